"""Identifies the module and the parameters of each recorded pair.

A pair is matched by its hidden vector to the call of the linear map that returned it, and that
linear map to its name in the model. Hidden vectors that are no linear map's output are accepted
only from caches attached to no module; their weights get names of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ekfac_dist.errors import ModelError
from ekfac_dist.functional.caches import KEY, MLPCache
from ekfac_dist.functional.recording import LinearCall, Recording
from ekfac_dist.functional.vectors import Layout
from ekfac_dist.models.modules import (
    LINEAR,
    TrackedModule,
    all_parameter_names,
    describe,
    same_tensor,
)


@dataclass(frozen=True)
class RecordedPair:
    """One recorded pair, with the call of the linear map that it was recorded from.

    Attributes:
        cache: Index of its cache.
        index: Its index in the cache.
        input: The linear map's input [..., I], without the bias coordinate.
        hidden: The linear map's output [..., O].
        call: The call; None if no Linear or Conv1D returned the hidden vector.
        counted: The cache's mask of counted positions.
        leader: Index, among the pairs of all caches, of the first pair of this cache with the same
            input.
    """

    cache: int
    index: int
    input: Tensor
    hidden: Tensor
    call: LinearCall | None
    counted: Tensor | None
    leader: int

    @property
    def edge(self) -> GradientEdge | None:
        """The gradient edge of the hidden vector; None if it takes no gradient."""
        if self.call is not None:
            return self.call.edge
        return get_gradient_edge(self.hidden) if self.hidden.requires_grad else None

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be equal in every call of `func`: cache, module, I, O and leader."""
        module = None if self.call is None else id(self.call.module)
        return self.cache, module, self.input.shape[-1], self.hidden.shape[-1], self.leader

    def __str__(self) -> str:
        return f"Pair {self.index} of mlp_cache[{self.cache}]"


def recorded_pairs(caches: Sequence[MLPCache], recording: Recording) -> list[RecordedPair]:
    """The pairs that all caches recorded in the last call of `func`.

    Raises:
        ModelError: If a cache has none, or something other than pairs of tensors; or if a pair's
            linear map was called more than once, had another input, or had its input overwritten.
    """
    pairs: list[RecordedPair] = []
    for c, cache in enumerate(caches):
        first = len(pairs)
        if not cache.input_hidden_pairs:
            raise _nothing_recorded(c, cache, recording)
        for index, (inputs, hidden) in enumerate(cache.collect_states()):
            call = recording.call_with_output(hidden)
            leader = next(
                (k for k in range(first, len(pairs)) if _share_input(pairs[k].call, call)),
                len(pairs),
            )
            pair = RecordedPair(c, index, inputs, hidden, call, cache.counted, leader)
            if call is not None:
                _require_single_call(pair, call, recording)
            pairs.append(pair)
    return pairs


def identify(
    pairs: Sequence[RecordedPair],
    caches: Sequence[MLPCache],
    recording: Recording,
    model: nn.Module | None,
) -> tuple[tuple[TrackedModule, ...], Layout]:
    """Finds the module of each pair, and the layout of all parameters.

    Args:
        pairs: The pairs of the first call of `func`.
        caches: The caches that hold them.
        recording: The observed calls of linear maps and the modules that fill the caches.
        model: The model whose parameters vectors have; None if it has to be found from the caches.

    Returns:
        The modules in the order of the pairs, and the layout of the model's parameters.

    Raises:
        ModelError: If a pair does not belong to a linear map with parameters of its own, or a
            linear map was recorded twice.
    """
    roots = _roots(caches, recording, model)
    names: dict[int, str] = {}
    shapes: dict[str, torch.Size] = {}
    tied: set[str] = set()
    for prefix, root in roots:
        for name, submodule in root.named_modules():
            names.setdefault(id(submodule), prefix + name)
        shapes |= {prefix + name: p.shape for name, p in root.named_parameters()}
        for shared in all_parameter_names(root).values():
            tied.update(prefix + name for name in shared if len(shared) > 1)
    modules: list[TrackedModule] = []
    for pair in pairs:
        if pair.call is not None:
            module = _module_of_call(pair, names, modules, model)
        elif (
            model is None
            and caches[pair.cache].model is None
            and not _owner(caches[pair.cache], recording)
        ):
            module = _module_without_call(pair)
            shapes[f"{module.name}.weight"] = torch.Size((module.num_outputs, module.num_inputs))
        else:
            raise ModelError(
                f"{pair}: its hidden vector {list(pair.hidden.shape)} is the output of no Linear "
                "or Conv1D of the module; record (input, hidden vector) with the linear map's own "
                "output, before the activation, and take hooks off that change it."
            )
        _require_own_parameters(module, shapes, tied)
        modules.append(module)
    repeated = {m.name for k, m in enumerate(modules) if m.name in {o.name for o in modules[:k]}}
    if repeated:
        raise ModelError(
            f"Module {min(repeated)} was recorded twice in one call of func; its calls share one "
            "weight and cannot be told apart. Record it once, on the whole batch. (Two caches of "
            "one model record it twice.)"
        )
    order = {name: index for index, name in enumerate(shapes)}
    in_order = sorted(modules, key=lambda module: order[module.parameters[0]])
    return tuple(modules), Layout(shapes, tuple(in_order))


def _owner(cache: MLPCache, recording: Recording) -> nn.Module | None:
    """The module whose decorated forward fills a cache; None if there is none."""
    return recording.owners.get(id(cache))


def _nothing_recorded(index: int, cache: MLPCache, recording: Recording) -> ModelError:
    if cache.model is None and _owner(cache, recording) is None:
        return ModelError(
            f"mlp_cache[{index}] recorded no pair: it is attached to nothing that func runs. "
            f"Attach it with setattr(module, KEY, cache), KEY being {KEY!r}, to a module whose "
            "class's forward is decorated with manual; or make caches with cache_linears(model)."
        )
    return ModelError(
        f"mlp_cache[{index}] recorded no pair: func does not run its module, or the forward ran "
        "without appending (input, hidden vector) of each linear map to input_hidden_pairs, or its "
        "hooks were removed, or added after torch.compile had compiled it."
    )


def _require_single_call(pair: RecordedPair, call: LinearCall, recording: Recording) -> None:
    """Checks that a pair is all that passed through its linear map, unchanged since."""
    inputs, version = call.input
    if recording.num_calls(call.module) > 1:
        raise ModelError(
            f"{pair}: its linear map ({inputs.shape[-1]} → {pair.hidden.shape[-1]}) was used more "
            "than once in one call of func; its uses share one weight and cannot be told apart. "
            "Have func call the model once, on the whole batch."
        )
    same_shape = inputs.shape == pair.input.shape
    if inputs is not pair.input and not (same_shape and torch.equal(inputs, pair.input)):
        raise ModelError(
            f"{pair} has another input {list(pair.input.shape)} than its linear map was called "
            f"with, {list(inputs.shape)}; record what the linear map was given."
        )
    if inputs._version != version:
        raise ModelError(
            f"{pair}: its input was written to after the linear map had read it, so what it was is "
            "lost; do without the operation in place."
        )


def _roots(
    caches: Sequence[MLPCache], recording: Recording, model: nn.Module | None
) -> list[tuple[str, nn.Module]]:
    """The modules whose parameters vectors have, each with the prefix of its parameters' names.

    Without a model these are the outermost modules that fill caches.
    """
    if model is not None:
        return [("", model)]
    owners = [cache.model or _owner(cache, recording) for cache in caches]
    unique = list({id(owner): owner for owner in owners if owner is not None}.values())
    inner = {id(part) for owner in unique for part in owner.modules() if part is not owner}
    outer = [owner for owner in unique if id(owner) not in inner]
    if len(outer) == 1:
        return [("", outer[0])]
    return [(f"{index}.", owner) for index, owner in enumerate(outer)]


def _module_without_call(pair: RecordedPair) -> TrackedModule:
    """A linear map without a bias, named after the cache, which is attached to no module."""
    name = f"mlp_cache[{pair.cache}].{pair.index}"
    sizes = pair.input.shape[-1], pair.hidden.shape[-1]
    return TrackedModule(name, LINEAR, *sizes, False, f"{name}.input", f"{name}.output")


def _module_of_call(
    pair: RecordedPair,
    names: Mapping[int, str],
    earlier: Sequence[TrackedModule],
    model: nn.Module | None,
) -> TrackedModule:
    """The linear map that was called.

    Args:
        pair: The pair.
        names: Name of every module of the model, by the module's `id`.
        earlier: The modules of the pairs before this one.
        model: The model, for an error.
    """
    call = pair.call
    assert call is not None
    described = describe(call.module)
    assert described is not None
    if id(call.module) not in names:
        raise ModelError(
            f"{pair} is of a {type(call.module).__name__} that does not belong to "
            f"{type(model).__name__}, the model whose parameters func takes."
        )
    name = names[id(call.module)]
    leader = name if pair.leader == len(earlier) else earlier[pair.leader].name
    return TrackedModule(name, *described, f"{leader}.input", f"{name}.output")


def _require_own_parameters(
    module: TrackedModule, shapes: Mapping[str, torch.Size], tied: set[str]
) -> None:
    weight = f"{module.name}.weight"
    matrix = (module.num_outputs, module.num_inputs)
    if shapes.get(weight) != (matrix if module.kind == LINEAR else matrix[::-1]):
        raise ModelError(
            f"Module {module.name} has no parameter of its own that is its weight, a matrix of "
            f"{matrix[0]} × {matrix[1]}: it is computed, packed or tied. Do not record that module."
        )
    if tied.intersection(module.parameters):
        raise ModelError(
            f"Module {module.name} is tied: its parameters are another module's too, so their "
            "gradient is no single module's. Do not record that module."
        )


def _share_input(first: LinearCall | None, second: LinearCall | None) -> bool:
    """Whether two linear maps read the same tensor, and both or neither have a bias."""
    if first is None or second is None:
        return False
    biases = [call.module.bias is not None for call in (first, second)]
    return biases[0] == biases[1] and same_tensor(first.input, second.input)
