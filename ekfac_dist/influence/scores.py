"""What an influence query is answered with: scores, lists of their ends, details. Only data."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.config import Normalize


@dataclass(frozen=True)
class Listed:
    """The sequences at one end of a row's scores.

    Attributes:
        columns: Their columns [K], the end itself first.
        indices: Their rows in the data [K].
        scores: Their scores [K]; exact ones, if they were scored again.
    """

    columns: np.ndarray
    indices: np.ndarray
    scores: Tensor


@dataclass(frozen=True)
class Rescored:
    """One row's sequences that were scored again, exactly, after a low-rank scan.

    They are the ends of the scan's scores, and as many sequences spread evenly over the data,
    which the scan had no part in choosing: only those say how good it was on the whole.

    Attributes:
        columns: Their columns [C], ascending.
        scan_scores: What the scan said [C].
        exact_scores: The exact scores [C].
        spearman: Rank correlation of the two over the evenly spread sequences; None where it is
            not defined.
        spearman_top: The same within the top end alone.
        overlap: Share of the lists of these exact scores that the scan's own lists held too; None
            where no more sequences were scored again than are listed. A sequence that the scan
            left out of both ends is not seen.
    """

    columns: np.ndarray
    scan_scores: Tensor
    exact_scores: Tensor
    spearman: float | None
    spearman_top: float | None
    overlap: float | None


@dataclass(frozen=True)
class Details:
    """Scores of positions, layers and modules for pairs of a row and a listed sequence.

    Attributes:
        rows: Row of scores of each pair [P].
        columns: Column of each pair [P].
        offsets: Where each pair's positions begin [P + 1].
        layer_token_scores: [layers, positions].
        module_scores: [P, modules].
    """

    rows: np.ndarray
    columns: np.ndarray
    offsets: np.ndarray
    layer_token_scores: Tensor
    module_scores: Tensor

    @property
    def token_scores(self) -> Tensor:
        """Score of each position; over a pair they sum to its score."""
        return self.layer_token_scores.sum(0)

    def take(self, pairs: np.ndarray) -> "Details":
        """Some of the pairs."""
        lengths = np.diff(self.offsets)[pairs]
        kept = [np.arange(self.offsets[p], self.offsets[p + 1]) for p in pairs]
        positions = torch.from_numpy(np.concatenate([*kept, np.zeros(0, np.int64)]))
        return Details(
            self.rows[pairs],
            self.columns[pairs],
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            self.layer_token_scores[:, positions],
            self.module_scores[torch.from_numpy(pairs)],
        )

    @classmethod
    def join(cls, parts: "list[Details]") -> "Details":
        """One after another."""
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.columns for part in parts]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            torch.cat([part.layer_token_scores for part in parts], 1),
            torch.cat([part.module_scores for part in parts]),
        )


@dataclass
class InfluenceScores:
    """Scores of training sequences for queries, on the CPU; positive: more of z, q more likely.

    They are float64 for a float64 model, else float32. Q rows, each a query or a group of them; N
    columns, the scored sequences in data order.

    Attributes:
        scores: ∇log p(q)ᵀ (F + λ)⁻¹ ∇log p(z), summed over modules, divided by both norms [Q, N].
            With query gradients of low rank these, and all their parts, are the scan's and so
            approximate; what was scored again exactly is in `top`, `bottom` and `rescored`.
        indices: Row in the data of each scored sequence [N].
        members: Numbers of each row's queries.
        training_size: How many sequences the model was trained on; None: not known, no nats.
        normalize: How norms were chosen.
        norms: What a column is divided by [N]; ones without a normalisation.
        query_norms: What a row is divided by besides [Q]; ones but for "cosine".
        modules: Names of the tracked modules, in model order.
        layers: Names of their layers, in model order.
        layer_of: Number of each module's layer [modules].
        damping: λ of each module.
        ranks: Rank of the scan's query gradients in each module; empty if they were whole.
        top: Of each row, the most positive sequences, the most positive first.
        bottom: The most negative ones.
        query_losses: −log p of each query, in nats.
        module_scores: [Q, modules, N], if asked for.
        layer_scores: [Q, layers, N], if asked for.
        self_influence: ∇log p(z)ᵀ (F + λ)⁻¹ ∇log p(z) [N], if asked for.
        token_scores: [Q, positions] of all sequences, if asked for.
        token_offsets: Where each sequence's positions begin there [N + 1].
        details: Of the listed sequences, unless not asked for.
        rescored: Of each row, if asked for.
        num_scans: How often the data was scanned.
        model_differs: A sentence for each way in which the model differs from the one that the
            factors were fitted for.
        not_compared: A sentence for each part of it that could not be compared with that one.
    """

    scores: Tensor
    indices: np.ndarray
    members: tuple[tuple[int, ...], ...]
    training_size: int | None
    normalize: Normalize
    norms: Tensor
    query_norms: Tensor
    modules: tuple[str, ...]
    layers: tuple[str, ...]
    layer_of: np.ndarray
    damping: dict[str, float]
    ranks: dict[str, int] = field(default_factory=dict)
    top: list[Listed] = field(default_factory=list)
    bottom: list[Listed] = field(default_factory=list)
    query_losses: list[float] = field(default_factory=list)
    module_scores: Tensor | None = None
    layer_scores: Tensor | None = None
    self_influence: Tensor | None = None
    token_scores: Tensor | None = None
    token_offsets: np.ndarray | None = None
    details: Details | None = None
    rescored: list[Rescored] = field(default_factory=list)
    num_scans: int = 1
    model_differs: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()

    @property
    def shares(self) -> Tensor:
        """Each score over the sum of its row's scores of its sign, float64 [Q, N].

        A share has its score's sign: in each row the positive ones sum to 1, the negative ones to
        −1. Of a low-rank run these are shares of the scan's scores.
        """
        return torch.stack([self.in_shares(scores, row) for row, scores in enumerate(self.scores)])

    def in_shares(self, scores: Tensor, row: int) -> Tensor:
        """Some scores of a row as shares of all of it, float64 [K].

        Args:
            scores: The scores [K]. Exact ones, of sequences that were scored again, are compared
                with the scan's sums too, the only ones of all sequences that there are.
            row: The row.

        Returns:
            0 for a score of 0; NaN where the row has no score of that sign, which can only be with
            exact scores.
        """
        every, some = self.scores[row].double(), scores.double()
        sums = torch.where(some > 0, every.clamp(min=0).sum(), -every.clamp(max=0).sum())
        return torch.where(some == 0, 0.0, torch.where(sums > 0, some / sums, math.nan))

    @property
    def nats(self) -> Tensor | None:
        """To first order, by how much log p(q) would rise with the sequence once more [Q, N].

        Scores without normalisation over the training set's size, float64; None without
        `training_size`. First order is far off where a value is above its row of `losses`.
        """
        if self.training_size is None:
            return None
        raw = self.scores.double() * self.norms.double() * self.query_norms[:, None].double()
        return raw / self.training_size

    def in_nats(self, scores: Tensor, row: int, columns: np.ndarray) -> Tensor | None:
        """The same of some of a row's scores; None without `training_size`."""
        if self.training_size is None:
            return None
        raw = scores.double() * self.norms[columns].double() * self.query_norms[row].double()
        return raw / self.training_size

    @property
    def losses(self) -> list[float]:
        """−log p of each row's queries together: by more than that log p(q) cannot rise [Q]."""
        return [sum(self.query_losses[number] for number in row) for row in self.members]

    def scale(self, rows: np.ndarray | list[int], columns: np.ndarray | slice) -> Tensor:
        """What raw scores of rows × columns are multiplied by; 0 where a gradient is zero."""
        return _inverse(self.query_norms[rows])[:, None] * _inverse(self.norms[columns])

    def pair_scale(self, rows: np.ndarray, columns: np.ndarray) -> Tensor:
        """What raw scores of pairs of a row and a column are multiplied by [P]."""
        return _inverse(self.query_norms[rows]) * _inverse(self.norms[columns])


def _inverse(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, 1 / norms, 0.0)
