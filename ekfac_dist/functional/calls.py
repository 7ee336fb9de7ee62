"""Calls `func` on each batch, and captures the inputs and output gradients of its linear maps.

Checks the losses and what was recorded, and takes the losses' gradients with respect to the hidden
vectors. Knows no covariance.
"""

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
from ekfac_dist.functional.checks import require_independent_examples, require_plain_linear
from ekfac_dist.functional.pairs import RecordedPair, identify, recorded_pairs
from ekfac_dist.functional.recording import Recording
from ekfac_dist.functional.vectors import Layout
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.runtime.progress import Progress


@dataclass(frozen=True)
class BatchPositions:
    """The counted positions of one batch in one module.

    Attributes:
        lengths: Number of counted positions of each example.
        real: Indices of the counted positions among all; None if all count, so that captured
            tensors share memory with the model's.
    """

    lengths: tuple[int, ...]
    real: Tensor | None
    sender = 0

    @property
    def are_copies(self) -> bool:
        """Whether captured tensors are copies."""
        return self.real is not None

    @property
    def num_positions(self) -> int:
        """M, the number of counted positions."""
        return sum(self.lengths)


@dataclass(frozen=True)
class ModuleCapture:
    """Inputs and output gradients of one module in one call of `func`, at counted positions.

    Attributes:
        module: The module.
        acts_Mi: Its inputs, example after example, without the bias coordinate.
        grads_MO: Gradients of the summed losses with respect to its outputs.
        positions: How many positions each example has.
    """

    module: TrackedModule
    acts_Mi: Tensor
    grads_MO: Tensor
    positions: BatchPositions


class Calls:
    """The calls of `func` over all batches; its attributes are set by the first call.

    Args:
        func: Takes a batch's arguments and returns its losses [examples · t].
        batches: The arguments, batch by batch.
        caches: The caches that `func` fills.
        model: The model whose parameters vectors have; None if it has to be found from the caches.

    Attributes:
        modules: The recorded modules, in the order of recording.
        layout: The order and shapes of all parameters.
        dtype: Dtype of the captured tensors: float64 if any hidden vector has it, else float32.
        device: Device of the first hidden vector, to which all captures are moved.
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
        self._signatures: list[tuple[Any, ...]] | None = None
        self._losses_per_example: int | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Context in which the caches are observed and dropout is off.

        At its end the modules' modes are restored, and the caches are empty and no longer observed.

        Raises:
            ConfigError: If a cache's `counted` was set outside of `func`.
        """
        models = [cache.model for cache in self._caches if cache.model is not None]
        with ExitStack() as stack:
            if self._model is not None:
                stack.enter_context(self._recording.watching(self._model))
                models.append(self._model)
            stack.enter_context(self._recording.evaluating(models))
            for index, cache in enumerate(self._caches):
                if cache.counted is not None:
                    raise ConfigError(
                        f"counted of mlp_cache[{index}] was set before func was called; func has "
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
                self._recording.linear_calls.clear()

    def captures(self, stage: str, show_progress: bool) -> Iterator[list[ModuleCapture]]:
        """Calls `func` on every batch and yields its captures, one for each module.

        Args:
            stage: Name of the pass, for the progress bar.
            show_progress: Whether to show one.

        Raises:
            ConfigError: If `func` returns no losses of the shape [examples · t].
            ModelError: If what it records cannot be used.
            NonFiniteError: If a loss, an input or a gradient is NaN or infinite.
        """
        total = self._batches.num_examples
        with Progress(stage, total=total, unit="examples", enabled=show_progress) as progress:
            for number, (arguments, size) in enumerate(self._batches):
                yield self._call(number, arguments, size)
                progress.update(size)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _call(self, number: int, arguments: tuple[Any, ...], size: int) -> list[ModuleCapture]:
        for cache in self._caches:
            cache.clear()
            cache.counted = None
        is_first = self._signatures is None
        if is_first:
            arguments = self._differentiable(arguments)
        with self._recording.call(checks_linearity=is_first):
            losses = self._func(*arguments)
        self._check_losses(losses, number, size)
        pairs = recorded_pairs(self._caches, self._recording)
        signatures = [pair.signature for pair in pairs]
        if is_first:
            self.modules, self.layout = identify(pairs, self._caches, self._recording, self._model)
            self.device = pairs[0].hidden.device
            is_double = any(pair.hidden.dtype == torch.float64 for pair in pairs)
            self.dtype = torch.float64 if is_double else torch.float32
            self._signatures = signatures
        elif signatures != self._signatures:
            raise ModelError(
                f"Call {number + 1} of func recorded other pairs than the first one: "
                f"{_sizes(signatures)}, not {_sizes(self._signatures or [])}. Every call must "
                "record the same modules, in one order, and with the same inputs shared."
            )
        edges = self._edges(pairs, losses)
        weights: list[Tensor] = []
        if is_first:
            require_independent_examples(losses, size, self.modules, edges)
            calls = [pair.call for pair in pairs if pair.call is not None]
            weights = [call.weight for call in calls if call.weight.requires_grad]
        inputs: list[Any] = [*edges, *weights]
        with torch.autocast(losses.device.type, enabled=False):  # meant for the forward only
            gradients = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
        weight_gradients = dict(zip(map(id, weights), gradients[len(edges) :], strict=True))
        captures = []
        for module, pair, gradient in zip(self.modules, pairs, gradients, strict=False):
            if gradient is None:
                _raise_no_gradient(module.name)
            captures.append(self._capture(module, pair, gradient, size))
        self._require_finite(losses, captures, number)
        if is_first:
            for module, pair, gradient in zip(self.modules, pairs, gradients, strict=False):
                if pair.call is not None:
                    weight_gradient = weight_gradients.get(id(pair.call.weight))
                    require_plain_linear(module, pair.call, gradient, weight_gradient)
        return captures

    def _edges(self, pairs: Sequence[RecordedPair], losses: Tensor) -> list[GradientEdge]:
        edges = []
        for module, pair in zip(self.modules, pairs, strict=True):
            edge = pair.edge
            if edge is None or not losses.requires_grad:
                _raise_no_gradient(module.name)
            edges.append(edge)
        return edges

    def _differentiable(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, where uncut floating-point ones (flat parameters) require gradients."""
        return tuple(
            value.detach().requires_grad_()
            if dim is None and isinstance(value, Tensor) and value.is_floating_point()
            else value
            for value, dim in zip(arguments, self._batches.in_dims, strict=True)
        )

    def _check_losses(self, losses: Any, number: int, size: int) -> None:
        expected = f"[{size} · t], t losses for each of the {size} examples, example after example"
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
            raise ConfigError(f"func returned {kind}; it must return a tensor of shape {expected}.")
        shape = list(losses.shape)
        if losses.ndim != 1 or not shape[0] or shape[0] % size:
            raise ConfigError(
                f"func returned losses of shape {shape} in call {number + 1}; for a batch of "
                f"{size} their shape must be {expected}: [{size}], [{2 * size}], … Losses that are "
                "already averaged or summed cannot be taken apart (reduction='none' helps)."
            )
        losses_per_example = shape[0] // size
        if self._losses_per_example is None:
            self._losses_per_example = losses_per_example
            if losses_per_example > 1 and not any(dim is not None for dim in self._batches.in_dims):
                warnings.warn(
                    f"Nothing is cut into batches, and func returned {shape[0]} losses where "
                    f"batch_size is {size}: they are taken for {size} sequence(s) of "
                    f"{losses_per_example}. If they are of more examples than that, batch_size "
                    "has to be their number.",
                    stacklevel=2,
                )
        elif losses_per_example != self._losses_per_example:
            raise ConfigError(
                f"func returned losses of shape {shape} for {size} examples in call {number + 1}, "
                f"t = {losses_per_example} for each, and t = {self._losses_per_example} in the "
                "first call; t must be the same in every call."
            )

    def _capture(
        self, module: TrackedModule, pair: RecordedPair, gradient: Tensor, size: int
    ) -> ModuleCapture:
        num_positions = pair.hidden.shape[:-1].numel()
        first_dimension = pair.hidden.shape[0] if pair.hidden.ndim > 2 else num_positions
        if num_positions % size or first_dimension % size:
            raise ModelError(
                f"Module {module.name} has hidden vectors {list(pair.hidden.shape)} for a batch of "
                f"{size} examples; which row is which example's cannot be told. Examples must be "
                "the first dimension, and have equally many rows."
            )
        lengths, real = (num_positions // size,) * size, None
        if pair.counted is not None:
            if pair.counted.numel() != num_positions or pair.counted.dtype != torch.bool:
                raise ModelError(
                    f"counted of mlp_cache[{pair.cache}] is of {pair.counted.dtype} and has shape "
                    f"{list(pair.counted.shape)}; it must be boolean, one for each row of inputs "
                    f"of shape {list(pair.input.shape)}."
                )
            real = pair.counted.flatten().nonzero().squeeze(-1).to(pair.hidden.device)
            lengths = tuple(pair.counted.reshape(size, -1).sum(-1).tolist())

        def counted_positions(tensor: Tensor) -> Tensor:
            vectors = tensor.detach().reshape(num_positions, -1)
            return (vectors if real is None else vectors[real]).to(self.device, self.dtype)

        return ModuleCapture(
            module,
            counted_positions(pair.input),
            counted_positions(gradient),
            BatchPositions(lengths, real),
        )

    def _require_finite(
        self, losses: Tensor, captures: Sequence[ModuleCapture], number: int
    ) -> None:
        tensors = {"the losses": losses}
        tensors |= {f"the input of module {c.module.name}": c.acts_Mi for c in captures}
        tensors |= {f"the output-gradient of module {c.module.name}": c.grads_MO for c in captures}
        finite = torch.stack(
            [tensor.detach().isfinite().all().to(self.device) for tensor in tensors.values()]
        )
        if not finite.all():
            where = list(tensors)[int(finite.logical_not().nonzero()[0])]
            first = number * self._batches.batch_size
            raise NonFiniteError(
                f"NaN or infinity in {where}, in call {number + 1} of func (examples {first} and "
                "on). Check the model's weights and that example, or use a wider dtype."
            )


def _sizes(signatures: Sequence[tuple[Any, ...]]) -> str:
    """Input and output sizes of pairs, for an error; see `RecordedPair.signature`."""
    return ", ".join(f"{inputs} → {outputs}" for _, _, inputs, outputs, _ in signatures)


def _raise_no_gradient(name: str) -> NoReturn:
    raise ModelError(
        f"The hidden vector of module {name} received no gradient: func's losses do not depend on "
        "it through differentiable operations. no_grad and detach do this, so does reentrant "
        "gradient checkpointing (use_reentrant=False helps), and a forward that leaves the "
        "recorded vector aside; do without, or do not record that module."
    )
