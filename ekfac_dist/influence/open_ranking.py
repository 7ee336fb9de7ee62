"""A ranking of a session: its lists, what of it is scored exactly, and the lists that come of that.

Scores only; `session` computes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ekfac_dist.config import ScoresConfig
from ekfac_dist.influence.asking import Question, Ranking
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.lists import (
    Chosen,
    choose_for_rescoring,
    exact_lists,
    list_lengths,
    make_lists,
)
from ekfac_dist.influence.preconditioned import PreparedQueries
from ekfac_dist.influence.queries import QuerySet
from ekfac_dist.influence.scores import Details, InfluenceScores


@dataclass
class OpenRanking(Ranking):
    """A ranking, with what its exact scores need.

    Attributes:
        question: The question.
        asked: The scores that it asks for.
        context: What it was answered with.
        prepared: Its whole preconditioned gradient; None: it is computed again when it is needed.
        in_eigenbasis: Whether that is in the eigenbasis; else in the parameters' own.
    """

    question: Question
    asked: ScoresConfig
    context: ScoringContext
    prepared: PreparedQueries | None
    in_eigenbasis: bool = True

    def to_rescore(self) -> list[int]:
        """Columns to be scored exactly; see `Session.to_rescore`."""
        chosen = self._chosen()
        return list(dict.fromkeys([*chosen.top.tolist(), *chosen.bottom.tolist()]))

    def finished(self, details: Sequence[Details]) -> InfluenceScores:
        """The scores with lists by exact scores, and details; see `Session.finish`."""
        together = Details.join(list(details))
        together = together.take(np.argsort(together.columns, kind="stable"))
        exact = together.module_scores.sum(1)
        lists, rescored = exact_lists(
            self.scores, 0, together.columns, exact, self._chosen(), self._lengths
        )
        listed = np.concatenate([one.columns for one in lists])
        kept = np.flatnonzero(np.isin(together.columns, listed))
        return replace(
            self.scores,
            top=[lists[0]],
            bottom=[lists[1]],
            rescored=[rescored],
            details=together.take(kept),
        )

    @property
    def _lengths(self) -> tuple[int, int]:
        return self.question.top_k, self.question.bottom_k

    def _chosen(self) -> Chosen:
        """The columns at either end of the ranking, those furthest out first."""
        chosen = choose_for_rescoring(self.scores, 0, self.question.rescore, self._lengths)
        order = self.scores.scores[0]

        def sorted_by(columns: np.ndarray, *, descending: bool) -> np.ndarray:
            values = order[torch.from_numpy(columns)]
            return columns[values.argsort(descending=descending, stable=True).numpy()]

        return Chosen(
            sorted_by(chosen.top, descending=True),
            sorted_by(chosen.bottom, descending=False),
            np.zeros(0, dtype=np.int64),
        )


def scores_of_one(
    result: InfluenceScores, queries: QuerySet, row: int, scores: ScoresConfig
) -> InfluenceScores:
    """One question's row of the scores of several, with its lists.

    Args:
        result: The scores of all.
        queries: The tokens of all.
        row: The question's row.
        scores: The scores that it asks for.
    """
    other = queries.against[row]
    refined = result.refined
    if refined is not None:
        refined = replace(refined, residuals=refined.residuals[row : row + 1])
    own = replace(
        result,
        scores=result.scores[row : row + 1],
        query_norms=result.query_norms[row : row + 1],
        members=((0,),),
        query_losses=[result.query_losses[row]],
        against_losses=[None if other is None else result.against_losses[row]],
        tokens=scores.tokens,
        refined=refined,
    )
    columns = np.arange(len(own.indices))
    lengths = list_lengths(scores, len(columns))
    top, bottom = make_lists(own.scores[0], columns, own.indices, lengths)
    own.top, own.bottom = [top], [bottom]
    return own
