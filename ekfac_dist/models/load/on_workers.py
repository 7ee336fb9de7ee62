"""A run's model on its workers, whole or sharded: loading it, and what is read of all its weights.

Reading a sharded model is a collective, so here every worker does it; of a whole one worker 0 does
what one is enough for.
"""

from collections.abc import Sequence

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ekfac_dist.config import ModelConfig, dotted
from ekfac_dist.errors import LaunchError, ModelError
from ekfac_dist.models.load.configuration import attention_implementation, configuration
from ekfac_dist.models.load.fingerprints import Fingerprints, fingerprints, narrower_dtypes
from ekfac_dist.models.load.fsdp import Held, reshards_after_forward, shard_model
from ekfac_dist.models.load.pretrained import load_model, loads_quantised, without_weights
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import agreeing, class_of, is_sharded, refuse_first_fsdp
from ekfac_dist.runtime.processes import World

_CPU = torch.device("cpu")


def load(config: ModelConfig, world: World) -> nn.Module:
    """The configured model, on each host's first worker first.

    If the launcher's configuration says so it is sharded; worker 0 reads it then, for all.

    Raises:
        ModelError: As `load_model` does; or it cannot be sharded, or be put on several devices.
        LaunchError: It would be sharded by FSDP's first version, or with settings that are none.
    """
    with world.agree():
        if world.fsdp == 1:
            raise LaunchError(
                "The launcher's configuration shards models by FSDP's first version; set "
                "fsdp_version: 2, as launch/accelerate/fsdp.yaml does."
            )
        if config.device_map is not None and world.size > 1:
            raise ModelError(
                f"model.device_map is {config.device_map} and there are {world.size} workers; it "
                "spreads the model of one worker over several devices. Start one worker, or shard "
                "the model over the workers with launch/accelerate/fsdp.yaml."
            )
        if world.fsdp and loads_quantised(config, with_weights=world.is_main):
            raise ModelError(
                "The launcher's configuration shards the model, which is quantised; that is not "
                "supported together, use one of them."
            )
        if world.fsdp and config.adapter is not None and not config.merge_adapter:
            raise ModelError(
                "A model with an adapter cannot be sharded; set model.merge_adapter, or give every "
                "worker the whole model with launch/accelerate/multi_gpu.yaml."
            )
        reshards = world.fsdp > 0 and reshards_after_forward()
    if not world.fsdp:
        return world.main_first(lambda: load_model(config, world.device))
    model = world.main_first(
        lambda: load_model(config, _CPU) if world.is_main else without_weights(config)
    )
    held = world.share(Held.by(model) if world.is_main else None)
    assert held is not None
    with world.agree(together=(ModelError,)):
        return shard_model(
            model,
            held,
            world.mesh(),
            world.broadcast_,
            is_main=world.is_main,
            reshard_after_forward=reshards,
        )


def unwrapped(model: nn.Module, world: World) -> nn.Module:
    """A caller's model without Accelerate's containers, which speak to the others at each forward.

    Raises:
        ModelError: FSDP's first version has sharded it.
    """
    with world.agree():
        refuse_first_fsdp(model)
    return extract_model_from_parallel(model, keep_torch_compile=False)


def refuse_sharded(world: World, model: nn.Module | None = None) -> None:
    """Refuses to answer queries with a sharded model.

    Raises:
        ModelError: The launcher's configuration shards it, or it is sharded.
    """
    if is_sharded(model) if model is not None else world.fsdp > 0:
        raise ModelError(
            "Queries are not answered with a sharded model; give every worker the whole model "
            "(launch/accelerate/multi_gpu.yaml), or start one worker and set model.device_map: "
            "auto if it is larger than a device."
        )


def model_fingerprints(
    model: nn.Module, modules: Sequence[TrackedModule], world: World
) -> Fingerprints:
    """The fingerprints of a model that all workers hold.

    Raises:
        LaunchError: Workers hold different models.
    """
    beside = narrower_dtypes if world.is_main else (lambda name, tensor: ())
    with agreeing(world, model):
        found = fingerprints(model, modules, beside)
    require_same_model(model, found, world)
    return world.share(found)


def require_same_model(model: nn.Module, found: Fingerprints, world: World) -> None:
    """Refuses workers whose models differ, in a tracked module or anywhere else.

    Args:
        model: This worker's.
        found: Its fingerprints.
        world: The workers.

    Raises:
        LaunchError: They differ.
    """
    world.require_same("model weights, by fingerprint,", found.tracked)
    world.require_same("model weights outside the tracked modules, by fingerprint,", found.whole)
    settings = {
        **dotted(configuration(model)),
        "class": class_of(model).__name__,
        "attention implementation": attention_implementation(model),
    }
    world.require_same("settings of the model", settings)
