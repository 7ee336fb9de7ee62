"""What is cheaper, by shape: the sizes and orders that the passes choose, and by what figures.

The figures are of `tests/benchmarks/choices.py`, which makes them again.
"""

from collections.abc import Sequence

import torch

# A covariance's lower triangle is computed in block rows. float32, 2 cores, 2,040 rows, in GFLOP/s
# of the half that is needed: n = 2048 gets 96 whole, 154 in 8 blocks, 140 in 16; n = 768 gets 102
# whole, 150 in 4 blocks or in 8. Fewer blocks compute more than the half, more make them narrow.
MIN_BLOCK = 192
MAX_BLOCKS = 8

# Tokens in a step for each thread of a CPU. Two threads: 2,048 and 4,096 take the same time (hidden
# 768, MLP 2048), 1,024 takes 3 % more, 512 takes 7 % more; and 2,048 take 1.9 GB instead of 2.9 GB.
# Two workers of one thread are 1.9 times as fast as one with 1,024, 1.8 times with 2,048.
TOKENS_PER_THREAD = 1024


def block_rows(size: int) -> int:
    """Rows of a covariance that are computed at a time."""
    return max(MIN_BLOCK, -(-size // MAX_BLOCKS))


def step_tokens(batch_tokens: int, device: torch.device, threads: int | None = None) -> int:
    """Tokens in a step: what was asked for, at most; on a CPU what its caches like.

    Args:
        batch_tokens: What was asked for.
        device: Where the step is computed.
        threads: Of a CPU; None: this process's.
    """
    if device.type != "cpu":
        return batch_tokens
    return min(batch_tokens, TOKENS_PER_THREAD * (threads or torch.get_num_threads()))


def rotates_inputs(num_rows: int, num_sequences: int, output_sizes: Sequence[int]) -> bool:
    """Whether rotating the rows of a shared input costs less than rotating each module's matrix.

    Args:
        num_rows: Positions in the batch.
        num_sequences: Sequences in the batch.
        output_sizes: O of every module that shares the input.
    """
    return num_rows <= num_sequences * sum(output_sizes)


def rotates_output_gradients(num_rows: int, num_sequences: int, input_size: int) -> bool:
    """Whether rotating the rows of an output gradient costs less than rotating the matrix.

    Args:
        num_rows: Positions in the batch.
        num_sequences: Sequences in the batch.
        input_size: I of the module.
    """
    return num_rows <= num_sequences * input_size
