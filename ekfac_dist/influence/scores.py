"""The result of influence queries: scores, lists of the highest and lowest, details. Only data.

A row of the scores is a query group: one query, or several that are summed. A column is a scored
training sequence. Q counts the rows, N the columns.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.config import Normalize, Tokens
from ekfac_dist.influence.refined import Refined


@dataclass(frozen=True)
class Listed:
    """The sequences with the highest, or with the lowest, scores for one query group.

    Attributes:
        columns: Their columns [K], the most extreme score first.
        indices: Their indices in the data [K].
        scores: Their scores [K]; exact ones, if they were scored again.
    """

    columns: np.ndarray
    indices: np.ndarray
    scores: Tensor


@dataclass(frozen=True)
class Rescored:
    """The sequences that were scored again, exactly, for one query group after a low-rank scan.

    They are those with the highest and lowest scores of the scan, and perhaps as many spread evenly
    over the data. The scan did not choose these, so only they tell how good it is on the whole.

    Attributes:
        columns: Their columns [C], ascending.
        scan_scores: Their approximate scores from the scan [C].
        exact_scores: Their exact scores [C].
        num_spread: How many were chosen as spread evenly over the data.
        spearman: Rank correlation of both scores over the evenly spread sequences; None where it is
            undefined.
        spearman_top: The same over the sequences with the scan's highest scores.
        overlap: Fraction of the sequences listed by exact scores that would be listed by the scan's
            scores too; None where no more sequences were scored again than are listed. It is an
            upper bound: a sequence that the scan did not choose could belong to the exact lists.
    """

    columns: np.ndarray
    scan_scores: Tensor
    exact_scores: Tensor
    num_spread: int
    spearman: float | None
    spearman_top: float | None
    overlap: float | None


@dataclass(frozen=True)
class Details:
    """Scores of positions, layers and modules for pairs of a query group and a listed sequence.

    Attributes:
        rows: Index of each pair's query group [P].
        columns: Column of each pair's sequence [P].
        offsets: Start of each pair's positions among those of all pairs, and their number [P + 1].
        layer_token_scores: Scores of each position in each layer [layers, positions].
        module_scores: Scores of each pair in each module [P, modules].
    """

    rows: np.ndarray
    columns: np.ndarray
    offsets: np.ndarray
    layer_token_scores: Tensor
    module_scores: Tensor

    @property
    def token_scores(self) -> Tensor:
        """Score of each position [positions]; those of a pair sum to its score."""
        return self.layer_token_scores.sum(0)

    def take(self, pairs: np.ndarray) -> "Details":
        """The details of some of the pairs.

        Args:
            pairs: Indices of those pairs [p].
        """
        lengths = np.diff(self.offsets)[pairs]
        ranges = [np.arange(self.offsets[p], self.offsets[p + 1]) for p in pairs]
        positions = torch.from_numpy(np.concatenate([*ranges, np.zeros(0, np.int64)]))
        return Details(
            self.rows[pairs],
            self.columns[pairs],
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            self.layer_token_scores[:, positions],
            self.module_scores[torch.from_numpy(pairs)],
        )

    @classmethod
    def join(cls, parts: "list[Details]") -> "Details":
        """Details of several sets of pairs, one after another."""
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

    They are float64 for a float64 model, else float32. Q counts query groups, each of one query or
    several that are summed; N the scored sequences, in data order.

    Attributes:
        scores: ∇log p(q)ᵀ (F + λ)⁻¹ ∇log p(z), summed over modules, divided by both norms [Q, N];
            of a contrast, log p(q) is log p(completion) − log p(against); with refinement, the
            Gauss–Newton matrix G in the place of F.
            With query gradients of low rank, or from an index, these scores, and all their parts,
            are the scan's and so approximate; the exact ones of sequences that were scored again
            are in `top`, `bottom` and `rescored`.
        indices: Index in the data of each scored sequence [N].
        members: Indices of each query group's queries.
        training_size: How many sequences the model was trained on; None: unknown, so no nats.
        normalize: Which norms scores are divided by.
        tokens: What a position's score is of: what its input adds, or its loss.
        norms: Norm of each sequence's gradient [N]; ones without a normalisation.
        query_norms: Norm of each query group's gradient [Q]; ones unless `normalize` is "cosine".
        modules: Names of the tracked modules, in model order.
        layers: Names of their layers, in model order.
        layer_of: Index of each module's layer [modules].
        damping: Absolute λ of each module.
        ranks: Rank of the scan's query gradients in each module; empty if they were whole.
        index_rank: Rank of the training gradients in the index that the scan read; None: whole ones
            were computed.
        top: For each query group the most positive sequences, the most positive first.
        bottom: For each query group the most negative sequences, the most negative first.
        query_losses: −log p of each query, in nats.
        against_losses: −log p of what each query is against, in nats; None: no contrast.
        module_scores: Scores of each module [Q, modules, N], if asked for.
        layer_scores: Scores of each layer [Q, layers, N], if asked for.
        self_influence: ∇log p(z)ᵀ (F + λ)⁻¹ ∇log p(z) [N], if asked for.
        token_scores: Scores of each position of all sequences [Q, positions], if asked for.
        token_offsets: Start of each sequence's positions in `token_scores`, and their number
            [N + 1].
        details: Details of the listed sequences, if asked for.
        rescored: For each query group the sequences that were scored again, if asked for.
        num_scans: How often the data was scanned.
        model_differs: A sentence for each difference between the model and the one that the factors
            were fitted for.
        not_compared: A sentence for each part of the model that could not be compared with that
            one.
        refined: How query gradients were refined; None: they were not.
    """

    scores: Tensor
    indices: np.ndarray
    members: tuple[tuple[int, ...], ...]
    training_size: int | None
    normalize: Normalize
    tokens: Tokens
    norms: Tensor
    query_norms: Tensor
    modules: tuple[str, ...]
    layers: tuple[str, ...]
    layer_of: np.ndarray
    damping: dict[str, float]
    ranks: dict[str, int] = field(default_factory=dict)
    index_rank: int | None = None
    top: list[Listed] = field(default_factory=list)
    bottom: list[Listed] = field(default_factory=list)
    query_losses: list[float] = field(default_factory=list)
    against_losses: list[float | None] = field(default_factory=list)
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
    refined: Refined | None = None

    @property
    def are_approximate(self) -> bool:
        """Whether `scores` are of gradients of low rank; lists may be exact nevertheless."""
        return bool(self.ranks) or self.index_rank is not None

    @property
    def shares(self) -> Tensor:
        """Each score over the sum of |scores| of the same sign for its query group, float64 [Q, N].

        A share has its score's sign: for each query group the positive shares sum to 1, the
        negative ones to −1. After a low-rank scan these are shares of the scan's scores.
        """
        return torch.stack([self.in_shares(scores, row) for row, scores in enumerate(self.scores)])

    def in_shares(self, scores: Tensor, row: int) -> Tensor:
        """Some scores of a query group as shares, float64 [K].

        Args:
            scores: The scores [K]. Exact scores after a low-rank scan are divided by sums of the
                scan's scores, as there are no exact ones of all sequences.
            row: Index of the query group.

        Returns:
            The shares: 0 for a score of 0; NaN where `self.scores` has no score of that sign for
            the group, which can only be with exact scores after a scan.
        """
        all_N, scores_K = self.scores[row].double(), scores.double()
        sums_K = torch.where(scores_K > 0, all_N.clamp(min=0).sum(), -all_N.clamp(max=0).sum())
        return torch.where(scores_K == 0, 0.0, torch.where(sums_K > 0, scores_K / sums_K, math.nan))

    @property
    def nats(self) -> Tensor | None:
        """Increase of log p(q), to first order, if the sequence were trained on once more [Q, N].

        Scores without normalisation over the training set's size, float64; None without
        `training_size`. First order is far off where a value is above its query group's `gains`.
        """
        if self.training_size is None:
            return None
        raw = self.scores.double() * self.norms.double() * self.query_norms[:, None].double()
        return raw / self.training_size

    def in_nats(self, scores: Tensor, row: int, columns: np.ndarray) -> Tensor | None:
        """Some scores of a query group in nats, float64 [K]; None without `training_size`.

        Args:
            scores: The scores [K].
            row: Index of the query group.
            columns: Columns of the scores' sequences [K].
        """
        if self.training_size is None:
            return None
        raw = scores.double() * self.norms[columns].double() * self.query_norms[row].double()
        return raw / self.training_size

    @property
    def losses(self) -> list[float]:
        """−log p of each query group's queries together [Q], less that of what they are against."""
        return [
            sum(self.query_losses[query] - (self.against_losses[query] or 0) for query in queries)
            for queries in self.members
        ]

    @property
    def has_contrasts(self) -> bool:
        """Whether any query is against something."""
        return any(loss is not None for loss in self.against_losses)

    @property
    def gains(self) -> list[float]:
        """By how much log p of each query group's queries can rise at most [Q], in nats.

        That is its loss; infinity for a group with a contrast, as log p(against) can always fall.
        """
        return [
            loss if all(self.against_losses[query] is None for query in queries) else math.inf
            for loss, queries in zip(self.losses, self.members, strict=True)
        ]

    def scale(self, rows: np.ndarray | list[int], columns: np.ndarray | slice) -> Tensor:
        """Factor of raw scores of rows × columns, 1 / both norms; 0 where a gradient is zero."""
        return _inverse(self.query_norms[rows])[:, None] * _inverse(self.norms[columns])

    def pair_scale(self, rows: np.ndarray, columns: np.ndarray) -> Tensor:
        """Factor of raw scores of pairs of a row and a column [P], 1 / both norms."""
        return _inverse(self.query_norms[rows]) * _inverse(self.norms[columns])


def _inverse(norms: Tensor) -> Tensor:
    """1 / norms, and 0 where a norm is 0."""
    return torch.where(norms > 0, 1 / norms, 0.0)
