"""Which modules of a model are tracked, which of them read the same input, and what is left out.

The one place that knows how MLP blocks look. A block is a submodule under one of `BLOCK_NAMES`, or,
in families whose layers hold their MLP linears themselves, the linears under `BARE_NAMES`. A traced
forward of a few tokens then tells which linears text really passes through, which is used twice,
and which read the same tensor.
"""

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekfac_dist.errors import ModelError
from ekfac_dist.models.modules import (
    TrackedModule,
    all_parameter_names,
    describe,
    factor_sizes,
    linear_modules,
    only_input,
    same_tensor,
)

# Llama, Mistral, Qwen, Gemma, OLMo, Phi, GPT-2, GPT-NeoX: `mlp`; others as they are named.
BLOCK_NAMES = frozenset({"mlp", "feed_forward", "ffn"})
# OPT: fc1 and fc2 stand in the decoder layer itself.
BARE_NAMES = frozenset({"fc1", "fc2"})


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
    block_parameters = dict(_block_parameters(model))
    in_blocks = {name for name in linears if f"{name}.weight" in block_parameters}
    if globs is None:
        chosen = in_blocks
        if not chosen:
            raise ModelError(
                f"No MLP linear was found in {type(model).__name__}; name its modules with "
                f"model.modules, for instance '{_example(linears)}'."
            )
    else:
        chosen = _match(globs, linears, model)
    trace = _trace(model, {name: linears[name] for name in linears if name in chosen}, device)
    twice = next((name for name, inputs in trace.items() if len(inputs) > 1), None)
    if twice is not None:
        raise ModelError(
            f"Module {twice} is used {len(trace[twice])} times in one forward; its uses share one "
            "weight and cannot be told apart. Leave it out with model.modules."
        )
    tracked = [name for name in linears if trace.get(name)]
    if not tracked:
        raise ModelError(
            f"Text passes through none of the {len(chosen)} chosen modules of "
            f"{type(model).__name__}; choose others with model.modules."
        )
    _refuse_tied(model, tracked)
    modules = tuple(_with_shared_inputs(linears, {name: trace[name][0] for name in tracked}))
    covered = {f"{name}.{p}" for name in tracked for p, _ in linears[name].named_parameters()}
    skipped = {
        name: _why_skipped(name, linears, chosen, in_blocks)
        for name in block_parameters
        if name not in covered
    }
    skipped |= {
        name: "text does not pass through it"
        for name in linears
        if name in chosen and name not in in_blocks and name not in tracked
    }
    parameters = dict(model.named_parameters())
    coverage = Coverage(
        mlp_parameters=sum(p.numel() for p in block_parameters.values()),
        tracked_parameters=sum(p.numel() for n, p in parameters.items() if n in covered),
        tracked_mlp_parameters=sum(p.numel() for n, p in block_parameters.items() if n in covered),
        model_parameters=sum(p.numel() for p in parameters.values()),
        skipped=skipped,
    )
    return Discovery(modules, coverage)


def mlp_block(path: str) -> str | None:
    """The MLP block that something of a transformer belongs to, by its name; None if to none.

    Args:
        path: Name of a module in the block, or of a parameter.
    """
    parts = path.split(".")
    for k, part in enumerate(parts):
        if part in BLOCK_NAMES:
            return ".".join(parts[: k + 1])
        if part in BARE_NAMES:
            return ".".join(parts[:k])
    return None


def _block_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter that belongs to an MLP block, by name, in model order."""
    for name, parameter in model.named_parameters():
        if mlp_block(name.rpartition(".")[0]) is not None:
            yield name, parameter


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


@torch.no_grad()
def _trace(
    model: nn.Module, modules: dict[str, nn.Module], device: torch.device
) -> dict[str, list[tuple[Tensor, int]]]:
    """The inputs of each module, with their versions, in one forward of a few tokens."""
    inputs: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in modules}
    handles = []
    for name, module in modules.items():

        def hook(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            # The tensors are held until the end, so no address is used twice.
            tensor = only_input(args, kwargs)
            inputs[name].append((tensor, tensor._version))

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        model(input_ids=torch.zeros(1, 3, dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


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


def _refuse_tied(model: nn.Module, tracked: Iterable[str]) -> None:
    names = all_parameter_names(model)
    for module in tracked:
        for parameter in model.get_submodule(module).parameters():
            shared = names[id(parameter)]
            if len(shared) > 1:
                raise ModelError(
                    f"Module {module} is tied: {' and '.join(shared)} are one parameter, so its "
                    "gradient is no single module's. Leave it out with model.modules."
                )


def _why_skipped(
    parameter: str, linears: dict[str, nn.Module], chosen: set[str], in_blocks: set[str]
) -> str:
    owner = parameter.rpartition(".")[0]
    if owner not in linears:
        return "not the weight or bias of a Linear or Conv1D"
    return "text does not pass through it" if owner in chosen else "not chosen by model.modules"
