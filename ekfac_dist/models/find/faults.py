"""Why a linear map, or an expert's matrix, cannot be tracked, or has nothing to track."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ekfac_dist.data.batches import Batch
from ekfac_dist.models.capture.expert_lists import in_expert_list
from ekfac_dist.models.find.trace import Trace
from ekfac_dist.models.load.adapters import is_adapters
from ekfac_dist.models.modules import EXPERT, TrackedModule, all_parameter_names

NOT_ROUTED = "no counted position was routed to this expert"
NO_GRADIENT = "no gradient reaches the counted positions that were routed to this expert"
_UNREACHED = "text does not pass through it"
_OWN_FORWARD = "these experts compute with a forward of their own, which cannot be looked into"
_NOT_CALLED = "it is not called as a linear map is (an adapter of a parameter, or switched off)"
# What leaves a module out, and does not forbid to go on without it.
LEFT_OUT = (_UNREACHED, _OWN_FORWARD, _NOT_CALLED)


def faults_of(
    model: nn.Module, modules: Iterable[TrackedModule], traced: Trace, probe: Batch
) -> dict[str, str]:
    """Why some modules cannot be tracked, by name; those that can are not in it.

    Args:
        model: The model.
        modules: The modules.
        traced: What a forward showed.
        probe: What was run through the model for it.
    """
    tied = _tied_parameters(model)
    found = {module.name: _fault(model, module, traced, tied, probe) for module in modules}
    return {name: fault for name, fault in found.items() if fault}


def is_routed(model: nn.Module, module: TrackedModule) -> bool:
    """Whether a module is an expert's, and sees some positions only."""
    return module.kind == EXPERT or bool(in_expert_list(model, module.name))


def checksums(model: nn.Module, names: Iterable[str]) -> dict[str, float]:
    """A number of each weight that can be summed up, by which a change of it is seen."""
    found = {}
    for name in names:
        weight = getattr(model.get_submodule(name), "weight", None)
        if type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta:
            total = float(weight.detach().sum(dtype=torch.float64))
            found[name] = 0.0 if math.isnan(total) else total
    return found


def _fault(
    model: nn.Module,
    module: TrackedModule,
    traced: Trace,
    tied: Mapping[str, Sequence[str]],
    probe: Batch,
) -> str:
    """Why a module cannot be tracked; "" if it can."""
    traced_name = _traced_name(module)
    times = len(traced.inputs[traced_name])
    if not times and is_adapters(module.name):
        return _NOT_CALLED
    if not times and not _is_in_used_list(model, module.name, traced):
        return _UNREACHED
    if module.kind == EXPERT and traced_name not in traced.heard:
        return _OWN_FORWARD
    if times > 1:
        return (
            f"is used {times} times in one forward; its uses share one weight and cannot be told "
            "apart"
        )
    if module.name in traced.not_linear:
        return (
            "does not compute its weight's product with its input; what its output is a function "
            "of cannot be told"
        )
    if module.kind != EXPERT and is_parametrized(model.get_submodule(module.name)):
        return "has a parametrization: its weight is computed, and is no parameter"
    shape = traced.by_position.get(traced_name)
    if shape is not None:
        num_sequences, num_positions = probe.grid(module.name).shape
        return (
            f"does not compute sequence by sequence: its input has shape {shape} for "
            f"{num_sequences} sequences of {num_positions} positions, so which row is whose cannot "
            "be told"
        )
    shared = next((tied[name] for name in module.parameters if name in tied), None)
    if shared is None:
        return ""
    return (
        f"is tied: {' and '.join(shared)} are one parameter, so its gradient is no single module's"
    )


def _is_in_used_list(model: nn.Module, name: str, traced: Trace) -> bool:
    """Whether a module is in a list of experts of which the few traced tokens reached others."""
    experts = in_expert_list(model, name)
    return bool(experts) and any(
        seen and other.startswith(f"{experts}.") for other, seen in traced.inputs.items()
    )


def _traced_name(module: TrackedModule) -> str:
    return module.fused[0] if module.kind == EXPERT else module.name


def _tied_parameters(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter that has several, by each of them."""
    shared = [names for names in all_parameter_names(model).values() if len(names) > 1]
    return {name: names for names in shared for name in names}
