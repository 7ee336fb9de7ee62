"""Labels, and the gradient of the summed loss with respect to the logits.

The loss of a sequence is the sum of −log p(label) over its labelled positions, so its gradient with
respect to a position's logits is softmax − onehot(label), whatever loss the model itself has.

A sampled label is the inverse CDF of the model's softmax at a uniform number that depends on
(seed, pass, the sequence's index in the source, position) alone: it is the position-th output of a
Philox generator keyed by seed and pass, whose counter starts at the index (Salmon et al. 2011).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.config import Labels
from ekfac_dist.data.batches import NO_LABEL, Batch, LabelPlaces, to_device
from ekfac_dist.errors import DataError, ModelError

COVARIANCE_PASS = 0
REFIT_PASS = 1

# Elements of the logits whose softmax is held at a time; on a CPU (True) it fits in the caches.
_CHUNK_ELEMENTS = {False: 2**24, True: 2**19}
_CDF_BLOCK = 64  # classes per block of the inverse CDF

# float16 gradients below 6e-8 vanish; scaling by a power of two is undone exactly.
GRADIENT_SCALES = {torch.float16: 1024.0}


@dataclass(frozen=True)
class LabelRule:
    """How a pass chooses its labels.

    Attributes:
        labels: "sampled" from the model, or the "data"'s own.
        seed: Seed of sampled labels.
        pass_number: The pass, so that passes draw independently.
    """

    labels: Labels
    seed: int
    pass_number: int


@dataclass(frozen=True)
class LossGradient:
    """Gradient of a batch's summed losses, with which the backward starts.

    Attributes:
        gradient: `scale` × the gradient with respect to the tensor at which the backward starts, in
            its dtype: the logits, a chunked head's hidden states, or a `LossTask`'s losses.
        scale: A power of two; 1 except for float16.
        losses: Each sequence's loss in nats [B], float64.
        num_labels: Labels of the batch; a `LossTask` counts one per sequence.
        labels: The chosen labels [L], in the order of the labelled positions; None for a
            `LossTask`.
        logit_bytes: Bytes of the logits that were held at a time; 0 for a `LossTask`.
    """

    gradient: Tensor
    scale: float
    losses: Tensor
    num_labels: int
    labels: Tensor | None = None
    logit_bytes: int = 0

    @property
    def loss(self) -> Tensor:
        """Sum of the losses in nats, float64 scalar."""
        return self.losses.sum()


class Draws:
    """Random numbers of a batch's sequences, for a task that samples labels in its own way.

    A number depends only on the run's seed, the pass, the sequence's index in the source and the
    number's offset: not on the batch, on workers, or on earlier draws. The same call returns the
    same numbers.

    Args:
        rule: The pass's rule.
        indices: Index in the source of each sequence [B].
        device: Device of the numbers.
    """

    def __init__(self, rule: LabelRule, indices: Sequence[int], device: torch.device) -> None:
        self._rule = rule
        self._indices = indices
        self._device = device

    def uniform(self, count: int) -> Tensor:
        """Uniform numbers in [0, 1), [B, count] float64."""
        by_sequence = [
            uniforms(self._rule.seed, self._rule.pass_number, index, count)
            for index in self._indices
        ]
        return torch.from_numpy(np.stack(by_sequence)).to(self._device)

    def normal(self, count: int) -> Tensor:
        """Standard normal numbers, [B, count] float64."""
        return torch.special.ndtri(self.uniform(count) + 2.0**-53)  # never the quantile of 0 or 1


def uniforms(seed: int, pass_number: int, index: int, num_positions: int) -> np.ndarray:
    """One uniform number in [0, 1) for each position of a sequence.

    Args:
        seed: The run's seed, below 2^63.
        pass_number: The pass.
        index: The sequence's index in the source.
        num_positions: How many numbers; more of them only append to the same ones.

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
    """The first class at which the cumulative probability exceeds a uniform number.

    First the class's block is found from the blocks' sums, then the class in its block. To cumulate
    all V classes in float64 would cost up to half as much as the model's head.

    Args:
        probabilities: [M, V], summing to about 1 over V.
        uniform: [M] float64 in [0, 1).

    Returns:
        Class indices [M] int64; never a class of probability zero.
    """
    num_positions, num_classes = probabilities.shape
    padding = -num_classes % _CDF_BLOCK
    if padding:
        probabilities = torch.nn.functional.pad(probabilities, (0, padding))
    blocks = probabilities.view(num_positions, -1, _CDF_BLOCK)
    block_cdf = blocks.sum(-1).double().cumsum(-1)
    threshold = uniform.unsqueeze(-1) * block_cdf[:, -1:]
    block = _first_above(block_cdf, threshold)
    cdf_before = torch.nn.functional.pad(block_cdf, (1, 0)).gather(-1, block)
    positions = torch.arange(num_positions, device=block.device)
    cdf_in_block = blocks[positions, block.squeeze(-1)].cumsum(-1, dtype=torch.float64)
    # Rounding of the block sums may put the threshold a hair outside of its block.
    rest = (threshold - cdf_before).clamp_(min=0).minimum(cdf_in_block[:, -1:] * (1 - 2.0**-52))
    classes = (block * _CDF_BLOCK + _first_above(cdf_in_block, rest)).squeeze(-1)
    return classes.clamp_(max=num_classes - 1)  # NaN is reported later, by the running sums


def _first_above(cdf: Tensor, threshold: Tensor) -> Tensor:
    """First index [M, 1] at which a CDF [M, n] exceeds a threshold [M, 1]."""
    return torch.searchsorted(cdf, threshold, right=True).clamp_(max=cdf.shape[-1] - 1)


class LabelLosses:
    """Losses of a batch's labels, and their gradient, for some labelled positions at a time.

    Args:
        labels: The data's labels [B] or [B, T], int64; −100 where there is none.
        batch: The batch, on the labels' device.
        rule: How labels are chosen.
        num_classes: V.

    Raises:
        DataError: If a label is no class of the model, or a sequence has no label.
        ModelError: If labels are not int64, one for each sequence or position.
    """

    def __init__(self, labels: Tensor, batch: Batch, rule: LabelRule, num_classes: int) -> None:
        self._batch, self._targets = batch, labels.flatten()
        self._labelled = _find_labels(labels, batch, num_classes)
        self._uniform: Tensor | None = None
        if rule.labels == "sampled":
            on_host = torch.from_numpy(_uniforms_of_labels(self._labelled, batch, rule))
            self._uniform = to_device(on_host, labels.device)
        self._chosen: list[Tensor] = []
        self._nats: list[Tensor] = []

    @property
    def num_labels(self) -> int:
        """L, the number of labels."""
        return len(self._labelled.flat)

    @property
    def places(self) -> LabelPlaces:
        """Where the labels are."""
        return self._labelled

    def chunks(self, size: int) -> Iterator[tuple[range, slice | Tensor]]:
        """Splits the labels, in the order of their positions.

        Args:
            size: Labels of a chunk; at least 1 is taken.

        Yields:
            (numbers of the labels, flat indices [n] of their positions); indices of contiguous
            positions are a slice, which copies nothing.
        """
        for start in range(0, self.num_labels, max(1, size)):
            end = min(start + max(1, size), self.num_labels)
            yield range(start, end), _label_indices(self._labelled, start, end)

    def data_labels(self, places: slice | Tensor) -> Tensor:
        """The data's own labels [n] at flat indices of labelled positions."""
        return self._targets[places]

    def differentiate(
        self, numbers: range, places: slice | Tensor, scores_nV: Tensor, residual_nV: Tensor
    ) -> None:
        """Chooses the labels of a chunk, and computes their losses and softmax − onehot(label).

        To be called once for each chunk, in order.

        Args:
            numbers: The chunk's labels.
            places: Flat indices of their positions.
            scores_nV: Their logits, float32 or float64.
            residual_nV: Takes the gradient with respect to the logits, in their dtype.
        """
        torch.softmax(scores_nV, -1, out=residual_nV)
        if self._uniform is None:
            chosen = self.data_labels(places)
        else:
            chosen = inverse_cdf(residual_nV, self._uniform[numbers.start : numbers.stop])
        chosen_elements = (torch.arange(len(numbers), device=scores_nV.device), chosen)
        # −log p(label) through the likeliest class: its probability cannot vanish, the label's can.
        likeliest = residual_nV.max(-1)
        log_total = scores_nV.gather(-1, likeliest.indices[:, None]).squeeze(-1)
        log_total = log_total.double() - likeliest.values.double().log()
        self._nats.append(log_total - scores_nV[chosen_elements])
        residual_nV[chosen_elements] -= 1
        self._chosen.append(chosen)

    def finished(self, gradient: Tensor, scale: float, logit_bytes: int) -> LossGradient:
        """The losses of all labels, with the gradient that was computed from them.

        Args:
            gradient: `scale` × the gradient of the summed losses, with respect to any tensor.
            scale: A power of two.
            logit_bytes: Bytes of the logits that were held at a time.
        """
        nats = torch.cat(self._nats)
        losses = nats.new_zeros(len(self._batch.indices))
        losses.index_add_(0, self._labelled.sequences_on_device, nats)
        chosen = torch.cat(self._chosen)
        return LossGradient(gradient, scale, losses, self.num_labels, chosen, logit_bytes)


def logit_gradient(logits: Tensor, labels: Tensor, batch: Batch, rule: LabelRule) -> LossGradient:
    """Chooses a batch's labels and differentiates its summed losses with respect to the logits.

    Args:
        logits: [B, V] or [B, T, V].
        labels: The data's labels [B] or [B, T], int64; −100 where there is none.
        batch: The batch, on the logits' device.
        rule: How labels are chosen.

    Raises:
        ModelError: If logits and labels do not match in shape, or labels are not int64.
        DataError: If a label is no class of the model, or a sequence has no label.
    """
    check_logits(logits, labels, batch)
    losses = LabelLosses(labels, batch, rule, num_classes=logits.shape[-1])
    flat_logits = logits.detach().flatten(0, -2)
    all_labelled = losses.num_labels == len(flat_logits)
    gradient = torch.empty_like(flat_logits) if all_labelled else torch.zeros_like(flat_logits)
    scale = GRADIENT_SCALES.get(logits.dtype, 1.0)
    for numbers, places in losses.chunks(softmax_positions(flat_logits)):
        # Written in place where possible: most positions have a label, so this saves copies.
        in_place = isinstance(places, slice) and gradient.dtype == wide_dtype(logits)
        scores = flat_logits[places].to(wide_dtype(logits))
        residual = gradient[places] if in_place else torch.empty_like(scores)
        losses.differentiate(numbers, places, scores, residual)
        if scale != 1.0:
            residual *= scale
        if not in_place:
            gradient[places] = residual.to(gradient.dtype)
    return losses.finished(gradient.view_as(logits), scale, logits.nbytes)


def wide_dtype(logits: Tensor) -> torch.dtype:
    """The precision of softmax and losses: float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def softmax_positions(logits: Tensor) -> int:
    """Number of positions whose softmax is computed at a time.

    Args:
        logits: Logits [..., V].
    """
    return max(1, _CHUNK_ELEMENTS[logits.device.type == "cpu"] // logits.shape[-1])


def _find_labels(labels: Tensor, batch: Batch, num_classes: int) -> LabelPlaces:
    """Where the labels are; refuses labels that are no class of the model."""
    labelled = batch.labelled
    if labelled is None or labels is not batch.inputs.get("labels"):
        _require_labels(labels, batch)
        width = labels.numel() // len(batch.indices)
        labelled = LabelPlaces.of(labels, [width] * len(batch.indices))
    if labelled.smallest < 0 or labelled.largest >= num_classes:
        invalid = labelled.smallest if labelled.smallest < 0 else labelled.largest
        raise DataError(
            f"The data has label {invalid}, but the model has {num_classes} logits, for labels "
            f"0 to {num_classes - 1}; what has no label is {NO_LABEL}."
        )
    return labelled


def _label_indices(labelled: LabelPlaces, start: int, end: int) -> slice | Tensor:
    """Flat indices of labels start to end; as a slice, which copies nothing, if contiguous."""
    first, last = int(labelled.flat[start]), int(labelled.flat[end - 1])
    if last - first == end - 1 - start:
        return slice(first, last + 1)
    return labelled.flat_on_device[start:end]


def check_logits(logits: Tensor, labels: Tensor, batch: Batch) -> None:
    """Checks that logits are one vector for each label; arguments as of `logit_gradient`.

    Raises:
        ModelError: If they are not, or labels are not int64.
    """
    if labels.ndim not in (1, 2) or labels.dtype != torch.int64:
        raise ModelError(
            f"The labels are {labels.dtype} of shape {list(labels.shape)}; they must be int64, "
            "one for each sequence or one for each position. For other labels give a LossTask."
        )
    leading_size = 1 if batch.packed else len(batch.indices)
    if labels.shape[0] != leading_size or logits.shape[:-1] != labels.shape:
        raise ModelError(
            f"The model gave logits of shape {list(logits.shape)} for {len(batch.indices)} "
            f"sequences with labels of shape {list(labels.shape)}; it must give one row of logits "
            "for each label."
        )


def _require_labels(labels: Tensor, batch: Batch) -> None:
    """Refuses a batch with a sequence that has no label."""
    is_unlabelled = (labels == NO_LABEL).view(len(batch.indices), -1).all(1)
    if is_unlabelled.any():
        index = batch.indices[int(is_unlabelled.nonzero()[0])]
        raise DataError(
            f"Sequence {index} of the data has no label, so its loss is no function of the model; "
            "leave it out."
        )


def _uniforms_of_labels(labelled: LabelPlaces, batch: Batch, rule: LabelRule) -> np.ndarray:
    """The uniform number of each of a batch's labels, in order [L]."""
    numbers = np.empty(len(labelled.flat))
    starts = np.flatnonzero(np.diff(labelled.sequences, prepend=-1))  # sequences ascend
    for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
        index, offsets = batch.indices[labelled.sequences[start]], labelled.offsets[start:end]
        sequence_numbers = uniforms(rule.seed, rule.pass_number, index, int(offsets[-1]) + 1)
        numbers[start:end] = sequence_numbers[offsets]
    return numbers
