"""What a service asks of an open model: a question, its ranking, and the session that answers.

A session holds model, factors and index open. `session` implements it; `serve` asks it over HTTP.
Knows no HTTP.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ekfac_dist.config import DEFAULT_TOP_K, DampingConfig, Normalize, RefineConfig, Tokens
from ekfac_dist.influence.queries import QuerySet
from ekfac_dist.influence.query_texts import Query
from ekfac_dist.influence.results_in_memory import ResultsInMemory
from ekfac_dist.influence.scores import Details, InfluenceScores
from ekfac_dist.runtime.processes import World


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question; can be pickled.

    Attributes:
        query: The query.
        top_k: Length of the list of the most positive sequences.
        bottom_k: Length of the list of the most negative; 0: none.
        rescore: How many sequences at either end of the index's ranking are scored exactly, at
            least as many as either list has; 0: none.
        damping: The damping λ.
        normalize: What scores are divided by.
        tokens: What a position's score is of.
        refine: Whether query gradients are refined.
    """

    query: Query
    top_k: int = DEFAULT_TOP_K
    bottom_k: int = DEFAULT_TOP_K
    rescore: int = DEFAULT_TOP_K
    damping: DampingConfig = field(default_factory=DampingConfig)
    normalize: Normalize = "none"
    tokens: Tokens = "inputs"
    refine: RefineConfig = field(default_factory=RefineConfig)

    @property
    def settings(self) -> dict[str, Any]:
        """What must be equal for questions to be answered by one scan of the index."""
        return {
            "damping": dataclasses.asdict(self.damping),
            "normalize": self.normalize,
            "tokens": self.tokens,
            "refine": dataclasses.asdict(self.refine),
        }


@dataclass
class Ranking:
    """All sequences of the index, ranked for one question.

    Attributes:
        scores: Scores of one query group [1, N], its loss, and the lists by the index's scores.
        queries: The question's tokens.
        seconds: Duration of the scan, which several questions may have shared.
    """

    scores: InfluenceScores
    queries: QuerySet
    seconds: float


class ScanStopped(Exception):
    """A scan or a solve that ended early, on every worker, as nobody wants its answer any more."""


class Session(Protocol):
    """An open model with its factors and its index.

    Unless a method says otherwise it is a collective: all workers call it with the same arguments,
    each in its main thread. What a question's asker can mend, and what a question alone has brought
    about, such as NaN in its gradient, is a `UserError` that all workers raise together (see
    `World.agree`); after it the session can be asked again.

    Attributes:
        world: The workers.
        info: What `GET /v1/info` answers: "model" {name, dtype, whole, chats: whether it
            has a chat template}, "factors" {path, num_sequences, labels, refit}, "index" {path,
            rank, dtype, num_sequences, bytes}, "layers", "modules", "damping".
    """

    world: World
    info: dict[str, Any]

    def check(self, question: Question) -> None:
        """Tokenises a question and refuses a wrong one; no collective, in any thread of worker 0.

        Raises:
            UserError: If it cannot be answered.
        """

    def rank(
        self, questions: Sequence[Question], go_on: Callable[[], bool] = lambda: True
    ) -> list[Ranking]:
        """The rankings of questions of the same settings, by one scan of the index.

        Args:
            questions: The questions.
            go_on: A collective that is called now and then, between shards of the index and between
                products of a refinement; false on all workers if nobody wants an answer any more.

        Raises:
            NonFiniteError: If a score is NaN or infinite.
            ScanStopped: If `go_on` is false.
        """

    def to_rescore(self, ranking: Ranking) -> list[int]:
        """Columns to be scored exactly, in the order of interest; no collective.

        The most positive ones first, then the most negative; each once.
        """

    def exact(
        self,
        ranking: Ranking,
        columns: Sequence[int],
        go_on: Callable[[], bool] = lambda: True,
    ) -> Details:
        """Exact scores of a few columns with those of their positions, layers and modules.

        Args:
            ranking: The ranking.
            columns: The columns.
            go_on: As of `rank`; called if the question's gradient has to be refined again.

        Raises:
            NonFiniteError: If a score is NaN or infinite.
            ScanStopped: If `go_on` is false.
        """

    def finish(self, ranking: Ranking, details: Sequence[Details]) -> InfluenceScores:
        """The scores with lists by exact scores, and details; no collective.

        Args:
            ranking: The ranking.
            details: Of all columns of `to_rescore`, in its order.
        """

    def sequence(self, index: int) -> dict[str, Any]:
        """A training sequence; no collective, in any thread of worker 0.

        Args:
            index: Its index in the data.

        Returns:
            "index", "text", "tokens", "is_label"; of a part of a row of the data "document" and
            "first_token", too.

        Raises:
            KeyError: If the index holds no such sequence.
        """

    def complete(
        self,
        prompt: str,
        messages: list[dict[str, Any]] | None,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> dict[str, Any]:
        """Lets the model go on from a prompt, or a chat; no collective, on worker 0 alone.

        Returns:
            "text", "tokens", and "finish": "length" or "end".

        Raises:
            UserError: If the prompt cannot be used.
        """

    def results(self, ranking: Ranking, scores: InfluenceScores) -> ResultsInMemory:
        """The files of `query`'s results for one question; no collective, on worker 0 alone.

        Args:
            ranking: The question's ranking.
            scores: Those of the ranking, or of `finish`.
        """
