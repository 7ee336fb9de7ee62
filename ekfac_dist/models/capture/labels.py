"""Labels, and the gradient of the summed loss with respect to the logits.

The loss of a sequence is the sum of −log p(label) over its labelled positions, so its gradient with
respect to a position's logits is softmax − onehot(label), whatever loss the model itself has.

A sampled label is the inverse CDF of the model's softmax at one uniform number, and that number is
a function of (seed, pass, row in the source, position) alone: the position-th output of a Philox
generator keyed by seed and pass, whose counter starts at the row (Salmon et al. 2011).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.config import Labels
from ekfac_dist.data.batches import NO_LABEL, Batch, Labelled, to_device
from ekfac_dist.errors import DataError, ModelError

COVARIANCE_PASS = 0
REFIT_PASS = 1

# Logits whose softmax and CDF are held at a time; on a CPU (True) few enough for its caches.
_CHUNK_ELEMENTS = {False: 2**24, True: 2**19}
_CDF_BLOCK = 64

# float16 gradients below 6e-8 vanish; a power of two shifts them up and is taken off exactly.
GRADIENT_SCALES = {torch.float16: 1024.0}


@dataclass(frozen=True)
class LabelRule:
    """Where a pass's labels come from.

    Attributes:
        labels: "sampled" or "data".
        seed: Seed of the sampled ones.
        pass_number: Which pass draws; passes draw independently.
    """

    labels: Labels
    seed: int
    pass_number: int


@dataclass(frozen=True)
class LossGradient:
    """Where the backward of a batch's summed losses starts.

    Attributes:
        gradient: `scale` times the gradient with respect to the logits, or losses, in their dtype.
        scale: A power of two; 1 but for float16.
        losses: Each sequence's loss [B], float64, in nats.
        num_labels: Labels of the batch; a sequence with a loss of its own kind counts as one.
        labels: Labels of the batch's labelled places, in order; None of a loss of its own kind.
    """

    gradient: Tensor
    scale: float
    losses: Tensor
    num_labels: int
    labels: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """Sum of the losses, float64 scalar, in nats."""
        return self.losses.sum()


class Draws:
    """Random numbers of a batch's sequences, for a task that samples labels of its own kind.

    A number depends on the run's seed, the pass, the sequence's row in the source and its place
    alone: not on the batch, on workers, or on what was drawn before. Asking again gives the same.

    Args:
        rule: The pass's rule.
        indices: Row in the source of each sequence.
        device: Where the numbers are wanted.
    """

    def __init__(self, rule: LabelRule, indices: Sequence[int], device: torch.device) -> None:
        self._rule = rule
        self._indices = indices
        self._device = device

    def uniform(self, count: int) -> Tensor:
        """Numbers in [0, 1), [B, count] float64."""
        rows = [
            uniforms(self._rule.seed, self._rule.pass_number, index, count)
            for index in self._indices
        ]
        return torch.from_numpy(np.stack(rows)).to(self._device)

    def normal(self, count: int) -> Tensor:
        """Standard normal numbers, [B, count] float64."""
        return torch.special.ndtri(self.uniform(count) + 2.0**-53)  # never at 0 or 1


def uniforms(seed: int, pass_number: int, index: int, num_positions: int) -> np.ndarray:
    """One number in [0, 1) for each position of a sequence.

    Args:
        seed: The run's seed, below 2^63.
        pass_number: Which pass draws.
        index: Row in the source.
        num_positions: How many positions; more of them only append numbers.

    Returns:
        [num_positions] float64, multiples of 2^-52.
    """
    generator = np.random.Philox(
        key=np.array([seed, pass_number], dtype=np.uint64),
        counter=np.array([0, 0, 0, index], dtype=np.uint64),
    )
    raw = generator.random_raw(num_positions)
    return (raw >> np.uint64(12)).astype(np.float64) * 2.0**-52


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The class at which the cumulated probability first exceeds a uniform number.

    The class's block is found first, from block sums, and the class inside its block then: a whole
    row need not be cumulated in float64, which would cost as much as half of the model's head.

    Args:
        probabilities: [M, V], each row summing to about 1.
        uniform: [M] float64 in [0, 1).

    Returns:
        [M] int64; never a class of probability zero.
    """
    num_rows, num_classes = probabilities.shape
    padding = -num_classes % _CDF_BLOCK
    if padding:
        probabilities = torch.nn.functional.pad(probabilities, (0, padding))
    blocks = probabilities.view(num_rows, -1, _CDF_BLOCK)
    up_to_block = blocks.sum(-1).double().cumsum(-1)
    threshold = uniform.unsqueeze(-1) * up_to_block[:, -1:]
    block = _first_above(up_to_block, threshold)
    before = torch.nn.functional.pad(up_to_block, (1, 0)).gather(-1, block)
    rows = torch.arange(num_rows, device=block.device)
    inside = blocks[rows, block.squeeze(-1)].cumsum(-1, dtype=torch.float64)
    # Rounding of the block sums may put the threshold a hair outside of its block.
    within = (threshold - before).clamp_(min=0).minimum(inside[:, -1:] * (1 - 2.0**-52))
    found = (block * _CDF_BLOCK + _first_above(inside, within)).squeeze(-1)
    return found.clamp_(max=num_classes - 1)  # NaN is told of later, by the running sums


def _first_above(cdf: Tensor, threshold: Tensor) -> Tensor:
    """First index [M, 1] of each row [M, n] of a CDF that is above its threshold [M, 1]."""
    return torch.searchsorted(cdf, threshold, right=True).clamp_(max=cdf.shape[-1] - 1)


def logit_gradient(logits: Tensor, labels: Tensor, batch: Batch, rule: LabelRule) -> LossGradient:
    """Chooses a batch's labels and differentiates its summed losses.

    Args:
        logits: [B, V] or [B, T, V].
        labels: The data's labels [B] or [B, T], int64; −100 where there is none.
        batch: The batch, on the logits' device.
        rule: Where the labels come from.

    Raises:
        ModelError: The logits are not one row for each label.
    """
    _check_logits(logits, labels, batch)
    flat, targets = logits.detach().flatten(0, -2), labels.flatten()
    labelled = batch.labelled
    if labelled is None or labels is not batch.inputs.get("labels"):
        _require_labels(labels, batch)
        width = labels.numel() // len(batch.indices)
        labelled = Labelled.of(labels, [width] * len(batch.indices))
    if labelled.smallest < 0 or labelled.largest >= logits.shape[-1]:
        wrong = labelled.smallest if labelled.smallest < 0 else labelled.largest
        raise DataError(
            f"The data has label {wrong}, but the model has {logits.shape[-1]} logits, for labels "
            f"0 to {logits.shape[-1] - 1}; what has no label is {NO_LABEL}."
        )
    draws = None
    if rule.labels == "sampled":
        draws = to_device(torch.from_numpy(_uniforms_at(labelled, batch, rule)), logits.device)
    scale = GRADIENT_SCALES.get(logits.dtype, 1.0)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    count = len(labelled.flat)
    gradient = torch.empty_like(flat) if count == len(flat) else torch.zeros_like(flat)
    chosen, losses = [], []
    step = max(1, _CHUNK_ELEMENTS[logits.device.type == "cpu"] // flat.shape[1])
    for start in range(0, count, step):
        end = min(start + step, count)
        rows = _rows(labelled, start, end)
        scores = flat[rows].to(wide)
        # Written where it is wanted, if it can be: most rows have a label, and no copy is needed.
        in_place = isinstance(rows, slice) and gradient.dtype == wide
        residual = gradient[rows] if in_place else torch.empty_like(scores)
        torch.softmax(scores, -1, out=residual)
        picked = targets[rows] if draws is None else inverse_cdf(residual, draws[start:end])
        at = (torch.arange(end - start, device=flat.device), picked)
        # −log p(label) by the likeliest class, whose probability cannot vanish as the label's can.
        likeliest = residual.max(-1)
        log_total = scores.gather(-1, likeliest.indices[:, None]).squeeze(-1)
        log_total = log_total.double() - likeliest.values.double().log()
        losses.append(log_total - scores[at])
        residual[at] -= 1
        if scale != 1.0:
            residual *= scale
        if not in_place:
            gradient[rows] = residual.to(gradient.dtype)
        chosen.append(picked)
    nats = torch.cat(losses)
    by_sequence = nats.new_zeros(len(batch.indices)).index_add_(0, labelled.rows_at, nats)
    return LossGradient(gradient.view_as(logits), scale, by_sequence, count, torch.cat(chosen))


def _rows(labelled: Labelled, start: int, end: int) -> slice | Tensor:
    """Flat places of some labels; a slice, which is no copy, where they follow one another."""
    first, last = int(labelled.flat[start]), int(labelled.flat[end - 1])
    if last - first == end - 1 - start:
        return slice(first, last + 1)
    return labelled.flat_at[start:end]


def _check_logits(logits: Tensor, labels: Tensor, batch: Batch) -> None:
    if labels.ndim not in (1, 2) or labels.dtype != torch.int64:
        raise ModelError(
            f"The labels are {labels.dtype} of shape {list(labels.shape)}; they must be int64, "
            "one for each sequence or one for each position. For other labels give a LossTask."
        )
    num_rows = 1 if batch.packed else len(batch.indices)
    if labels.shape[0] != num_rows or logits.shape[:-1] != labels.shape:
        raise ModelError(
            f"The model gave logits of shape {list(logits.shape)} for {len(batch.indices)} "
            f"sequences with labels of shape {list(labels.shape)}; it must give one row of logits "
            "for each label."
        )


def _require_labels(labels: Tensor, batch: Batch) -> None:
    without = (labels == NO_LABEL).view(len(batch.indices), -1).all(1)
    if without.any():
        number = batch.indices[int(without.nonzero()[0])]
        raise DataError(
            f"Sequence {number} of the data has no label, so its loss is no function of the model; "
            "leave it out."
        )


def _uniforms_at(labelled: Labelled, batch: Batch, rule: LabelRule) -> np.ndarray:
    """The uniform numbers of a batch's labels, in order [L]."""
    found = np.empty(len(labelled.flat))
    starts = np.flatnonzero(np.diff(labelled.rows, prepend=-1))  # rows ascend
    for start, end in zip(starts, [*starts[1:], len(found)], strict=True):
        index, offsets = batch.indices[labelled.rows[start]], labelled.offsets[start:end]
        drawn = uniforms(rule.seed, rule.pass_number, index, int(offsets[-1]) + 1)
        found[start:end] = drawn[offsets]
    return found
