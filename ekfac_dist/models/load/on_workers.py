"""A run's model on all workers, whole or sharded: loading it, and comparing it between workers.

Reading a sharded model's weights is a collective that every worker takes part in. With a whole
model, rank 0 alone does what need not be repeated.
"""

from collections.abc import Sequence

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ekfac_dist.config import ModelConfig, dotted
from ekfac_dist.errors import LaunchError, ModelError
from ekfac_dist.models.load.configuration import attention_implementation, configuration
from ekfac_dist.models.load.fingerprints import Fingerprints, fingerprints, narrower_dtypes
from ekfac_dist.models.load.fsdp import ModelLayout, reshards_after_forward, shard_model
from ekfac_dist.models.load.pretrained import load_model, loads_quantised, without_weights
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import agreeing, class_of, refuse_first_fsdp
from ekfac_dist.runtime.processes import World

_CPU = torch.device("cpu")


def load(config: ModelConfig, world: World) -> nn.Module:
    """Loads the configured model on every worker; on each host, the first worker before the others.

    If the launcher's configuration asks for sharding, rank 0 reads the weights for all workers.

    Raises:
        ModelError: As `load_model`; or if the model cannot be sharded, or be spread over devices.
        LaunchError: If the launcher asks for FSDP1, or its FSDP settings cannot be used.
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
    layout = world.share(ModelLayout.of(model) if world.is_main else None)
    assert layout is not None
    with world.agree(together=(ModelError,)):
        return shard_model(
            model,
            layout,
            world.mesh(),
            world.broadcast_,
            is_main=world.is_main,
            reshard_after_forward=reshards,
        )


def unwrapped(model: nn.Module, world: World) -> nn.Module:
    """The caller's model without Accelerate's wrappers, whose forwards are collectives.

    Raises:
        ModelError: If the model is sharded by FSDP1.
    """
    with world.agree():
        refuse_first_fsdp(model)
    return extract_model_from_parallel(model, keep_torch_compile=False)


def model_fingerprints(
    model: nn.Module, modules: Sequence[TrackedModule], world: World
) -> Fingerprints:
    """Fingerprints of the model that all workers hold, on every worker.

    Raises:
        LaunchError: If workers hold different models.
    """
    other_dtypes = narrower_dtypes if world.is_main else (lambda name, tensor: ())
    with agreeing(world, model):
        own = fingerprints(model, modules, other_dtypes)
    require_same_model(model, own, world)
    return world.share(own)


def require_same_model(model: nn.Module, own: Fingerprints, world: World) -> None:
    """Refuses workers whose models differ in a weight or in a setting.

    Args:
        model: This worker's model.
        own: Its fingerprints.
        world: The workers.

    Raises:
        LaunchError: If they differ.
    """
    world.require_same("model weights, by fingerprint,", own.tracked)
    world.require_same("model weights outside the tracked modules, by fingerprint,", own.whole)
    settings = {
        **dotted(configuration(model)),
        "class": class_of(model).__name__,
        "attention implementation": attention_implementation(model),
    }
    world.require_same("settings of the model", settings)
