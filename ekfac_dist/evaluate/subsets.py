"""Which sequences a model of the bank is trained on: bool arrays [subsets, N], true where kept."""

import numpy as np

from ekfac_dist.errors import ConfigError


def lds_subsets(num_sequences: int, num_subsets: int, keep: float, seed: int) -> np.ndarray:
    """Random subsets for LDS.

    Up to a half, subsets are independent. Above it, what is left out of one subset after another is
    disjoint until every sequence had its turn.

    Args:
        num_sequences: N.
        num_subsets: Number of subsets.
        keep: Share of the sequences in each subset, between 0 and 1.
        seed: Seed.

    Returns:
        Whether each sequence is kept, bool [subsets, N].

    Raises:
        ConfigError: If a subset would hold nothing, or everything.
    """
    num_kept = round(keep * num_sequences)
    if not 0 < num_kept < num_sequences:
        what = "nothing" if num_kept == 0 else "all of it"
        raise ConfigError(
            f"lds.keep is {keep:g} of {num_sequences} sequences, so subsets would hold {what}; "
            "give a share that leaves at least one sequence in and one out."
        )
    generator = np.random.default_rng([seed, 0])
    kept = np.zeros((num_subsets, num_sequences), dtype=bool)
    if 2 * num_kept <= num_sequences:
        for subset in kept:
            subset[generator.permutation(num_sequences)[:num_kept]] = True
        return kept
    num_left_out = num_sequences - num_kept
    kept[:] = True
    waiting = np.zeros(0, dtype=np.int64)
    for subset in kept:
        if len(waiting) < num_left_out:
            waiting = generator.permutation(num_sequences)
        subset[waiting[:num_left_out]] = False
        waiting = waiting[num_left_out:]
    return kept


def num_removed(num_sequences: int, share: float) -> int:
    """How many sequences a removal takes away.

    Raises:
        ConfigError: If that is none, or all.
    """
    number = round(share * num_sequences)
    if not 0 < number < num_sequences:
        what = "none" if number == 0 else "all"
        raise ConfigError(
            f"removal.share is {share:g} of {num_sequences} sequences, which is {what} of them; "
            "give a share that removes at least one and leaves at least one."
        )
    return number


def without(num_sequences: int, removed: np.ndarray) -> np.ndarray:
    """All sequences but some: bool [N]."""
    kept = np.ones(num_sequences, dtype=bool)
    kept[removed] = False
    return kept


def random_removals(num_sequences: int, removed: int, times: int, seed: int) -> np.ndarray:
    """Subsets that leave out random sequences: bool [times, N]."""
    generator = np.random.default_rng([seed, 1])
    return np.stack(
        [
            without(num_sequences, generator.permutation(num_sequences)[:removed])
            for _ in range(times)
        ]
    )
