"""What factors of half of the data would change of scores, from half of Λ's sums.

δ is how far a factor of half of the data is off, from two halves, as `halves` explains.

**Scores**: by module s(q, z) = Σ_a q_a z_a / (Λ_a + λ), with gradients q and z in the eigenbasis,
where a runs over all pairs of an output and an input eigenvector. If Λ_a and λ change by δ_a and
δ_λ, s changes by − Σ_a q_a z_a r_a / (Λ_a + λ), to first order, with r_a = (δ_a + δ_λ)/(Λ_a + λ).
Gradients like those of the fit have mean squares Λ_a, so for them

    mean square of s                  Σ_a ω_a         ω_a = (Λ_a / (Λ_a + λ))²
    mean square of what it changes    Σ_a ω_a r_a²
    correlation of s and s + change   1 / √(1 + v)    v = Σ ω_a r_a² / Σ ω_a − (Σ ω_a r_a / Σ ω_a)²

where the last term takes off a common factor, which changes no correlation. From this v, of half of
the data, that of n sequences is (N/n − 1) v.

**Eigenbases**: those of the halves are not computed, but how far A's turns follows from ‖δ_A‖. If
inputs are Gaussian, δ_A has in the eigenbasis elements B_ij of squares of about τ α_i α_j, where α
are A's eigenvalues and τ = ‖δ_A‖² / (tr A)². Two eigenvectors turn into each other by

    θ_ij² = B_ij² / ((α_i − α_j)² + 4 B_ij²)

to first order where B is small, and no further than they can, and E gets between them elements
(Λ_oi − Λ_oj) θ_ij. With w = Λ / (Λ + λ)² these add Σ_o Σ_ij w_oi w_oj (Λ_oi − Λ_oj)² θ_ij² to
Σ ω_a r_a². S's turns are left out: with them predictions come out several times too large.

**All modules together**: errors are independent, scores are not. With v of the sums over all
modules, and n = (Σ_m √Σω)² / Σ_m Σω modules of equal weight, it is v if their scores are
uncorrelated, and v/n if they all say the same; v/√n is taken, the geometric mean.

δ_a is known for some rows of Λ: those of the largest eigenvalues, where few directions may hold
most of mean(Λ), and others spread evenly over the rest, each of which stands for its neighbours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac_dist.curvature.damping import DEFAULT

# λ over mean(Λ) that scores are predicted for: the default, and far to either side.
DAMPINGS = (0.001, DEFAULT, 10.0)
LEAST_ROWS = 16
_ROWS_PER_SAMPLED = 128
_SAMPLED_INPUTS = 128


@dataclass(frozen=True)
class SampledRows:
    """Some rows of Λ.

    Attributes:
        indices_k: Their indices, ascending, int64 [k].
        weights_k: How many rows each stands for, float64 [k]; they sum to O.
    """

    indices_k: Tensor
    weights_k: Tensor

    @classmethod
    def of(cls, values_O: Tensor, number: int | None = None) -> "SampledRows":
        """The rows of the largest eigenvalues, and as many spread evenly over the others.

        Args:
            values_O: λ_S [O], eigenvalues of the output factor, in any order.
            number: How many, if there are as many; None: `num_sampled`.
        """
        size = len(values_O)
        number = num_sampled(size) if number is None else min(number, size)
        order = values_O.cpu().argsort(descending=True, stable=True)
        first = number if number == size else number // 2
        edges = torch.linspace(first, size, number - first + 1, dtype=torch.float64).round().long()
        places = torch.cat([torch.arange(first), (edges[:-1] + edges[1:] - 1) // 2])
        weights = torch.cat([torch.ones(first, dtype=torch.float64), edges.diff().double()])
        indices, sorting = order[places].sort()
        return cls(indices, weights[sorting])

    def to(self, device: torch.device) -> "SampledRows":
        """The same rows on another device."""
        return SampledRows(self.indices_k.to(device), self.weights_k.to(device))


def num_sampled(num_outputs: int) -> int:
    """Number of the rows of Λ [O, I] that are sampled."""
    return min(num_outputs, max(LEAST_ROWS, num_outputs // _ROWS_PER_SAMPLED))


@dataclass(frozen=True)
class ScoreChange:
    """What half of the data changes of the scores of one or more modules; see the module's text.

    Attributes:
        signal: Σ ω_a.
        first: Σ ω_a r_a.
        second: Σ ω_a r_a², and what turns of the eigenbasis add.
        deviation: √Σ ω_a, summed over the modules.
    """

    signal: float = 0.0
    first: float = 0.0
    second: float = 0.0
    deviation: float = 0.0

    @classmethod
    def of_module(cls, signal: float, first: float, second: float) -> "ScoreChange":
        """That of one module."""
        return cls(signal, first, second, math.sqrt(signal))

    def __add__(self, other: "ScoreChange") -> "ScoreChange":
        return ScoreChange(
            self.signal + other.signal,
            self.first + other.first,
            self.second + other.second,
            self.deviation + other.deviation,
        )

    def correlation(self, share: float = 0.5) -> float | None:
        """The predicted correlation of scores from a fit on a part of the data, and on all.

        Args:
            share: The part's share of the sequences, n / N. Above 1 the part is N / share of these
                sequences: 2 is the correlation between this fit and one on twice as many.

        Returns:
            None where there is no signal.
        """
        if not self.signal:
            return None
        variance = max(0.0, self.second / self.signal - (self.first / self.signal) ** 2)
        variance /= self.deviation / math.sqrt(self.signal)  # √n
        # c²/n − c²/N, over that of half of the data: c²/N.
        scale = 1 / share - 1 if share <= 1 else 1 - 1 / share
        return 1 / math.sqrt(1 + scale * variance)


@dataclass(frozen=True)
class Turning:
    """How far eigenvectors of A turn into each other if half of the data is left out.

    Attributes:
        squares_Ij: θ² of all with some of them, float64.
        indices_j: Which these are.
        weights_j: How many each of these stands for.
    """

    squares_Ij: Tensor
    indices_j: Tensor
    weights_j: Tensor

    @classmethod
    def of(
        cls,
        values_I: Tensor,
        block_sizes: Sequence[int],
        difference: float,
        device: torch.device,
    ) -> "Turning":
        """From a factor's eigenvalues, and what half of the data is off.

        Args:
            values_I: α, block by block, on the CPU.
            block_sizes: Sizes of the factor's diagonal blocks, between which nothing turns.
            difference: ‖δ‖ / ‖A‖, from `relative_difference`.
            device: Where it is wanted.
        """
        values_I = values_I.double().clamp(min=0)
        sampled = SampledRows.of(values_I, _SAMPLED_INPUTS)
        blocks_I = torch.arange(len(block_sizes)).repeat_interleave(torch.tensor(block_sizes))
        traces = sum(part.sum().item() ** 2 for part in values_I.split(list(block_sizes)))
        tau = difference**2 * values_I.square().sum().item() / traces
        values_I = values_I.to(device)
        values_j = values_I[sampled.indices_k]
        elements_Ij = tau * torch.outer(values_I, values_j)
        gaps_Ij = (values_I[:, None] - values_j).square() + 4 * elements_Ij
        squares_Ij = elements_Ij / gaps_Ij.clamp(min=torch.finfo(torch.float64).tiny)
        same_Ij = blocks_I[:, None] == blocks_I[sampled.indices_k]
        sampled = sampled.to(device)
        return cls(squares_Ij * same_Ij.to(device), sampled.indices_k, sampled.weights_k)

    def changed(self, lambda_kI: Tensor, damped_kI: Tensor, weights_k: Tensor) -> float:
        """Σ_o Σ_ij w_oi w_oj (Λ_oi − Λ_oj)² θ_ij², with w = Λ / (Λ + λ)².

        Args:
            lambda_kI: Some rows of Λ, float64.
            damped_kI: Λ + λ there.
            weights_k: How many rows each of them stands for.
        """
        w_kI = lambda_kI / damped_kI.square()
        first_kI, second_kI = w_kI * lambda_kI, w_kI * lambda_kI.square()
        w_kj, first_kj, second_kj = (
            weights_k[:, None] * x[:, self.indices_j] for x in (w_kI, first_kI, second_kI)
        )
        pairs_Ij = second_kI.T @ w_kj + w_kI.T @ second_kj - 2 * first_kI.T @ first_kj
        return max(0.0, ((pairs_Ij * self.squares_Ij).sum(0) * self.weights_j).sum().item())


@dataclass(frozen=True)
class HalfOfLambda:
    """How far a module's Λ of half of the sequences is from that of all.

    Attributes:
        difference: ‖δ‖ / ‖Λ‖, Frobenius, from the sampled rows.
        scores: What it changes of the module's scores, by damping: λ over mean(Λ).
    """

    difference: float
    scores: Mapping[float, ScoreChange]


def half_of_lambda(
    lambda_OI: Tensor,
    even_kI: Tensor,
    rows: SampledRows,
    num_even: int,
    number: int,
    turning: Turning,
) -> HalfOfLambda | None:
    """What half of the sequences changes of a module's Λ, and of its scores at `DAMPINGS`.

    Args:
        lambda_OI: Λ of all sequences.
        even_kI: Σ over the even sequences of the squares whose mean Λ is, in the sampled rows;
            float64.
        rows: Which rows those are.
        num_even: Number of even sequences.
        number: N, of all.
        turning: How far the eigenbasis of the inputs turns.

    Returns:
        None where a half has no sequence, or its sums are not known (NaN).
    """
    num_odd = number - num_even
    mean = lambda_OI.mean(dtype=torch.float64).item()
    if not num_even or not num_odd or not bool(even_kI.isfinite().all()):
        return None
    if not mean:
        return HalfOfLambda(0.0, dict.fromkeys(DAMPINGS, ScoreChange()))
    sampled_kI, weights_k1 = lambda_OI[rows.indices_k].double(), rows.weights_k[:, None]
    odd_kI = number * sampled_kI - even_kI
    change_kI = (even_kI / num_even - odd_kI / num_odd) * math.sqrt(num_even * num_odd) / number
    squares = [(weights_k1 * x.square()).sum().item() for x in (change_kI, sampled_kI)]
    change_of_mean = (weights_k1 * change_kI).sum().item() / lambda_OI.numel()
    scores = {}
    for damping in DAMPINGS:
        damped_kI = sampled_kI + damping * mean
        relative_kI = (change_kI + damping * change_of_mean) / damped_kI
        omega_kI = weights_k1 * (sampled_kI / damped_kI).square()
        signal, first, second = ((omega_kI * relative_kI**power).sum().item() for power in range(3))
        second += turning.changed(sampled_kI, damped_kI, rows.weights_k)
        scores[damping] = ScoreChange.of_module(signal, first, second)
    difference = math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0
    return HalfOfLambda(difference, scores)
