"""The steps of a demo from its factors on: other commands of this package, as a user starts them.

What they need lies in the demo's directory: model, data, queries and configurations. A step whose
result is complete is left out; when a part is made anew, everything made from the old one is
removed.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

from ekfac_dist.demo.commands import PROGRAM, call, ends_its_children, launch_line
from ekfac_dist.demo.configs import (
    Job,
    is_store_of,
    is_unfinished_answer,
    is_whole_answer,
    is_whole_store,
)
from ekfac_dist.demo.directory import DemoPaths, remove_paths
from ekfac_dist.errors import ConfigError

NUM_STEPS = 8
FACTORS, INSPECT, QUERY, ANSWERS, REPORT = range(4, 9)


@dataclass(frozen=True)
class Steps:
    """The last five steps of one demo.

    Args:
        paths: The demo's directory.
        job: What it fits and asks.
        workers: Number of workers that fit the factors and answer the queries.
    """

    paths: DemoPaths
    job: Job
    workers: int

    def take(self, start: float, show_answers: Callable[[], None]) -> int:
        """Takes all five, up to the first that fails.

        Args:
            start: When the demo began, by `time.monotonic`.
            show_answers: Shows the scores, once they are there.

        Returns:
            The exit status: 0, or that of the step that failed.
        """
        with ends_its_children():
            status = self._fit() or self._inspect() or self._query()
            if not status:
                show_answers()
                status = self._report()
        if not status:
            print(
                f"\nThe demo took {elapsed(start)}. Everything is in {self.paths.directory}",
                flush=True,
            )
        return status

    def _fit(self) -> int:
        """Runs `estimate` on several workers, unless its store exists; returns its status."""
        paths = self.paths
        if is_whole_store(paths, self.job):
            print_step(FACTORS, "factors", f"reused: {paths.factors}")
            return 0
        remove_paths(paths.report, paths.scores)
        if not is_store_of(paths, self.job):  # else `estimate` resumes it
            remove_paths(paths.factors)
        print_step(FACTORS, "factors", f"fitting on {self._num_workers}")
        line = launch_line(paths.accelerate_config, "estimate", paths.estimate_config)
        return call("estimate", line)

    def _inspect(self) -> int:
        """Runs `inspect`; returns its exit status."""
        print_step(INSPECT, "inspect", str(self.paths.factors))
        return call("inspect", [*PROGRAM, "inspect", str(self.paths.factors)])

    def _query(self) -> int:
        """Runs `query` on several workers, unless its results exist; returns its status."""
        paths = self.paths
        if is_whole_answer(paths, self.job):
            print_step(QUERY, "query", f"reused: {paths.scores}")
            return 0
        remove_paths(paths.report)
        if not is_unfinished_answer(paths, self.job):  # else `query` resumes it
            remove_paths(paths.scores)
        num_queries = len(self.job.queries)
        print_step(QUERY, "query", f"answering {num_queries} queries on {self._num_workers}")
        return call("query", launch_line(paths.accelerate_config, "query", paths.query_config))

    def _report(self) -> int:
        """Runs `report`, unless its page exists or jinja2 is missing; returns its status."""
        paths = self.paths
        if paths.report.is_file():
            print_step(REPORT, "report", f"reused: {paths.report}")
            return 0
        if importlib.util.find_spec("jinja2") is None:
            advice = "left out, for it needs jinja2: pip install 'ekfac_dist[report]'"
            print_step(REPORT, "report", advice)
            return 0
        print_step(REPORT, "report", "a page to look at the scores in")
        note = [] if self.job.note is None else ["--note", self.job.note]
        line = [*PROGRAM, "report", str(paths.scores), *note, "--output", str(paths.report)]
        return call("report", line)

    @property
    def _num_workers(self) -> str:
        return f"{self.workers} worker{'s' * (self.workers != 1)}"


def require_workers(number: int) -> None:
    """Refuses a number of workers below 1.

    Raises:
        ConfigError: If it is below 1.
    """
    if number < 1:
        raise ConfigError(f"workers is {number}; it must be 1 or more.")


def print_step(step: int, name: str, text: str) -> None:
    """Says that a step begins, or what it made."""
    print(f"{step}/{NUM_STEPS} {name:<10} {text}", flush=True)


def elapsed(start: float) -> str:
    """The seconds since a time by `time.monotonic`, as text."""
    return f"{time.monotonic() - start:.0f} s"
