"""What a fit needs: memory by part, disk, and operations, from its modules' sizes alone.

Sums and bases are exact; what a step holds is what autograd keeps, and the rest is stated here as
it was measured.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ekfac_dist.config import FactorsConfig
from ekfac_dist.curvature import covariance, long_sums
from ekfac_dist.curvature.blocks import block_sizes, num_elements
from ekfac_dist.curvature.costs import block_rows, rotates_inputs, rotates_output_gradients
from ekfac_dist.curvature.eigenbasis import workspace_bytes
from ekfac_dist.fit.groups import partition
from ekfac_dist.models.capture.saved_tensors import StepMemory
from ekfac_dist.models.modules import TrackedModule, factor_sizes

# Operations of one decomposition over n³, at the rate of float32 products: measured on 2 CPU cores,
# 1.2 s at n = 2048 and 190 GFLOP/s.
DECOMPOSITION_OPERATIONS = 26

# Of the rate of products, what passes reach; measured, see tests/benchmarks/peers.
EFFICIENCY = 0.8

# Of a step's memory, what a CPU's allocator still holds when the next stage is at its peak: with
# glibc 0.4 to 1.0 after the covariance pass of the three models of tests/stages/test_peak_memory.
RETAINED = 0.6

# Of the memory that is free, how much is planned for; the rest is the allocator's, and chance's.
USABLE = 0.9

# Where eigenvectors and sums take a smaller part of what is free, one group of modules will do.
LARGE_SUMS = 0.2

# A safetensors file's header, and a manifest's entry of a file and of a module, in bytes.
_HEADER = 256
_MANIFEST_FILE, _MANIFEST_MODULE = 190, 260


@dataclass(frozen=True)
class WorkerShare:
    """What one worker has of the data, at most: by it running sums get a second level, or none.

    Attributes:
        steps: Its batches.
        sequences: The sequences in them.
        positions: Counted positions of those.
    """

    steps: int
    sequences: int
    positions: int

    def is_long(self, per_term: int) -> bool:
        """Whether products of so many rows a term make enough terms for a flush.

        A step's last term may have fewer rows.
        """
        return self.positions / per_term + self.steps >= long_sums.FLUSH_AFTER


@dataclass(frozen=True)
class Memory:
    """Bytes that a worker holds, by part; what is held at once is summed in `peak`.

    Attributes:
        process: Of the program itself.
        weights: Of the model.
        step: Of a step: activations, logits and their gradient, rows.
        covariance: Running sums of the covariance pass.
        bases: Eigenvectors of the refit, all factors'.
        spectra: Running sums of the refit, and matrices of a sequence's gradient beside them.
        workspace: Of the largest decomposition.
        retained: Of steps that are over, what the allocator does not give back.
        second_levels: Of the running sums' second levels, by stage; in the host's memory.
        on_cpu: Whether the host's memory is the one that the rest is in.
    """

    process: int
    weights: int
    step: int
    covariance: int
    bases: int
    spectra: int
    workspace: int
    retained: int
    second_levels: Mapping[str, int]
    on_cpu: bool

    @property
    def sums(self) -> int:
        """What the refit holds of eigenvectors and running sums."""
        return self.bases + self.spectra + self.on_cpu * self.second_levels["refit"]

    @property
    def host(self) -> int:
        """What a worker on a GPU holds in its host's memory, beside the program."""
        return 0 if self.on_cpu else max(self.second_levels.values())

    @property
    def passes(self) -> dict[str, int]:
        """What each stage holds at once."""
        always = self.process + self.weights
        second = self.on_cpu * self.second_levels["covariance"]
        return {
            "covariance": always + self.step + self.covariance + second,
            "eigenbasis": always + self.retained + self.covariance + self.workspace,
            "refit": always + self.retained + self.step + self.sums,
        }

    @property
    def peak(self) -> int:
        """The most of any stage."""
        return max(self.passes.values())

    def lack(
        self, free_bytes: float, free_host_bytes: float = math.inf
    ) -> tuple[int, float] | None:
        """What is needed and what there is, of the memory that is too small; None if none is.

        Args:
            free_bytes: Of the worker's device, for everything.
            free_host_bytes: Of its host, for a worker on a GPU.
        """
        for needed, free in ((self.peak, free_bytes), (self.host, free_host_bytes)):
            if needed > USABLE * free:
                return needed, free
        return None


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk.

    Attributes:
        store: Of the finished store.
        states: Of the workers' saved states at their most, while a pass is under way.
        sums: Of raw sums that do not stay in the store.
    """

    store: int
    states: int
    sums: int

    @property
    def peak(self) -> int:
        """The most that the run has there at a time."""
        return self.store + self.states + self.sums


@dataclass(frozen=True)
class Operations:
    """Operations of all workers, two for each multiply-add."""

    covariance: float
    eigenbasis: float
    refit: float

    def seconds(self, rate: float, workers: int, *, sharded: bool) -> dict[str, float]:
        """Of each stage, at so many operations a second of each worker.

        Args:
            rate: Of float32 products.
            workers: W.
            sharded: Whether every worker decomposes its share.
        """
        return {
            "covariance": self.covariance / rate / workers / EFFICIENCY,
            "eigenbasis": self.eigenbasis / rate / (workers if sharded else 1),
            "refit": self.refit / rate / workers / EFFICIENCY,
        }


def memory(
    group: Sequence[TrackedModule],
    step: StepMemory,
    step_tokens: int,
    share: WorkerShare,
    *,
    factors: FactorsConfig,
    on_cpu: bool,
    process_bytes: int = 0,
    weight_bytes: int = 0,
) -> Memory:
    """What a worker holds while it fits a group of modules.

    Args:
        group: The modules.
        step: What a step holds.
        step_tokens: Positions of a step.
        share: What it has of the data.
        factors: What is fitted.
        on_cpu: Whether it computes on the CPU, in the host's memory.
        process_bytes: Of the program itself, where that is not held already.
        weight_bytes: Of the model, likewise.
    """
    itemsize = getattr(torch, factors.accumulate).itemsize
    sizes = factor_sizes(group)
    squares = itemsize * sum(num_elements(n, factors.blocks) for n in sizes.values())
    inputs = {module.input: module.input_size for module in group}
    # Inputs wait in the eigenbasis for their gradients; and the backward of the widest layer.
    rows = step_tokens * sum(inputs.values()) * itemsize
    matrices = [module.num_outputs * module.input_size for module in group]
    widest = max(sizes.values(), default=0)
    backward = step_tokens * 4 * widest * step.itemsize
    held = step.activation_bytes + 2 * step.logit_bytes + rows + backward
    return Memory(
        process=process_bytes,
        weights=weight_bytes,
        step=held,
        covariance=squares,
        bases=squares,
        spectra=itemsize * (sum(matrices) + 3 * max(matrices, default=0)),
        workspace=workspace_bytes(max(block_sizes(widest, factors.blocks), default=0)),
        retained=int(RETAINED * held) if on_cpu else 0,
        second_levels=_second_levels(group, factors, share, on_cpu=on_cpu),
        on_cpu=on_cpu,
    )


def _second_levels(
    group: Sequence[TrackedModule], factors: FactorsConfig, share: WorkerShare, *, on_cpu: bool
) -> dict[str, int]:
    """Bytes of the second levels of a worker's running sums, by stage; see `LongSums`."""
    levels = {"covariance": 0, "refit": 0}
    if factors.accumulate != "float32":
        return levels
    device, itemsize = torch.device("cpu" if on_cpu else "cuda"), torch.float32.itemsize
    with_bias = {module.input for module in group if module.bias}
    for factor, size in factor_sizes(group).items():
        columns = block_sizes(size, factors.blocks)
        columns[-1] -= factor in with_bias
        per_term = covariance.outer_product_positions_per_term(columns, device)
        levels["covariance"] += itemsize * _summed(size, factors.blocks) * share.is_long(per_term)
    for module in group:
        if factors.refit == "per_token":
            sides = (module.num_outputs, module.input_size)
            is_long = share.is_long(long_sums.positions_per_term(min(sides), device))
        else:
            is_long = factors.refit != "none" and share.sequences >= long_sums.FLUSH_AFTER
        levels["refit"] += itemsize * module.num_outputs * module.input_size * is_long
    return levels


def disk(
    groups: Sequence[Sequence[TrackedModule]],
    factors: FactorsConfig,
    workers: int,
    share: WorkerShare,
    *,
    on_cpu: bool,
    saves: bool = True,
) -> Disk:
    """What a run has on the disk.

    Args:
        groups: Groups of modules that have passes of their own.
        factors: What is fitted.
        workers: W.
        share: What each has of the data.
        on_cpu: Whether they compute on the CPU.
        saves: Whether states are saved.
    """
    itemsize = getattr(torch, factors.accumulate).itemsize
    modules = [module for group in groups for module in group]
    stages = [stage_bytes(group, factors, workers, share, on_cpu=on_cpu) for group in groups]
    sizes = factor_sizes(modules)
    numbers = [num_elements(n, factors.blocks) for n in sizes.values()]
    squares = sum(itemsize * number + _HEADER for number in numbers)
    bases = squares + sum(8 * n for n in sizes.values())
    spectra = sum(itemsize * m.num_outputs * m.input_size + _HEADER for m in modules)
    num_files = len(sizes) * (1 + factors.keep_covariance) + len(modules)
    listed = _MANIFEST_FILE * num_files + _MANIFEST_MODULE * len(modules) + 4096
    return Disk(
        store=bases + spectra + listed + (squares if factors.keep_covariance else 0),
        states=saves * max(states for stage in stages for _, states in stage.values()),
        sums=0 if factors.keep_covariance else max(stage["covariance"][0] for stage in stages),
    )


def stage_bytes(
    group: Sequence[TrackedModule],
    factors: FactorsConfig,
    workers: int,
    share: WorkerShare,
    *,
    on_cpu: bool,
) -> dict[str, tuple[int, int]]:
    """What each stage of a group writes: its results, and its workers' saved states at their most.

    Args:
        group: The modules.
        factors: What is fitted.
        workers: W.
        share: What each has of the data.
        on_cpu: Whether they compute on the CPU.
    """
    itemsize = getattr(torch, factors.accumulate).itemsize
    sizes = factor_sizes(group).values()
    numbers = [num_elements(n, factors.blocks) for n in sizes]
    squares = sum(itemsize * number + _HEADER for number in numbers)
    spectra = sum(itemsize * m.num_outputs * m.input_size + _HEADER for m in group)
    twice = 2 * workers  # a new state is whole before the one before it goes
    summed = itemsize * sum(_summed(n, factors.blocks) for n in sizes)
    second = _second_levels(group, factors, share, on_cpu=on_cpu)
    return {
        "covariance": (squares, twice * (summed + second["covariance"])),
        "eigenbasis": (squares + sum(8 * n for n in sizes), 0),
        "refit": (spectra, twice * (spectra + second["refit"]) if factors.refit != "none" else 0),
    }


def work(
    groups: Sequence[Sequence[TrackedModule]],
    operations_per_token: Sequence[float],
    factors: FactorsConfig,
    num_sequences: int,
    num_tokens: int,
    routed: Mapping[str, float],
) -> Operations:
    """Operations of a whole fit.

    Args:
        groups: Groups of modules that have passes of their own.
        operations_per_token: Of the model's own forward and backward, for each group.
        factors: What is fitted.
        num_sequences: N.
        num_tokens: Positions of each.
        routed: Which part of the positions a module sees, if not all, by its name.
    """
    covariance = refit = eigenbasis = 0.0
    positions = num_sequences * num_tokens
    for group, model in zip(groups, operations_per_token, strict=True):
        sizes, share = factor_sizes(group), {}
        for module in group:
            share[module.input] = share[module.output] = routed.get(module.name, 1.0)
        eigenbasis += DECOMPOSITION_OPERATIONS * sum(
            n**3 for size in sizes.values() for n in block_sizes(size, factors.blocks)
        )
        covariance += positions * model
        covariance += (
            positions * 2 * sum(_summed(n, factors.blocks) * share[f] for f, n in sizes.items())
        )
        if factors.refit == "none":
            continue
        refit += positions * model
        refit += num_sequences * 2 * _refit_pairs(group, num_tokens, factors, routed)
    return Operations(covariance, eigenbasis, refit)


def _refit_pairs(
    group: Sequence[TrackedModule],
    num_tokens: int,
    factors: FactorsConfig,
    routed: Mapping[str, float],
) -> float:
    """Multiply-add pairs of one sequence's part in the refit."""
    readers: dict[str, list[TrackedModule]] = {}
    for module in group:
        readers.setdefault(module.input, []).append(module)
    per_token = factors.refit == "per_token"
    pairs = 0.0
    for members in readers.values():
        tokens = num_tokens * routed.get(members[0].name, 1.0)
        size, outputs = members[0].input_size, [m.num_outputs for m in members]
        rows = math.ceil(tokens)
        by_rows = per_token or rotates_inputs(rows, 1, outputs)
        squares = num_elements(size, factors.blocks)
        pairs += (tokens if by_rows else sum(outputs)) * squares
        for num_outputs in outputs:
            by_rows = per_token or rotates_output_gradients(rows, 1, size)
            squares = num_elements(num_outputs, factors.blocks)
            pairs += (tokens if by_rows else size) * squares + tokens * num_outputs * size
    return pairs


def _summed(size: int, blocks: int) -> int:
    """Numbers of a covariance that are summed: its blocks' lower triangles, in block rows."""
    return sum(map(_staircase, block_sizes(size, blocks)))


def _staircase(size: int) -> int:
    """Numbers of a covariance that are summed: its lower triangle, in block rows."""
    rows = block_rows(size)
    return sum(
        (min(start + rows, size) - start) * min(start + rows, size)
        for start in range(0, size, rows)
    )


def fewest_groups(
    modules: Sequence[TrackedModule],
    needs: Callable[[Sequence[TrackedModule]], Memory],
    free_bytes: float,
    free_host_bytes: float = math.inf,
) -> int | None:
    """The fewest groups that each fit into a worker's memory; None if no number of them does.

    Args:
        modules: All modules.
        needs: What a worker needs for a group.
        free_bytes: As for `Memory.lack`.
        free_host_bytes: Likewise.
    """
    families = len({module.input for module in modules})
    # Every number up to 64, then steps of a sixteenth, and at last each family for itself.
    numbers = [n for n in range(1, 65) if n < families]
    while numbers and numbers[-1] >= 64 and numbers[-1] * 17 // 16 < families:
        numbers.append(numbers[-1] * 17 // 16)
    for number in (*numbers, families):
        groups = partition(modules, number)
        if all(needs(group).lack(free_bytes, free_host_bytes) is None for group in groups):
            return len(groups)
    return None
