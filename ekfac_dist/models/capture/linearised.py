"""A batch's forward, linearised in the tracked modules' weights.

With V a change of a module's weight [O, I] and a its input (a 1 appended where there is a bias),
its output changes by V a at each counted position. J takes the changes of all modules together to
that of the logits; parameters are frozen, so no weight gradient is ever computed:

    J V     one derivative of a backward: with g(w), the gradients of the modules' outputs from a
            backward that starts with w, ⟨w, J V⟩ = Σ over modules and positions of ⟨g(w), V a⟩ for
            every w, so J V is the gradient of the right side with respect to w
    Jᵀ u    one backward that starts with u: g aᵀ summed over positions, for each module

Both use the graph of one forward, which any number of products share. Padding is perturbed by
nothing, and an expert only at the positions that are routed to it.

    with Linearisation(model, modules, torch.float64, task) as linearisation:
        batch = linearisation.of(batch)
        batch.log_probability_tangents({name: V_OI})        # [L]
        batch.add_gauss_newton_products_({name: V_QOI}, into={name: sums_QOI})
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from ekfac_dist.curvature.float32_products import precisely
from ekfac_dist.curvature.products import with_bias
from ekfac_dist.data.batches import (
    Batch,
    CapturedPositions,
    Grid,
    LabelPlaces,
    RoutedPositions,
)
from ekfac_dist.errors import ModelError, first_line
from ekfac_dist.models.capture import labelled_logits
from ekfac_dist.models.capture.checkpointing import LayerCall
from ekfac_dist.models.capture.hooks import Capture
from ekfac_dist.models.capture.labelled_logits import LabelledLogits
from ekfac_dist.models.capture.observers import NullObserver, owned
from ekfac_dist.models.capture.second_derivative import twice_differentiable
from ekfac_dist.models.capture.tasks import CAUSAL_LM, Task
from ekfac_dist.models.capture.tracked_calls import TrackedCall
from ekfac_dist.models.modules import TrackedModule

# Most memory, in bytes, of the tangents that are held at a time.
TANGENT_BYTES = 2**28
REFINEMENT_ADVICE = "products with the Gauss–Newton matrix need; set refine.method: none"


@dataclass(frozen=True)
class ModuleCall:
    """A tracked module's part in a forward.

    Attributes:
        module: The module.
        acts_MI: Its input at counted positions, with the bias coordinate.
        output: Its output, in the graph.
        positions: Which of the output's vectors belong to counted positions.
    """

    module: TrackedModule
    acts_MI: Tensor
    output: Tensor
    positions: Grid | RoutedPositions

    def tangent(self, vector_OI: Tensor) -> Tensor:
        """The output's change, shaped like it, for a change of the weight; 0 at padding."""
        rows_MO = self.acts_MI @ vector_OI.to(self.acts_MI.device).T
        real = self.positions.real
        if real is None:
            return rows_MO.to(self.output.dtype).view(self.output.shape)
        tangent = torch.zeros_like(self.output, requires_grad=False)
        tangent.view(-1, rows_MO.shape[-1])[real.to(rows_MO.device)] = rows_MO.to(tangent.dtype)
        return tangent

    def grads_MO(self, gradient: Tensor) -> Tensor:
        """The output's gradient at counted positions, in the inputs' dtype."""
        rows = gradient.reshape(-1, self.module.num_outputs)
        if self.positions.real is not None:
            rows = rows[self.positions.real.to(rows.device)]
        return rows.to(self.acts_MI.dtype)


class Linearisation(Capture):
    """Linearises batches of a prepared model; its hooks are removed when the context ends.

    Args:
        model: A prepared model.
        modules: The tracked modules, in model order.
        dtype: Of the weights' changes and gradients, float32 or float64.
        task: What the model is asked, and what its loss is; it needs logits.
        advice: How the error against a backward that cannot be differentiated goes on: what needs
            it, and what would do.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[TrackedModule],
        dtype: torch.dtype,
        task: Task = CAUSAL_LM,
        advice: str = REFINEMENT_ADVICE,
    ) -> None:
        self._advice = advice
        self._acts = _Inputs()
        super().__init__(model, modules, self._acts, dtype, task)
        self._outputs: dict[str, Tensor] = {}

    def __enter__(self) -> "Linearisation":
        self._stack.enter_context(twice_differentiable(self.model))
        super().__enter__()
        return self

    @torch.enable_grad()
    def of(self, batch: Batch) -> "LinearisedBatch":
        """Runs a batch's forward.

        Args:
            batch: The batch, on the model's device.

        Raises:
            ModelError: As of `Capture.run`; or if the model's backward cannot be differentiated.
        """
        self._outputs, self._acts.by_input = {}, {}
        with self._forward_of(batch):
            logits = self.task.labelled_logits(self.model, batch)
            self._require_all(self._everywhere - self._called, "was not used in this forward")
            calls = [
                ModuleCall(
                    module,
                    self._acts.by_input[module.input],
                    self._outputs[module.name],
                    self._positions_of_input[module.name],
                )
                for module in self.modules
                if module.name in self._outputs
            ]
        return LinearisedBatch(calls, logits, self._advice)

    def _watch(self, call: TrackedCall, output: Tensor, layer_call: LayerCall | None) -> Tensor:
        """Keeps each module's output, in the graph."""
        if call.sizes is None:
            self._outputs[call.name] = output
            return output
        parts = output.split(list(call.sizes))
        for module in call.modules:
            self._outputs[module.name] = parts[module.fused[1]]
        return torch.cat(parts)


class _Inputs(NullObserver):
    """Keeps inputs, with their bias coordinate, by the name of the input's factor."""

    def __init__(self) -> None:
        self.by_input: dict[str, Tensor] = {}

    def on_input(
        self, module: TrackedModule, acts_Mi: Tensor, positions: CapturedPositions
    ) -> None:
        """Keeps an input."""
        acts_MI = with_bias(acts_Mi) if module.bias else owned(acts_Mi, positions)
        self.by_input[module.input] = acts_MI


class LinearisedBatch:
    """A batch's forward with its graph, in which both products with J are computed.

    Args:
        calls: The part of every tracked module that has counted positions.
        logits: The logits of the labelled positions.
        advice: As of `Linearisation`.

    Raises:
        ModelError: If the model's backward cannot be differentiated.
    """

    def __init__(
        self, calls: Sequence[ModuleCall], logits: LabelledLogits, advice: str = REFINEMENT_ADVICE
    ) -> None:
        self._logits, self._start, self._advice = logits, logits.start, advice
        self._calls: list[ModuleCall] = []
        self._pulled: list[Tensor] = []
        self._cotangent = torch.zeros_like(self._start, requires_grad=True)
        if not self._start.requires_grad:
            return  # no tracked module, for want of experts' positions
        try:
            pulled = torch.autograd.grad(
                self._start,
                [call.output for call in calls],
                self._cotangent,
                create_graph=True,
                allow_unused=True,
            )
        except RuntimeError as error:
            _refuse(error, self._advice)
        for call, gradient in zip(calls, pulled, strict=True):
            # None: what an expert gives does not reach a labelled position.
            if gradient is not None and gradient.requires_grad:
                self._calls.append(call)
                self._pulled.append(gradient)

    @property
    def num_labels(self) -> int:
        """L, the number of labelled positions."""
        return self._logits.num_labels

    @property
    def labels(self) -> LabelPlaces:
        """Where the labelled positions are."""
        return self._logits.labels

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the labels: [B, T], or [B] where each is a whole sequence's."""
        return tuple(self._start.shape[:-1])

    def tangent(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """J V, up to the tensor at which the graph ends: logits, or a chunked head's hidden states.

        Args:
            vectors: V by module's name [O, I]; modules without one do not change, and what lies
                below all that do is not computed.

        Raises:
            ModelError: If the model's backward cannot be differentiated.
        """
        changed = [k for k, call in enumerate(self._calls) if call.module.name in vectors]
        if not changed:
            return torch.zeros_like(self._start)
        calls, pulled = zip(*((self._calls[k], self._pulled[k]) for k in changed), strict=True)
        with torch.no_grad(), precisely(self._start.device):
            tangents = [call.tangent(vectors[call.module.name]) for call in calls]
        try:
            with torch.autocast(self._start.device.type, enabled=False):  # meant for forwards
                (tangent,) = torch.autograd.grad(
                    pulled, self._cotangent, tangents, retain_graph=True
                )
        except RuntimeError as error:
            _refuse(error, self._advice)
        return tangent

    def gradients(self, cotangent: Tensor) -> Iterator[tuple[TrackedModule, Tensor, Tensor]]:
        """Jᵀ u as pairs of vectors: u's gradient of a module's weight is grads_MOᵀ acts_MI.

        Args:
            cotangent: u, shaped like the tensor at which the graph ends.

        Yields:
            (module, acts_MI, grads_MO) of each module that u depends on.
        """
        if not self._calls:
            return
        with torch.autocast(self._start.device.type, enabled=False):
            gradients = torch.autograd.grad(
                self._start,
                [call.output for call in self._calls],
                cotangent,
                retain_graph=True,
            )
        for call, gradient in zip(self._calls, gradients, strict=True):
            yield call.module, call.acts_MI, call.grads_MO(gradient)

    def log_probability_tangents(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """The derivative of log p(label) at every labelled position along V.

        Args:
            vectors: V by module's name [O, I]; modules without one do not change.

        Returns:
            [L], positions in order, float32 or float64 as the logits; labels are the data's own.
        """
        return self.log_probability_tangents_of([vectors])[0]

    def log_probability_tangents_of(self, directions: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """As `log_probability_tangents` along each of several directions [directions, L]."""
        step = max(1, TANGENT_BYTES // self._start.nbytes)
        parts = [
            labelled_logits.log_probability_tangents(
                self._logits, [self.tangent(vectors) for vectors in directions[k : k + step]]
            )
            for k in range(0, len(directions), step)
        ]
        return torch.cat(parts)

    def log_probability_gradients(
        self, number: int
    ) -> Iterator[tuple[TrackedModule, Tensor, Tensor]]:
        """The gradient of log p(label) at one labelled position, by a backward; as `gradients`."""
        return self.gradients(labelled_logits.log_probability_cotangent(self._logits, number))

    def add_gauss_newton_products_(
        self,
        vectors: Mapping[str, Tensor],
        into: Mapping[str, Tensor],
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Adds Σ_t Jᵀ(diag p_t − p_t p_tᵀ)J V over the batch's labelled positions t.

        Args:
            vectors: V of Q right-hand sides in every tracked module, by name [Q, O, I].
            into: Sums of the same shapes, changed in place.
            numbers: Of which right-hand sides, by index; None: of all.
        """
        if not self._calls:
            return
        if numbers is None:
            numbers = range(len(next(iter(vectors.values()))))
        step = max(1, TANGENT_BYTES // (2 * self._start.nbytes))
        for first in range(0, len(numbers), step):
            few = numbers[first : first + step]
            tangents = [self.tangent({n: v[k] for n, v in vectors.items()}) for k in few]
            cotangents = labelled_logits.hessian_products(self._logits, tangents)
            del tangents
            for k, cotangent in zip(few, cotangents, strict=True):
                for module, acts_MI, grads_MO in self.gradients(cotangent):
                    with precisely(acts_MI.device):
                        product_OI = grads_MO.T @ acts_MI
                    into[module.name][k] += product_OI.to(into[module.name].device)


def _refuse(error: RuntimeError, advice: str) -> NoReturn:
    """Raises the sentence for an operation without second derivative; other errors as they are."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    raise ModelError(
        f"The model's backward cannot be differentiated ({first_line(error)}), which {advice}."
    ) from error
