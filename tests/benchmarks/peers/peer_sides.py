"""The three sides: what each is given, how it is run and measured, and the factors that it left.

Each run of a side is a process of its own, from its start to stored factors. Measured are its
seconds, with a clock outside it, and its peak memory, for every side in the same way: VmHWM, summed
over all processes of the command, a launcher's included; one worker is one process. Shared pages
count in each of them. Processes need not be at their peaks at one time, so the largest sum of
resident memory at one time is kept beside it, sampled.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peer_batches import Batch
from peer_environments import peer_python
from peer_files import load_modules, save_rows, status_bytes
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ekfac_dist import load_factors

HERE = Path(__file__).parent
LAUNCHER = HERE.parents[2] / "launch" / "accelerate" / "cpu.yaml"
MAX_TOKENS = 32768  # of every model: bergson allows no larger batches than one such sequence
SAMPLE_SECONDS = 0.2


@dataclass(frozen=True)
class Settings:
    """How the sides are run.

    Attributes:
        environments: Directory of the peers' environments.
        threads: Of all workers of a side together.
        batch: Of the side that it is given to.
        order: "length" or "given", of kronfluence's sequences.
    """

    environments: Path | None
    device: str
    threads: int
    workers: int
    batch: Batch
    order: str = "length"


# --- what all are given ---------------------------------------------------------------------------


def make_rows(num_rows, lengths, vocabulary, generator):
    """Rows of Zipf's tokens, so that they share some, with every token a label."""
    weights = 1 / torch.arange(10, vocabulary + 10).double()
    rows = []
    for length in torch.randint(lengths[0], lengths[1] + 1, (num_rows,), generator=generator):
        ids = torch.multinomial(weights, int(length), replacement=True, generator=generator)
        rows.append({"input_ids": ids, "labels": ids.clone()})
    return rows


def prepare(work, shape, dtype, **sets):
    """Writes what `peer_files` describes into a new folder; returns the model.

    Args:
        work: The folder.
        shape: The model's.
        dtype: The model's, as a name.
        sets: Rows, as `make_rows` makes them; `fit` among them.
    """
    work.mkdir(parents=True)
    model = shape.model(MAX_TOKENS).to(getattr(torch, dtype))
    model.save_pretrained(work / "model")
    words = WordLevel({"<unk>": 0}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>")
    tokenizer.save_pretrained(work / "model")
    names = [name for name, _ in model.named_modules() if re.search(r"\.mlp\..*_proj$", name)]
    (work / "modules.json").write_text(json.dumps(names))
    save_rows(work / "data.safetensors", **sets)
    columns = {name: [row[name].tolist() for row in sets["fit"]] for name in sets["fit"][0]}
    columns["length"] = [len(ids) for ids in columns["input_ids"]]
    disable_progress_bar()
    Dataset.from_dict(columns).save_to_disk(work / "fit")
    return model


# --- running a side -------------------------------------------------------------------------------


def fit_command(side, work, settings):
    """The command that fits factors from `work` with one side, as a list."""
    python = sys.executable if side == "ours" else peer_python(settings.environments, side)
    command, device = [python], ["--device", settings.device]
    if side == "kronfluence":
        batches = ["--batch", settings.batch.size, "--order", settings.order]
        batches += ["--iterative"] if settings.batch.iterative else []
        return [*command, HERE / "kronfluence_side.py", work, *batches, *device]
    tokens = ["--batch_tokens", settings.batch.size]
    if side == "bergson":
        workers = ["--workers", settings.workers]
        return [*command, HERE / "bergson_side.py", work, *workers, *tokens, *device]
    if settings.workers > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", LAUNCHER]
        command += ["--num_processes", settings.workers]
        device += ["--eigen", "sharded"]
    return [*command, HERE / "ours.py", work, *tokens, *device]


def environment(settings):
    """Variables for a side: its threads, its devices, and silence."""
    quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    quiet |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    threads = str(max(1, settings.threads // settings.workers))
    hidden = {} if settings.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **quiet, **hidden, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def run(command, settings, log, *, reports=True):
    """Runs a side's command and measures it.

    Args:
        command: A list, as of `fit_command`.
        settings: Whose threads and device it gets.
        log: File for all that it prints.
        reports: Whether it ends with a report; the package's own commands do not.

    Returns:
        The side's own report, and `whole_seconds`, `all_peak_bytes` (its processes' peaks, summed),
        `at_once_bytes` (the largest sum of their resident memory, sampled) and `num_processes`.

    Raises:
        SystemExit: It failed.
    """
    words = [str(part) for part in command]
    with log.open("w") as out:
        start = time.perf_counter()
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment(settings)
        )
        ended, peaks, sums = threading.Event(), {}, []
        watch = threading.Thread(target=watch_memory, args=(process.pid, ended, peaks, sums))
        watch.start()
        process.wait()
        whole_seconds = time.perf_counter() - start
        ended.set()
        watch.join()
    lines = log.read_text().splitlines()
    found = [line for line in lines if line.startswith("{")]
    if process.returncode or (reports and not found):
        print(*lines[-30:], sep="\n", file=sys.stderr)
        sys.exit(f"failed with {process.returncode}: {' '.join(words)}; its output is in {log}")
    report = json.loads(found[-1]) if reports else {"peak_bytes": 0}
    # A process says its own peak at its end, which a sample can miss.
    report["all_peak_bytes"] = max(sum(peaks.values()), report["peak_bytes"])
    report["at_once_bytes"] = max(sums, default=0)
    return report | {"whole_seconds": whole_seconds, "num_processes": len(peaks)}


def watch_memory(pid, ended, peaks, sums):
    """Watches a process and its descendants until it has ended.

    Args:
        pid: Its number.
        ended: An event: it has.
        peaks: Gets each process's VmHWM, {number: bytes}.
        sums: Gets the sum of all processes' VmRSS at each sample, a list.
    """
    process = psutil.Process(pid)
    while not ended.wait(SAMPLE_SECONDS):
        try:
            family = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        resident = 0
        for member in family:
            try:
                peaks[member.pid] = max(status_bytes("VmHWM", member.pid), peaks.get(member.pid, 0))
                resident += status_bytes("VmRSS", member.pid)
            except OSError:  # it has ended since
                continue
        sums.append(resident)


# --- the factors that it left ---------------------------------------------------------------------


def read_factors(side, work):
    """A function from a module's name to a side's (Q_S [O, O], Q_A [I, I], Λ [O, I])."""
    return {"ours": _ours, "kronfluence": _kronfluence, "bergson": _bergson}[side](work / side)


def _ours(folder):
    stored = load_factors(folder)

    def read(name):
        module = stored.module(name)
        return module.basis_OO, module.basis_II, module.lambda_OI

    return read


def _kronfluence(folder):
    def tensor(file, name):
        with safe_open(folder / "factors_fit" / f"{file}.safetensors", framework="pt") as opened:
            return opened.get_tensor(name)

    def read(name):
        # Λ is kept as a sum and the number of sequences in it.
        spectrum = tensor("lambda_matrix", name) / tensor("num_lambda_processed", name)
        bases = (tensor(f"{kind}_eigenvectors", name) for kind in ("gradient", "activation"))
        return *bases, spectrum

    return read


def _bergson(folder):
    def tensor(kind, name):
        # Each worker has written some rows; names are those in the model without its head.
        files = sorted((folder / kind).iterdir(), key=lambda file: int(file.stem.split("_")[1]))
        parts = []
        for file in files:
            with safe_open(file, framework="pt") as opened:
                parts.append(opened.get_tensor(name.removeprefix("model.")))
        return torch.cat(parts)

    def read(name):
        kinds = ("eigen_gradient_sharded", "eigen_activation_sharded")
        return *(tensor(k, name) for k in kinds), tensor("eigenvalue_correction_sharded", name)

    return read


def fitted_modules(side, work):
    """Names of the modules that a side has fitted."""
    if side == "ours":
        return set(load_factors(work / side).modules)
    file = {
        "kronfluence": "factors_fit/lambda_matrix.safetensors",
        "bergson": "eigenvalue_correction_sharded/shard_0.safetensors",
    }[side]
    with safe_open(work / side / file, framework="pt") as opened:
        names = set(opened.keys())
    return {f"model.{name}" for name in names} if side == "bergson" else names


def require_same_modules(sides, work):
    """Ends the program if a side has fitted other modules than asked."""
    asked = set(load_modules(work))
    for side in sides:
        if fitted_modules(side, work) != asked:
            different = sorted(fitted_modules(side, work) ^ asked)
            sys.exit(f"{side} has fitted other modules: {', '.join(different)}")
