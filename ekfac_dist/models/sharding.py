"""Models whose weights are sharded over the workers (PyTorch's FSDP2).

A forward, a backward, and reading a weight of such a model are collectives: every worker has to do
as many of them, in the same order. What is looked at more closely than that, a graph cut in the
middle of a forward, is looked at in a whole copy; that, and sharding a model, is `shards`.
"""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from ekfac_dist.errors import ModelError
from ekfac_dist.runtime.processes import World

INSTEAD = "give every worker the whole model"


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model's weights over the workers."""
    return isinstance(model, FSDPModule)


def class_of(model: nn.Module) -> type[nn.Module]:
    """A model's class as it was before it was sharded."""
    kinds = [kind for kind in type(model).__mro__ if issubclass(kind, nn.Module)]
    return next(kind for kind in kinds if not issubclass(kind, FSDPModule))


def gathered(tensor: Tensor) -> Tensor:
    """A weight's numbers, gathered from all workers if they are sharded: a collective then."""
    if not isinstance(tensor, DTensor):
        return tensor
    held: Any = tensor.detach().to(tensor.device_mesh.device_type)
    return held.full_tensor()


def reshard(model: nn.Module) -> None:
    """Gives up the weights that a forward without a backward leaves gathered, if it is sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """The part of a weight that this worker holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def refuse_first_fsdp(model: nn.Module) -> None:
    """Refuses a model that FSDP's first version has sharded, before its container is taken off.

    Raises:
        ModelError: It is.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ModelError(
            "The model is sharded by FSDP's first version; shard it by the second (fsdp_version: 2 "
            f"in the launcher's configuration), or {INSTEAD}."
        )


def require_known_sharding(model: nn.Module) -> None:
    """Refuses weights that are spread over the workers in another way than FSDP2's of all of it.

    Raises:
        ModelError: They are.
    """
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        if not is_sharded(model) or parameter.device_mesh.ndim > 1:
            raise ModelError(
                f"The weight {name} is spread over the workers otherwise than by FSDP2 of the "
                "whole model (fully_shard on its layers and on itself) on a mesh of one dimension; "
                f"shard it so, or {INSTEAD}."
            )
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        wanted = module._get_fsdp_state()._mp_policy.param_dtype
        inner = [each for each in sharded if each is not module and each in set(module.modules())]
        of_inner = {id(p) for each in inner for p in each.parameters()}
        held = {p.dtype for p in module.parameters() if id(p) not in of_inner}
        if wanted is not None and held - {wanted}:
            raise ModelError(
                f"The model is sharded with mixed precision, so it computes in {wanted} with "
                "weights of another dtype; load it in the dtype that it is to compute in, and set "
                'mixed_precision: "no".'
            )


def forget_forward(model: nn.Module) -> None:
    """Makes a model ready again after a forward that failed on every worker."""
    reset = getattr(model, "reset_iter_state", None)
    if isinstance(model, FSDPModule) and reset is not None and model._get_fsdp_state()._is_root:
        reset()


def layers(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The repeated blocks of a model by name, in model order; lists within blocks are theirs."""
    found: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList) and not any(
            isinstance(each, nn.ModuleList) for each in child
        ):
            for number, each in enumerate(child):
                if any(True for _ in each.parameters()):
                    found[f"{prefix}{name}.{number}"] = each
        else:
            found |= layers(child, f"{prefix}{name}.")
    return found


def bytes_of_worker(model: nn.Module, workers: int) -> int:
    """What a worker holds at most of a model's weights when they are sharded.

    Args:
        model: The model before it is sharded.
        workers: W.
    """
    total = parameter_bytes(model)
    return -(-total // workers) + gathered_bytes(model) if workers > 1 else total


def gathered_bytes(model: nn.Module) -> int:
    """What is whole at once of a model that is sharded, or will be.

    What is in no layer, a layer that is computed with, and the next one twice: as it is gathered
    and as it is put in place. Before the first layer, what is in none twice.
    """
    of_layers = [parameter_bytes(layer) for layer in layers(model).values()]
    outside, layer = parameter_bytes(model) - sum(of_layers), max(of_layers, default=0)
    return outside + max(outside, 3 * layer)


def parameter_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers; a tied one once, a sharded one as a whole."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def storage_of(tensor: Tensor) -> int:
    """By what it is told whether tensors share memory."""
    return local(tensor).untyped_storage()._cdata


def agreeing(
    world: World, model: nn.Module, *together: type[Exception], takes_part: bool = True
) -> AbstractContextManager[None]:
    """`World.agree` of a block that runs a model, or reads its weights.

    Args:
        world: The workers.
        model: The model.
        together: What is raised on every worker at the same place, if it is sharded.
        takes_part: Whether this worker really does something in the block.
    """
    held = together if is_sharded(model) else None
    return world.agree(takes_part=takes_part, together=held)
