"""Block sizes, step sizes and orders of multiplication, chosen from tensor shapes by cost.

Every measured figure below can be reproduced with `tests/benchmarks/choices.py`; all are a CPU's.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch

# The lower triangle of a covariance is computed in block rows: MIN_BLOCK or more matrix rows each,
# MAX_BLOCKS of them at most. Fewer blocks compute more than the needed half, more make them narrow.
# Measured in float32 on 2 cores with 2,040 positions, in GFLOP/s of the needed half: n = 2048 gets
# 96 as one block, 154 in 8 blocks, 140 in 16; n = 768 gets 102 as one block, 150 in 4 or in 8.
MIN_BLOCK = 192
MAX_BLOCKS = 8

# On a GPU the block rows are those that take the fewest waves; derived, not measured. Each of its
# multiprocessors computes one tile of a product at a time, and a product takes as long as its waves
# of tiles (NVIDIA, Matrix Multiplication Background User's Guide: tile and wave quantisation). With
# cuBLAS's tiles of 128 × 128 and the 132 multiprocessors of an H100, a whole covariance, the chosen
# blocks, and a CPU's blocks are 1, 1 and 8 waves for n = 1408; 8, 6 and 8 for 4096; 96, 56 and 56
# for 14,336.
GPU_TILE = 128
GPU_MULTIPROCESSORS = 132

# Tokens in a step for each thread of a CPU. With two threads (hidden size 768, MLP 2048), steps of
# 2,048 and of 4,096 tokens take the same time, 1,024 take 3 % more and 512 take 7 % more; steps of
# 2,048 need 1.9 GB where 4,096 need 2.9 GB. Two workers of one thread each are 1.9 times as fast as
# one worker with steps of 1,024 tokens, and 1.8 times as fast with 2,048.
TOKENS_PER_THREAD = 1024

# Bytes of the gradients, and of the query gradients, that are formed and multiplied at a time: on a
# CPU (True) they stay in its caches. Measured on an AMD EPYC of family 26, model 2 (2 MiB of L2 and
# 32 MiB of L3 cache), in float32 with one thread, 1,024 positions in sequences of 8 to 32, O and I
# of 576 and 1536: 4 and 8 MiB take the same time, 1 MiB up to 20 % more, 16 MiB up to 40 % more.
TILE_BYTES = {False: 2**28, True: 2**22}

# Rows of a gradient that are formed at a time, at least: fewer make the product that forms them
# narrow. In the same measurement 16 take as long as 64, or up to 40 % less where T < 8.
MIN_TILE_ROWS = 16

# What an element of a sequence's gradient costs beside its T multiply-adds when it is formed, and
# with each query that it is multiplied with, in multiply-adds of a large product. Measured like the
# above, with T = 1 to 32 and 1 to 8 queries; the sum is within 15 % of what was measured
# from T = 2 on.
_FORMING = 5
_INNER_PRODUCT = 2


def block_rows(size: int, device: torch.device) -> int:
    """Number of rows of a covariance [size, size] that are computed at a time on a device."""
    if device.type == "cpu":
        return max(MIN_BLOCK, -(-size // MAX_BLOCKS))
    return _rows_of_fewest_waves(size)


@cache
def _rows_of_fewest_waves(size: int) -> int:
    num_tiles = -(-size // GPU_TILE)  # along a side

    def num_waves(height: int) -> int:
        """Waves of all block rows of so many tiles each."""
        ends = [min(start + height, num_tiles) for start in range(0, num_tiles, height)]
        tiles = [(end - start) * end for start, end in pairwise([0, *ends])]
        return sum(-(-number // GPU_MULTIPROCESSORS) for number in tiles)

    heights = [-(-num_tiles // number) for number in range(1, MAX_BLOCKS + 1)]
    return GPU_TILE * min(heights, key=num_waves)  # of equal ones the fewest blocks


def stored_rows(size: int) -> int:
    """Number of rows of a covariance [size, size] that are saved at a time: on all devices alike.

    Below the diagonal block, those rows are the lower triangle, which any block rows include. So
    what one kind of device has saved, another one can go on with.
    """
    return block_rows(size, torch.device("cpu"))


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


def tile_bytes(device: torch.device) -> int:
    """Bytes of the gradients that are formed and multiplied at a time."""
    return TILE_BYTES[device.type == "cpu"]


def tile_size(num_matrices: int, row_bytes: int, num_rows: int, most_bytes: int) -> tuple[int, int]:
    """How many matrices are formed at a time, and how many of their rows.

    Args:
        num_matrices: Number of all matrices, 1 or more.
        row_bytes: Bytes of a row of one of them.
        num_rows: Rows of a matrix.
        most_bytes: Bytes that are formed at a time; see `tile_bytes`.

    Returns:
        (matrices, rows), each 1 at least.
    """
    few_rows = min(MIN_TILE_ROWS, num_rows)
    matrices = max(1, min(num_matrices, most_bytes // (few_rows * row_bytes)))
    return matrices, max(1, min(num_rows, most_bytes // (matrices * row_bytes)))


def from_gradients(
    num_positions: int, num_sequences: int, num_queries: int, are_formed: bool = False
) -> int:
    """Cost of scoring sequences from their gradients, in multiply-adds for each element of these.

    Args:
        num_positions: Positions in the batch.
        num_sequences: Sequences in the batch.
        num_queries: Query groups.
        are_formed: Whether gradients are formed anyway, which then costs nothing.
    """
    products = _INNER_PRODUCT * num_queries * num_sequences
    return products if are_formed else products + num_positions + _FORMING * num_sequences
