"""Progress is whole lines in a log and a bar on a terminal, on one worker alone."""

import io
import re
from contextlib import suppress

import pytest

from ekfac_dist.runtime import progress as progress_module
from ekfac_dist.runtime.progress import LOG_SECONDS, Progress


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module.time, "monotonic", clock)
    return clock


def test_a_log_gets_whole_lines_now_and_then_and_one_at_the_end(clock: Clock):
    log = io.StringIO()
    with Progress("covariance", total=1000, unit="tokens", stream=log) as progress:
        for _ in range(100):
            clock.pass_(0.5)
            progress.update(10)
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert log.getvalue().endswith("\n")
    assert len(lines) == 50 / LOG_SECONDS  # the end alone says 100%
    assert [line.split()[:2] for line in lines[:2]] == [
        ["covariance", "20%"],
        ["covariance", "40%"],
    ]
    assert lines[-1].split()[:2] == ["covariance", "100%"]


def test_a_line_tells_the_rates_and_the_time_left(clock: Clock):
    log = io.StringIO()
    with Progress("refit", total=1000, unit="tokens", num_sequences=50, stream=log) as progress:
        clock.pass_(LOG_SECONDS)
        progress.update(250, 20)
        (line,) = log.getvalue().splitlines()
    assert line == "refit         25%  2.0 sequences/s, 25.0 tokens/s, 0:00:30 left"


def test_rates_are_those_of_all_workers(clock: Clock):
    """The shown worker does a quarter of the work; the time left is its own."""
    log = io.StringIO()
    progress = Progress(
        "refit", total=250, unit="tokens", num_sequences=50, whole=(1000, 200), stream=log
    )
    clock.pass_(LOG_SECONDS)
    progress.update(125, 10)
    assert log.getvalue() == "refit         50%  4.0 sequences/s, 50.0 tokens/s, 0:00:10 left\n"


def test_large_rates_are_shortened(clock: Clock):
    log = io.StringIO()
    progress = Progress("refit", total=10**6, unit="tokens", stream=log)
    clock.pass_(LOG_SECONDS)
    progress.update(500_000)
    assert " 50.0k tokens/s" in log.getvalue()


def test_a_rate_that_says_nothing_is_left_out(clock: Clock):
    log = io.StringIO()
    progress = Progress("eigenbasis", total=100, unit="n³", show_rate=False, stream=log)
    clock.pass_(LOG_SECONDS)
    progress.update(50)
    assert log.getvalue() == "eigenbasis    50%  0:00:10 left\n"


def test_the_last_line_tells_the_time_that_it_took(clock: Clock):
    log = io.StringIO()
    with Progress("refit", total=100, unit="tokens", stream=log) as progress:
        clock.pass_(75)
        progress.update(100)
    assert log.getvalue().splitlines()[-1].endswith("1.3 tokens/s, 0:01:15")


def test_nothing_is_shown_where_it_is_disabled(clock: Clock):
    for stream in (io.StringIO(), Terminal()):
        with Progress("refit", total=10, unit="tokens", enabled=False, stream=stream) as progress:
            clock.pass_(10 * LOG_SECONDS)
            progress.update(10, 1)
        assert stream.getvalue() == ""
        assert (progress.done, progress.sequences_done) == (10, 1)


def test_work_that_was_never_begun_leaves_no_line(clock: Clock):
    log = io.StringIO()
    with Progress("tokenising", total=10, unit="sequences", stream=log):
        clock.pass_(10 * LOG_SECONDS)
    assert log.getvalue() == ""


def fail_midway(progress: Progress) -> None:
    with suppress(RuntimeError), progress:
        progress.update(1)
        raise RuntimeError


def test_a_failure_leaves_no_closing_line(clock: Clock):
    log = io.StringIO()
    fail_midway(Progress("refit", total=10, unit="tokens", stream=log))
    assert log.getvalue() == ""


def test_no_work_at_all_is_no_division_by_zero(clock: Clock):
    log = io.StringIO()
    with Progress("refit", total=0, unit="tokens", stream=log) as progress:
        clock.pass_(LOG_SECONDS)
        progress.update(0)
    assert log.getvalue().startswith("refit        100%")


def test_a_terminal_gets_a_bar(clock: Clock):
    terminal = Terminal()
    with Progress("refit", total=4, unit="tokens", num_sequences=4, stream=terminal) as progress:
        for _ in range(4):
            clock.pass_(1.0)
            progress.update(1, 1)
    shown = terminal.getvalue()
    assert "\r" in shown
    last = [part for part in shown.split("\r") if part.strip()][-1]
    assert re.match(r"refit +100%\|[█#]+\| 1.0 sequences/s, 1.0 tokens/s, 0:00:04", last)
    assert shown.endswith("\n"), "what is printed next begins a line of its own"


def test_a_bar_is_closed_when_the_work_fails(clock: Clock):
    terminal = Terminal()
    fail_midway(Progress("refit", total=4, unit="tokens", stream=terminal))
    assert terminal.getvalue().endswith("\n")
