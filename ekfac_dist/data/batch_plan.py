"""The plan of batches: which sequences are computed together, and by which worker.

A pure function of the sequences' lengths. Sequences are sorted by length and cut into batches under
a token budget, so a batch is nearly free of padding. For a given budget the batches do not depend
on the number of workers; only their assignment to workers does. Every sequence is in exactly one
batch, and every batch belongs to exactly one worker.

    lengths   9 9 8 | 7 7 6 6 | 4 4 3 3 3 2 | …      budget 27
    worker    0       1         1              …      each batch to the least loaded worker
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np


def plan_batches(
    lengths: SequenceOf[int] | np.ndarray, batch_tokens: int, equal_above: int | None = None
) -> list[list[int]]:
    """Cuts sequences into batches, the longest first.

    Args:
        lengths: Positions of each sequence [N].
        batch_tokens: Upper limit of number of sequences × longest sequence in a batch. A sequence
            that exceeds it alone gets a batch of its own.
        equal_above: Sequences longer than this share a batch only with others of their length;
            None: sequences of any lengths may share one.

    Returns:
        Indices into `lengths` for each batch; each index occurs exactly once.
    """
    lengths = np.asarray(lengths)
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    batches: list[list[int]] = []
    longest = 0
    for index in order.tolist():
        fits = batches and longest * (len(batches[-1]) + 1) <= batch_tokens
        if fits and may_share(longest, int(lengths[index]), equal_above):
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = int(lengths[index])
    return batches


def may_share(length: int, other_length: int, equal_above: int | None) -> bool:
    """Whether sequences of two lengths may share a batch; see `plan_batches`."""
    return equal_above is None or length == other_length or max(length, other_length) <= equal_above


def assign_batches(costs: SequenceOf[int], num_workers: int) -> list[list[int]]:
    """Assigns each batch to the least loaded worker so far, the costliest batch first.

    Args:
        costs: Cost of each batch.
        num_workers: W.

    Returns:
        Indices of each worker's batches, ascending; a worker may have none.
    """
    shards: list[list[int]] = [[] for _ in range(num_workers)]
    loads = [0] * num_workers
    for batch in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        worker = loads.index(min(loads))
        shards[worker].append(batch)
        loads[worker] += costs[batch]
    return [sorted(shard) for shard in shards]


def padded_sizes(lengths: np.ndarray, batches: Iterable[SequenceOf[int]]) -> list[int]:
    """Number of sequences × longest sequence of each batch."""
    return [len(indices) * int(lengths[indices].max()) for indices in batches]


def worker_batches(
    lengths: np.ndarray,
    batch_tokens: int,
    num_workers: int,
    worker: int,
    equal_above: int | None = None,
) -> list[list[int]]:
    """One worker's share of the batches of all sequences; a batch costs its padded size.

    Args:
        lengths: Positions of each sequence [N].
        batch_tokens: As for `plan_batches`.
        num_workers: W.
        worker: The worker's rank.
        equal_above: As for `plan_batches`.

    Returns:
        Indices into `lengths` for each of the worker's batches.
    """
    batches = plan_batches(lengths, batch_tokens, equal_above)
    costs = padded_sizes(lengths, batches)
    return [batches[k] for k in assign_batches(costs, num_workers)[worker]]
