"""The whole job in one command: text, tokenizer, model, factors on several workers, a look at them.

Everything lies in one directory, and what is there and whole is used again:

    demo.json        whose directory this is, and what its contents were made with
    corpus.jsonl     text                               (`demo.corpus`)
    model/           tokenizer and model                (`demo.model`)
    accelerate.yaml  how many workers
    estimate.yaml    the run's configuration
    factors/         the factor store                   (`ekfac-dist estimate`)

The last two steps are other commands, started as a person would start them.
"""

import json
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers.utils.logging import disable_progress_bar

from ekfac_dist.config import DataConfig, EstimateConfig, ModelConfig
from ekfac_dist.demo.corpus import read_corpus, split_by_module, write_corpus
from ekfac_dist.demo.model import ModelShape, train_model, train_tokenizer
from ekfac_dist.errors import ConfigError, OutputError, StoreError
from ekfac_dist.runtime.files import write_whole
from ekfac_dist.runtime.store import MANIFEST, StoreReader

FORMAT = "ekfac_dist/demo/1"
NUM_STEPS = 5
END_SECONDS = 30.0

ACCELERATE_CONFIG = """\
# Workers on the CPU, which talk through gloo.
# MULTI_GPU with use_cpu is meant: MULTI_CPU without an MPI host file starts one process only.
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
gpu_ids: "-1,-1"  # hides this machine's GPUs, if it has any, from the workers
num_machines: 1
num_processes: {workers}
main_process_port: 0  # any port that is free
mixed_precision: "no"
"""

ESTIMATE_HEADER = """\
# Written by `ekfac-dist demo`, anew each time: copy it to change it.
"""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo makes; other settings give another demo, made from the start.

    Args:
        vocab_size: Size of the tokenizer's vocabulary.
        shape: Sizes of the model.
        training_seconds: Time budget of the model's training; None: `max_steps` alone.
        max_steps: Most steps of it.
        max_sequences: How many texts to fit factors on.
        max_tokens: Where those are cut.
        batch_tokens: Token budget of a batch, per worker.
    """

    vocab_size: int = 4096
    shape: ModelShape = field(default_factory=ModelShape)
    training_seconds: float | None = 60.0
    max_steps: int = 2000
    max_sequences: int = 1000
    max_tokens: int = 256
    batch_tokens: int = 4096


@dataclass(frozen=True)
class DemoPaths:
    """Where in its directory the demo keeps what.

    Args:
        directory: The demo's directory.
    """

    directory: Path

    @property
    def marker(self) -> Path:
        """Says that the directory is a demo's, and what its contents were made with."""
        return self.directory / "demo.json"

    @property
    def corpus(self) -> Path:
        """The text."""
        return self.directory / "corpus.jsonl"

    @property
    def model(self) -> Path:
        """The model and its tokenizer."""
        return self.directory / "model"

    @property
    def factors(self) -> Path:
        """The factor store."""
        return self.directory / "factors"

    @property
    def estimate_config(self) -> Path:
        """The configuration of `estimate`."""
        return self.directory / "estimate.yaml"

    @property
    def accelerate_config(self) -> Path:
        """The configuration of Accelerate's launcher."""
        return self.directory / "accelerate.yaml"


def run_demo(directory: str | Path, workers: int = 2, settings: DemoSettings | None = None) -> int:
    """Makes text, tokenizer, model and factors, and inspects the factors.

    Args:
        directory: Where to; new, empty, or of an earlier demo, whose whole parts are used again.
        workers: Number of workers that fit the factors.
        settings: What to make; None: the defaults.

    Returns:
        The exit status: 0, or that of the step that failed.

    Raises:
        ConfigError: `workers` is below 1.
        OutputError: The directory holds something else, or cannot be written.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}; it must be 1 or more.")
    settings = settings or DemoSettings()
    paths = DemoPaths(Path(directory).expanduser().resolve())
    start = time.monotonic()
    _claim(paths, settings)
    make_corpus(paths)
    make_model(paths, settings)
    with _ends_its_children():
        status = fit_factors(paths, settings, workers) or inspect_factors(paths)
    if status == 0:
        print(f"\nThe demo took {_clock(start)}. Everything is in {paths.directory}", flush=True)
    return status


def make_corpus(paths: DemoPaths) -> None:
    """Step 1: writes the text, unless it is there."""
    if paths.corpus.is_file():
        _say(1, "corpus", f"reused: {paths.corpus}")
        return
    start = time.monotonic()
    num_rows = write_corpus(paths.corpus)
    _say(
        1,
        "corpus",
        f"{num_rows:,} texts from the sources of Python {platform.python_version()}'s own library "
        f"({_clock(start)})",
    )


def make_model(paths: DemoPaths, settings: DemoSettings) -> None:
    """Steps 2 and 3: trains tokenizer and model, unless they are there."""
    if paths.model.is_dir():
        _say(2, "tokenizer", f"reused: {paths.model}")
        _say(3, "model", f"reused: {paths.model}")
        return
    _remove(paths.factors)  # they are of a model that is gone
    rows, held_out = split_by_module(read_corpus(paths.corpus))
    start = time.monotonic()
    tokenizer = train_tokenizer([row.text for row in rows], settings.vocab_size)
    _say(2, "tokenizer", f"byte-level BPE, {len(tokenizer):,} tokens ({_clock(start)})")
    budget = (
        f"about {settings.training_seconds:.0f} seconds"
        if settings.training_seconds is not None
        else f"{settings.max_steps} steps"
    )
    shape = settings.shape
    disable_progress_bar()  # of Transformers, which has one for every file that it writes
    _say(
        3,
        "model",
        f"training a Llama of {shape.layers} layers, width {shape.hidden}, MLP {shape.mlp}, for "
        f"{budget}",
    )
    training = train_model(
        paths.model,
        tokenizer,
        [row.text for row in rows],
        [row.text for row in held_out],
        shape=shape,
        seconds=settings.training_seconds,
        max_steps=settings.max_steps,
    )
    print(
        f"    loss {training.loss_from:.2f} -> {training.loss_to:.2f} nats per token on held-out "
        f"modules, {training.steps} steps in {training.seconds:.0f} s",
        flush=True,
    )


def fit_factors(paths: DemoPaths, settings: DemoSettings, workers: int) -> int:
    """Step 4: `estimate` on several workers, unless its store is there; the exit status."""
    config = estimate_config(paths, settings)
    write_whole(paths.estimate_config, [ESTIMATE_HEADER.encode(), _as_yaml(config.as_dict())])
    write_whole(paths.accelerate_config, [ACCELERATE_CONFIG.format(workers=workers).encode()])
    if is_whole_store(paths.factors, config):
        _say(4, "factors", f"reused: {paths.factors}")
        return 0
    if _config_of_store(paths.factors) != _plain(config):
        _remove(paths.factors)
    command = launch_command(paths.accelerate_config, paths.estimate_config)
    _say(4, "factors", f"fitting on {workers} workers")
    return _call("estimate", command)


def inspect_factors(paths: DemoPaths) -> int:
    """Step 5: `inspect`; the exit status."""
    _say(5, "inspect", str(paths.factors))
    return _call("inspect", [sys.executable, "-m", "ekfac_dist", "inspect", str(paths.factors)])


def estimate_config(paths: DemoPaths, settings: DemoSettings) -> EstimateConfig:
    """The configuration that the demo's factors are fitted with."""
    return EstimateConfig(
        model=ModelConfig(name=str(paths.model)),
        data=DataConfig(
            source=str(paths.corpus),
            max_tokens=settings.max_tokens,
            max_sequences=settings.max_sequences,
        ),
        batch_tokens=settings.batch_tokens,
        output=str(paths.factors),
    )


def launch_command(accelerate_config: Path, estimate_config: Path) -> list[str]:
    """The command that runs `estimate` on several workers of this machine.

    Args:
        accelerate_config: Configuration of Accelerate's launcher.
        estimate_config: Configuration of `estimate`.
    """
    return [
        *(sys.executable, "-m", "ekfac_dist", "launch"),
        *("--config_file", str(accelerate_config)),
        *("estimate", "--config", str(estimate_config)),
    ]


def is_whole_store(path: Path, config: EstimateConfig) -> bool:
    """Whether a directory is a finished factor store of this very configuration."""
    try:
        manifest = StoreReader(path).manifest
    except StoreError:
        return False
    return manifest["config"] == _plain(config)


def _claim(paths: DemoPaths, settings: DemoSettings) -> None:
    """Marks the directory as this demo's, after clearing away another demo's parts.

    A directory that holds anything else is never touched.
    """
    wanted = {
        "format": FORMAT,
        "python": platform.python_version(),
        "settings": json.loads(json.dumps(asdict(settings))),
    }
    found = _read_marker(paths)
    if found == wanted:
        return
    if found is not None:
        print(f"{paths.directory} holds a demo with other settings; it is made anew.", flush=True)
        for part in (paths.factors, paths.model, paths.corpus):
            _remove(part)
    try:
        paths.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{paths.directory} cannot be made: {error.strerror or error}. Give another directory."
        ) from error
    write_whole(paths.marker, [json.dumps(wanted, indent=1).encode(), b"\n"])


def _read_marker(paths: DemoPaths) -> dict[str, Any] | None:
    """What the directory's contents were made with; None for a new or empty directory."""
    try:
        if not paths.directory.exists() or not any(paths.directory.iterdir()):
            return None
        marker = json.loads(paths.marker.read_text(encoding="utf-8"))
        if str(marker["format"]).startswith("ekfac_dist/demo/"):
            return marker
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"{paths.directory} is not an earlier demo's directory; give one that is new or empty."
        ) from error
    raise OutputError(
        f"{paths.marker} is no demo's, but of {marker['format']!r}; give a directory that is new "
        "or empty."
    )


def _config_of_store(path: Path) -> Any:
    try:
        return json.loads((path / MANIFEST).read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _plain(config: EstimateConfig) -> Any:
    """The configuration as it comes back from JSON."""
    return json.loads(json.dumps(config.as_dict()))


def _as_yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode()


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be removed: {error.strerror or error}.") from error


def _call(step: str, command: Sequence[str]) -> int:
    """Runs another command to its end, its output going where ours goes; the exit status."""
    process = subprocess.Popen(command)
    try:
        status = process.wait()
    except BaseException:
        process.terminate()  # which the launcher passes on to its workers
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    if status < 0:
        status = 128 - status  # as a shell says that a signal ended it
    if status != 0:
        print(
            f"The demo stops: `{step}` ended with exit status {status}; what it said is above.",
            file=sys.stderr,
            flush=True,
        )
    return status


@contextmanager
def _ends_its_children() -> Iterator[None]:
    """Makes a polite end of this process (SIGTERM) an exception, so that children end with it."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(step: int, name: str, text: str) -> None:
    print(f"{step}/{NUM_STEPS} {name:<10} {text}", flush=True)


def _clock(start: float) -> str:
    return f"{time.monotonic() - start:.0f} s"
