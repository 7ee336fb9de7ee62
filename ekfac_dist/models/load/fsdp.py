"""Sharding a model's weights over the workers by FSDP2, and whole copies of sharded models."""

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
    """Whether, by the launcher's configuration, weights are freed between forward and backward.

    Raises:
        LaunchError: If the configuration cannot be used.
        ModelError: If it asks for CPU offloading or activation checkpointing.
    """
    try:
        plugin = FullyShardedDataParallelPlugin()  # reads the launcher's environment variables
    except ValueError as error:
        raise LaunchError(
            f"The launcher's configuration of FSDP cannot be used: {first_line(error)}."
        ) from error
    refused = {
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing": bool(plugin.activation_checkpointing),
    }
    for field, is_set in refused.items():
        if is_set:
            raise ModelError(
                f"{field} is true in the launcher's configuration, which is not supported; set it "
                "to false and use more workers, or smaller batch_tokens."
            )
    return bool(plugin.reshard_after_forward)


@dataclass(frozen=True)
class ModelLayout:
    """Parameters and buffers of rank 0's model, which all other workers' models must get.

    Attributes:
        parameters: (names, shape, dtype) of each parameter; a tied one has several names.
        buffers: (name, shape, dtype) of each buffer.
    """

    parameters: list[tuple[list[str], torch.Size, torch.dtype]]
    buffers: list[tuple[str, torch.Size, torch.dtype]]

    @classmethod
    def of(cls, model: nn.Module) -> "ModelLayout":
        """The layout of a model."""
        names = all_parameter_names(model)
        return cls(
            [(names[id(p)], p.shape, p.dtype) for p in model.parameters()],
            [(name, buffer.shape, buffer.dtype) for name, buffer in _all_buffers(model)],
        )

    def allocate_in(self, model: nn.Module) -> None:
        """Gives a model parameters of these names and shapes, tied alike, without values."""
        for names, shape, dtype in self.parameters:
            empty = torch.empty(shape, dtype=dtype, device="meta")
            parameter = nn.Parameter(empty, requires_grad=False)
            for name in names:
                _replace_tensor(model, name, parameter)

    def tie(self, model: nn.Module) -> None:
        """Ties the parameters again that are tied in this layout."""
        for names, _, _ in self.parameters:
            for name in names[1:]:
                _replace_tensor(model, name, model.get_parameter(names[0]))

    def require_separate_layers(self, layers: Iterable[str]) -> None:
        """Refuses a parameter that is in several layers, or in a layer and outside of all.

        Args:
            layers: Names of the layers.

        Raises:
            ModelError: If there is such a parameter.
        """
        for names, _, _ in self.parameters:
            homes = {
                next((layer for layer in layers if name.startswith(f"{layer}.")), "")
                for name in names
            }
            if len(homes) > 1:
                raise ModelError(
                    f"The model cannot be sharded by layers: {' and '.join(names[:2])} are one "
                    f"parameter; {INSTEAD} (launch/accelerate/multi_gpu.yaml)."
                )


def shard_model(
    model: nn.Module,
    layout: ModelLayout,
    mesh: DeviceMesh,
    broadcast_: Callable[[Tensor], Tensor],
    *,
    is_main: bool,
    reshard_after_forward: bool,
) -> nn.Module:
    """Shards a model's weights over the workers, layer by layer; a collective.

    Args:
        model: The model on the CPU; rank 0's with its weights, the others' without values.
        layout: Layout of rank 0's model.
        mesh: The workers.
        broadcast_: Overwrites a tensor with rank 0's, on every worker.
        is_main: Whether this is rank 0.
        reshard_after_forward: Whether a layer's weights are freed between forward and backward.

    Raises:
        ModelError: If layers share weights.
    """
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    buffers = dict(_all_buffers(model))
    model.to("meta")
    layout.allocate_in(model)
    model_layers = layers(model)
    layout.require_separate_layers(model_layers)
    for layer in model_layers.values():
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=mesh.device_type)
    layout.tie(model)
    set_model_state_dict(
        model,
        weights if is_main else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    for name, shape, dtype in layout.buffers:
        buffer = torch.empty(shape, dtype=dtype, device=mesh.device_type)
        if is_main:
            buffer.copy_(buffers[name])
        _replace_tensor(model, name, broadcast_(buffer))
    return model.eval()


def whole_copy(model: nn.Module, *, keep: bool) -> nn.Module | None:
    """A copy of a sharded model with whole weights, on the CPU; a collective.

    Args:
        model: A sharded model.
        keep: Whether this worker gets the copy; the others take part in gathering it and get None.

    Raises:
        ModelError: On every worker, if the model cannot be built from its configuration.
    """
    whole = _rebuilt(model)
    reshard(model)
    copies: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in copies:  # a tied one has several names
            values = gathered(parameter)
            values = values.cpu() if keep else values.new_empty(0)
            copies[id(parameter)] = nn.Parameter(values, requires_grad=False)
        _replace_tensor(whole, name, copies[id(parameter)])
    for name, buffer in _all_buffers(model):
        _replace_tensor(whole, name, buffer.detach().cpu())
    for name, module in whole.named_modules():
        module.training = model.get_submodule(name).training
    return whole if keep else None


def _rebuilt(model: nn.Module) -> nn.Module:
    """The model before it was sharded, rebuilt from its configuration on the meta device."""
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
    sharded_names, built_names = _tensor_names(model), _tensor_names(built)
    if sharded_names != built_names:
        raise ModelError(
            f"The sharded {kind.__name__} is not as its configuration says "
            f"({min(sharded_names ^ built_names)}): it has adapters, or was changed after it was "
            f"built; {INSTEAD}."
        )
    return built


def _tensor_names(model: nn.Module) -> set[str]:
    """Names of all parameters and buffers; every name of a tied one."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name for name, _ in [*parameters, *_all_buffers(model)]}


def _replace_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces a parameter, or a buffer if the tensor is no `nn.Parameter`."""
    owner, _, kind = name.rpartition(".")
    module = model.get_submodule(owner)
    tensors: Any = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
    tensors[kind] = tensor


def _all_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every buffer under each of its names."""
    return list(model.named_buffers(remove_duplicate=False))
