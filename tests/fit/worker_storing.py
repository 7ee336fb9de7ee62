"""Started on W workers by test_storing.py: factors that are shared out, decomposed and stored.

worker_storing.py OUTPUT SHARD PART…: some of the functions below that begin with `part_`.
"""

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from helpers.networks import build, examples
from helpers.workshop import leave, logged
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ekfac_dist import estimate_factors
from ekfac_dist.errors import StoreError, UserError
from ekfac_dist.factors import writer
from ekfac_dist.fit import checkpoints, group, offloading
from ekfac_dist.runtime import preemption

# Arguments of fits that differ in who decomposes.
FITS: dict[str, dict[str, Any]] = {"auto": {"eigen": "auto"}, "rank0": {"eigen": "rank0"}}
MORE_FITS: dict[str, dict[str, Any]] = {
    "sharded": {"eigen": "sharded"},
    "auto, in blocks": {"eigen": "auto", "keep_covariance": False, "blocks": 2},
    "rank0, in blocks": {"eigen": "rank0", "keep_covariance": False, "blocks": 2},
}


SHARD = 1


def fit(output: Path | None, model: nn.Module | None = None, **settings: Any) -> None:
    arguments = {"accumulate": "float64", "batch_tokens": 16, "labels": "data", "shard": SHARD}
    data = examples(9, prompts=True)
    estimate_factors(model or build("llama_bias"), data, output=output, **arguments | settings)


def say(what: str) -> None:
    # In one piece: print's line and its end may be parted by another worker's.
    os.write(1, f"WORKER {RANK} {what}\n".encode())


@contextmanager
def replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    plain = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, plain)


@contextmanager
def counted(owner: Any, name: str) -> Iterator[list[Any]]:
    """Within it calls of a function are listed by their arguments."""
    plain, calls = getattr(owner, name), []
    with replaced(owner, name, lambda *of, **by: calls.append(of) or plain(*of, **by)):
        yield calls


@contextmanager
def refused(step: str) -> Iterator[None]:
    """Says the sentence of a refusal, or that there was none."""
    sentence = "None"
    try:
        yield
    except UserError as error:
        sentence = str(error)
    say(f"{step}: {sentence}")


def part_fits(output: Path, fits: Mapping[str, dict[str, Any]] = FITS) -> None:
    """Every fit; how many files each worker writes, and matrices it decomposes."""
    for name, settings in fits.items():
        with counted(writer, "_write_file") as files, counted(torch.linalg, "eigh") as matrices:
            fit(output / name, **settings)
        say(f"{name}: wrote {len(files)}, decomposed {len(matrices)}")


def part_more_fits(output: Path) -> None:
    part_fits(output, MORE_FITS)


def part_memory(output: Path) -> None:
    with refused("in memory"):
        fit(None)


def part_overwrite(output: Path) -> None:
    """A store that takes the place of another one's."""
    fit(output / "overwritten", labels="sampled", save_minutes=None)
    fit(output / "overwritten", overwrite=True, save_minutes=None)


def part_full_disk(output: Path) -> None:
    """The last worker's disk is full at its second basis; then the run goes on."""
    write, bases = writer._write_file, []

    def full(store: Path, file: str, *of: Any) -> Any:
        if file.startswith("eigenbasis/") and RANK == LAST:
            bases.append(file)
            if len(bases) == 2:
                with replaced(os, "fsync", no_room):
                    return write(store, file, *of)
        return write(store, file, *of)

    with refused("full disk"), replaced(writer, "_write_file", full):
        fit(output / "full")
    with counted(torch.linalg, "eigh") as matrices, counted(group, "run_pass") as passes:
        fit(output / "full")
    say(f"after a full disk: passes {len(passes)}, decomposed {len(matrices)}")


def no_room(file: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def part_no_directory(output: Path) -> None:
    """The last worker's directory cannot be made."""
    own = output / "a file" / "store" if RANK == LAST else output / "refused"
    if RANK == LAST:
        (output / "a file").write_text("")
    with counted(group, "run_pass") as passes, refused("no directory"):
        fit(own)
    say(f"no directory: passes {len(passes)}")


def part_hosts(output: Path) -> None:
    """Each worker sees a disk of its own; the last one's is lost in the covariance pass."""
    own = output / f"host{RANK}"
    own.mkdir()
    for name, shard in (("hosts", SHARD), ("hosts, whole", 1)):
        steps = []

        def after_step(state: Any, steps: list[Any] = steps) -> None:
            steps.append(1)
            state.steps += 1
            preemption._is_requested = RANK == LAST and len(steps) == 1

        os.chdir(own)
        with refused(f"{name}, begun"), replaced(checkpoints._SavedState, "after_step", after_step):
            fit(Path(name), shard=shard, save_minutes=0)
        preemption._is_requested = False
        if RANK == LAST:
            assert list((own / name).glob("state/*/*"))
            shutil.rmtree(own / name)
        with logged() as lines:
            try:
                fit(Path(name), shard=shard, save_minutes=0)
            except StoreError:
                assert RANK, "worker 0 has the store"
        for line in lines:
            say(f"{name}: {line}")


def part_weights(output: Path) -> None:
    """Weights that FSDP2 has sharded leave the device, for which the CPU stands."""
    model, held = build("llama_bias"), []
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (LAST + 1,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (LAST + 1,)))
    eigh = torch.linalg.eigh

    def look(matrix: torch.Tensor) -> Any:
        shards = [parameter.to_local() for parameter in model.parameters()]
        held.append(sum(shard.untyped_storage().nbytes() for shard in shards))
        return eigh(matrix)

    before = [parameter.to_local().clone() for parameter in model.parameters()]
    as_a_device = replaced(offloading, "has_own_memory", lambda device: True)
    with replaced(torch.linalg, "eigh", look), as_a_device:
        fit(output / "weights", model)
    after = [parameter.to_local() for parameter in model.parameters()]
    assert all(map(torch.equal, before, after))
    say(f"weights: {max(held)} bytes held")


if __name__ == "__main__":
    state = Accelerator(cpu=True)
    RANK, LAST, SHARD = state.process_index, state.num_processes - 1, int(sys.argv[2])
    for part in sys.argv[3:]:
        globals()[f"part_{part}"](Path(sys.argv[1]))
    leave()
