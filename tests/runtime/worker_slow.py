"""Started on 2 workers by test_waits.py: fits in which one keeps the other waiting for long.

worker_slow.py OUTPUT: a store of each fit, and of the same with nobody slow.
Collectives have less time than one worker takes in its slow place.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from helpers.networks import build, examples
from helpers.workshop import leave
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ekfac_dist import estimate_factors
from ekfac_dist.fit import checkpoints
from ekfac_dist.fit import estimate as run
from ekfac_dist.models.capture.hooks import Capture

TIME_OUT, SLOW = 4.0, 6.0
# The slow place, the slow worker in it, and the fit's arguments.
FITS: dict[str, tuple[Any, str, int, dict[str, Any]]] = {
    "decomposing all": (torch.linalg, "eigh", 0, {}),
    "decomposing a share": (torch.linalg, "eigh", 1, {"eigen": "sharded"}),
    "the last of a pass": (Capture, "run", 1, {}),
    "reading the data": (run, "read_examples", 1, {}),
    "saving a state, weights sharded": (checkpoints, "write_part", 1, {"save_minutes": 0}),
}


@contextmanager
def slow_once(owner: Any, name: str) -> Iterator[None]:
    """Within it the first call of a function takes long."""
    plain: Callable[..., Any] = getattr(owner, name)
    calls = []

    def slow(*args: Any, **kwargs: Any) -> Any:
        if not calls:
            calls.append(name)
            time.sleep(SLOW)
        return plain(*args, **kwargs)

    setattr(owner, name, slow)
    try:
        yield
    finally:
        setattr(owner, name, plain)
    assert calls


def made(name: str) -> nn.Module:
    model = build("llama")
    if "sharded" in name:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


if __name__ == "__main__":
    limit = InitProcessGroupKwargs(timeout=timedelta(seconds=TIME_OUT))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[limit])
    for name, (owner, function, rank, settings) in FITS.items():
        common = {"batch_tokens": 12, **settings}
        path = Path(sys.argv[1], name)
        estimate_factors(made(name), examples(6), output=path / "usual", **common)
        if accelerator.process_index == rank:
            with slow_once(owner, function):
                estimate_factors(made(name), examples(6), output=path / "slow", **common)
        else:
            estimate_factors(made(name), examples(6), output=path / "slow", **common)
        print(f"{name}: ended", flush=True)
    leave()
