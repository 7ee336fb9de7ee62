"""Block sizes, step sizes and orders of multiplication, chosen from tensor shapes by cost.

Every measured figure below can be reproduced with `tests/benchmarks/choices.py`.
"""

from collections.abc import Sequence

import torch

# The lower triangle of a covariance is computed in block rows: MIN_BLOCK or more matrix rows each,
# MAX_BLOCKS of them at most. Fewer blocks compute more than the needed half, more make them narrow.
# Measured in float32 on 2 cores with 2,040 positions, in GFLOP/s of the needed half: n = 2048 gets
# 96 as one block, 154 in 8 blocks, 140 in 16; n = 768 gets 102 as one block, 150 in 4 or in 8.
MIN_BLOCK = 192
MAX_BLOCKS = 8

# Tokens in a step for each thread of a CPU. With two threads (hidden size 768, MLP 2048), steps of
# 2,048 and of 4,096 tokens take the same time, 1,024 take 3 % more and 512 take 7 % more; steps of
# 2,048 need 1.9 GB where 4,096 need 2.9 GB. Two workers of one thread each are 1.9 times as fast as
# one worker with steps of 1,024 tokens, and 1.8 times as fast with 2,048.
TOKENS_PER_THREAD = 1024


def block_rows(size: int) -> int:
    """Number of rows of a covariance [size, size] that are computed at a time."""
    return max(MIN_BLOCK, -(-size // MAX_BLOCKS))


def step_tokens(batch_tokens: int, device: torch.device, threads: int | None = None) -> int:
    """Most tokens in a step: `batch_tokens`, or fewer on a CPU, whose caches favour small steps.

    Args:
        batch_tokens: The configured number of tokens, padding included.
        device: Where the step is computed.
        threads: Number of threads of a CPU; None for this process's own number.
    """
    if device.type != "cpu":
        return batch_tokens
    return min(batch_tokens, TOKENS_PER_THREAD * (threads or torch.get_num_threads()))


def rotates_inputs(num_positions: int, num_sequences: int, output_sizes: Sequence[int]) -> bool:
    """Whether to rotate a shared input at every position, or each module's sequence gradients.

    Args:
        num_positions: Positions in the batch.
        num_sequences: Sequences in the batch.
        output_sizes: O of every module that shares the input.

    Returns:
        True where rotating the input costs at most as much; see `curvature.refit` for the costs.
    """
    return num_positions <= num_sequences * sum(output_sizes)


def rotates_output_gradients(num_positions: int, num_sequences: int, input_size: int) -> bool:
    """Whether to rotate output gradients at every position, or the module's sequence gradients.

    Args:
        num_positions: Positions in the batch.
        num_sequences: Sequences in the batch.
        input_size: I of the module.

    Returns:
        True where rotating the output gradients costs at most as much; see `curvature.refit`.
    """
    return num_positions <= num_sequences * input_size
