"""A session: model, factors and index stay open, and answer one question after another.

What a run of `query` reads and checks once is here read and checked when the session is opened; a
question costs its own gradient, one scan of the index, and what is scored again.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ekfac_dist.config import QueryConfig, ScoresConfig, ServeConfig
from ekfac_dist.curvature import kronecker
from ekfac_dist.curvature.damping import Damping
from ekfac_dist.errors import NonFiniteError
from ekfac_dist.influence.answer import Answer
from ekfac_dist.influence.asking import Question, Ranking
from ekfac_dist.influence.checks import absolute_damping, scoring_context
from ekfac_dist.influence.completion import complete, prompt_ids
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.data_passes import DataPasses
from ekfac_dist.influence.held import computes_again, factors_on_device
from ekfac_dist.influence.index.scan import IndexScan
from ekfac_dist.influence.open_model import OpenModel, opened_model
from ekfac_dist.influence.open_ranking import OpenRanking, scores_of_one
from ekfac_dist.influence.output import SequenceTexts, write_answer
from ekfac_dist.influence.preconditioned import (
    PreparedQueries,
    at_rank,
    joined,
    rank_in,
)
from ekfac_dist.influence.queries import QuerySet
from ekfac_dist.influence.query_gradients import prepare
from ekfac_dist.influence.question_checks import QuestionChecks
from ekfac_dist.influence.refinement import Refinement
from ekfac_dist.influence.refinement_start import start_refinement
from ekfac_dist.influence.results_in_memory import ResultsInMemory, ResultsToMemory
from ekfac_dist.influence.scores import Details, InfluenceScores
from ekfac_dist.influence.scoring import empty_result
from ekfac_dist.influence.token_texts import TokenTexts
from ekfac_dist.passes.sequences import exactly_batched, with_chunked_head
from ekfac_dist.runtime.processes import World

# Rank of query gradients in a scan. SmolLM2-135M, sequences at rank 8, four questions: scores of
# rank 12 correlate with those of whole gradients at 0.992 and more, of rank 16 at 0.996; a scan of
# 2,000 took 0.9 s, of rank 32 1.1 s (2 cores of an AMD EPYC, family 25).
_SCAN_RANK = 12
# The least number of an index's products for which a scan with them costs less than one with whole
# ones, their decomposition included.
_LEAST_FOR_LOW_RANK = 1000
_KEPT_DAMPINGS = 16


@contextmanager
def open_session(config: ServeConfig, world: World) -> Iterator["OpenSession"]:
    """Opens model, factors and index; a collective.

    Raises:
        UserError: As of `opened_model`.
    """
    with opened_model(config, world) as opened:
        yield OpenSession(opened, world)


class OpenSession:
    """The session; see `asking.Session` for its methods.

    Args:
        opened: What it holds.
        world: The workers.

    Attributes:
        world: The workers.
        info: What it is, for people.
    """

    def __init__(self, opened: OpenModel, world: World) -> None:
        self._opened, self.world = opened, world
        self._lock = threading.Lock()  # a tokenizer is not to be used by two threads at once
        self._scores = ScoresConfig()
        self._base = self._first_context()
        train, task = opened.train, self._base.task
        budget = self._base.batch_tokens
        self._train = exactly_batched(opened.model, train, task, world, budget)
        checkpointing = opened.model_config.gradient_checkpointing
        again = computes_again(self._base, self._train, 1, self._scores, checkpointing)
        base = replace(self._base, checkpoints=again)
        base = replace(base, row_order=base.over(self._train).noted_row_order(base.modules))
        fitted = factors_on_device(base, self._train, 1, self._scores)
        self._base = replace(base, on_device=fitted)
        self._texts = SequenceTexts(
            opened.train, opened.examples, opened.data_config, opened.tokenizer
        )
        shares_out = self._base.owners is not None
        self._checks = QuestionChecks(opened, self._lock, shares_out=shares_out)
        self._last: OpenRanking | None = None  # that was scored exactly
        self._dampings: dict[str, dict[str, float]] = {}  # absolute, of each that was asked for
        self._columns = {int(index): k for k, index in enumerate(opened.train.indices)}
        self.info = opened.info(self._base.modules)

    def _first_context(self) -> ScoringContext:
        opened = self._opened
        damping = Damping(**vars(opened.config.damping))
        context = scoring_context(
            opened.model,
            opened.factors,
            damping,
            self.world,
            opened.config.batch_tokens,
            False,
            self._scores,
            1,
        )
        task = with_chunked_head(
            opened.model, context.modules, opened.train, context.task, self.world
        )
        return replace(context, task=task, in_eigenbasis=True)

    # -- before the compute thread -----------------------------------------------------------------

    def check(self, question: Question) -> None:
        """Tokenises a question and refuses a wrong one."""
        self._checks.scores(question)
        self._checks.tokens([question])

    def sequence(self, index: int) -> dict[str, Any]:
        """A training sequence."""
        column = self._columns[index]
        with self._lock:
            return self._texts.line(column)

    # -- questions ---------------------------------------------------------------------------------

    def rank(
        self, questions: Sequence[Question], go_on: Callable[[], bool] = lambda: True
    ) -> list[Ranking]:
        """The rankings of questions of the same settings, by one scan of the index."""
        # Whole gradients of several at once may be more than there is memory for.
        if len(questions) > 1 and not self._scans_by_rank:
            return [ranking for question in questions for ranking in self.rank([question], go_on)]
        start = time.perf_counter()
        with self.world.agree():
            scores = [self._checks.scores(question) for question in questions]
            together = self._checks.tokens(questions)
            alone = [self._checks.tokens([question]) for question in questions]
        context = self._context_of(questions[0])
        result = empty_result(context, together, self._train, scores[0], self._opened.index.rank)
        result.model_differs = self._opened.differs
        result.not_compared = self._opened.not_compared
        joined, whole = self._query_gradients(context, together, scores[0], result, go_on)
        with self.world.agree():
            with_norms = questions[0].normalize != "none"
            index = IndexScan(context, self._opened.index, self._train, with_norms=with_norms)
        DataPasses(context, self._train, scores[0], result, index).scan("", joined, go_on)
        losses = [*result.query_losses, *(one for one in result.against_losses if one is not None)]
        self._require_finite(result.scores, torch.tensor(losses))
        seconds = time.perf_counter() - start
        return [
            OpenRanking(
                scores=scores_of_one(result, together, row, scores[row]),
                queries=alone[row],
                seconds=seconds,
                question=question,
                asked=scores[row],
                context=context,
                prepared=whole if len(questions) == 1 else None,
            )
            for row, question in enumerate(questions)
        ]

    @property
    def _scans_by_rank(self) -> bool:
        """Whether scans are of query gradients of low rank; the same whoever else asks."""
        return len(self._opened.index) * self._opened.index.rank >= _LEAST_FOR_LOW_RANK

    def _context_of(self, question: Question) -> ScoringContext:
        """What a question is answered with."""
        asked = repr(question.damping)
        if asked not in self._dampings:
            if len(self._dampings) >= _KEPT_DAMPINGS:
                self._dampings.clear()
            base, damping = self._base, Damping(**vars(question.damping))
            self._dampings[asked] = absolute_damping(base.factors, damping, self.world, base.owners)
        return replace(self._base, damping=self._dampings[asked], refine=question.refine)

    def _query_gradients(
        self,
        context: ScoringContext,
        together: QuerySet,
        scores: ScoresConfig,
        result: InfluenceScores,
        go_on: Callable[[], bool],
    ) -> tuple[PreparedQueries, PreparedQueries]:
        """The gradients that a scan is of, and the whole ones of the last question.

        Args:
            context: What the questions are answered with.
            together: The questions' tokens.
            scores: The scores that they ask for.
            result: Takes how they were refined.
            go_on: As of `rank`.
        """
        num_questions = len(together)
        refinement = self._refinement(context, scores, num_questions, go_on)
        if refinement is not None:
            result.refined = refinement.result
        scanned: list[PreparedQueries] = []
        for group in range(num_questions):
            of_group = _whole(context, refinement, together, group)
            scanned.append(
                at_rank(context, of_group, _SCAN_RANK) if self._scans_by_rank else of_group
            )
            result.query_losses[group] = of_group.losses[group]
            if (other := together.against[group]) is not None:
                result.against_losses[group] = of_group.losses[other]
        if self._scans_by_rank:
            result.ranks = {m.name: rank_in(m, _SCAN_RANK) for m in context.modules}
        return joined(scanned), of_group

    def _refinement(
        self,
        context: ScoringContext,
        scores: ScoresConfig,
        num_questions: int,
        go_on: Callable[[], bool],
    ) -> Refinement | None:
        """How the gradients of some questions are refined; None: they are not."""
        if not context.refine.is_on:
            return None
        refinement = start_refinement(context, self._train, scores, num_questions)
        return replace(refinement, go_on=go_on)

    def to_rescore(self, ranking: Ranking) -> list[int]:
        """Columns to be scored exactly, in the order of interest."""
        return _open(ranking).to_rescore()

    def exact(
        self,
        ranking: Ranking,
        columns: Sequence[int],
        go_on: Callable[[], bool] = lambda: True,
    ) -> Details:
        """Exact scores of a few columns with those of their positions, layers and modules."""
        own = _open(ranking)
        if self._last is not None and self._last is not own:
            self._last.prepared = None  # there is memory for the whole gradients of one question
        self._last = own
        # Turning the gradient of one question costs less than turning every training position.
        context = replace(own.context, in_eigenbasis=False)
        if own.prepared is not None and own.in_eigenbasis:
            self._turn_back(own.prepared)
        elif own.prepared is None:
            refinement = self._refinement(context, self._scores, 1, go_on)
            own.prepared = _whole(context, refinement, own.queries, 0)
        own.in_eigenbasis = False
        scores = replace(own.asked, per_token="top")
        passes = DataPasses(context, self._train, scores, own.scores)
        of_query = replace(own.prepared, groups=[0])
        details = passes.details("exact", of_query, [(0, column) for column in columns])
        details = passes.with_outputs("exact", of_query, details)
        self._require_finite(details.module_scores, details.layer_token_scores)
        return details

    def _turn_back(self, prepared: PreparedQueries) -> None:
        """Rotates a question's whole gradients out of the eigenbasis, in place."""
        fitted = self._base.fitted
        for module in self._base.own_modules:
            (matrices_QOI,) = prepared.gradients[module.name].tensors()
            bases = fitted.output_basis(module), fitted.input_basis(module)
            matrices_QOI.copy_(kronecker.rotate_back(matrices_QOI, *bases))

    def _require_finite(self, *values: Tensor) -> None:
        """Refuses numbers that an answer cannot hold, before worker 0 alone comes upon them.

        Raises:
            NonFiniteError: If one is NaN or infinite.
        """
        with self.world.agree():
            if not all(bool(torch.isfinite(one).all()) for one in values):
                raise NonFiniteError(
                    "Scores of this question are NaN or infinite: a norm that they are divided by "
                    "may be too small, or a loss too large; ask with another normalisation or "
                    "completion."
                )

    def finish(self, ranking: Ranking, details: Sequence[Details]) -> InfluenceScores:
        """The scores with lists by exact scores, and details."""
        return _open(ranking).finished(details)

    # -- on worker 0 -------------------------------------------------------------------------------

    def results(self, ranking: Ranking, scores: InfluenceScores) -> ResultsInMemory:
        """The files of `query`'s results for one question."""
        own, opened = _open(ranking), self._opened
        question = own.question
        config = QueryConfig(
            factors=opened.config.factors,
            index=opened.config.index,
            queries="the service",
            output="the service",
            model=opened.config.model,
            data=opened.config.data,
            damping=question.damping,
            scores=self._checks.scores(
                question if scores.rescored else replace(question, rescore=0)
            ),
            refine=question.refine,
            batch_tokens=opened.config.batch_tokens,
        )
        answer = Answer(
            scores=scores,
            queries=own.queries,
            train=opened.train,
            scored=opened.train,
            factors=opened.factors,
            index=opened.index,
            store=str(opened.config.factors),
            damping=Damping(**vars(question.damping)),
            data=opened.data_config,
            model=opened.model_config,
            dtype=opened.dtype,
            whole=opened.whole,
            config=config,
            tokenizer=opened.tokenizer,
            workers=self.world.size,
            seconds=own.seconds,
        )
        writer = ResultsToMemory()
        with self._lock:
            write_answer(writer, answer, opened.examples)
        return writer.results

    def complete(
        self,
        prompt: str,
        messages: list[dict[str, Any]] | None,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> dict[str, Any]:
        """Lets the model go on from a prompt, or a chat."""
        model, tokenizer = self._opened.model, self._opened.tokenizer
        with self._lock:
            ids = prompt_ids(tokenizer, prompt, messages)
        new, ends = complete(model, tokenizer, ids, max_tokens, temperature, seed)
        with self._lock:
            text = tokenizer.decode(new, skip_special_tokens=False)
            tokens = TokenTexts(tokenizer).of(new) if new else []
        return {"text": text, "tokens": tokens, "finish": "end" if ends else "length"}


def _whole(
    context: ScoringContext, refinement: Refinement | None, queries: QuerySet, group: int
) -> PreparedQueries:
    """The whole gradients of one question."""
    if refinement is not None:
        return refinement.prepare("refine", queries, [group], None)
    return prepare("query", context, queries, [group], None)


def _open(ranking: Ranking) -> OpenRanking:
    assert isinstance(ranking, OpenRanking)
    return ranking
