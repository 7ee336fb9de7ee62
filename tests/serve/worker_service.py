"""`serve` with a session without a model, alone or as one of several workers.

worker_service.py NOTES SHARD_SECONDS EXACT_SECONDS [OPTIONS OF serve]: each worker notes in NOTES
what its session has done, a line of JSON for each scan and exact call.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from helpers.fake_session import FakeSession

from ekfac_dist import cli
from ekfac_dist.errors import NonFiniteError


class NotingSession(FakeSession):
    """Notes what it is asked, and fails on all workers together, or on worker 1 alone."""

    notes: Path

    def rank(self, questions, go_on):
        self._note("scan", [question.query.completion for question in questions])
        with self.world.agree():
            if any(question.query.completion == "bad" for question in questions):
                raise NonFiniteError("NaN in the question's gradient.")
        if self.world.rank == 1 and questions[0].query.completion == "defect":
            raise RuntimeError("a wrong shape")
        found = super().rank(questions, go_on)
        self._note("ranked", self.scans[-1])
        return found

    def exact(self, ranking, columns, go_on):
        found = super().exact(ranking, columns, go_on)
        self._note("exact", list(columns))
        return found

    def _note(self, what, value):
        with self.notes.open("a") as opened:
            opened.write(json.dumps([what, value]) + "\n")


def session_module(notes: Path, shard_seconds: float, exact_seconds: float) -> ModuleType:
    module = ModuleType("ekfac_dist.influence.session")

    @contextmanager
    def open_session(config, world):
        session = NotingSession(
            world=world, shard_seconds=shard_seconds, exact_seconds=exact_seconds
        )
        session.notes = notes / f"{world.rank}.jsonl"
        yield session

    module.open_session = open_session
    return module


if __name__ == "__main__":
    notes, shard_seconds, exact_seconds, *options = sys.argv[1:]
    sys.modules["ekfac_dist.influence.session"] = session_module(
        Path(notes), float(shard_seconds), float(exact_seconds)
    )
    good = ["serve", "--factors", "f", "--index", "i", "--port", "0"]
    sys.exit(cli.main([*good, *options]))
