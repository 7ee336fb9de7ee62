"""Which modules of a model are tracked, which of them read the same input, and what is left out.

What an MLP is, `blocks` says; what text passes through, `trace`.
"""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ekfac_dist.errors import ModelError
from ekfac_dist.models.blocks import Anatomy
from ekfac_dist.models.modules import (
    TrackedModule,
    all_parameter_names,
    describe,
    factor_sizes,
    linear_modules,
    same_tensor,
)
from ekfac_dist.models.trace import Trace, trace

UNREACHED = "text does not pass through it"


@dataclass(frozen=True)
class Coverage:
    """How much of the model the tracked modules are.

    Attributes:
        mlp_parameters: Parameters in MLP blocks.
        tracked_parameters: Parameters of tracked modules.
        tracked_mlp_parameters: Those of them that are in MLP blocks.
        model_parameters: All of the model's parameters.
        skipped: MLP parameters (or modules) that are not tracked, and why.
    """

    mlp_parameters: int
    tracked_parameters: int
    tracked_mlp_parameters: int
    model_parameters: int
    skipped: dict[str, str]


@dataclass(frozen=True)
class Discovery:
    """What is tracked in a model, in model order, and how much of it that is."""

    modules: tuple[TrackedModule, ...]
    coverage: Coverage

    @property
    def factors(self) -> dict[str, int]:
        """Size n of every factor, by name, in model order."""
        return factor_sizes(self.modules)


def discover(model: nn.Module, globs: Sequence[str] | None, device: torch.device) -> Discovery:
    """Finds the modules to track.

    Args:
        model: A causal language model, frozen and in evaluation mode.
        globs: Patterns of module names; None for every MLP linear.
        device: Where the traced forward's tokens go.

    Raises:
        ModelError: No MLP is found; a glob matches nothing, or something that is no linear map; a
            module is tied to another or used twice in one forward.
    """
    linears = linear_modules(model)
    traced = trace(model, linears, device)
    mlp = _mlp_parameters(model, Anatomy(model, traced.mixing))
    in_mlp = {name for name in linears if f"{name}.weight" in mlp}
    if globs is not None:
        chosen = _match(globs, linears, model)
    elif in_mlp:
        chosen = in_mlp
    else:
        raise ModelError(
            f"No MLP linear was found in the layers of {type(model).__name__}; name its modules "
            f"with model.modules, for instance '{_example(linears)}'."
        )
    faults = {name: fault for name in chosen if (fault := _fault(model, name, traced))}
    tracked = [name for name in linears if name in chosen and name not in faults]
    unusable = {name: fault for name, fault in faults.items() if fault != UNREACHED}
    if unusable:
        name = next(name for name in linears if name in unusable)
        raise ModelError(f"Module {name} {unusable[name]}. Leave it out with model.modules.")
    if not tracked:
        raise ModelError(
            f"Text passes through none of the {len(chosen)} chosen modules of "
            f"{type(model).__name__}; choose others with model.modules."
        )
    inputs = {name: traced.inputs[name][0] for name in tracked}
    modules = tuple(_with_shared_inputs(linears, inputs))
    covered = {f"{name}.{p}" for name in tracked for p, _ in linears[name].named_parameters()}
    skipped = {
        name: _why_skipped(name, linears, chosen, faults) for name in mlp if name not in covered
    }
    skipped |= {name: fault for name, fault in faults.items() if name not in in_mlp}
    parameters = dict(model.named_parameters())
    coverage = Coverage(
        mlp_parameters=sum(p.numel() for p in mlp.values()),
        tracked_parameters=sum(p.numel() for n, p in parameters.items() if n in covered),
        tracked_mlp_parameters=sum(p.numel() for n, p in mlp.items() if n in covered),
        model_parameters=sum(p.numel() for p in parameters.values()),
        skipped=skipped,
    )
    return Discovery(modules, coverage)


def _mlp_parameters(model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Parameter]:
    """Every parameter of an MLP, by name, in model order; routers' and norms' are none."""
    linears = linear_modules(model)
    found = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        place = anatomy.place(owner)
        if place.outside or (owner == place.layer and parameter.ndim < 2):
            continue
        described = describe(linears.get(owner))
        if not anatomy.is_router(owner, described[2] if described else parameter.shape[0]):
            found[name] = parameter
    return found


def _fault(model: nn.Module, name: str, traced: Trace) -> str:
    """Why a linear map cannot be tracked; "" if it can."""
    times = len(traced.inputs[name])
    if not times:
        return UNREACHED
    if times > 1:
        return (
            f"is used {times} times in one forward; its uses share one weight and cannot be told "
            "apart"
        )
    return _tied(model, name)


def _example(linears: Iterable[str]) -> str:
    name = next(iter(linears), "layers.0.linear")
    return "*." + name.rpartition(".")[2]


def _match(globs: Sequence[str], linears: dict[str, nn.Module], model: nn.Module) -> set[str]:
    chosen: set[str] = set()
    for glob in globs:
        matched = set(fnmatch.filter(linears, glob))
        if not matched:
            others = fnmatch.filter((name for name, _ in model.named_modules() if name), glob)
            if others:
                kind = type(model.get_submodule(others[0])).__name__
                raise ModelError(
                    f"model.modules: {glob!r} matches {others[0]}, a {kind}; only Linear and "
                    f"Conv1D modules can be tracked, such as {next(iter(linears), 'none here')}."
                )
            raise ModelError(
                f"model.modules: {glob!r} matches none of the model's {len(linears)} linear "
                f"modules, such as {next(iter(linears), 'none here')}."
            )
        chosen |= matched
    return chosen


def _with_shared_inputs(
    linears: dict[str, nn.Module], inputs: dict[str, tuple[Tensor, int]]
) -> Iterator[TrackedModule]:
    leaders: list[tuple[str, bool]] = []
    for name, seen in inputs.items():
        module = linears[name]
        bias = module.bias is not None
        leader = next((n for n, b in leaders if b == bias and same_tensor(inputs[n], seen)), None)
        if leader is None:
            leader = name
            leaders.append((name, bias))
        described = describe(module)
        assert described is not None
        kind, num_inputs, num_outputs, _ = described
        yield TrackedModule(
            name=name,
            kind=kind,
            num_inputs=num_inputs,
            num_outputs=num_outputs,
            bias=bias,
            input=f"{leader}.input",
            output=f"{name}.output",
        )


def _tied(model: nn.Module, module: str) -> str:
    names = all_parameter_names(model)
    for parameter in model.get_submodule(module).parameters():
        shared = names[id(parameter)]
        if len(shared) > 1:
            return (
                f"is tied: {' and '.join(shared)} are one parameter, so its gradient is no single "
                "module's"
            )
    return ""


def _why_skipped(
    parameter: str, linears: dict[str, nn.Module], chosen: set[str], faults: Mapping[str, str]
) -> str:
    owner = parameter.rpartition(".")[0]
    if owner not in linears:
        return "not the weight or bias of a Linear or Conv1D"
    return faults[owner] if owner in chosen else "not chosen by model.modules"
