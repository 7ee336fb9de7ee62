"""What a benchmark's folder holds, for every side, and what a side says when it has finished.

    WORK/model/              a saved Hugging Face model, with a tokenizer that is never used
    WORK/modules.json        names of the modules to track
    WORK/data.safetensors    for each set of rows <set>.ids, <set>.labels and <set>.lengths, the
                             rows laid end to end; -100 for no label. Sets are fit, and for scores
                             train and queries
    WORK/fit/                the set fit once more, as a `datasets` directory
    WORK/<side>/             what the side writes

Each side reads this in an environment of its own: nothing of ekfac_dist may be imported here.
"""

import json
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NO_LABEL = -100


def save_rows(path, **sets):
    """Writes data.safetensors: of each set a list of rows with `input_ids` and `labels`."""
    tensors = {}
    for name, rows in sets.items():
        tensors[f"{name}.ids"] = torch.cat([row["input_ids"] for row in rows])
        tensors[f"{name}.labels"] = torch.cat([row["labels"] for row in rows])
        tensors[f"{name}.lengths"] = torch.tensor([len(row["input_ids"]) for row in rows])
    save_file(tensors, path)


def load_rows(path, name):
    """The rows of a set, as `save_rows` took them."""
    tensors = load_file(path)
    lengths = tensors[f"{name}.lengths"].tolist()
    ids, labels = tensors[f"{name}.ids"].split(lengths), tensors[f"{name}.labels"].split(lengths)
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


def load_modules(work):
    """Names of the modules to track."""
    return json.loads((work / "modules.json").read_text())


def factor_dtype(model_dtype):
    """Precision of factors: float32, or float64 for a float64 model."""
    return torch.promote_types(model_dtype, torch.float32)


def status_bytes(field, process="self"):
    """A process's VmHWM (peak resident memory) or VmRSS (resident now).

    Not getrusage's peak, which a child inherits from the process that started it.

    Args:
        field: "VmHWM" or "VmRSS".
        process: Its number.

    Returns:
        Bytes; 0 for a process that has ended but is not yet gone.
    """
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return 1024 * int(found[1]) if found else 0


def print_report(package, device, **report):
    """Prints what a side has to say as one line of JSON: its report, its peak, its versions."""
    report["peak_bytes"] = status_bytes("VmHWM")
    if device == "cuda":
        report["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    names = (package, "torch", "transformers", "accelerate")
    report["versions"] = {name: metadata.version(name) for name in names}
    report["versions"]["python"] = platform.python_version()
    # In one piece, whatever else is printed.
    sys.stdout.write(json.dumps(report) + "\n")
