"""Finding the tracked modules of a model that all workers hold, whole or sharded."""

from collections.abc import Sequence

import torch
from torch import nn

from ekfac_dist.data.batches import Batch
from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.capture.tasks import CAUSAL_LM, Task
from ekfac_dist.models.find.discovery import Discovery, discover
from ekfac_dist.models.load.fsdp import whole_copy
from ekfac_dist.models.sharding import is_sharded
from ekfac_dist.runtime.processes import World


def find(
    model: nn.Module,
    globs: Sequence[str] | None,
    world: World,
    task: Task = CAUSAL_LM,
    probe: Batch | None = None,
) -> Discovery:
    """What `discover` finds in a prepared model; a sharded one is looked at whole, by worker 0.

    Raises:
        ModelError: As `discover` does, on every worker.
    """
    if not is_sharded(model):
        with world.agree():
            return discover(model, globs, world.device, task, probe)
    with world.agree(together=(ModelError,)):
        whole = whole_copy(model, keep=world.is_main)

    def look() -> Discovery:
        assert whole is not None
        with prepared(whole):
            return discover(
                whole,
                globs,
                torch.device("cpu"),
                task,
                None if probe is None else probe.to(torch.device("cpu")),
            )

    found = world.share(world.on_main(look))
    assert found is not None
    return found
