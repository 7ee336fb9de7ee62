"""Which modules of a model are tracked, which of them read the same input, and what is left out.

The one place that knows how MLP blocks look. A block is a submodule under one of `BLOCK_NAMES`, or,
in families whose layers hold their MLP linears themselves, the linears under `BARE_NAMES`. A traced
forward of a few tokens then tells which linears text really passes through, which is used twice,
and which read the same tensor.
"""

import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ekfac_dist.errors import ModelError

# Llama, Mistral, Qwen, Gemma, OLMo, Phi, GPT-2, GPT-NeoX: `mlp`; others as they are named.
BLOCK_NAMES = frozenset({"mlp", "feed_forward", "ffn"})
# OPT: fc1 and fc2 stand in the decoder layer itself.
BARE_NAMES = frozenset({"fc1", "fc2"})

LINEAR = "linear"
CONV1D = "conv1d"


@dataclass(frozen=True)
class TrackedModule:
    """One linear map that factors are fitted for.

    Attributes:
        name: Its name in the model.
        kind: "linear" (weight O×I) or "conv1d" (weight stored I×O).
        num_inputs: Features that it reads, without the bias coordinate.
        num_outputs: O.
        bias: Whether it has a bias.
        input: Name of its input factor; modules that read one tensor share it.
        output: Name of its output factor.
    """

    name: str
    kind: str
    num_inputs: int
    num_outputs: int
    bias: bool
    input: str
    output: str

    @property
    def input_size(self) -> int:
        """I: size of the input factor, the bias coordinate included."""
        return self.num_inputs + self.bias

    @property
    def leads(self) -> bool:
        """Whether its input factor bears its name: it is the first that reads that tensor."""
        return self.input == f"{self.name}.input"

    def as_dict(self) -> dict[str, Any]:
        """Its entry in a manifest."""
        return {
            "kind": self.kind,
            "in_features": self.num_inputs,
            "out_features": self.num_outputs,
            "bias": self.bias,
            "input": self.input,
            "output": self.output,
        }


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


def layer_name(module: str) -> str:
    """The layer that a module belongs to: its name up to the first number, or the whole of it."""
    parts = module.split(".")
    number = next((k for k, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


def factor_sizes(modules: Iterable[TrackedModule]) -> dict[str, int]:
    """Size n of every factor of some modules, by name, in model order."""
    sizes: dict[str, int] = {}
    for module in modules:
        sizes[module.input] = module.input_size
        sizes[module.output] = module.num_outputs
    return sizes


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


def partition(modules: Sequence[TrackedModule], number: int) -> list[list[TrackedModule]]:
    """Cuts modules, in model order, into at most `number` groups of about equal factor memory.

    Modules that share an input stay together.

    Args:
        modules: In model order.
        number: Wanted number of groups; fewer if there are not enough modules.
    """
    families: dict[str, list[TrackedModule]] = {}
    for module in modules:
        families.setdefault(module.input, []).append(module)
    weights = [
        members[0].input_size ** 2
        + sum(m.num_outputs**2 + m.num_outputs * m.input_size for m in members)
        for members in families.values()
    ]
    number = min(number, len(families))
    groups: list[list[TrackedModule]] = []
    passed, whole = 0.0, sum(weights)
    members_left = len(families)
    for members, weight in zip(families.values(), weights, strict=True):
        begins = len(groups) * whole / number
        # A family begins a group once the groups before it have their share, and sooner if there
        # are only just enough families left for the groups still to come.
        is_due = passed >= begins - 1e-9 * whole or number - len(groups) >= members_left
        if is_due and len(groups) < number:
            groups.append([])
        groups[-1].extend(members)
        passed += weight
        members_left -= 1
    return groups


def fingerprint(
    model: nn.Module, modules: Iterable[TrackedModule], dtype: torch.dtype | None = None
) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tracked modules' parameters.

    Args:
        model: The model.
        modules: Its tracked modules, in model order.
        dtype: As if the parameters were held in that one; None: as they are.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, parameter in model.get_submodule(module.name).named_parameters():
            held = parameter.detach().to(dtype=dtype)
            label = f"{module.name}.{name}|{held.dtype}|{tuple(held.shape)}|"
            digest.update(label.encode())
            content = held.cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(content.numpy().data)
    return digest.hexdigest()


def narrower_fingerprints(model: nn.Module, modules: Sequence[TrackedModule]) -> dict[str, str]:
    """The same of the parameters rounded to each narrower dtype, by the dtype's name.

    By them a model is known again that holds the same weights in less precision.
    """
    own = min(p.element_size() for m in modules for p in model.get_submodule(m.name).parameters())
    return {
        str(dtype).removeprefix("torch."): fingerprint(model, modules, dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if dtype.itemsize < own
    }


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear map of a model, by name, in model order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


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


def only_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a linear map was called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def same_tensor(one: tuple[Tensor, int], other: tuple[Tensor, int]) -> bool:
    """Whether two (tensor, version) pairs are the same values in the same memory."""
    (a, a_version), (b, b_version) = one, other
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a_version == b_version
    )


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


def describe(module: Any) -> tuple[str, int, int, bool] | None:
    """Kind, inputs, outputs and whether there is a bias; None of what is no linear map."""
    if isinstance(module, Conv1D):
        return CONV1D, module.nx, module.nf, module.bias is not None
    if isinstance(module, nn.Linear):
        return LINEAR, module.in_features, module.out_features, module.bias is not None
    return None


def all_parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """Every name of each parameter, by its `id`; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


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
