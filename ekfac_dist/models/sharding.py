"""Models whose weights are sharded over the workers (PyTorch's FSDP2).

A forward, a backward, and reading a weight of such a model are collectives: every worker has to do
as many of them, in the same order. What is looked at more closely than that, a graph cut in the
middle of a forward, is looked at in a whole copy.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ekfac_dist.errors import LaunchError, ModelError, first_line

_INSTEAD = "give every worker the whole model"


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model's weights over the workers."""
    return isinstance(model, FSDPModule)


def class_of(model: nn.Module) -> type[nn.Module]:
    """A model's class as it was before it was sharded."""
    kinds = [kind for kind in type(model).__mro__ if issubclass(kind, nn.Module)]
    return next(kind for kind in kinds if not issubclass(kind, FSDPModule))


def whole(tensor: Tensor) -> Tensor:
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
            f"in the launcher's configuration), or {_INSTEAD}."
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
                f"shard it so, or {_INSTEAD}."
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


def reshards_after_forward() -> bool:
    """Whether the launcher's configuration gives up weights between forward and backward.

    Raises:
        LaunchError: The configuration cannot be used.
        ModelError: It asks for what is not supported.
    """
    try:
        plugin = FullyShardedDataParallelPlugin()  # what the launcher's configuration says
    except ValueError as error:
        raise LaunchError(
            f"The launcher's configuration of FSDP cannot be used: {first_line(error)}."
        ) from error
    refused = {
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing": bool(plugin.activation_checkpointing),
    }
    for field, asked in refused.items():
        if asked:
            raise ModelError(
                f"{field} is true in the launcher's configuration, which is not supported; set it "
                "to false and use more workers, or smaller batch_tokens."
            )
    return bool(plugin.reshard_after_forward)


@dataclass(frozen=True)
class Held:
    """What worker 0's model holds, for the others to hold the same.

    Attributes:
        parameters: Names of each parameter, a tied one's all of them; its shape and dtype.
        buffers: Name, shape and dtype of each buffer.
    """

    parameters: list[tuple[list[str], torch.Size, torch.dtype]]
    buffers: list[tuple[str, torch.Size, torch.dtype]]

    @classmethod
    def by(cls, model: nn.Module) -> "Held":
        """What a model holds."""
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        of = dict(model.named_parameters(remove_duplicate=False))
        return cls(
            [(each, of[each[0]].shape, of[each[0]].dtype) for each in names.values()],
            [(name, buffer.shape, buffer.dtype) for name, buffer in _all_buffers(model)],
        )

    def put_into(self, model: nn.Module) -> None:
        """Gives a model parameters of these names and shapes, tied as they are, without numbers."""
        for names, shape, dtype in self.parameters:
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self._set(model, names, nn.Parameter(empty, requires_grad=False))

    def tie(self, model: nn.Module) -> None:
        """Makes one parameter again of those that were."""
        for names, _, _ in self.parameters:
            if len(names) > 1:
                self._set(model, names, model.get_parameter(names[0]))

    def require_apart(self, layers: Iterable[str]) -> None:
        """Refuses what a layer shares with another, or with what is in none.

        Raises:
            ModelError: There is something.
        """
        for names, _, _ in self.parameters:
            homes = {next((x for x in layers if name.startswith(f"{x}.")), "") for name in names}
            if len(homes) > 1:
                raise ModelError(
                    f"The model cannot be sharded by layers: {' and '.join(names[:2])} are one "
                    f"parameter; {_INSTEAD} (launch/accelerate/multi_gpu.yaml)."
                )

    @staticmethod
    def _set(model: nn.Module, names: Sequence[str], parameter: nn.Parameter) -> None:
        for name in names:
            owner, _, kind = name.rpartition(".")
            model.get_submodule(owner)._parameters[kind] = parameter


def shard(
    model: nn.Module,
    held: Held,
    mesh: DeviceMesh,
    broadcast_: Callable[[Tensor], Tensor],
    *,
    is_main: bool,
    reshard_after_forward: bool,
) -> nn.Module:
    """Shards a model's weights over the workers, layer by layer; a collective.

    Args:
        model: The model, on the CPU: worker 0's is whole, others' is without numbers.
        held: What worker 0's holds.
        mesh: The workers.
        broadcast_: Overwrites a tensor by worker 0's, on every worker.
        is_main: Whether this is worker 0.
        reshard_after_forward: Whether a layer's weights are given up between forward and backward.

    Raises:
        ModelError: Layers share weights.
    """
    numbers = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    buffers = dict(_all_buffers(model))
    model.to("meta")
    held.put_into(model)
    by_name = layers(model)
    held.require_apart(by_name)
    for layer in by_name.values():
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=mesh.device_type)
    held.tie(model)
    set_model_state_dict(
        model,
        numbers if is_main else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    for name, shape, dtype in held.buffers:
        owner, _, kind = name.rpartition(".")
        buffer = torch.empty(shape, dtype=dtype, device=mesh.device_type)
        if is_main:
            buffer.copy_(buffers[name])
        model.get_submodule(owner)._buffers[kind] = broadcast_(buffer)
    return model.eval()


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
    of_layers = [_whole_bytes(layer) for layer in layers(model).values()]
    outside, layer = _whole_bytes(model) - sum(of_layers), max(of_layers, default=0)
    return outside + max(outside, 3 * layer)


def _whole_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def parameter_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers; a tied one once."""
    held = {storage_of(t): local(t) for t in [*model.parameters(), *model.buffers()]}
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def storage_of(tensor: Tensor) -> int:
    """By what it is told whether tensors share memory."""
    return local(tensor).untyped_storage()._cdata


def whole_copy(model: nn.Module, *, keep: bool) -> nn.Module | None:
    """The same model with whole weights, on the CPU; a collective.

    Args:
        model: A sharded model.
        keep: Whether this worker wants it; the others help, and get None.

    Raises:
        ModelError: It cannot be built from the model's configuration, on every worker.
    """
    built = _without_numbers(model)
    reshard(model)
    copies: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in copies:  # a tied one has several names
            numbers = whole(parameter)
            numbers = numbers.cpu() if keep else numbers.new_empty(0)
            copies[id(parameter)] = nn.Parameter(numbers, requires_grad=False)
        owner, _, kind = name.rpartition(".")
        built.get_submodule(owner)._parameters[kind] = copies[id(parameter)]
    for name, buffer in _all_buffers(model):
        owner, _, kind = name.rpartition(".")
        built.get_submodule(owner)._buffers[kind] = buffer.detach().cpu()
    for name, module in built.named_modules():
        module.training = model.get_submodule(name).training
    return built if keep else None


def _without_numbers(model: nn.Module) -> nn.Module:
    """The same model before it was sharded, its parameters and buffers without numbers."""
    kind = class_of(model)
    if not isinstance(model, PreTrainedModel) or getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"A sharded model has to be one of transformers' own, not quantised, which this "
            f"{kind.__name__} is not; {_INSTEAD}."
        )
    config: Any = copy.deepcopy(model.config)
    if config._attn_implementation not in ("sdpa", "eager"):
        config._attn_implementation = "sdpa"  # the copy is on the CPU
    try:
        with torch.device("meta"):
            built = kind(config)
    except Exception as error:
        raise ModelError(
            f"The sharded {kind.__name__} cannot be built again from its configuration "
            f"({first_line(error)}); {_INSTEAD}."
        ) from error
    wanted, found = _names(model), _names(built)
    if wanted != found:
        raise ModelError(
            f"The sharded {kind.__name__} is not as its configuration says "
            f"({min(wanted ^ found)}): it has adapters, or was changed after it was built; "
            f"{_INSTEAD}."
        )
    return built


def _names(model: nn.Module) -> set[str]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {name for name, _ in [*parameters, *_all_buffers(model)]}


def _all_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every buffer under each of its names."""
    return list(model.named_buffers(remove_duplicate=False))
