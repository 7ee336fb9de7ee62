"""What tests are made from: tiny models on disk, texts, configurations, and runs on real workers.

    model = save_tiny_llama(tmp_path / "model")
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts(20)])
    done = run_cli(["estimate", "--model.name", model, "--data.source", data, ...], workers=2)
    assert done.returncode == 0, done.stderr

Everything is made from a seed, small enough for a second, and the same in every session.
"""

import contextlib
import functools
import io
import json
import logging
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist
import yaml
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from ekfac_dist import cli
from ekfac_dist.factors.layout import CHECKSUM, MANIFEST, manifest_checksum

TESTS = Path(__file__).parents[1]
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCABULARY = 321  # no multiple of anything
CONTEXT = 128

_WORDS = """
    a the of and in to is that for with as on by from each which one two no every
    worker batch factor module layer token label gradient input output matrix sequence model
    reads writes sums counts holds keeps sends waits begins ends finds makes gives takes
    small large first last same other whole empty long short real padded
"""


# -- texts -----------------------------------------------------------------------------------------


def texts(number: int, *, seed: int = 0, words: tuple[int, int] = (2, 24)) -> list[str]:
    """Texts of a fewest to a most number of words, different for every seed."""
    draw, known = random.Random(seed), _WORDS.split()
    return [
        " ".join(draw.choice(known) for _ in range(draw.randint(*words))).capitalize() + "."
        for _ in range(number)
    ]


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSONL file with one row a line."""
    path = Path(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_yaml(path: str | Path, content: Mapping[str, Any]) -> Path:
    """A YAML file; paths in it become strings."""
    path = Path(path)
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content, default=str))), encoding="utf-8")
    return path


def rewrite_manifest(directory: str | Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest of a factor store, or of results, and seals it again if it was."""
    path = Path(directory, MANIFEST)
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    if CHECKSUM in manifest:
        manifest[CHECKSUM] = manifest_checksum(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


# -- models and tokenizers on disk -----------------------------------------------------------------


@functools.cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(200, seed=1), trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    *, bos: bool = True, eos: bool = False, trims: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens.

    Args:
        bos: Whether it puts `BOS` before every text, as Llama's does.
        eos: Whether it puts `EOS` after every text.
        trims: Whether its offsets leave out the space that a token begins with, as GPT-NeoX's do.
    """
    tokenizer = Tokenizer.from_str(_trained_tokenizer())
    single = [BOS] * bos + ["$A"] + [EOS] * eos
    steps = [processors.ByteLevel(trim_offsets=trims)]
    if bos or eos:
        special = [(name, tokenizer.token_to_id(name)) for name in (BOS, EOS)]
        steps.append(processors.TemplateProcessing(single=single, special_tokens=special))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def sentencepiece_like(kind: str) -> PreTrainedTokenizerFast:
    """A BPE tokenizer that writes a space as ▁ and falls back on bytes, as SentencePiece's do.

    Args:
        kind: How it comes by the ▁: "Metaspace", "Metaspace, first" (at the text's start alone one
            is put before), or "normalizer", as Llama 2's, whose tokens may hold several words.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if kind == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        scheme = "first" if kind.endswith("first") else "always"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=2 * VOCABULARY,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(40, seed=1, words=(1, 3)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def save_tiny(
    directory: str | Path,
    config: PreTrainedConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Saves a random causal language model of any configuration, and a tokenizer beside it.

    Biases and norms are random too, so that none is trivially 0 or 1.

    Args:
        directory: Where to; it is made.
        config: Its vocabulary should have `VOCABULARY` tokens.
        seed: Seed of the weights.
        dtype: Of the stored weights.
        tokenizer: `tiny_tokenizer()` by default.
    """
    directory = Path(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(directory)
    (tokenizer or tiny_tokenizer()).save_pretrained(directory)
    return directory


def tiny_llama_config(**changes: Any) -> LlamaConfig:
    """Llama: gated MLPs without biases; hidden 16, MLP 24, 2 layers."""
    return LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            **changes,
        }
    )


def tiny_gpt2_config(**changes: Any) -> GPT2Config:
    """GPT-2: Conv1D with biases, plain MLPs; hidden 16, MLP 64, 2 layers."""
    return GPT2Config(
        **{
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": CONTEXT,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **changes,
        }
    )


def save_tiny_llama(
    directory: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A tiny Llama and its tokenizer; `changes` go to its configuration."""
    return save_tiny(directory, tiny_llama_config(**changes), seed=seed, dtype=dtype)


def save_tiny_gpt2(
    directory: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A tiny GPT-2 and its tokenizer; `changes` go to its configuration."""
    return save_tiny(directory, tiny_gpt2_config(**changes), seed=seed, dtype=dtype)


# -- lines for people ------------------------------------------------------------------------------


@contextmanager
def logged(on_line: Callable[[str], object] = lambda line: None) -> Iterator[list[str]]:
    """Lists the lines that the package logs; `on_line` is called with each at once."""
    lines: list[str] = []

    class Listing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            on_line(lines[-1])

    logger, handler = logging.getLogger("ekfac_dist"), Listing()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


# -- real workers ----------------------------------------------------------------------------------


def cpu_launcher_config(path: str | Path, workers: int) -> Path:
    """A configuration of Accelerate's launcher: gloo workers on the CPU, any free port."""
    return write_yaml(
        path,
        {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "MULTI_GPU" if workers > 1 else "NO",
            "use_cpu": True,
            "gpu_ids": ",".join(["-1"] * workers),
            "num_machines": 1,
            "num_processes": workers,
            "main_process_port": 0,
            "mixed_precision": "no",
        },
    )


def run_cli(
    arguments: Sequence[str | Path],
    workers: int = 1,
    *,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m ekfac_dist ARGUMENTS`, through its `launch` command if on many workers.

    Args:
        arguments: Command and options, such as ["estimate", "--config", path].
        workers: Number of CPU workers.
        timeout: Seconds until all of it is killed and `subprocess.TimeoutExpired` raised.
        env: Variables added to this process's own.
        cwd: Where to run it.

    Returns:
        With exit status, standard output and standard error (of all workers) as text.
    """
    program = [sys.executable, "-m", "ekfac_dist"]
    with tempfile.TemporaryDirectory() as temporary:
        if workers > 1:
            launcher = cpu_launcher_config(Path(temporary, "launcher.yaml"), workers)
            program += ["launch", "--config_file", str(launcher)]
        return _run([*program, *map(str, arguments)], timeout, env, cwd)


def run_here(arguments: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """What `run_cli` does on one worker, in this process, which need not start first."""
    words, stdout, stderr = list(map(str, arguments)), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = cli.main(words)
    return subprocess.CompletedProcess(words, status, stdout.getvalue(), stderr.getvalue())


def run_workers(
    script: str | Path,
    workers: int,
    *arguments: str | Path,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a Python script on CPU workers with `accelerate launch`; see `run_cli`.

    It can import from `helpers`, and is started by `helpers.started`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        launcher = cpu_launcher_config(Path(temporary, "launcher.yaml"), workers)
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(launcher), "-m", "helpers.started"]
        command += [str(script), *map(str, arguments)]
        return _run(command, timeout, {**with_helpers(), **(env or {})}, cwd)


def with_helpers() -> dict[str, str]:
    """The variable by which a Python process of its own can import from `helpers`."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def start_without_launcher(
    command: Sequence[str], workers: int, store: dist.TCPStore | None = None
) -> list[subprocess.Popen[str]]:
    """Starts a Python script's workers with no launcher, which would end the others with the first.

    Args:
        command: The script and its arguments.
        workers: Number of workers.
        store: The key-value store that outlives them, as a launcher's does; None: worker 0's own.
    """
    port = free_port() if store is None else store.port
    common = {
        "TORCHELASTIC_USE_AGENT_STORE": str(store is not None),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        **with_helpers(),
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(workers)
    ]


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def leave() -> NoReturn:
    """Ends a worker's script that went well.

    Without the interpreter's orderly end, in which gloo's threads sometimes abort the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _run(
    command: list[str], timeout: float, env: Mapping[str, str] | None, cwd: str | Path | None
) -> subprocess.CompletedProcess[str]:
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **(env or {})}
    process = subprocess.Popen(
        command,
        env={**os.environ, **settings},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as late:
        # The launcher gives each worker a session of its own, so each has to be found.
        family = [*psutil.Process(process.pid).children(recursive=True), process]
        for member in family:
            member.kill()
        stdout, stderr = process.communicate()
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr) from late
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
