"""All stages of a fit, for each group of modules, into a store.

    group 1   covariance pass → decomposition → refit pass
    group 2   the same, with the memory of group 1 free again
    …         then the manifest

The number of groups is the smallest that fits into the workers' memory.
"""

import socket
from collections.abc import Sequence

import torch

from ekfac_dist.data.batch_plan import worker_batches
from ekfac_dist.errors import ConfigError
from ekfac_dist.factors.sinks import FactorSink
from ekfac_dist.fit.checkpoints import Checkpoints
from ekfac_dist.fit.group import GroupFit
from ekfac_dist.fit.manifest import FitInputs, FitSummary, store_manifest
from ekfac_dist.fit.partition import partition
from ekfac_dist.fit.sizes import WorkerShare
from ekfac_dist.fit.worker_memory import LARGE_SUMS, Memory, fewest_groups, memory
from ekfac_dist.models.capture.saved_tensors import StepMemory
from ekfac_dist.models.load.on_workers import model_fingerprints
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import agreeing, gathered_bytes, is_sharded
from ekfac_dist.passes.context import PassContext, measured_step
from ekfac_dist.passes.owners import Owners
from ekfac_dist.runtime.memory import as_text, available_bytes, peak_bytes
from ekfac_dist.runtime.processes import World


def fit_factors(
    inputs: FitInputs,
    world: World,
    sink: FactorSink,
    checkpoints: Checkpoints,
    *,
    show_progress: bool,
) -> FitSummary:
    """Runs every stage for every group of modules, and finishes the store.

    Args:
        inputs: The prepared model, the data and the settings.
        world: The workers.
        sink: Where the factors are written.
        checkpoints: How the states of passes are saved.
        show_progress: Whether worker 0 shows progress.
    """
    sequences, discovery = inputs.sequences, inputs.discovery
    own_batches = worker_batches(
        sequences.num_positions,
        inputs.step_tokens,
        world.size,
        world.rank,
        sequences.equal_above,
    )
    dtype = getattr(torch, inputs.settings.factors.accumulate)
    shard = inputs.settings.factors.shard
    owners = Owners.of(world, 1 if shard == "auto" else shard, discovery.modules)
    context = PassContext(
        inputs.model,
        sequences,
        own_batches,
        world,
        dtype,
        show_progress,
        task=inputs.task,
        owners=owners,
    )
    share = _largest_share(context)
    groups = partition(discovery.modules, _number_of_groups(inputs, context, share, sink))
    summary = FitSummary(sequences, discovery, world.size, len(groups))
    for number, group in enumerate(groups, start=1):
        name = f"{number}" if len(groups) == 1 else f"{number}/{len(groups)}"
        GroupFit(
            name, group, context, owners, share, inputs.settings.factors, sink, checkpoints, summary
        ).fit()
    peaks = world.gather(peak_bytes(world.device))
    summary.peak_bytes = {place: max(p.get(place, 0) for p in peaks) for place in peaks[0]}
    if summary.discovery is not discovery:  # experts without factors were left out
        inputs.fingerprints = model_fingerprints(inputs.model, summary.discovery.modules, world)
    with world.agree(takes_part=world.is_main):
        sink.finish(store_manifest(inputs, summary))
    return summary


def _largest_share(context: PassContext) -> WorkerShare:
    """The most steps, sequences and positions that any worker has."""
    batches, lengths = context.own_batches, context.sequences.num_positions
    positions = int(lengths[[index for batch in batches for index in batch]].sum())
    shares = context.world.gather((len(batches), sum(map(len, batches)), positions))
    return WorkerShare(*map(max, zip(*shares, strict=True)))


def _number_of_groups(
    inputs: FitInputs, context: PassContext, share: WorkerShare, sink: FactorSink
) -> int:
    """The configured number of groups, that of the resumed run, or the smallest that fits.

    Raises:
        ConfigError: If no number of groups fits.
    """
    configured = inputs.settings.factors.partitions
    if configured != "auto":
        return int(configured)
    record = sink.stored.records.get("groups")
    if record is not None:
        return int(record["number"])
    world = context.world
    free, free_host = _free_bytes(world)
    number: int | None = 1
    if _sums_are_large(inputs, share, world, free, free_host):
        modules = inputs.discovery.modules
        with agreeing(world, context.model):
            step = measured_step(context, modules)
        gathered = gathered_bytes(context.model) if is_sharded(context.model) else 0
        with world.agree():

            def needed(group: Sequence[TrackedModule]) -> Memory:
                return memory(
                    group,
                    step,
                    inputs.step_tokens,
                    share,
                    factors=inputs.settings.factors,
                    on_cpu=world.device.type == "cpu",
                    weight_bytes=gathered,
                )

            number = fewest_groups(modules, needed, free, free_host)
            if number is None:
                alone = [
                    needed(group).lack(free, free_host)
                    for group in partition(modules, len(modules))
                ]
                most, left = max(lack for lack in alone if lack is not None)
                raise ConfigError(
                    f"A worker has {as_text(left)} of memory left, and no number of partitions "
                    f"fits: one module alone needs {as_text(most)}. Use smaller batch_tokens or "
                    "data.max_tokens, fewer workers on a host, or set factors.partitions to try "
                    "all the same."
                )
    number = max(world.gather(number or 1))
    with world.agree(takes_part=world.is_main):
        sink.record("groups", {"number": number})
    return number


def _free_bytes(world: World) -> tuple[int, int]:
    """Each worker's part of the free memory of its device, and of its host."""
    places = world.gather((socket.gethostname(), str(world.device)))
    hosts = [host for host, _ in places]
    on_device = available_bytes(world.device) // places.count(places[world.rank])
    on_host = available_bytes(torch.device("cpu")) // hosts.count(hosts[world.rank])
    return on_device, on_host


def _sums_are_large(
    inputs: FitInputs, share: WorkerShare, world: World, free: int, free_host: int
) -> bool:
    """Whether running sums take so much of any worker's memory that groups may be needed.

    Groups make the sums smaller, and nothing else.
    """
    needed = memory(
        inputs.discovery.modules,
        StepMemory.nothing(),
        0,
        share,
        factors=inputs.settings.factors,
        on_cpu=world.device.type == "cpu",
    )
    are_large = needed.sums > LARGE_SUMS * free or needed.host > LARGE_SUMS * free_host
    return any(world.gather(are_large))
