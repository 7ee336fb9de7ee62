"""What a fit would need, before it runs: from its configuration and the model's own alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from ekfac_dist.config import Kept, PlanConfig
from ekfac_dist.curvature.blocks import block_sizes
from ekfac_dist.curvature.costs import step_tokens
from ekfac_dist.curvature.eigenbasis import (
    MAX_CPU_SIZE,
    can_decompose,
    cuda_limit,
    decomposing_device,
)
from ekfac_dist.fit.arrangement import Arrangement, Limits, Needed, arrange, most_needed, step_sizes
from ekfac_dist.fit.disk_space import Disk, disk
from ekfac_dist.fit.operations import Operations, operations
from ekfac_dist.fit.rates import Rates, rates
from ekfac_dist.fit.sizes import WorkerShare
from ekfac_dist.fit.worker_memory import Memory, memory
from ekfac_dist.models.find.discovery import Discovery
from ekfac_dist.models.find.faults import is_routed
from ekfac_dist.models.find.meta_device import (
    StepEstimate,
    discover_by_shape,
    estimate_step,
    model_without_weights,
)
from ekfac_dist.models.load.pretrained import context_length
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import bytes_of_worker, parameter_bytes
from ekfac_dist.passes.owners import Places, require_divisor
from ekfac_dist.runtime.memory import available_bytes, free_disk_bytes, own_bytes

# What CUDA and its libraries hold on a GPU for each process.
CUDA_CONTEXT_BYTES = 700 * 10**6


@dataclass(frozen=True)
class Plan:
    """What a fit needs, and whether the machine has it.

    Attributes:
        discovery: The modules that it would track.
        model: The model's class, and its parameters' dtype.
        workers: W.
        device: What each worker computes on, in words.
        free_bytes: Free memory of each worker's device.
        groups: Groups of modules, one pair of passes each.
        is_chosen: Whether the number of groups was chosen here.
        memory: What a worker needs for the group that needs most.
        disk: What the run needs on the disk.
        free_disk_bytes: What the output's disk has; None if no output is configured.
        operations: Operations of all workers.
        rates: Operations a second of each worker; None if they are not known.
        num_sequences: N.
        num_tokens: Positions of each sequence.
        step_tokens: Positions of a step.
        sharded: Whether every worker decomposes its share of the factors.
        shard: D, the number of workers that share one copy of the factors.
        checkpoints: Whether layers keep their inputs alone, and are computed again in the backward.
        least_workers: The least number of workers that would do, if these are too few; None if no
            number would, or these fit.
        block_sizes: The sizes of blocks of factors that are decomposed.
        kept: How an index of the data would keep gradients.
    """

    discovery: Discovery
    model: str
    workers: int
    device: str
    free_bytes: int
    groups: Sequence[Sequence[TrackedModule]]
    is_chosen: bool
    memory: Memory
    disk: Disk
    free_disk_bytes: int | None
    operations: Operations
    rates: Rates | None
    num_sequences: int
    num_tokens: int
    step_tokens: int
    sharded: bool
    shard: int
    checkpoints: bool
    least_workers: int | None
    block_sizes: frozenset[int]
    kept: Kept

    @property
    def seconds(self) -> dict[str, float] | None:
        """The time of each stage; None if the rates are not known."""
        if self.rates is None:
            return None
        return self.operations.seconds(self.rates, self.workers, sharded=self.sharded)

    @property
    def decomposed(self) -> dict[str, list[int]]:
        """Sizes of blocks of factors by where they are decomposed, in words, ascending."""
        device = torch.device("cpu" if self.memory.on_cpu else "cuda")
        free = self.free_bytes - self.memory.process
        places: dict[str, list[int]] = {}
        for size in sorted(self.block_sizes):
            place = self._place(size, device, free)
            places.setdefault(place, []).append(size)
        return places

    @staticmethod
    def _place(size: int, device: torch.device, free_bytes: float) -> str:
        """Where a block of a size is decomposed, in words, with this machine's version of CUDA."""
        cuda = torch.version.cuda
        where = decomposing_device(size, device, free_bytes, cuda)
        if not can_decompose(where, size, cuda):
            return f"neither CPU (n < {MAX_CPU_SIZE + 1}) nor GPU: give factors.blocks"
        if where == device:
            return "CPU" if device.type == "cpu" else "GPU"
        if not can_decompose(device, size, cuda):
            return f"CPU, as CUDA {cuda} cannot n ≥ {cuda_limit(cuda)}"
        return "CPU, as the GPU has no room"

    @property
    def fits(self) -> bool:
        """Whether a worker's memory is enough."""
        return self.memory.lack(self.free_bytes) is None

    @property
    def fits_on_disk(self) -> bool | None:
        """Whether the disk has enough space; None if no output is configured."""
        return None if self.free_disk_bytes is None else self.disk.peak <= self.free_disk_bytes


@dataclass(frozen=True)
class _Machine:
    """The workers that are planned for.

    Attributes:
        workers: W.
        here: The device that this process would use.
        on_gpu: Whether the planned workers are on GPUs.
        threads: CPU threads of each worker.
        free_bytes: Free memory of each worker's device.
        own_bytes: What this process holds now, about what a worker's program does.
    """

    workers: int
    here: torch.device
    on_gpu: bool
    threads: int
    free_bytes: int
    own_bytes: int

    @property
    def device(self) -> torch.device:
        """The kind of device that is planned for."""
        return torch.device("cuda" if self.on_gpu else "cpu")


def make_plan(config: PlanConfig) -> Plan:
    """Plans a fit from its configuration and the model's own, without weights and data.

    Raises:
        ModelError: If there is no such model, or it cannot be built or run without weights.
    """
    factors = config.factors
    model = model_without_weights(config.model)
    dtype = next(model.parameters()).dtype
    discovery = discover_by_shape(model, config.model.modules)
    modules = discovery.modules
    machine = _machine(config)
    require_divisor("factors.shard", factors.shard, machine.workers)
    tokens = step_tokens(config.batch_tokens, machine.device, machine.threads)
    length = min(config.data.max_tokens, context_length(model) or config.data.max_tokens)
    batch_size = max(1, tokens // length)
    most_tokens = batch_size * length

    are_some_routed = any(is_routed(model, module) for module in modules)

    @cache
    def step(checkpoints: bool) -> StepEstimate:
        step = estimate_step(model, modules, batch_size, length, checkpoints=checkpoints)
        return replace(step, exchanges_at_end=config.fsdp and are_some_routed)

    num_sequences = config.sequences or config.data.max_sequences or 1000

    def needed_by(workers: int) -> Needed:
        weight_bytes = parameter_bytes(model)
        if config.fsdp:
            weight_bytes = bytes_of_worker(model, workers)
        share = _share(num_sequences, batch_size, length, workers)  # of the largest steps

        def needed(
            group: Sequence[TrackedModule], places: Places, checkpoints: bool, tokens: int
        ) -> Memory:
            return memory(
                group,
                # With the graph from the lowest module; groups above it hold less.
                step(checkpoints).scaled(tokens / most_tokens),
                tokens,
                share,
                process_bytes=CUDA_CONTEXT_BYTES if machine.on_gpu else machine.own_bytes,
                weight_bytes=weight_bytes,
                factors=factors,
                on_cpu=not machine.on_gpu,
                places=places,
            )

        return needed

    limits = Limits(machine.free_bytes)
    checkpointing = config.model.gradient_checkpointing
    sizes = step_sizes(most_tokens, length)

    def arranged(workers: int) -> tuple[Arrangement, Memory]:
        needed = needed_by(workers)
        arrangement = arrange(modules, workers, factors, checkpointing, sizes, needed, limits)
        return arrangement, most_needed(arrangement, modules, needed, limits)

    arrangement, most = arranged(machine.workers)
    groups = arrangement.groups
    least_workers = None
    if not limits.hold(most) and factors.shard == "auto":
        least_workers = _least_workers(machine.workers, lambda n: limits.hold(arranged(n)[1]))
    whole_step = step(arrangement.checkpoints)
    per_token = [whole_step.operations(group) / most_tokens for group in groups]
    share = _share(num_sequences, batch_size, length, machine.workers)
    return Plan(
        discovery=discovery,
        model=f"{type(model).__name__}, {str(dtype).removeprefix('torch.')}",
        workers=machine.workers,
        device="GPU" if machine.on_gpu else f"CPU, {machine.threads} threads",
        free_bytes=machine.free_bytes,
        groups=groups,
        is_chosen=factors.partitions == "auto",
        memory=most,
        disk=disk(
            groups,
            factors,
            machine.workers,
            arrangement.shard,
            share,
            on_cpu=not machine.on_gpu,
            saves=config.save_minutes is not None,
        ),
        free_disk_bytes=free_disk_bytes(Path(config.output)) if config.output else None,
        operations=operations(groups, per_token, factors, num_sequences, length, whole_step.routed),
        rates=rates(config, dtype, machine.here, machine.device),
        num_sequences=num_sequences,
        num_tokens=length,
        step_tokens=arrangement.step_tokens,
        sharded=factors.shares_decompositions(arrangement.shard),
        shard=arrangement.shard,
        checkpoints=arrangement.checkpoints,
        least_workers=least_workers,
        block_sizes=frozenset(
            n for size in discovery.factors.values() for n in block_sizes(size, factors.blocks)
        ),
        kept=config.index.over(None),
    )


def _machine(config: PlanConfig) -> _Machine:
    has_gpu = torch.cuda.is_available()
    workers = config.workers or (torch.cuda.device_count() if has_gpu else 1)
    here, held_here = torch.device("cuda" if has_gpu else "cpu"), own_bytes()
    free = config.memory_bytes
    if free is None:
        free = available_bytes(here) if has_gpu else (available_bytes(here) + held_here) // workers
    return _Machine(
        workers=workers,
        here=here,
        on_gpu=has_gpu or config.device_memory is not None,
        threads=max(1, torch.get_num_threads() // (config.workers or 1)),
        free_bytes=free,
        own_bytes=held_here,
    )


def _share(num_sequences: int, batch_size: int, length: int, workers: int) -> WorkerShare:
    num_steps = math.ceil(num_sequences / batch_size / workers)
    most_sequences = min(num_sequences, num_steps * batch_size)
    return WorkerShare(num_steps, most_sequences, most_sequences * length)


def _least_workers(too_few: int, fits: Callable[[int], bool]) -> int | None:
    """The least number of workers that fits; None if none up to 1024 times as many does.

    Args:
        too_few: A number that does not fit.
        fits: Whether a number fits; if one does, so do larger ones.
    """
    enough = next((n for k in range(1, 11) if fits(n := too_few * 2**k)), None)
    if enough is None:
        return None
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if fits(middle) else (middle, enough)
    return enough
