"""Sharding a model's weights over the workers, and a whole copy of one that is sharded."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from transformers import PreTrainedModel

from ekfac_dist.errors import LaunchError, ModelError, first_line
from ekfac_dist.models.modules import all_parameter_names
from ekfac_dist.models.sharding import INSTEAD, class_of, gathered, layers, reshard


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
        names = all_parameter_names(model)
        return cls(
            [(names[id(p)], p.shape, p.dtype) for p in model.parameters()],
            [(name, buffer.shape, buffer.dtype) for name, buffer in _all_buffers(model)],
        )

    def put_into(self, model: nn.Module) -> None:
        """Gives a model parameters of these names and shapes, tied as they are, without numbers."""
        for names, shape, dtype in self.parameters:
            empty = torch.empty(shape, dtype=dtype, device="meta")
            parameter = nn.Parameter(empty, requires_grad=False)
            for name in names:
                _put(model, name, parameter)

    def tie(self, model: nn.Module) -> None:
        """Makes one parameter again of those that were."""
        for names, _, _ in self.parameters:
            for name in names[1:]:
                _put(model, name, model.get_parameter(names[0]))

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
                    f"parameter; {INSTEAD} (launch/accelerate/multi_gpu.yaml)."
                )


def shard_model(
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
        buffer = torch.empty(shape, dtype=dtype, device=mesh.device_type)
        if is_main:
            buffer.copy_(buffers[name])
        _put(model, name, broadcast_(buffer))
    return model.eval()


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
            numbers = gathered(parameter)
            numbers = numbers.cpu() if keep else numbers.new_empty(0)
            copies[id(parameter)] = nn.Parameter(numbers, requires_grad=False)
        _put(built, name, copies[id(parameter)])
    for name, buffer in _all_buffers(model):
        _put(built, name, buffer.detach().cpu())
    for name, module in built.named_modules():
        module.training = model.get_submodule(name).training
    return built if keep else None


def _without_numbers(model: nn.Module) -> nn.Module:
    """The same model before it was sharded, its parameters and buffers without numbers."""
    kind = class_of(model)
    if not isinstance(model, PreTrainedModel) or getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"A sharded model has to be one of transformers' own, not quantised, which this "
            f"{kind.__name__} is not; {INSTEAD}."
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
            f"({first_line(error)}); {INSTEAD}."
        ) from error
    wanted, found = _names(model), _names(built)
    if wanted != found:
        raise ModelError(
            f"The sharded {kind.__name__} is not as its configuration says "
            f"({min(wanted ^ found)}): it has adapters, or was changed after it was built; "
            f"{INSTEAD}."
        )
    return built


def _names(model: nn.Module) -> set[str]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {name for name, _ in [*parameters, *_all_buffers(model)]}


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a parameter, or else a buffer, in the place of one that there is."""
    owner, _, kind = name.rpartition(".")
    module = model.get_submodule(owner)
    places: Any = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
    places[kind] = tensor


def _all_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every buffer under each of its names."""
    return list(model.named_buffers(remove_duplicate=False))
