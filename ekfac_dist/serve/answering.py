"""Worker 0's side of the questions that are being answered: what their clients are told, and when.

The loop runs the same on every worker; what only worker 0 does with a result is here.
"""

import time
from collections.abc import Sequence

from ekfac_dist.errors import UserError
from ekfac_dist.influence.asking import Question, Ranking, Session
from ekfac_dist.influence.results import BOTTOM, TOP
from ekfac_dist.influence.scores import Details, InfluenceScores
from ekfac_dist.runtime.out_of_memory import shortage
from ekfac_dist.serve.answers import Answered, exact_rows, is_of_outputs
from ekfac_dist.serve.desk import Desk
from ekfac_dist.serve.field_names import renamed
from ekfac_dist.serve.jobs import UNUSABLE, Continuation, Job


class Answering:
    """One question that is being answered, on worker 0.

    Args:
        session: The open model.
        desk: Where it came from.
        job: The question.
    """

    def __init__(self, session: Session, desk: Desk, job: Job) -> None:
        self._session, self._desk, self.job = session, desk, job
        self._seconds = {"waited": job.seconds_waited, "ranking": 0.0, "exact": 0.0}
        self._places: dict[int, tuple[str, int]] = {}
        self._of_outputs = False
        self._num_columns = self._num_scored = 0

    @property
    def is_wanted(self) -> bool:
        """Whether to go on."""
        return self._desk.is_wanted(self.job)

    def ranked(self, ranking: Ranking) -> None:
        """Tells the index's ranking."""
        question = self._question
        self._seconds["ranking"] = ranking.seconds
        self._desk.metrics.seconds.labels("ranking").observe(ranking.seconds)
        if self.job.streams and question.rescore:
            answer = self._answered(ranking, ranking.scores, "ranking")
            for name, file in (("bottom", BOTTOM), ("top", TOP)):
                lines = answer.results.lines(file)
                self._places |= {line["index"]: (name, line["rank"]) for line in lines}
            self._of_outputs = is_of_outputs(answer.results.manifest)
            self.job.post("ranking", answer.json())

    def count_scan(self, num_sequences: int) -> None:
        """Counts a scan of the index, of this question and perhaps of others."""
        self._desk.metrics.sequences.inc(num_sequences)

    def columns(self, ranking: Ranking) -> list[int]:
        """What is scored exactly, in that order."""
        columns = self._session.to_rescore(ranking) if self._question.rescore else []
        self._num_columns = len(columns)
        self._tell_progress()
        return columns

    def scored(self, ranking: Ranking, details: Details) -> None:
        """Tells the exact scores of some sequences."""
        self._num_scored += len(details.columns)
        if not self.job.streams:
            return
        for row in exact_rows(
            self._session, ranking, details, self._places, of_outputs=self._of_outputs
        ):
            self.job.post("sequence", row)
        self._tell_progress()

    def finished(self, ranking: Ranking, parts: Sequence[Details], seconds: float) -> None:
        """Tells the whole answer, and keeps it.

        Args:
            ranking: The question's ranking.
            parts: The exact scores of all sequences of `columns`; empty without re-scoring.
            seconds: Duration of the exact scoring.
        """
        scores, stage = ranking.scores, "ranking"
        if parts:
            scores, stage = self._session.finish(ranking, parts), "exact"
            self._seconds["exact"] = seconds
            self._desk.metrics.seconds.labels("exact").observe(seconds)
        answer = self._answered(ranking, scores, stage)
        self._desk.answered(self.job, answer.json(), answer)

    def refused(self, error: Exception) -> None:
        """Tells why the question cannot be answered."""
        self._desk.refused(self.job, UNUSABLE, renamed(str(error), self.job.names))

    def dropped(self) -> None:
        """Ends the question, which is not wanted any more."""
        self._desk.dropped(self.job)

    @property
    def _question(self) -> Question:
        assert isinstance(self.job.work, Question)
        return self.job.work

    def _tell_progress(self) -> None:
        progress = {"done": self._num_scored, "of": self._num_columns, "what": "sequences"}
        self.job.post("progress", progress)

    def _answered(self, ranking: Ranking, scores: InfluenceScores, stage: str) -> Answered:
        index = self._session.info["index"]
        return Answered(
            id=self.job.id,
            request=self.job.request,
            results=self._session.results(ranking, scores),
            index={name: index[name] for name in ("rank", "dtype")},
            stage=stage,
            seconds=dict(self._seconds),
        )


def go_on_from(session: Session, desk: Desk, job: Job) -> None:
    """Lets the model go on from a prompt; on worker 0 alone, while the others wait."""
    work = job.work
    assert isinstance(work, Continuation)
    started = time.monotonic()
    try:
        text = session.complete(
            work.prompt, work.messages, work.max_tokens, work.temperature, work.seed
        )
    except Exception as error:
        for_user = shortage(error) or error
        if not isinstance(for_user, UserError):
            raise
        desk.refused(job, UNUSABLE, str(for_user))
        return
    desk.metrics.seconds.labels("complete").observe(time.monotonic() - started)
    desk.answered(job, text)
