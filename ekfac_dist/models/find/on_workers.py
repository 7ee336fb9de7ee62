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
    """The tracked modules of a prepared model, on every worker.

    Of a sharded model, rank 0 examines a whole copy.

    Args:
        model: The model.
        globs: As for `discover`.
        world: The workers.
        task: As for `discover`.
        probe: As for `discover`.

    Raises:
        ModelError: As `discover`, on every worker.
    """
    if not is_sharded(model):
        with world.agree():
            return discover(model, globs, world.device, task, probe)
    with world.agree(together=(ModelError,)):
        whole = whole_copy(model, keep=world.is_main)

    def discover_in_copy() -> Discovery:
        assert whole is not None
        with prepared(whole):
            return discover(
                whole,
                globs,
                torch.device("cpu"),
                task,
                None if probe is None else probe.to(torch.device("cpu")),
            )

    discovery = world.share(world.on_main(discover_in_copy))
    assert discovery is not None
    return discovery
