"""Why a linear map, or an expert's matrix, cannot be tracked, or has nothing to track.

The sentences are read by users: in errors, or as reasons why a module is not covered.
"""

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
# Faults with which a module is left out; with any other fault the run stops.
LEFT_OUT = (_UNREACHED, _OWN_FORWARD, _NOT_CALLED)


def faults_of(
    model: nn.Module, modules: Iterable[TrackedModule], traced: Trace, probe: Batch
) -> dict[str, str]:
    """{module that cannot be tracked: why}.

    Args:
        model: The model.
        modules: The modules to examine.
        traced: The trace of a forward.
        probe: The batch of that forward.
    """
    tied = _tied_parameters(model)
    faults = {module.name: _fault_of(model, module, traced, tied, probe) for module in modules}
    return {name: fault for name, fault in faults.items() if fault}


def is_routed(model: nn.Module, module: TrackedModule) -> bool:
    """Whether a module belongs to an expert, which sees only the positions routed to it."""
    return module.kind == EXPERT or bool(in_expert_list(model, module.name))


def checksums(model: nn.Module, names: Iterable[str]) -> dict[str, float]:
    """{module: sum of its floating-point weight, in float64}; shows if a weight has changed."""
    sums = {}
    for name in names:
        weight = getattr(model.get_submodule(name), "weight", None)
        if type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta:
            total = float(weight.detach().sum(dtype=torch.float64))
            sums[name] = 0.0 if math.isnan(total) else total
    return sums


def _fault_of(
    model: nn.Module,
    module: TrackedModule,
    traced: Trace,
    tied: Mapping[str, Sequence[str]],
    probe: Batch,
) -> str:
    """Why a module cannot be tracked; "" if it can."""
    traced_name = _traced_name(module)
    num_calls = len(traced.inputs[traced_name])
    if not num_calls and is_adapters(module.name):
        return _NOT_CALLED
    if not num_calls and not _is_in_used_list(model, module.name, traced):
        return _UNREACHED
    if module.kind == EXPERT and traced_name not in traced.observable_experts:
        return _OWN_FORWARD
    if num_calls > 1:
        return (
            f"is used {num_calls} times in one forward; its uses share one weight and cannot be "
            "told apart"
        )
    if module.name in traced.not_linear:
        return (
            "does not compute its weight's product with its input; what its output is a function "
            "of cannot be told"
        )
    if module.kind != EXPERT and is_parametrized(model.get_submodule(module.name)):
        return "has a parametrization: its weight is computed, and is no parameter"
    shape = traced.not_by_sequence.get(traced_name)
    if shape is not None:
        num_sequences, num_positions = probe.grid(module.name).shape
        return (
            f"does not compute sequence by sequence: its input has shape {shape} for "
            f"{num_sequences} sequences of {num_positions} positions, so which row is whose cannot "
            "be told"
        )
    names = next((tied[name] for name in module.parameters if name in tied), None)
    if names is None:
        return ""
    return (
        f"is tied: {' and '.join(names)} are one parameter, so its gradient is no single module's"
    )


def _is_in_used_list(model: nn.Module, name: str, traced: Trace) -> bool:
    """Whether a module is an expert in a list of which other experts were called."""
    experts = in_expert_list(model, name)
    return bool(experts) and any(
        calls and other.startswith(f"{experts}.") for other, calls in traced.inputs.items()
    )


def _traced_name(module: TrackedModule) -> str:
    """Name under which a trace lists a module: of an expert, that of its collection."""
    return module.fused[0] if module.kind == EXPERT else module.name


def _tied_parameters(model: nn.Module) -> dict[str, list[str]]:
    """{name of a tied parameter: all of its names}."""
    tied = [names for names in all_parameter_names(model).values() if len(names) > 1]
    return {name: names for names in tied for name in names}
