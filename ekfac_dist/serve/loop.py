"""The main thread of every worker: takes what worker 0's desk has, and answers it together.

Every worker goes through the same steps. Worker 0 says before each what comes next, so that a
cancelled question is left by all at the same place. Workers without a question hear "nothing" every
few seconds, so that no wait is longer than a collective's.
"""

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

from ekfac_dist.errors import MENDABLE, UserError, status_of
from ekfac_dist.influence.asking import Question, Ranking, ScanStopped, Session
from ekfac_dist.runtime.out_of_memory import shortage
from ekfac_dist.runtime.peers import was_agreed
from ekfac_dist.runtime.processes import World
from ekfac_dist.serve.answering import Answering, go_on_from
from ekfac_dist.serve.desk import Desk
from ekfac_dist.serve.jobs import Continuation

Said = TypeVar("Said")

IDLE_SECONDS = 2.0
# Sequences that are scored exactly before the next look at whether their question is still wanted.
SEQUENCES_AT_A_TIME = 4


@dataclass
class EndRequest:
    """Whether this process was asked to end, by SIGTERM or Ctrl-C.

    Attributes:
        was_made: Whether it was.
    """

    was_made: bool = False

    def listen(self) -> None:
        """Notes the signals from now on; a second Ctrl-C ends the process at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.was_made:
            signal.default_int_handler(number, frame)
        self.was_made = True


@dataclass(frozen=True)
class Command:
    """What worker 0 says to all.

    Attributes:
        questions: What to answer; none: wait for the next command.
        ends: Whether the service ends.
    """

    questions: tuple[Question, ...] = ()
    ends: bool = False


def answer_until_end(
    session: Session,
    desk: Desk | None,
    request: EndRequest,
    is_served: Callable[[], bool] = lambda: True,
) -> None:
    """Answers what comes to the desk, until any worker is asked to end and all is answered.

    A collective. What a question's asker can mend ends that question; any other error is raised.

    Args:
        session: The open model.
        desk: The desk, on worker 0; None on the others.
        request: Whether this worker was asked to end.
        is_served: Whether the HTTP threads are alive.
    """
    while True:
        command, answerings = _next(session, desk, request, is_served)
        command = _said_by_main(session.world, desk, request, command)
        if command.ends:
            return
        if command.questions:
            _Batch(session, desk, request).answer(command.questions, answerings)


def _said_by_main(world: World, desk: Desk | None, request: EndRequest, said: Said) -> Said:
    """What worker 0 says to all; a collective, in which any worker's wish to end is heard.

    Args:
        world: The workers.
        desk: The desk, on worker 0; None on the others.
        request: Whether this worker was asked to end.
        said: What this worker would say.
    """
    everyone = world.gather((said, request.was_made))
    if desk is not None and any(asked for _, asked in everyone):
        desk.drain()
    return everyone[0][0]


def _next(
    session: Session, desk: Desk | None, request: EndRequest, is_served: Callable[[], bool]
) -> tuple[Command, Sequence[Answering]]:
    """Worker 0's next command, and the questions in it; on other workers nothing."""
    if desk is None:
        return Command(), ()
    if not is_served():
        raise RuntimeError("the HTTP thread has ended")
    if request.was_made:
        desk.drain()
    if desk.is_drained():
        return Command(ends=True), ()
    jobs = desk.take(IDLE_SECONDS, lambda: request.was_made)
    if len(jobs) == 1 and isinstance(jobs[0].work, Continuation):
        go_on_from(session, desk, jobs[0])
        return Command(), ()
    questions = tuple(job.work for job in jobs if isinstance(job.work, Question))
    return Command(questions), [Answering(session, desk, job) for job in jobs]


@dataclass(frozen=True)
class _Batch:
    """Answers questions of the same settings by one scan.

    Attributes:
        session: The open model.
        desk: The desk, on worker 0; None on the others.
        request: Whether this worker was asked to end.
    """

    session: Session
    desk: Desk | None
    request: EndRequest

    def answer(self, questions: Sequence[Question], answerings: Sequence[Answering]) -> None:
        """Answers them; a collective.

        Args:
            questions: The questions.
            answerings: Worker 0's side of each; empty on other workers.
        """
        try:
            rankings = self.session.rank(questions, lambda: self._go_on(answerings))
        except ScanStopped:
            for answering in answerings:
                answering.dropped()
            return
        except Exception as error:
            refusal = _of_question(self.session, error)
            if len(questions) > 1:  # whose fault it is shows when each is asked alone
                for number, question in enumerate(questions):
                    self.answer([question], answerings[number : number + 1])
                return
            for answering in answerings:
                answering.refused(refusal)
            return
        if answerings:
            answerings[0].count_scan(len(rankings[0].scores.indices))
        for answering, ranking in zip(answerings, rankings, strict=False):
            answering.ranked(ranking)
        for number, ranking in enumerate(rankings):
            self._score_exactly(ranking, answerings[number : number + 1])

    def _score_exactly(self, ranking: Ranking, answerings: Sequence[Answering]) -> None:
        """Scores the best of a ranking exactly, a few sequences at a time; a collective.

        Args:
            ranking: The ranking.
            answerings: Worker 0's side of its question; empty on other workers.
        """
        world, start, parts = self.session.world, time.perf_counter(), []
        answering = answerings[0] if answerings else None

        def go_on() -> bool:
            return self._go_on(answerings)

        is_wanted = True
        columns = world.share(answering.columns(ranking) if answering else [])
        step = max(SEQUENCES_AT_A_TIME, world.size)
        for begin in range(0, len(columns), step):
            is_wanted = go_on()
            if not is_wanted:
                break
            try:
                part = self.session.exact(ranking, columns[begin : begin + step], go_on)
            except ScanStopped:
                is_wanted = False
                break
            except Exception as error:
                refusal = _of_question(self.session, error)
                if answering:
                    answering.refused(refusal)
                return
            parts.append(part)
            if answering:
                answering.scored(ranking, part)
        if answering and is_wanted and answering.is_wanted:
            answering.finished(ranking, parts, time.perf_counter() - start)
        elif answering:
            answering.dropped()

    def _go_on(self, answerings: Sequence[Answering]) -> bool:
        """Whether any of some questions is wanted; a collective, as all leave them together."""
        is_wanted = any(answering.is_wanted for answering in answerings)
        return _said_by_main(self.session.world, self.desk, self.request, is_wanted)


def _of_question(session: Session, error: Exception) -> UserError:
    """An error that ends a question and not the service; any other is raised.

    All workers raise it together, or there is one worker.
    """
    for_user = shortage(error) or error
    together = session.world.size == 1 or was_agreed(error)
    if isinstance(for_user, UserError) and status_of(for_user) == MENDABLE and together:
        return for_user
    raise error
