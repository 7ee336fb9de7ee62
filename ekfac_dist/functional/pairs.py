"""Which parameters the recorded pairs belong to, and where those stand among all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ekfac_dist.errors import ModelError
from ekfac_dist.functional.caches import KEY, MLPCache
from ekfac_dist.functional.recording import Recording, Use
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
    """One recorded pair, and the call of a linear map that it is.

    Attributes:
        cache: Number of its cache.
        number: Its number in the cache.
        input: The linear map's input [..., I], without the bias coordinate.
        hidden: Its output [..., O].
        use: The call; None if no Linear or Conv1D gave the hidden vector.
        counted: The cache's rows that count.
        leader: Number, among all pairs, of the first that reads the same input.
    """

    cache: int
    number: int
    input: Tensor
    hidden: Tensor
    use: Use | None
    counted: Tensor | None
    leader: int

    @property
    def edge(self) -> GradientEdge | None:
        """Where the hidden vector's gradient arrives; None if it takes none."""
        if self.use is not None:
            return self.use.edge
        return get_gradient_edge(self.hidden) if self.hidden.requires_grad else None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What has to be the same in every call of `func`."""
        module = None if self.use is None else id(self.use.module)
        return self.cache, module, self.input.shape[-1], self.hidden.shape[-1], self.leader

    def __str__(self) -> str:
        return f"Pair {self.number} of mlp_cache[{self.cache}]"


def recorded_pairs(caches: Sequence[MLPCache], recording: Recording) -> list[RecordedPair]:
    """The pairs of the last call of `func`.

    Raises:
        ModelError: A cache has none, or something else than pairs of tensors; or a pair is not all
            of what passed through its linear map.
    """
    pairs: list[RecordedPair] = []
    for c, cache in enumerate(caches):
        first = len(pairs)
        if not cache.input_hidden_pairs:
            raise _nothing_recorded(c, cache, recording)
        for number, (given, hidden) in enumerate(cache.collect_states()):
            use = recording.use_of(hidden)
            leader = next(
                (k for k in range(first, len(pairs)) if _share(pairs[k].use, use)), len(pairs)
            )
            pair = RecordedPair(c, number, given, hidden, use, cache.counted, leader)
            if use is not None:
                _require_one_use(pair, use, recording)
            pairs.append(pair)
    return pairs


def identify(
    pairs: Sequence[RecordedPair],
    caches: Sequence[MLPCache],
    recording: Recording,
    model: nn.Module | None,
) -> tuple[tuple[TrackedModule, ...], Layout]:
    """The module of each pair, and the layout of all parameters.

    Args:
        pairs: What was recorded.
        caches: The caches.
        recording: Which modules filled them.
        model: The model whose parameters are meant, where that is known.

    Raises:
        ModelError: A pair is no linear map's, or one's whose parameters are not its own; or a
            linear map was recorded twice.
    """
    roots = _roots(caches, recording, model)
    names: dict[int, str] = {}
    shapes: dict[str, torch.Size] = {}
    tied: set[str] = set()
    for prefix, root in roots:
        for name, module in root.named_modules():
            names.setdefault(id(module), prefix + name)
        shapes |= {prefix + name: p.shape for name, p in root.named_parameters()}
        for shared in all_parameter_names(root).values():
            tied.update(prefix + name for name in shared if len(shared) > 1)
    found: list[TrackedModule] = []
    for pair in pairs:
        if pair.use is not None:
            module = _module_of_use(pair, names, found, model)
        elif (
            model is None
            and caches[pair.cache].model is None
            and not _owner(caches[pair.cache], recording)
        ):
            module = _module_of_weight(pair)
            shapes[f"{module.name}.weight"] = torch.Size((module.num_outputs, module.num_inputs))
        else:
            raise ModelError(
                f"{pair}: its hidden vector {list(pair.hidden.shape)} is the output of no Linear "
                "or Conv1D of the module; record (input, hidden vector) with the linear map's own "
                "output, before the activation, and take hooks off that change it."
            )
        _require_own_parameters(module, shapes, tied)
        found.append(module)
    repeated = {m.name for k, m in enumerate(found) if m.name in {o.name for o in found[:k]}}
    if repeated:
        raise ModelError(
            f"Module {min(repeated)} was recorded twice in one call of func; its calls share one "
            "weight and cannot be told apart. Record it once, on the whole batch. (Two caches of "
            "one model record it twice.)"
        )
    order = {name: number for number, name in enumerate(shapes)}
    in_order = sorted(found, key=lambda module: order[module.parameters[0]])
    return tuple(found), Layout(shapes, tuple(in_order))


def _owner(cache: MLPCache, recording: Recording) -> nn.Module | None:
    """The module whose forward fills a cache."""
    return recording.owners.get(id(cache))


def _nothing_recorded(number: int, cache: MLPCache, recording: Recording) -> ModelError:
    if cache.model is None and _owner(cache, recording) is None:
        return ModelError(
            f"mlp_cache[{number}] recorded no pair: it is attached to nothing that func runs. "
            f"Attach it with setattr(module, KEY, cache), KEY being {KEY!r}, to a module whose "
            "class's forward is decorated with manual; or make caches with cache_linears(model)."
        )
    return ModelError(
        f"mlp_cache[{number}] recorded no pair: func does not run its module, or the forward ran "
        "without appending (input, hidden vector) of each linear map to input_hidden_pairs, or its "
        "hooks were removed, or added after torch.compile had compiled it."
    )


def _require_one_use(pair: RecordedPair, use: Use, recording: Recording) -> None:
    given, version = use.input
    if recording.times(use.module) > 1:
        raise ModelError(
            f"{pair}: its linear map ({given.shape[-1]} → {pair.hidden.shape[-1]}) was used more "
            "than once in one call of func; its uses share one weight and cannot be told apart. "
            "Have func call the model once, on the whole batch."
        )
    same_shape = given.shape == pair.input.shape
    if given is not pair.input and not (same_shape and torch.equal(given, pair.input)):
        raise ModelError(
            f"{pair} has another input {list(pair.input.shape)} than its linear map was called "
            f"with, {list(given.shape)}; record what the linear map was given."
        )
    if given._version != version:
        raise ModelError(
            f"{pair}: its input was written to after the linear map had read it, so what it was is "
            "lost; do without the operation in place."
        )


def _roots(
    caches: Sequence[MLPCache], recording: Recording, model: nn.Module | None
) -> list[tuple[str, nn.Module]]:
    """The modules whose parameters are meant, each with what its parameters' names begin with."""
    if model is not None:
        return [("", model)]
    owners = [cache.model or _owner(cache, recording) for cache in caches]
    unique = list({id(owner): owner for owner in owners if owner is not None}.values())
    inner = {id(part) for owner in unique for part in owner.modules() if part is not owner}
    outer = [owner for owner in unique if id(owner) not in inner]
    if len(outer) == 1:
        return [("", outer[0])]
    return [(f"{number}.", owner) for number, owner in enumerate(outer)]


def _module_of_weight(pair: RecordedPair) -> TrackedModule:
    """A weight without a bias and without a module, which a cache that is nobody's recorded."""
    name = f"mlp_cache[{pair.cache}].{pair.number}"
    sizes = pair.input.shape[-1], pair.hidden.shape[-1]
    return TrackedModule(name, LINEAR, *sizes, False, f"{name}.input", f"{name}.output")


def _module_of_use(
    pair: RecordedPair,
    names: Mapping[int, str],
    found: Sequence[TrackedModule],
    model: nn.Module | None,
) -> TrackedModule:
    use = pair.use
    assert use is not None
    described = describe(use.module)
    assert described is not None
    if id(use.module) not in names:
        raise ModelError(
            f"{pair} is of a {type(use.module).__name__} that does not belong to "
            f"{type(model).__name__}, the model whose parameters func takes."
        )
    name = names[id(use.module)]
    leader = name if pair.leader == len(found) else found[pair.leader].name
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


def _share(one: Use | None, other: Use | None) -> bool:
    """Whether two linear maps read one tensor, and both or neither have a bias."""
    if one is None or other is None:
        return False
    biases = [use.module.bias is not None for use in (one, other)]
    return biases[0] == biases[1] and same_tensor(one.input, other.input)
