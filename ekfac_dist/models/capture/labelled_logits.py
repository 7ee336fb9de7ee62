"""Logits of a batch's labelled positions as a function of the tensor at which its graph ends.

That tensor, `start`, is where a backward starts: the logits themselves, or the hidden states that a
chunked head reads. Labelled positions come in chunks, each with its logits z [n, V] and both
products with the Jacobian of z with respect to `start`:

    push     tangent of start            → tangent of z
    pull_    cotangent of z              → adds to the cotangent of start

For a head of any shape the tangent is a derivative of a backward: the cotangent of the hidden
states, r(w) = Jᵀw, is linear in w, and its own backward applied to a tangent is J times that.

Knows no module and no weight.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac_dist.data.batches import Batch, LabelPlaces
from ekfac_dist.models.capture.labels import (
    COVARIANCE_PASS,
    LabelLosses,
    LabelRule,
    check_logits,
    softmax_positions,
    wide_dtype,
)

DATA_LABELS = LabelRule("data", 0, COVARIANCE_PASS)


class LogitChunk(ABC):
    """The logits of n labelled positions.

    Attributes:
        logits_nV: The logits, float32 or float64.
        labels_n: The data's labels of these positions.
    """

    logits_nV: Tensor
    labels_n: Tensor

    @abstractmethod
    def push(self, tangent: Tensor) -> Tensor:
        """The logits' directional derivative [n, V], in their dtype, along a tangent of `start`."""

    @abstractmethod
    def pull_(self, cotangent_nV: Tensor, into: Tensor) -> None:
        """Adds the logits' Jacobian, transposed, times a cotangent to a cotangent of `start`."""


class LabelledLogits(ABC):
    """The logits of a batch's labelled positions.

    Attributes:
        start: The tensor at which the batch's graph ends.
        num_labels: L, the number of labelled positions.
        labels: Where they are.
    """

    start: Tensor
    num_labels: int
    labels: LabelPlaces

    @abstractmethod
    def chunks(self) -> Iterator[LogitChunk]:
        """The labelled positions, in order, some at a time."""


@dataclass(frozen=True)
class _WholeChunk(LogitChunk):
    logits_nV: Tensor
    labels_n: Tensor
    places: slice | Tensor

    def push(self, tangent: Tensor) -> Tensor:
        return tangent.flatten(0, -2)[self.places].to(self.logits_nV.dtype)

    def pull_(self, cotangent_nV: Tensor, into: Tensor) -> None:
        into.view(-1, into.shape[-1])[self.places] += cotangent_nV.to(into.dtype)


class WholeLogits(LabelledLogits):
    """Logits that are held whole: `start` is the logits.

    Args:
        logits: [B, V] or [B, T, V].
        labels: The data's labels [B] or [B, T], int64; −100 where there is none.
        batch: The batch.

    Raises:
        ModelError: If logits and labels do not match in shape, or labels are not int64.
        DataError: If a label is no class of the model, or a sequence has no label.
    """

    def __init__(self, logits: Tensor, labels: Tensor, batch: Batch) -> None:
        check_logits(logits, labels, batch)
        self._losses = LabelLosses(labels, batch, DATA_LABELS, num_classes=logits.shape[-1])
        self.start, self.num_labels = logits, self._losses.num_labels
        self.labels = self._losses.places

    def chunks(self) -> Iterator[LogitChunk]:
        """As many positions at a time as a softmax is computed for."""
        flat_logits = self.start.detach().flatten(0, -2)
        for _, places in self._losses.chunks(softmax_positions(flat_logits)):
            scores = flat_logits[places].to(wide_dtype(flat_logits))
            yield _WholeChunk(scores, self._losses.data_labels(places), places)


class _HeadChunk(LogitChunk):
    """A chunk whose logits are computed from hidden states, with the graph of that.

    Args:
        hidden_nH: The hidden states, a leaf.
        logits_nV: The logits.
        labels_n: The data's labels.
        places: Flat indices of the positions.
    """

    def __init__(
        self, hidden_nH: Tensor, logits_nV: Tensor, labels_n: Tensor, places: slice | Tensor
    ) -> None:
        self._hidden, self._attached, self._places = hidden_nH, logits_nV, places
        self.logits_nV = logits_nV.detach().to(wide_dtype(logits_nV))
        self.labels_n = labels_n
        self._cotangent = torch.zeros_like(logits_nV, requires_grad=True)
        (self._pulled,) = torch.autograd.grad(
            logits_nV, hidden_nH, self._cotangent, create_graph=True
        )

    def push(self, tangent: Tensor) -> Tensor:
        rows = tangent.flatten(0, -2)[self._places].to(self._pulled.dtype)
        (pushed,) = torch.autograd.grad(self._pulled, self._cotangent, rows, retain_graph=True)
        return pushed.to(self.logits_nV.dtype)

    def pull_(self, cotangent_nV: Tensor, into: Tensor) -> None:
        (pulled,) = torch.autograd.grad(
            self._attached,
            self._hidden,
            cotangent_nV.to(self._attached.dtype),
            retain_graph=True,
        )
        into.view(-1, into.shape[-1])[self._places] += pulled


class LogitsInChunks(LabelledLogits):
    """Logits that are never held whole: `start` is the hidden states [B, T, H] before the head.

    Args:
        hidden: The hidden states.
        losses: Where the labels are.
        head: The logits [n, V] of hidden states [n, H] at flat indices.
        chunk_size: Positions of a chunk.
    """

    def __init__(
        self,
        hidden: Tensor,
        losses: LabelLosses,
        head: Callable[[Tensor, slice | Tensor], Tensor],
        chunk_size: int,
    ) -> None:
        self.start, self.num_labels = hidden, losses.num_labels
        self.labels = losses.places
        self._losses, self._head, self._chunk_size = losses, head, chunk_size

    def chunks(self) -> Iterator[LogitChunk]:
        """Each with a forward of the head."""
        flat_hidden = self.start.detach().flatten(0, -2)
        for _, places in self._losses.chunks(self._chunk_size):
            with torch.enable_grad():
                hidden_nH = flat_hidden[places].detach().requires_grad_()
                logits_nV = self._head(hidden_nH, places)
            labels_n = self._losses.data_labels(places)
            yield _HeadChunk(hidden_nH, logits_nV, labels_n, places)


def hessian_products(logits: LabelledLogits, tangents: Sequence[Tensor]) -> list[Tensor]:
    """Products with the Hessian of the batch's summed losses with respect to the logits.

    u ↦ p ∘ (u − Σ_v p_v u_v) at each labelled position, between both products with the Jacobian of
    the logits with respect to `start`: the Gauss–Newton matrix of the loss as a function of it.

    Args:
        logits: The logits.
        tangents: Tangents of `start`, shaped like it.

    Returns:
        Cotangents of `start`.
    """
    cotangents = [torch.zeros_like(logits.start) for _ in tangents]
    for chunk in logits.chunks():
        probabilities_nV = torch.softmax(chunk.logits_nV, -1)
        for tangent, cotangent in zip(tangents, cotangents, strict=True):
            pushed_nV = chunk.push(tangent)
            mean_n1 = (probabilities_nV * pushed_nV).sum(-1, keepdim=True)
            chunk.pull_(probabilities_nV * (pushed_nV - mean_n1), cotangent)
    return cotangents


def log_probability_tangents(logits: LabelledLogits, tangents: Sequence[Tensor]) -> Tensor:
    """Directional derivatives of log p(label) at every labelled position.

    Args:
        logits: The logits; labels are the data's own.
        tangents: Tangents of `start`, shaped like it.

    Returns:
        [tangents, L], labelled positions in order, in the logits' dtype.
    """
    parts = []
    for chunk in logits.chunks():
        probabilities_nV = torch.softmax(chunk.logits_nV, -1)
        pushed = (chunk.push(tangent) for tangent in tangents)
        parts.append(
            torch.stack(
                [
                    pushed_nV.gather(-1, chunk.labels_n[:, None]).squeeze(-1)
                    - (probabilities_nV * pushed_nV).sum(-1)
                    for pushed_nV in pushed
                ]
            )
        )
    return torch.cat(parts, 1)


def log_probability_cotangent(logits: LabelledLogits, number: int) -> Tensor:
    """The gradient of log p(label) at one labelled position with respect to `start`.

    Args:
        logits: The logits; labels are the data's own.
        number: The position's number among the labelled ones.

    Returns:
        A cotangent of `start`.
    """
    cotangent, first = torch.zeros_like(logits.start), 0
    for chunk in logits.chunks():
        place = number - first
        if 0 <= place < len(chunk.labels_n):
            gradient_nV = torch.zeros_like(chunk.logits_nV)
            gradient_nV[place] = -torch.softmax(chunk.logits_nV[place], -1)
            gradient_nV[place, chunk.labels_n[place]] += 1
            chunk.pull_(gradient_nV, cotangent)
        first += len(chunk.labels_n)
    return cotangent
