"""Labels, and the gradient of the summed loss with respect to the logits.

The loss of a sequence is the sum of −log p(label) over its labelled positions, so its gradient with
respect to a position's logits is softmax − onehot(label), whatever loss the model itself has.

A sampled label is the inverse CDF of the model's softmax at one uniform number, and that number is
a function of (seed, pass, row in the source, position) alone: the position-th output of a Philox
generator keyed by seed and pass, whose counter starts at the row (Salmon et al. 2011).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.config import Labels
from ekfac_dist.data.batches import Batch
from ekfac_dist.errors import ModelError

COVARIANCE_PASS = 0
REFIT_PASS = 1

# Rows of logits whose softmax and CDF are held at a time.
_CHUNK_ELEMENTS = 2**24
_CDF_BLOCK = 64

# float16 gradients below 6e-8 vanish; a power of two shifts them up and is taken off exactly.
_GRADIENT_SCALES = {torch.float16: 1024.0}


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
class LogitGradient:
    """The gradient of a batch's summed losses.

    Attributes:
        gradient: `scale` times the gradient with respect to the logits [B, T, V], in their dtype.
        scale: A power of two; 1 but for float16.
        loss: Sum of −log p(label) over the batch, float64 scalar on the logits' device, in nats.
        labels: The labels of the batch's labelled positions, in order.
        losses: −log p of each of them, float64, in nats.
    """

    gradient: Tensor
    scale: float
    loss: Tensor
    labels: Tensor
    losses: Tensor

    def by_sequence(self, batch: Batch) -> Tensor:
        """−log p of each of the batch's sequences [B], float64."""
        owner = batch.labelled // batch.input_ids.shape[1]
        return self.losses.new_zeros(len(batch.lengths)).index_add_(0, owner, self.losses)


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


def logit_gradient(logits: Tensor, batch: Batch, rule: LabelRule) -> LogitGradient:
    """Chooses the batch's labels and differentiates its summed losses.

    Args:
        logits: [B, T, V].
        batch: The batch, on the logits' device.
        rule: Where the labels come from.

    Raises:
        ModelError: The logits are not one row for each position.
    """
    if logits.shape[:2] != batch.input_ids.shape:
        raise ModelError(
            f"The model gave logits of shape {list(logits.shape)} for input ids of shape "
            f"{list(batch.input_ids.shape)}; it must give one row of logits for each position."
        )
    flat = logits.detach().flatten(0, 1)
    gradient = torch.zeros_like(flat)
    scale = _GRADIENT_SCALES.get(logits.dtype, 1.0)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    targets = batch.targets.flatten()
    draws = _uniforms_of(batch, rule).to(logits.device) if rule.labels == "sampled" else None
    chosen, losses = [], []
    step = max(1, _CHUNK_ELEMENTS // flat.shape[1])
    for start in range(0, batch.labelled.numel(), step):
        rows = batch.labelled[start : start + step]
        scores = flat[rows].to(wide)
        residual = torch.softmax(scores, -1)
        labels = (
            targets[rows] if draws is None else inverse_cdf(residual, draws[start : start + step])
        )
        at = (torch.arange(len(rows), device=rows.device), labels)
        # −log p(label) by the likeliest class, whose probability cannot vanish as the label's can.
        likeliest = residual.max(-1)
        log_total = scores.gather(-1, likeliest.indices[:, None]).squeeze(-1)
        log_total = log_total.double() - likeliest.values.double().log()
        losses.append(log_total - scores[at])
        residual[at] -= 1
        gradient[rows] = (residual if scale == 1.0 else residual * scale).to(gradient.dtype)
        chosen.append(labels)
    nats = torch.cat(losses)
    return LogitGradient(gradient.view_as(logits), scale, nats.sum(), torch.cat(chosen), nats)


def _uniforms_of(batch: Batch, rule: LabelRule) -> Tensor:
    """The uniform numbers of a batch's labelled positions, in order."""
    table = np.zeros(tuple(batch.input_ids.shape))
    for row, (index, length) in enumerate(zip(batch.indices, batch.lengths, strict=True)):
        table[row, :length] = uniforms(rule.seed, rule.pass_number, index, length)
    return torch.from_numpy(table).flatten()[batch.labelled.cpu()]
