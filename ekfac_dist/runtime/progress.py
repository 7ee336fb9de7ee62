"""Progress of long work: a bar on a terminal, a line every `LOG_SECONDS` in a log file.

Only worker 0 shows it. Batches are balanced between workers by tokens, so its share of the work
stands for all: the rates shown are its own, scaled to all workers.
"""

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

LOG_SECONDS = 10.0


def _rate(per_second: float) -> str:
    return f"{per_second / 1000:.1f}k" if per_second >= 10_000 else f"{per_second:.1f}"


def clock(seconds: float) -> str:
    """A number of seconds as hours, minutes and seconds, such as 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def show_line(name: str, text: str) -> None:
    """Shows a line about a stage of work where its progress is shown, on standard error."""
    print(f"{name:<12} {text}", file=sys.stderr, flush=True)


class Progress:
    """Shows the progress of one stage of a run.

    Args:
        name: Name of the stage.
        total: This worker's amount of work, in units proportional to time.
        unit: Name of the unit, in the plural.
        num_sequences: Number of sequences in `total`; None if the stage does not process sequences.
        whole: `total` and `num_sequences` of all workers together, which the shown rates are scaled
            to; None for this worker's own.
        enabled: Whether to show anything; false on every worker but the first.
        show_rate: Whether to show units per second, which is of no use for abstract units.
        stream: Where to show it; standard error by default.

    Attributes:
        done: Amount of work finished.
        sequences_done: Number of sequences finished.
    """

    def __init__(
        self,
        name: str,
        *,
        total: float,
        unit: str,
        num_sequences: int | None = None,
        whole: tuple[float, int] | None = None,
        enabled: bool = True,
        show_rate: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.num_sequences = num_sequences
        self.whole = whole or (total, num_sequences or 0)
        self.enabled = enabled
        self.show_rate = show_rate
        self.stream = stream or sys.stderr
        self.done = 0.0
        self.sequences_done = 0
        self._start = self._last_line = time.monotonic()
        self._bar: tqdm | None = None
        if enabled and self.stream.isatty():
            self._bar = tqdm(
                total=total,
                desc=f"{name:<12}",
                file=self.stream,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {unit}",
                unit="",
                dynamic_ncols=True,
                leave=True,
            )

    def update(self, amount: float, num_sequences: int = 0) -> None:
        """Adds finished work.

        Args:
            amount: Work done since the last call, in `unit`.
            num_sequences: Sequences finished since the last call.
        """
        self.done += amount
        self.sequences_done += num_sequences
        if not self.enabled:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.unit = self._describe(now)  # the text after the bar, by its bar_format
            self._bar.update(amount)
        elif now - self._last_line >= LOG_SECONDS and not 0 < self.total <= self.done:
            self._last_line = now  # the end has a line of its own
            self._print(now)

    def _describe(self, now: float) -> str:
        seconds = max(now - self._start, 1e-9)
        parts = []
        if self.num_sequences is not None:
            scale = self.whole[1] / self.num_sequences if self.num_sequences else 1.0
            parts.append(f"{_rate(scale * self.sequences_done / seconds)} sequences/s")
        if self.show_rate:
            scale = self.whole[0] / self.total if self.total else 1.0
            parts.append(f"{_rate(scale * self.done / seconds)} {self.unit}/s")
        if 0 < self.done < self.total:
            seconds_left = seconds * (self.total - self.done) / self.done
            parts.append(f"{clock(seconds_left)} left")
        else:
            parts.append(clock(seconds))
        return ", ".join(parts)

    def _print(self, now: float) -> None:
        percent = 100 * self.done / self.total if self.total else 100
        print(
            f"{self.name:<12} {percent:3.0f}%  {self._describe(now)}", file=self.stream, flush=True
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.unit = self._describe(time.monotonic())
            self._bar.refresh()
            self._bar.close()
        elif self.enabled and kind is None and self.done:
            self._print(time.monotonic())
