"""What a run would need, before it runs: from its configuration and the model's own alone."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ekfac_dist.config import PlanConfig
from ekfac_dist.curvature.costs import step_tokens
from ekfac_dist.fit.groups import partition
from ekfac_dist.fit.resources import (
    Disk,
    Memory,
    Operations,
    WorkerShare,
    disk,
    fewest_groups,
    memory,
    work,
)
from ekfac_dist.models.find.discovery import Discovery
from ekfac_dist.models.find.meta_device import (
    discover_by_shape,
    estimate_step,
    model_without_weights,
)
from ekfac_dist.models.load.pretrained import context_length
from ekfac_dist.models.modules import EXPERT, TrackedModule
from ekfac_dist.models.sharding import bytes_of_worker, parameter_bytes
from ekfac_dist.runtime.memory import available_bytes, free_disk_bytes, own_bytes

# What CUDA and its libraries hold on a GPU for each process.
CUDA_CONTEXT_BYTES = 700 * 10**6


@dataclass(frozen=True)
class Plan:
    """What a run needs, and whether it can be had.

    Attributes:
        discovery: What it would track.
        model: The model's class, and its parameters' dtype.
        workers: W.
        device: Where each works.
        free_bytes: Of each worker's device.
        groups: Groups of modules that have passes of their own.
        is_chosen: Whether their number was chosen here.
        memory: Of a worker, of the group that needs most.
        disk: Of the run.
        free_disk_bytes: Where its output would be; None: not said.
        work: Operations.
        rate: Operations a second of each worker; None: not known.
        num_sequences: N.
        num_tokens: Positions of each.
        step_tokens: Positions of a step.
        sharded: Whether every worker decomposes its share.
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
    work: Operations
    rate: float | None
    num_sequences: int
    num_tokens: int
    step_tokens: int
    sharded: bool

    @property
    def seconds(self) -> dict[str, float] | None:
        """Of each stage; None where the rate is not known."""
        if self.rate is None:
            return None
        return self.work.seconds(self.rate, self.workers, sharded=self.sharded)

    @property
    def fits(self) -> bool:
        """Whether a worker's memory is enough."""
        return self.memory.lack(self.free_bytes) is None

    @property
    def fits_on_disk(self) -> bool | None:
        """Whether the disk is; None: not said where."""
        return None if self.free_disk_bytes is None else self.disk.peak <= self.free_disk_bytes


def make_plan(config: PlanConfig) -> Plan:
    """Plans a run from its configuration and the model's own, without weights and data.

    Raises:
        ModelError: There is no such model, or it cannot be built or run without weights.
    """
    factors = config.factors
    on_gpu = torch.cuda.is_available()
    workers = config.workers or (torch.cuda.device_count() if on_gpu else 1)
    device = torch.device("cuda" if on_gpu else "cpu")
    model = model_without_weights(config.model)
    modules = discover_by_shape(model, config.model.modules)
    held_here = own_bytes()
    weight_bytes = bytes_of_worker(model, workers) if config.fsdp else parameter_bytes(model)
    free = config.memory_bytes
    if free is None:
        free = (
            available_bytes(device) if on_gpu else (available_bytes(device) + held_here) // workers
        )
    planned_gpu = on_gpu or config.device_memory is not None
    threads = max(1, torch.get_num_threads() // (config.workers or 1))
    planned = torch.device("cuda" if planned_gpu else "cpu")
    tokens = step_tokens(config.batch_tokens, planned, threads)
    length = min(config.data.max_tokens, context_length(model) or config.data.max_tokens)
    shape = (max(1, tokens // length), length)
    whole = estimate_step(model, modules.modules, *shape)
    num_sequences = config.sequences or config.data.max_sequences or 1000
    num_steps = math.ceil(num_sequences / shape[0] / workers)
    most = min(num_sequences, num_steps * shape[0])
    share = WorkerShare(num_steps, most, most * length)

    def held(group: Sequence[TrackedModule]) -> Memory:
        return memory(
            group,
            whole,  # of the lowest group; those above it hold less
            shape[0] * shape[1],
            share,
            process_bytes=CUDA_CONTEXT_BYTES if planned_gpu else held_here,
            weight_bytes=weight_bytes,
            factors=factors,
            on_cpu=not planned_gpu,
        )

    if factors.partitions == "auto":
        number = fewest_groups(modules.modules, held, free) or len(modules.modules)
    else:
        number = factors.partitions
    groups = partition(modules.modules, number)
    routed = {
        module.name: whole.routed.get(module.fused[0], 1.0)
        for module in modules.modules
        if module.kind == EXPERT
    }
    rate = 1e9 * config.gflops if config.gflops else None
    if rate is None and planned_gpu == on_gpu:
        rate = _measured_rate(device)
    folder = None if not config.output else Path(config.output)
    dtype_name = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Plan(
        discovery=modules,
        model=f"{type(model).__name__}, {dtype_name}",
        workers=workers,
        device="GPU" if planned_gpu else f"CPU, {threads} threads",
        free_bytes=free,
        groups=groups,
        is_chosen=factors.partitions == "auto",
        memory=max(map(held, groups), key=lambda needed: needed.peak),
        disk=disk(
            groups,
            factors,
            workers,
            share,
            on_cpu=not planned_gpu,
            saves=config.save_minutes is not None,
        ),
        free_disk_bytes=None if folder is None else free_disk_bytes(folder),
        work=work(
            groups,
            [whole.operations(group) / (shape[0] * shape[1]) for group in groups],
            factors,
            num_sequences,
            length,
            routed,
        ),
        rate=rate,
        num_sequences=num_sequences,
        num_tokens=length,
        step_tokens=shape[0] * shape[1],
        sharded=factors.eigen == "sharded",
    )


def _measured_rate(device: torch.device) -> float:
    """Operations a second of a product of float32 matrices: the best of half a second."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device)
    best, until = math.inf, time.perf_counter() + 0.5
    while time.perf_counter() < until:
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
