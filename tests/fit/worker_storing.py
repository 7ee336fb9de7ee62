"""Started on W workers by test_storing.py: factors that several workers decompose and store.

worker_storing.py OUTPUT SHARD WHAT…: one of `main`'s functions, with its arguments.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from helpers.networks import build, examples
from helpers.workshop import leave, logged

from ekfac_dist import estimate_factors
from ekfac_dist.errors import StoreError, UserError
from ekfac_dist.factors import writer

# Arguments of fits that end alike.
FITS: dict[str, dict[str, Any]] = {
    "auto": {"eigen": "auto"},
    "sharded": {"eigen": "sharded"},
    "rank0": {"eigen": "rank0"},
    "rank0, sums not kept, blocks": {"eigen": "rank0", "keep_covariance": False, "blocks": 2},
    "auto, sums not kept, blocks": {"eigen": "auto", "keep_covariance": False, "blocks": 2},
}


def fit(output: Path | None, shard: int, **settings: Any) -> None:
    arguments = {"accumulate": "float64", "batch_tokens": 16, "labels": "data", **settings}
    data = examples(9, prompts=True)
    estimate_factors(build("llama_bias"), data, output=output, shard=shard, **arguments)


def say(what: str) -> None:
    # In one piece: print's line and its end may be parted by another worker's.
    os.write(1, f"WORKER {RANK}: {what}\n".encode())


def fits(output: Path, shard: int) -> None:
    """Every fit; says which files each worker writes, and who decomposes how many."""
    write, decompose = writer._write_file, torch.linalg.eigh
    for name, settings in FITS.items():
        written: list[str] = []
        decomposed: list[int] = []
        writer._write_file = lambda *of: written.append(of[1]) or write(*of)  # noqa: B023
        torch.linalg.eigh = lambda a: decomposed.append(len(a)) or decompose(a)  # noqa: B023
        fit(output / name, shard, **settings)
        say(f"{name}: wrote {len(written)}, decomposed {len(decomposed)}")
    try:
        fit(None, shard)
    except UserError as error:
        say(f"in memory: {error}")


def hosts(output: Path, shard: int, *lost: str) -> None:
    """A fit by workers that each see a directory of their own; LOST ends before its refit."""
    own = output / f"host{RANK}"
    own.mkdir(parents=True, exist_ok=True)
    os.chdir(own)
    with logged() as lines:
        try:
            fit(Path("store"), shard, save_minutes=0)
        except StoreError:
            assert RANK, "worker 0 has the store"
    for line in lines:
        say(line)


if __name__ == "__main__":
    RANK = Accelerator(cpu=True).process_index
    {"fits": fits, "hosts": hosts}[sys.argv[3]](Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[4:])
    leave()
