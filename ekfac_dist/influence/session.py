"""A session: model, factors and index stay open, and answer one question after another.

What a run of `query` reads and checks once is here read and checked when the session is opened; a
question costs its own gradient, one scan of the index, and what is scored again.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.config import (
    QueryConfig,
    ScoresConfig,
    ServeConfig,
    require_refinable,
)
from ekfac_dist.curvature import kronecker
from ekfac_dist.curvature.damping import Damping
from ekfac_dist.errors import ConfigError, ModelError, NonFiniteError
from ekfac_dist.influence.answer import Answer
from ekfac_dist.influence.asking import Question, Ranking
from ekfac_dist.influence.checks import absolute_damping, scoring_context
from ekfac_dist.influence.completion import complete, prompt_ids
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.data_passes import DataPasses
from ekfac_dist.influence.held import computes_again, factors_on_device
from ekfac_dist.influence.index.scan import IndexScan
from ekfac_dist.influence.lists import (
    Chosen,
    choose_for_rescoring,
    exact_lists,
    list_lengths,
    make_lists,
)
from ekfac_dist.influence.open_model import OpenModel, opened_model
from ekfac_dist.influence.output import SequenceTexts, write_answer
from ekfac_dist.influence.preconditioned import (
    PreparedQueries,
    at_rank,
    joined,
    rank_in,
)
from ekfac_dist.influence.queries import QuerySet, tokenize_queries
from ekfac_dist.influence.query_gradients import prepare
from ekfac_dist.influence.refinement import Refinement
from ekfac_dist.influence.refinement_start import require_refinable_model, start_refinement
from ekfac_dist.influence.results_in_memory import ResultsInMemory, ResultsToMemory
from ekfac_dist.influence.scores import Details, InfluenceScores
from ekfac_dist.influence.scoring import empty_result
from ekfac_dist.influence.token_texts import TokenTexts
from ekfac_dist.models.capture.tasks import CAUSAL_LM
from ekfac_dist.models.load.pretrained import context_length
from ekfac_dist.models.modules import layer_name
from ekfac_dist.models.sharding import is_sharded
from ekfac_dist.passes.sequences import (
    check_sequences,
    exactly_batched,
    with_chunked_head,
)
from ekfac_dist.runtime.processes import World

# Rank of query gradients in a scan, and the least number of an index's products for which a scan
# with them costs less than one with whole ones, their decomposition included.
_SCAN_RANK = 16
_LEAST_FOR_LOW_RANK = 1000
_KEPT_DAMPINGS = 16


@dataclass
class _OpenRanking(Ranking):
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
        self._last: _OpenRanking | None = None  # that was scored exactly
        self._dampings: dict[str, dict[str, float]] = {}  # absolute, of each that was asked for
        self._columns = {int(index): k for k, index in enumerate(opened.train.indices)}
        self.info = self._info()

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

    def _info(self) -> dict[str, Any]:
        opened, index = self._opened, self._opened.index
        fitted = opened.factors.manifest
        names = [module.name for module in self._base.modules]
        return {
            "model": {
                "name": opened.model_config.name,
                "dtype": opened.dtype,
                "whole": opened.whole,
            },
            "factors": {
                "path": str(opened.config.factors),
                "num_sequences": fitted["data"]["num_sequences"],
                "labels": fitted["fisher"]["labels"],
                "refit": fitted["fisher"]["refit"],
            },
            "index": {
                "path": str(index.path),
                "rank": index.rank,
                "dtype": index.manifest["index"]["dtype"],
                "num_sequences": len(index),
                "bytes": index.num_bytes,
            },
            "layers": list(dict.fromkeys(map(layer_name, names))),
            "modules": names,
            "damping": vars(opened.config.damping),
        }

    # -- before the compute thread -----------------------------------------------------------------

    def check(self, question: Question) -> None:
        """Tokenises a question and refuses a wrong one."""
        self._checked(question)
        self._tokenized([question])

    def _checked(self, question: Question) -> ScoresConfig:
        """The scores that a question asks for.

        Raises:
            ConfigError: If they cannot be meant.
            ModelError: If its gradients cannot be refined.
        """
        scores = ScoresConfig(
            normalize=question.normalize,
            top_k=question.top_k,
            bottom_k=question.bottom_k,
            rescore=question.rescore,
            per_token="top" if question.rescore else "none",
            tokens=question.tokens if question.rescore else "inputs",
        )
        require_refinable(scores, question.refine)
        require_refinable_model(self._opened.model, CAUSAL_LM, question.refine)
        if question.refine.is_on and self._base.owners is not None:
            raise ConfigError(
                f"refine.method is {question.refine.method}, for which every worker holds all "
                "factors, but those of this service are shared out, as they are too large for one; "
                "ask without refinement."
            )
        if scores.tokens == "outputs" and is_sharded(self._opened.model):
            raise ModelError(
                "tokens is outputs, but the model is sharded over the workers by FSDP, which "
                "gathers weights for one backward alone; ask with tokens: inputs."
            )
        list_lengths(scores, len(self._train))
        Damping(**vars(question.damping)).require_used(self._base.factors.modules)
        return scores

    def _tokenized(self, questions: Sequence[Question]) -> QuerySet:
        with self._lock:
            texts = [question.query for question in questions]
            longest = context_length(self._opened.model)
            queries = tokenize_queries(texts, self._opened.tokenizer, longest)
        check_sequences(self._opened.model, queries.sequences, "shorten the query")
        return queries

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
        start = time.perf_counter()
        with self.world.agree():
            scores = [self._checked(question) for question in questions]
            together = self._tokenized(questions)
            alone = [self._tokenized([question]) for question in questions]
        context = self._context_of(questions[0])
        result = empty_result(context, together, self._train, scores[0], self._opened.index.rank)
        joined, whole = self._query_gradients(context, together, scores[0], result, go_on)
        with self.world.agree():
            with_norms = questions[0].normalize != "none"
            index = IndexScan(context, self._opened.index, self._train, with_norms=with_norms)
        DataPasses(context, self._train, scores[0], result, index).scan("", joined, go_on)
        losses = [*result.query_losses, *(one for one in result.against_losses if one is not None)]
        self._require_finite(result.scores, torch.tensor(losses))
        seconds = time.perf_counter() - start
        return [
            _OpenRanking(
                scores=self._row(result, together, row, scores[row]),
                queries=alone[row],
                seconds=seconds,
                question=question,
                asked=scores[row],
                context=context,
                prepared=whole if len(questions) == 1 else None,
            )
            for row, question in enumerate(questions)
        ]

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
        products_of_scan = len(self._opened.index) * self._opened.index.rank
        # Whole gradients of several questions at once may be more than there is memory for.
        by_rank = products_of_scan >= _LEAST_FOR_LOW_RANK or num_questions > 1
        scanned: list[PreparedQueries] = []
        for group in range(num_questions):
            of_group = _whole(context, refinement, together, group)
            scanned.append(at_rank(context, of_group, _SCAN_RANK) if by_rank else of_group)
            result.query_losses[group] = of_group.losses[group]
            if (other := together.against[group]) is not None:
                result.against_losses[group] = of_group.losses[other]
        if by_rank:
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

    def _row(
        self, result: InfluenceScores, queries: QuerySet, row: int, scores: ScoresConfig
    ) -> InfluenceScores:
        """One question's row of the scores of several, with its lists."""
        losses = result.query_losses
        other = queries.against[row]
        refined = result.refined
        if refined is not None:
            refined = replace(refined, residuals=refined.residuals[row : row + 1])
        own = replace(
            result,
            scores=result.scores[row : row + 1],
            query_norms=result.query_norms[row : row + 1],
            members=((0,),),
            query_losses=[losses[row]],
            against_losses=[None if other is None else result.against_losses[row]],
            tokens=scores.tokens,
            refined=refined,
            model_differs=self._opened.differs,
            not_compared=self._opened.not_compared,
        )
        columns = np.arange(len(own.indices))
        lengths = list_lengths(scores, len(self._train))
        top, bottom = make_lists(own.scores[0], columns, own.indices, lengths)
        own.top, own.bottom = [top], [bottom]
        return own

    def to_rescore(self, ranking: Ranking) -> list[int]:
        """Columns to be scored exactly, in the order of interest."""
        chosen = self._chosen(_open(ranking))
        return list(dict.fromkeys([*chosen.top.tolist(), *chosen.bottom.tolist()]))

    def _chosen(self, ranking: "_OpenRanking") -> Chosen:
        question = ranking.question
        lengths = (question.top_k, question.bottom_k)
        chosen = choose_for_rescoring(ranking.scores, 0, question.rescore, lengths)
        order = ranking.scores.scores[0]

        def sorted_by(columns: np.ndarray, *, descending: bool) -> np.ndarray:
            values = order[torch.from_numpy(columns)]
            return columns[values.argsort(descending=descending, stable=True).numpy()]

        return Chosen(
            sorted_by(chosen.top, descending=True),
            sorted_by(chosen.bottom, descending=False),
            np.zeros(0, dtype=np.int64),
        )

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
        own, joined = _open(ranking), Details.join(list(details))
        joined = joined.take(np.argsort(joined.columns, kind="stable"))
        lengths = (own.question.top_k, own.question.bottom_k)
        exact = joined.module_scores.sum(1)
        chosen = self._chosen(own)
        lists, rescored = exact_lists(own.scores, 0, joined.columns, exact, chosen, lengths)
        listed = np.concatenate([one.columns for one in lists])
        kept = np.flatnonzero(np.isin(joined.columns, listed))
        return replace(
            own.scores,
            top=[lists[0]],
            bottom=[lists[1]],
            rescored=[rescored],
            details=joined.take(kept),
        )

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
            scores=self._checked(question if scores.rescored else replace(question, rescore=0)),
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


def _open(ranking: Ranking) -> _OpenRanking:
    assert isinstance(ranking, _OpenRanking)
    return ranking
