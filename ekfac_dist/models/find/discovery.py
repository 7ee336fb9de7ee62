"""Which modules of a model are tracked, which of them share an input, and what is left out.

What an MLP is, is defined in `mlp_blocks`; what passes through the modules is observed by `trace`;
`faults` says why a module cannot be tracked.
"""

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ekfac_dist.data.batches import Batch
from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.experts import expert_modules, fused_experts
from ekfac_dist.models.capture.tasks import CAUSAL_LM, CausalLM, Task
from ekfac_dist.models.find.faults import LEFT_OUT, checksums, faults_of, is_routed
from ekfac_dist.models.find.mlp_blocks import PART_OF_NORM, Anatomy
from ekfac_dist.models.find.trace import Trace, few_tokens, trace
from ekfac_dist.models.load.adapters import base_layer, is_adapters, is_trained_bias
from ekfac_dist.models.modules import (
    EXPERT,
    TrackedModule,
    describe,
    factor_sizes,
    linear_modules,
    parameter_sizes,
    same_tensor,
)

_BIAS_BESIDE_ADAPTER = "trained with the adapter, and no matrix of it"
_NORM_BY_NAME = "taken for part of a norm, by its name"


@dataclass(frozen=True)
class Coverage:
    """How much of the model the tracked modules are; all sizes in elements of parameters.

    Attributes:
        mlp_parameters: Elements of the parameters in MLPs; if the model has adapters, only of the
            adapters' in MLPs.
        tracked_parameters: Elements of the tracked modules' parameters.
        tracked_mlp_parameters: Those of them that are in MLPs.
        model_parameters: Elements of all parameters.
        skipped: {MLP parameter, or module, that is not tracked: why}.
    """

    mlp_parameters: int
    tracked_parameters: int
    tracked_mlp_parameters: int
    model_parameters: int
    skipped: dict[str, str]


@dataclass(frozen=True)
class Discovery:
    """The tracked modules of a model, in model order, and how much of it they are."""

    modules: tuple[TrackedModule, ...]
    coverage: Coverage

    def without(self, unreached: Collection[str], why: str) -> "Discovery":
        """The discovery without some experts' modules.

        Args:
            unreached: Names of the modules.
            why: Why they are left out.

        Raises:
            ModelError: If no module would be left.
        """
        if not unreached:
            return self
        if len(unreached) == len(self.modules):
            raise ModelError(
                f"Nothing is left to fit: of all {len(self.modules)} chosen modules, {why}. Use "
                "more data, or choose others with model.modules."
            )
        size = sum(module.num_parameters for module in self.modules if module.name in unreached)
        coverage = replace(
            self.coverage,
            tracked_parameters=self.coverage.tracked_parameters - size,
            tracked_mlp_parameters=self.coverage.tracked_mlp_parameters - size,
            skipped=self.coverage.skipped | dict.fromkeys(unreached, why),
        )
        modules = tuple(module for module in self.modules if module.name not in unreached)
        return Discovery(modules, coverage)

    @property
    def factors(self) -> dict[str, int]:
        """Size n of every factor, by name, in model order."""
        return factor_sizes(self.modules)


def discover(
    model: nn.Module,
    globs: Sequence[str] | None,
    device: torch.device,
    task: Task = CAUSAL_LM,
    probe: Batch | None = None,
) -> Discovery:
    """Finds the modules to track.

    Args:
        model: The model, frozen and in evaluation mode.
        globs: Patterns of module names; None for every MLP linear.
        device: Device of the traced batch.
        task: The task.
        probe: The batch to trace the model with, as `trace` takes it; None: a few tokens.

    Raises:
        ModelError: If no MLP is found; if a glob matches nothing, or something that is no linear
            map; if a module is tied to another or used twice in one forward; or if the model sees
            the tokens that it is to predict.
    """
    probe = few_tokens(model, device) if probe is None else probe
    return discovered(model, globs, _trace_model(model, task, probe), probe)


def discovered(
    model: nn.Module, globs: Sequence[str] | None, traced: Trace, probe: Batch
) -> Discovery:
    """The modules to track, given the trace of a forward; see `discover`.

    Args:
        model: The model.
        globs: Patterns of module names; None for every MLP linear.
        traced: The trace.
        probe: The batch of that forward.
    """
    anatomy = Anatomy(model, traced.mixing, traced.pointwise)
    mlp_sizes = _mlp_parameters(model, anatomy)
    candidates = candidates_of(model)
    norm_parts = {
        name: _NORM_BY_NAME
        for name in linear_modules(model)
        if anatomy.place(name).outside == PART_OF_NORM and traced.inputs[name]
    }
    if any(map(is_adapters, candidates)):  # the model's own weights were not trained
        mlp_sizes = {
            name: size
            for name, size in mlp_sizes.items()
            if is_adapters(name) or is_trained_bias(model, name)
        }
    in_mlp = {name for name, module in candidates.items() if module.parameters[0] in mlp_sizes}
    chosen = in_mlp if globs is None else _matching_names(globs, candidates, model)
    if not chosen:
        raise _nothing_found(model, candidates)
    chosen_modules = [module for name, module in candidates.items() if name in chosen]
    faults = faults_of(model, chosen_modules, traced, probe)
    unusable = next((name for name, fault in faults.items() if fault not in LEFT_OUT), None)
    if unusable is not None:
        raise ModelError(f"Module {unusable} {faults[unusable]}. Leave it out with model.modules.")
    tracked = [module for module in chosen_modules if module.name not in faults]
    if not tracked:
        name, fault = next(iter(faults.items()))
        raise ModelError(
            f"None of the {len(chosen)} chosen modules of {type(model).__name__} can be tracked: "
            f"{fault} ({name}). Choose others with model.modules."
        )
    modules = tuple(_with_shared_inputs(model, tracked, traced))
    coverage = Coverage(
        mlp_parameters=sum(mlp_sizes.values()),
        tracked_parameters=sum(module.num_parameters for module in modules),
        tracked_mlp_parameters=sum(m.num_parameters for m in modules if m.name in in_mlp),
        model_parameters=sum(parameter_sizes(model).values()),
        skipped=norm_parts | _reasons_to_skip(mlp_sizes, candidates, chosen, faults),
    )
    return Discovery(modules, coverage)


def _trace_model(model: nn.Module, task: Task, probe: Batch) -> Trace:
    """The trace of a model.

    Raises:
        ModelError: If a forward changes a weight, or if the model sees the tokens that it is to
            predict.
    """
    names = [*linear_modules(model), *fused_experts(model)]
    before = checksums(model, names)
    traced = trace(model, names, task, probe)
    changed = [name for name, total in checksums(model, names).items() if total != before[name]]
    if changed:
        raise ModelError(
            f"{type(model).__name__} changes its weight {changed[0]} when it runs; set what does "
            "so off in its configuration (for RWKV, rescale_every: 0)."
        )
    if isinstance(task, CausalLM) and traced.looks_ahead:
        raise ModelError(
            f"{type(model).__name__} sees the tokens that it would have to predict: its logits at "
            "a position depend on later ones. Set is_decoder (or causal) in its configuration if "
            "it was trained so; from Python, give another task, such as MaskedLM."
        )
    return traced


def _nothing_found(model: nn.Module, candidates: Iterable[str]) -> ModelError:
    """The error that no MLP was found."""
    if any(map(is_adapters, candidates)):
        return ModelError(
            f"The adapter of {type(model).__name__} has no matrix in an MLP; name those that it "
            "has with model.modules, for instance '*.lora_*'."
        )
    return ModelError(
        f"No MLP linear was found in the layers of {type(model).__name__}; name its modules with "
        f"model.modules, for instance '{_example_pattern(candidates)}'."
    )


def candidates_of(model: nn.Module) -> dict[str, TrackedModule]:
    """Every linear map, and every expert's matrix, as a tracked module, in model order."""
    linears, experts = linear_modules(model), fused_experts(model)
    candidates: dict[str, TrackedModule] = {}
    for name, _ in model.named_modules():
        described = describe(linears.get(name))
        if described is not None:
            candidates[name] = TrackedModule(name, *described, f"{name}.input", f"{name}.output")
        elif name in experts:
            candidates |= {module.name: module for module in expert_modules(name, experts[name])}
    return candidates


def _mlp_parameters(model: nn.Module, anatomy: Anatomy) -> dict[str, int]:
    """{parameter of an MLP: its elements}, in model order, without routers and norms."""
    linears = linear_modules(model)
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    sizes = {}
    for name, size in parameter_sizes(model).items():
        owner = name.rpartition(".")[0]
        place = anatomy.place(owner)
        if place.outside or (owner == place.layer and name in vectors):
            continue
        described = describe(linears.get(base_layer(owner, linears)))
        num_outputs = described[2] if described else _first_size(model, name)
        if not anatomy.is_router(owner, num_outputs):
            sizes[name] = size
    return sizes


def _first_size(model: nn.Module, name: str) -> int:
    """Size of a parameter's first dimension."""
    parameter = model.get_parameter(name)
    return parameter.shape[0] if parameter.ndim else 0


def _example_pattern(linears: Iterable[str]) -> str:
    """A pattern that matches some of the linear maps."""
    name = next(iter(linears), "layers.0.linear")
    return "*." + name.rpartition(".")[2]


def _matching_names(
    globs: Sequence[str], linears: Mapping[str, TrackedModule], model: nn.Module
) -> set[str]:
    """Names of the linear maps that match any of the patterns."""
    chosen: set[str] = set()
    for glob in globs:
        matched = set(fnmatch.filter(linears, glob))
        if not matched:
            others = fnmatch.filter((name for name, _ in model.named_modules() if name), glob)
            if others:
                kind = type(model.get_submodule(others[0])).__name__
                raise ModelError(
                    f"model.modules: {glob!r} matches {others[0]}, a {kind}; only Linear and "
                    "Conv1D modules and experts can be tracked, such as "
                    f"{next(iter(linears), 'none here')}."
                )
            raise ModelError(
                f"model.modules: {glob!r} matches none of the model's {len(linears)} linear "
                f"modules, such as {next(iter(linears), 'none here')}."
            )
        chosen |= matched
    return chosen


def _with_shared_inputs(
    model: nn.Module, modules: Iterable[TrackedModule], traced: Trace
) -> Iterator[TrackedModule]:
    """The modules, in which those that read the same tensor have the same input factor."""
    first_readers: list[TrackedModule] = []
    for module in modules:
        if is_routed(model, module):  # each expert reads its own tokens
            yield module
            continue
        own_input = traced.inputs[module.name][0]
        first_reader = next(
            (
                reader
                for reader in first_readers
                if reader.bias == module.bias
                and same_tensor(traced.inputs[reader.name][0], own_input)
            ),
            None,
        )
        if first_reader is None:
            first_readers.append(module)
        else:
            module = replace(module, input=first_reader.input)
        yield module


def _reasons_to_skip(
    in_mlp: Iterable[str],
    candidates: Mapping[str, TrackedModule],
    chosen: Collection[str],
    faults: Mapping[str, str],
) -> dict[str, str]:
    """{MLP parameter, or expert's matrix, that is not tracked: why}."""
    owners = {name: module for module in candidates.values() for name in module.parameters}
    skipped = {}
    for name in in_mlp:
        module = owners.get(name)
        if module is None:
            skipped[name] = "not the weight or bias of a Linear, a Conv1D or a fused expert"
        elif module.kind != EXPERT and (module.name in faults or module.name not in chosen):
            is_models_bias = any(map(is_adapters, in_mlp)) and not is_adapters(name)
            why = _BIAS_BESIDE_ADAPTER if is_models_bias else "not chosen by model.modules"
            skipped[name] = faults.get(module.name, why)
    for module in candidates.values():
        if module.kind == EXPERT and module.parameters[0] in in_mlp and module.name not in chosen:
            skipped[module.name] = "not chosen by model.modules"
        elif module.name in faults and (
            module.kind == EXPERT or module.parameters[0] not in in_mlp
        ):
            skipped[module.name] = faults[module.name]
    return skipped
