"""Worker 0's desk: what waits, what is being answered, what was answered, and whether all is well.

The one object that HTTP threads and the main thread share; each method holds its lock.
"""

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ekfac_dist.errors import UserError
from ekfac_dist.influence.asking import Question
from ekfac_dist.serve.answers import Answered
from ekfac_dist.serve.jobs import CANCELLED, CANCELLED_SENTENCE, ENDING, Job
from ekfac_dist.serve.metrics import Metrics

MOST_IN_A_SCAN = 8
KEPT_ANSWERS, KEPT_BYTES = 64, 256 * 2**20
ENDING_SENTENCE = "The service is ending; ask again when it has been started again."
_LOOK_SECONDS = 0.1  # a signal is noticed so soon


class QueueFull(Exception):
    """A desk at which no more jobs can wait.

    Args:
        retry_seconds: When it is worth trying again, in whole seconds.
    """

    def __init__(self, retry_seconds: int) -> None:
        super().__init__(
            f"Too many questions are waiting; ask again in about {retry_seconds} "
            f"second{'' if retry_seconds == 1 else 's'}."
        )
        self.retry_seconds = retry_seconds


class Ending(Exception):
    """A desk that takes no more jobs, and why."""


class Desk:
    """Jobs between HTTP threads and the main thread.

    Args:
        queue_length: Most jobs that wait.
        drain_seconds: How long jobs are still answered after `drain`.
        metrics: What is counted.
    """

    def __init__(self, queue_length: int, drain_seconds: float, metrics: Metrics) -> None:
        self.metrics = metrics
        self._queue_length, self._drain_seconds = queue_length, drain_seconds
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._current: list[Job] = []
        self._kept: OrderedDict[str, Answered] = OrderedDict()
        self._deadline: float | None = None  # set by `drain`
        self._failure: str | None = None
        self._job_seconds = 1.0  # about as long as a job takes

    # -- of HTTP threads -------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        """Lets a job wait, and tells it how many are before it.

        Raises:
            QueueFull: If too many wait.
            Ending: If the service is ending.
        """
        with self._changed:
            if (reason := self._reason_to_end()) is not None:
                raise Ending(reason)
            if len(self._waiting) >= self._queue_length:
                self.metrics.questions.labels(job.kind, "refused_full").inc()
                seconds = self._job_seconds * len(self._waiting) / 2
                raise QueueFull(min(60, max(1, math.ceil(seconds))))
            job.post("queued", {"id": job.id, "before": len(self._waiting) + len(self._current)})
            self._waiting.append(job)
            self._count_waiting()
            self._changed.notify()

    def cancel(self, job_id: str) -> bool:
        """Cancels a job that waits, or is being answered; whether there was one."""
        with self._changed:
            for job in (*self._waiting, *self._current):
                if job.id != job_id or job.is_cancelled:
                    continue
                job.is_cancelled = True
                if job in self._waiting:
                    self._waiting.remove(job)
                    self._count_waiting()
                    self._end(job, CANCELLED, CANCELLED_SENTENCE)
                return True
        return False

    def kept(self, job_id: str) -> Answered | None:
        """One of the last answers."""
        with self._changed:
            return self._kept.get(job_id)

    @property
    def reason_to_end(self) -> str | None:
        """Why no more is answered; None: all is well."""
        with self._changed:
            return self._reason_to_end()

    # -- of the main thread ------------------------------------------------------------------------

    def take(self, seconds: float, is_asked_to_end: Callable[[], bool]) -> list[Job]:
        """The next jobs: one, with the questions that one scan can answer together with it.

        Args:
            seconds: How long to wait for one.
            is_asked_to_end: Whether to stop waiting.

        Returns:
            The jobs, which are the current ones from now on; none if none came.
        """
        until = time.monotonic() + seconds
        with self._changed:
            while not self._waiting and time.monotonic() < until and not is_asked_to_end():
                self._changed.wait(_LOOK_SECONDS)
            self._current = self._take_together()
            now = time.monotonic()
            for job in self._current:
                job.started_at = now
                self.metrics.seconds.labels("waiting").observe(job.seconds_waited)
                job.post("started", {})
            self._count_waiting()
            return list(self._current)

    def _take_together(self) -> list[Job]:
        if not self._waiting:
            return []
        first = self._waiting.popleft()
        if not isinstance(first.work, Question):
            return [first]
        settings = first.work.settings
        alike = [
            job
            for job in self._waiting
            if isinstance(job.work, Question) and job.work.settings == settings
        ][: MOST_IN_A_SCAN - 1]
        for job in alike:
            self._waiting.remove(job)
        return [first, *alike]

    def is_wanted(self, job: Job) -> bool:
        """Whether a current job is to be gone on with."""
        with self._changed:
            return not job.is_cancelled and not self._is_overdue()

    def answered(self, job: Job, answer: Any, kept: Answered | None = None) -> None:
        """Ends a current job with its answer.

        Args:
            job: The job.
            answer: The answer, as types that JSON has.
            kept: What is kept of it.
        """
        with self._changed:
            if job not in self._current:  # ended meanwhile
                return
            if kept is not None:
                self._kept[job.id] = kept
                self._drop_old_answers()
            self._current.remove(job)
            spent = time.monotonic() - job.started_at
            self._job_seconds += 0.3 * (spent - self._job_seconds)
        job.post("answer", answer)
        self.metrics.questions.labels(job.kind, "answered").inc()

    def refused(self, job: Job, status: int, sentence: str) -> None:
        """Ends a current job without an answer."""
        with self._changed:
            if job in self._current:
                self._current.remove(job)
                self._end(job, status, sentence)

    def dropped(self, job: Job) -> None:
        """Ends a current job that is not wanted any more."""
        if job.is_cancelled:
            self.refused(job, CANCELLED, CANCELLED_SENTENCE)
        else:
            self.refused(job, ENDING, ENDING_SENTENCE)

    def drain(self) -> None:
        """Takes no more jobs; those that are there are answered as far as there is time."""
        with self._changed:
            if self._deadline is None:
                self._deadline = time.monotonic() + self._drain_seconds

    def is_drained(self) -> bool:
        """Whether the service may end; jobs for which there was no time are told so."""
        with self._changed:
            if self._is_overdue():
                self._end_all(ENDING_SENTENCE)
            return self._deadline is not None and not self._waiting and not self._current

    def fail(self, sentence: str) -> None:
        """Takes no more jobs, and tells all that are there why; only the first reason counts."""
        with self._changed:
            if self._failure is None:
                self._failure = sentence
                self._end_all(sentence)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Context whose error ends all jobs with its sentence."""
        try:
            yield
        except BaseException as error:
            self.fail(sentence_of(error))
            raise

    # -- with the lock held ------------------------------------------------------------------------

    def _reason_to_end(self) -> str | None:
        return self._failure or (ENDING_SENTENCE if self._deadline is not None else None)

    def _is_overdue(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _end_all(self, sentence: str) -> None:
        for job in (*self._current, *self._waiting):
            self._end(job, ENDING, sentence)
        self._current, self._waiting = [], deque()
        self._count_waiting()

    def _end(self, job: Job, status: int, sentence: str) -> None:
        outcomes = {CANCELLED: "cancelled", ENDING: "ended"}
        self.metrics.questions.labels(job.kind, outcomes.get(status, "refused")).inc()
        job.refuse(status, sentence)

    def _count_waiting(self) -> None:
        self.metrics.waiting.set(len(self._waiting))

    def _drop_old_answers(self) -> None:
        held = sum(kept.num_bytes for kept in self._kept.values())
        while len(self._kept) > 1 and (len(self._kept) > KEPT_ANSWERS or held > KEPT_BYTES):
            _, oldest = self._kept.popitem(last=False)
            held -= oldest.num_bytes


def sentence_of(error: BaseException) -> str:
    """What clients are told of an error that ends the service; a defect is in the log alone."""
    if isinstance(error, UserError):
        return str(error)
    return (
        "The service has failed; see its log." if isinstance(error, Exception) else ENDING_SENTENCE
    )
