"""The sizes of a batch that a side is tried with, and which of them is its best.

A size counts what the side's own option counts: tokens of a step for this package, tokens of a
batch, padding included, for bergson, sequences of a batch for kronfluence. One sequence at a time
is the least that each can do, so candidates are 1, 4 and 16 of the longest sequence. On a CPU this
package takes no more tokens in a step than `step_tokens` allows, so larger ones are the same.
kronfluence has a second way with its largest batch, `use_iterative_lambda_aggregation`.
"""

from dataclasses import dataclass

import torch

from ekfac_dist.curvature.costs import step_tokens
from ekfac_dist.report.tables import table

SEQUENCES = (1, 4, 16)
COUNTED = {
    "ours": ("token", "a step"),
    "kronfluence": ("sequence", "a batch"),
    "bergson": ("token", "a batch"),
}


@dataclass(frozen=True)
class Batch:
    """A size of a side's batch.

    Attributes:
        size: Tokens, or sequences for kronfluence.
        iterative: kronfluence's `use_iterative_lambda_aggregation`.
    """

    size: int
    iterative: bool = False

    def words(self, side):
        """For a table: what `size` counts."""
        one, of_what = COUNTED[side]
        counted = one if self.size == 1 else f"{one}s"
        return f"{self.size:,} {counted} {of_what}" + (", iterative" if self.iterative else "")


def candidates(side, sequences, longest, threads, device):
    """The batches to try a side with, smallest first.

    Args:
        side: "ours", "kronfluence" or "bergson".
        sequences: How many there are.
        longest: Tokens of the longest.
        threads: Of each worker.
        device: "cpu" or "cuda".
    """
    counts = [count for count in SEQUENCES if count <= sequences]
    if side == "kronfluence":
        return [*(Batch(count) for count in counts), Batch(counts[-1], iterative=True)]
    tokens = [count * longest for count in counts]
    if side == "ours":
        tokens = [step_tokens(size, torch.device(device), threads) for size in tokens]
    return [Batch(size) for size in dict.fromkeys(tokens)]


def estimated_seconds(report, layers, tokens):
    """What the whole work would take, from a run on a part of it.

    Start, loading and storing are taken to last as long as for the part; the decomposition as many
    times as long as there are more layers; the passes by layers and by tokens.

    Args:
        report: Of the run, as `peer_sides.run` returns it.
        layers: The whole model's over those of the part.
        tokens: The whole data's over those of the part.
    """
    passes = report["passes"]
    over_data = passes["covariance"] + passes["refit"]
    rest = report["whole_seconds"] - over_data - passes["eigenbasis"]
    return rest + layers * (passes["eigenbasis"] + tokens * over_data)


def best(tried):
    """The batch of the least estimated seconds.

    Args:
        tried: A list of {"batch": of a side, "estimated_seconds": …}.
    """
    return min(tried, key=lambda one: one["estimated_seconds"])["batch"]


def sweep_table(sweep):
    """All that was tried, as a table.

    Args:
        sweep: {side: [{"batch", "estimated_seconds", "report"}, …]}.
    """
    lines = []
    for side, tried in sweep.items():
        for one in tried:
            chosen = "best" if one["batch"] == best(tried) else ""
            seconds = (one["report"]["whole_seconds"], one["estimated_seconds"])
            lines.append([side, one["batch"].words(side), *(f"{s:.1f}" for s in seconds)])
            lines[-1] += [f"{one['report']['all_peak_bytes'] / 1e9:.2f}", chosen]
    return table(["side", "batch", "part, s", "whole, estimated s", "part, GB", ""], lines)


# --- given by hand --------------------------------------------------------------------------------


def parsed(text):
    """(row or None, side, Batch) of `[ROW:]SIDE=SIZE[,iterative]`.

    Raises:
        ValueError: It is not of this form.
    """
    place, _, value = text.partition("=")
    row, _, side = place.rpartition(":")
    size, _, way = value.partition(",")
    if side not in COUNTED or not size.isdecimal() or int(size) < 1 or way not in ("", "iterative"):
        raise ValueError(
            f"{text} is no setting; give [ROW:]SIDE=SIZE[,iterative], a side of "
            f"{', '.join(COUNTED)} and a size of at least 1, such as kronfluence=4"
        )
    if way and side != "kronfluence":
        raise ValueError(f"{text}: only kronfluence can be iterative")
    return row or None, side, Batch(int(size), iterative=bool(way))


def given_batch(settings, row, side):
    """What was given for a side of a row, or for the side in every row; None: nothing.

    Args:
        settings: A list of what `parsed` returns; of two for the same the last one counts.
        row: Its name.
        side: Its name.
    """
    by_place = {(of_row, of_side): batch for of_row, of_side, batch in settings}
    return by_place.get((row, side), by_place.get((None, side)))


def as_settings(batches):
    """The words for `--settings` that give these again.

    Args:
        batches: {row: {side: Batch}}.
    """
    return " ".join(
        f"{row}:{side}={batch.size}" + (",iterative" if batch.iterative else "")
        for row, of_sides in batches.items()
        for side, batch in of_sides.items()
    )
