"""Calls of `func`: its losses checked, its hidden vectors' gradients taken, its rows sorted out."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ekfac_dist.errors import ConfigError, ModelError, NonFiniteError
from ekfac_dist.functional.batching import Batches
from ekfac_dist.functional.caches import MLPCache
from ekfac_dist.functional.checks import require_apart, require_whole
from ekfac_dist.functional.pairs import RecordedPair, identify, recorded_pairs
from ekfac_dist.functional.recording import Recording
from ekfac_dist.functional.vectors import Layout
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.runtime.progress import Progress


@dataclass(frozen=True)
class _Positions:
    """A batch's rows in one module; see `Positions`."""

    lengths: tuple[int, ...]
    real: Tensor | None

    @property
    def num_positions(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class ModuleCapture:
    """What passed through one module in one call of `func`."""

    module: TrackedModule
    acts_Mi: Tensor
    grads_MO: Tensor
    positions: _Positions


class Calls:
    """Calls `func` batch by batch, and tells what it recorded.

    Attributes:
        modules: The recorded modules, in the order of recording; known after the first call.
        layout: All parameters; likewise.
    """

    modules: tuple[TrackedModule, ...]
    layout: Layout
    dtype: torch.dtype
    device: torch.device

    def __init__(
        self,
        func: Callable[..., Tensor],
        batches: Batches,
        caches: Sequence[MLPCache],
        model: nn.Module | None,
    ) -> None:
        self._func = func
        self._batches = batches
        self._caches = caches
        self._model = model
        self._recording = Recording()
        self._kinds: list[tuple[Any, ...]] | None = None
        self._losses_each: int | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Lends the caches the recording, with dropout off; everything is as before afterwards."""
        known = [cache.model for cache in self._caches if cache.model is not None]
        with ExitStack() as stack:
            if self._model is not None:
                stack.enter_context(self._recording.watching(self._model))
                known.append(self._model)
            stack.enter_context(self._recording.evaluating(known))
            for number, cache in enumerate(self._caches):
                if cache.counted is not None:
                    raise ConfigError(
                        f"counted of mlp_cache[{number}] was set before func was called; func has "
                        "to set it in every call, for the batch at hand."
                    )
            try:
                for cache in self._caches:
                    cache.recording = self._recording
                yield
            finally:
                for cache in self._caches:
                    cache.recording = cache.counted = None
                    cache.clear()
                self._recording.uses.clear()

    def each(self, name: str, show: bool) -> Iterator[list[ModuleCapture]]:
        """What each call of `func` recorded, over all batches."""
        total = self._batches.num_examples
        with Progress(name, total=total, unit="examples", enabled=show) as progress:
            for number, (arguments, size) in enumerate(self._batches):
                yield self._call(number, arguments, size)
                progress.update(size)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _call(self, number: int, arguments: tuple[Any, ...], size: int) -> list[ModuleCapture]:
        for cache in self._caches:
            cache.clear()
            cache.counted = None
        if self._kinds is None:
            arguments = self._differentiable(arguments)
        with self._recording.call(closely=self._kinds is None):
            losses = self._func(*arguments)
        self._check_losses(losses, number, size)
        pairs = recorded_pairs(self._caches, self._recording)
        kinds = [pair.kind for pair in pairs]
        is_first = self._kinds is None
        if is_first:
            self.modules, self.layout = identify(pairs, self._caches, self._recording, self._model)
            self.device = pairs[0].hidden.device
            wide = any(pair.hidden.dtype == torch.float64 for pair in pairs)
            self.dtype = torch.float64 if wide else torch.float32
            self._kinds = kinds
        elif kinds != self._kinds:
            raise ModelError(
                f"Call {number + 1} of func recorded other pairs than the first one: "
                f"{_sizes(kinds)}, not {_sizes(self._kinds or [])}. Every call must record the "
                "same modules, in one order, and with the same inputs shared."
            )
        edges = self._edges(pairs, losses)
        weights: list[Tensor] = []
        if is_first:
            require_apart(losses, size, self.modules, edges)
            weights = [
                p.use.weight for p in pairs if p.use is not None and p.use.weight.requires_grad
            ]
        inputs: list[Any] = [*edges, *weights]
        with torch.autocast(losses.device.type, enabled=False):  # it is for forwards alone
            gradients = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
        of_weights = dict(zip(map(id, weights), gradients[len(edges) :], strict=True))
        rows = []
        for module, pair, gradient in zip(self.modules, pairs, gradients, strict=False):
            if gradient is None:
                _raise_no_gradient(module.name)
            rows.append(self._rows(module, pair, gradient, size))
        self._require_finite(losses, rows, number)
        if is_first:
            for module, pair, gradient in zip(self.modules, pairs, gradients, strict=False):
                if pair.use is not None:
                    require_whole(module, pair.use, gradient, of_weights.get(id(pair.use.weight)))
        return rows

    def _edges(self, pairs: Sequence[RecordedPair], losses: Tensor) -> list[GradientEdge]:
        edges = []
        for module, pair in zip(self.modules, pairs, strict=True):
            edge = pair.edge
            if edge is None or not losses.requires_grad:
                _raise_no_gradient(module.name)
            edges.append(edge)
        return edges

    def _differentiable(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of which the uncut ones, such as flat parameters, take gradients."""
        return tuple(
            value.detach().requires_grad_()
            if dim is None and isinstance(value, Tensor) and value.is_floating_point()
            else value
            for value, dim in zip(arguments, self._batches.in_dims, strict=True)
        )

    def _check_losses(self, losses: Any, number: int, size: int) -> None:
        wanted = f"[{size} · t], t losses for each of the {size} examples, example after example"
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            given = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
            raise ConfigError(f"func returned {given}; it must return a tensor of shape {wanted}.")
        shape = list(losses.shape)
        if losses.ndim != 1 or not shape[0] or shape[0] % size:
            raise ConfigError(
                f"func returned losses of shape {shape} in call {number + 1}; for a batch of "
                f"{size} their shape must be {wanted}: [{size}], [{2 * size}], … Losses that are "
                "already averaged or summed cannot be taken apart (reduction='none' helps)."
            )
        each = shape[0] // size
        if self._losses_each is None:
            self._losses_each = each
            if each > 1 and not any(dim is not None for dim in self._batches.in_dims):
                warnings.warn(
                    f"Nothing is cut into batches, and func returned {shape[0]} losses where "
                    f"batch_size is {size}: they are taken for {size} sequence(s) of {each}. If "
                    "they are of more examples than that, batch_size has to be their number.",
                    stacklevel=2,
                )
        elif each != self._losses_each:
            raise ConfigError(
                f"func returned losses of shape {shape} for {size} examples in call {number + 1}, "
                f"t = {each} for each, and t = {self._losses_each} in the first call; t must be "
                "the same in every call."
            )

    def _rows(
        self, module: TrackedModule, pair: RecordedPair, gradient: Tensor, size: int
    ) -> ModuleCapture:
        num_rows = pair.hidden.shape[:-1].numel()
        lead = pair.hidden.shape[0] if pair.hidden.ndim > 2 else num_rows
        if num_rows % size or lead % size:
            raise ModelError(
                f"Module {module.name} has hidden vectors {list(pair.hidden.shape)} for a batch of "
                f"{size} examples; which row is which example's cannot be told. Examples must be "
                "the first dimension, and have equally many rows."
            )
        lengths, real = (num_rows // size,) * size, None
        if pair.counted is not None:
            if pair.counted.numel() != num_rows or pair.counted.dtype != torch.bool:
                raise ModelError(
                    f"counted of mlp_cache[{pair.cache}] is of {pair.counted.dtype} and has shape "
                    f"{list(pair.counted.shape)}; it must be boolean, one for each row of inputs "
                    f"of shape {list(pair.input.shape)}."
                )
            real = pair.counted.flatten().nonzero().squeeze(-1).to(pair.hidden.device)
            lengths = tuple(pair.counted.reshape(size, -1).sum(-1).tolist())

        def rows_of(tensor: Tensor) -> Tensor:
            rows = tensor.detach().reshape(num_rows, -1)
            return (rows if real is None else rows[real]).to(self.device, self.dtype)

        return ModuleCapture(
            module, rows_of(pair.input), rows_of(gradient), _Positions(lengths, real)
        )

    def _require_finite(self, losses: Tensor, rows: Sequence[ModuleCapture], number: int) -> None:
        seen = {"the losses": losses}
        seen |= {f"the input of module {r.module.name}": r.acts_Mi for r in rows}
        seen |= {f"the output-gradient of module {r.module.name}": r.grads_MO for r in rows}
        finite = torch.stack([t.detach().isfinite().all().to(self.device) for t in seen.values()])
        if not finite.all():
            where = list(seen)[int(finite.logical_not().nonzero()[0])]
            first = number * self._batches.batch_size
            raise NonFiniteError(
                f"NaN or infinity in {where}, in call {number + 1} of func (examples {first} and "
                "on). Check the model's weights and that example, or use a wider dtype."
            )


def _sizes(kinds: Sequence[tuple[Any, ...]]) -> str:
    return ", ".join(f"{inputs} → {outputs}" for _, _, inputs, outputs, _ in kinds)


def _raise_no_gradient(name: str) -> NoReturn:
    raise ModelError(
        f"The hidden vector of module {name} received no gradient: func's losses do not depend on "
        "it through differentiable operations. no_grad and detach do this, so does reentrant "
        "gradient checkpointing (use_reentrant=False helps), and a forward that leaves the "
        "recorded vector aside; do without, or do not record that module."
    )
