"""Models whose weights are sharded over the workers by PyTorch's FSDP2.

Forward, backward and reading a weight of such a model are collectives: every worker has to perform
the same number of them in the same order. Inspections that cut the autograd graph in the middle of
a forward use a whole copy of the model instead. The copy, and the sharding itself, are in
`load.fsdp`.

PyTorch's FSDP is imported by what is given a model or a weight: what only reads a store of factors
does without it.
"""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ekfac_dist.errors import ModelError

if TYPE_CHECKING:
    from ekfac_dist.runtime.processes import World

# End of an error: what to do instead of sharding.
INSTEAD = "give every worker the whole model"


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model's weights over the workers."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def class_of(model: nn.Module) -> type[nn.Module]:
    """A model's class, without the subclass that FSDP2 makes of it."""
    from torch.distributed.fsdp import FSDPModule

    kinds = [kind for kind in type(model).__mro__ if issubclass(kind, nn.Module)]
    return next(kind for kind in kinds if not issubclass(kind, FSDPModule))


def gathered(tensor: Tensor) -> Tensor:
    """A weight's values; of a sharded weight, gathered from all workers: a collective."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    on_device: Any = tensor.detach().to(tensor.device_mesh.device_type)
    return on_device.full_tensor()


def reshard(model: nn.Module) -> None:
    """Frees the weights of a sharded model that a forward without a backward leaves gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This worker's shard of a weight; the weight itself if it is not sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def refuse_first_fsdp(model: nn.Module) -> None:
    """Refuses a model sharded by FSDP1; to be called before Accelerate's wrapper is removed.

    Raises:
        ModelError: If the model is sharded by FSDP1.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ModelError(
            "The model is sharded by FSDP's first version; shard it by the second (fsdp_version: 2 "
            f"in the launcher's configuration), or {INSTEAD}."
        )


def require_known_sharding(model: nn.Module) -> None:
    """Refuses weights that are distributed in another way than by FSDP2 of the whole model.

    Raises:
        ModelError: If weights are distributed so, or FSDP2 computes with mixed precision.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

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
        dtype = module._get_fsdp_state()._mp_policy.param_dtype
        nested = [
            other for other in sharded if other is not module and other in set(module.modules())
        ]
        nested_parameters = {id(p) for other in nested for p in other.parameters()}
        own_dtypes = {p.dtype for p in module.parameters() if id(p) not in nested_parameters}
        if dtype is not None and own_dtypes - {dtype}:
            raise ModelError(
                f"The model is sharded with mixed precision, so it computes in {dtype} with "
                "weights of another dtype; load it in the dtype that it is to compute in, and set "
                'mixed_precision: "no".'
            )


def forget_forward(model: nn.Module) -> None:
    """Resets FSDP2's state after a forward that failed on every worker."""
    from torch.distributed.fsdp import FSDPModule

    reset = getattr(model, "reset_iter_state", None)
    if isinstance(model, FSDPModule) and reset is not None and model._get_fsdp_state()._is_root:
        reset()


def layers(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The repeated blocks of a model by name, in model order.

    They are the elements with parameters of the outermost `nn.ModuleList`s, lists of lists aside.
    """
    blocks: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList) and not any(
            isinstance(element, nn.ModuleList) for element in child
        ):
            for index, element in enumerate(child):
                if any(True for _ in element.parameters()):
                    blocks[f"{prefix}{name}.{index}"] = element
        else:
            blocks |= layers(child, f"{prefix}{name}.")
    return blocks


def bytes_of_worker(model: nn.Module, workers: int) -> int:
    """Largest size in bytes of a model's weights on one worker when they are sharded.

    Args:
        model: The model before it is sharded.
        workers: W.
    """
    total = parameter_bytes(model)
    return -(-total // workers) + gathered_bytes(model) if workers > 1 else total


def gathered_bytes(model: nn.Module) -> int:
    """Largest size in bytes of weights that are whole on a worker at one time, besides its shard.

    During a layer: the weights outside all layers, the current layer, and the next one twice (the
    gathered buffer and the parameters copied out of it). Before the first layer: the weights
    outside all layers twice.
    """
    layer_bytes = [parameter_bytes(layer) for layer in layers(model).values()]
    outside_bytes = parameter_bytes(model) - sum(layer_bytes)
    return outside_bytes + max(outside_bytes, 3 * max(layer_bytes, default=0))


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers: tied ones once, sharded ones in full."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def storage_of(tensor: Tensor) -> int:
    """Address of a tensor's storage: equal for tensors that share memory."""
    return local(tensor).untyped_storage()._cdata


def agreeing(
    world: "World", model: nn.Module, *together: type[Exception], takes_part: bool = True
) -> AbstractContextManager[None]:
    """`World.agree` for a block that runs a model, or reads its weights.

    Args:
        world: The workers.
        model: The model.
        together: Exceptions that, if the model is sharded, every worker raises at the same point.
        takes_part: Whether this worker does any work in the block.
    """
    joint_errors = together if is_sharded(model) else None
    return world.agree(takes_part=takes_part, together=joint_errors)
