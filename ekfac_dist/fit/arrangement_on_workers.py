"""The arrangement of a fit, chosen by the model, data and memory that its workers have."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

from ekfac_dist.config import Checkpointing, FactorsConfig
from ekfac_dist.data.batch_plan import worker_batches
from ekfac_dist.errors import ConfigError
from ekfac_dist.factors.sinks import FactorSink
from ekfac_dist.fit.arrangement import Arrangement, Limits, arrange, most_needed, step_sizes
from ekfac_dist.fit.manifest import FitInputs
from ekfac_dist.fit.partition import partition
from ekfac_dist.fit.settings import FitSettings
from ekfac_dist.fit.sizes import WorkerShare
from ekfac_dist.fit.worker_memory import Memory, memory
from ekfac_dist.models.capture.saved_tensors import StepMemory
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import agreeing, gathered_bytes, is_sharded
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.owners import Places
from ekfac_dist.passes.sequences import COMPUTED_AGAIN, why_not_checkpointed
from ekfac_dist.passes.step_memory import LARGE, free_bytes, largest_step, measured_step
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.memory import as_text
from ekfac_dist.runtime.processes import World

# Free memory of the worker with most over that of the worker with least, from which on it is said.
_UNEQUAL = 1.25


def arranged(inputs: FitInputs, context: PassContext, sink: FactorSink) -> Arrangement:
    """How the fit is arranged: as the resumed run was, or the cheapest that fits as configured.

    Args:
        inputs: The prepared model, the data and the settings.
        context: Model, data and workers; without batches.
        sink: Where the journal is.

    Raises:
        ConfigError: If nothing fits. A run that goes on is not refused.
    """
    context = in_steps_of(inputs.step_tokens, context)
    world, settings = context.world, inputs.settings
    factors, modules = settings.factors, inputs.discovery.modules
    checkpointing = settings.gradient_checkpointing
    record = sink.stored.records.get("groups")
    if record is not None:  # an earlier start of this run has arranged it
        factors = replace(factors, partitions=record["number"])
        if factors.shard == "auto" and record.get("workers") == world.size:
            factors = replace(factors, shard=record.get("shard", 1))
        if checkpointing == "auto" and "checkpoints" in record:
            checkpointing = record["checkpoints"]
    sizes = step_sizes(inputs.step_tokens, int(inputs.sequences.num_positions.max()))
    if record is not None and record.get("workers") == world.size:
        sizes = [size for size in sizes if size == record.get("step_tokens")] or sizes
    is_fixed = "auto" not in (factors.partitions, factors.shard, checkpointing)
    if record is not None and is_fixed:
        groups = partition(modules, int(factors.partitions))
        arrangement = Arrangement(int(factors.shard), bool(checkpointing), sizes[0], groups)
    else:
        arrangement, lack = _cheapest(inputs, context, factors, checkpointing, sizes)
        with world.agree():
            if lack is not None and record is None:
                raise ConfigError(_too_little(lack, arrangement, settings))
    found = {
        "number": len(arrangement.groups),
        "workers": world.size,
        "shard": arrangement.shard,
        "checkpoints": arrangement.checkpoints,
        "step_tokens": arrangement.step_tokens,
    }
    if found != record:
        world.on_main(lambda: sink.record("groups", found))
    for line in _arrangement_lines(arrangement, inputs.step_tokens):
        log_on_main(world, line)
    return arrangement


def _cheapest(
    inputs: FitInputs,
    context: PassContext,
    factors: FactorsConfig,
    checkpointing: Checkpointing,
    sizes: Sequence[int],
) -> tuple[Arrangement, tuple[int, float] | None]:
    """The cheapest arrangement that fits the worker with least memory; a collective.

    Returns:
        The arrangement, and if none fits the bytes that it needs and those that there are.
    """
    world, modules = context.world, inputs.discovery.modules
    share = largest_share(context)
    whole = 1 if factors.partitions == "auto" else factors.partitions
    simplest = Arrangement(
        1 if factors.shard == "auto" else factors.shard,
        checkpointing is True,
        sizes[0],
        partition(modules, whole),
    )
    limits = _limits(world)
    if not _may_lack_memory(inputs, context, share, simplest, limits):
        return simplest, None
    if checkpointing == "auto":
        reason = why_not_checkpointed(inputs.model, modules, inputs.sequences, inputs.task, world)
        checkpointing = "auto" if reason is None else False
    modes = [False, True] if checkpointing == "auto" else [checkpointing]
    steps = {}
    for mode in modes:
        with agreeing(world, context.model):
            steps[mode] = measured_step(replace(context, checkpoints=mode), modules)
    steps = {mode: reduce(StepMemory.larger, world.gather(step)) for mode, step in steps.items()}
    gathered = gathered_bytes(context.model) if is_sharded(context.model) else 0

    def needed(
        group: Sequence[TrackedModule], places: Places, checkpoints: bool, tokens: int
    ) -> Memory:
        return memory(
            group,
            steps[checkpoints].scaled(tokens / inputs.step_tokens),
            tokens,
            share,
            factors=inputs.settings.factors,
            on_cpu=world.device.type == "cpu",
            places=places,
            weight_bytes=gathered,
        )

    with world.agree():
        arrangement = arrange(modules, world.size, factors, checkpointing, sizes, needed, limits)
        most = most_needed(arrangement, modules, needed, limits)
    return arrangement, most.lack(limits.device, limits.host)


def _too_little(lack: tuple[int, float], arrangement: Arrangement, settings: FitSettings) -> str:
    """The sentence that refuses a fit for which no arrangement has the memory.

    Args:
        lack: Bytes that a worker needs, and those that it has.
        arrangement: The arrangement that needs least.
        settings: What is configured.
    """
    needs, left = map(as_text, lack)
    factors = settings.factors
    if factors.partitions == "auto":
        return (
            f"A worker has {left} of memory left, and no number of partitions fits: one module "
            f"alone needs {needs}. Use a smaller data.max_tokens, or fewer workers on a host."
        )
    number = len(arrangement.groups)
    groups = f"the largest of {number} partitions" if number > 1 else "one partition"
    instead = [f"more factors.partitions than {factors.partitions}, or auto"]
    if factors.shard != "auto":
        instead.append("factors.shard: auto")
    if settings.gradient_checkpointing is False:
        instead.append("model.gradient_checkpointing: auto")
    return (
        f"A worker has {left} of memory left, and {groups} needs {needs} in steps of "
        f"{arrangement.step_tokens} tokens. Give {', or '.join(instead)}; or a smaller "
        "data.max_tokens, or fewer workers on a host."
    )


def _arrangement_lines(arrangement: Arrangement, step_tokens: int) -> list[str]:
    lines = []
    if arrangement.step_tokens < step_tokens:
        lines.append(f"memory        steps have at most {arrangement.step_tokens} tokens, to fit")
    if arrangement.shard > 1:
        lines.append(f"factors       shared out: {arrangement.shard} workers hold one copy of them")
    if len(arrangement.groups) > 1:
        lines.append(f"partitions    {len(arrangement.groups)}, a pair of passes each")
    if arrangement.checkpoints:
        lines.append(COMPUTED_AGAIN)
    return lines


def _limits(world: World) -> Limits:
    """What the worker with least memory has free; it is said if others have much more."""
    free = world.gather(free_bytes(world))
    least, most = min(device for device, _ in free), max(device for device, _ in free)
    if most > _UNEQUAL * least:
        rank = [device for device, _ in free].index(least)
        log_on_main(
            world,
            f"memory        workers have {as_text(least)} (worker {rank}) to {as_text(most)} left: "
            "planned by the least",
        )
    return Limits(least, min(host for _, host in free))


def _may_lack_memory(
    inputs: FitInputs,
    context: PassContext,
    share: WorkerShare,
    simplest: Arrangement,
    limits: Limits,
) -> bool:
    """Whether the simplest arrangement takes so much memory that it has to be looked into.

    Running sums are known exactly; of activations only what the tracked modules read and give is.
    """
    world, modules = context.world, inputs.discovery.modules
    on_cpu = world.device.type == "cpu"
    needed = most_needed(
        simplest,
        modules,
        lambda group, places, _, tokens: memory(
            group,
            largest_step(context, modules, tokens),
            tokens,
            share,
            factors=inputs.settings.factors,
            on_cpu=on_cpu,
            places=places,
        ),
        limits,
    )
    return needed.peak > LARGE * limits.device or needed.host > LARGE * limits.host


def in_steps_of(step_tokens: int, context: PassContext) -> PassContext:
    """The context with this worker's batches of at most so many positions."""
    sequences, world = context.sequences, context.world
    batches = worker_batches(
        sequences.num_positions, step_tokens, world.size, world.rank, sequences.equal_above
    )
    return replace(context, own_batches=batches)


def largest_share(context: PassContext) -> WorkerShare:
    """The most steps, sequences and positions that any worker has."""
    batches, lengths = context.own_batches, context.sequences.num_positions
    positions = int(lengths[[index for batch in batches for index in batch]].sum())
    shares = context.world.gather((len(batches), sum(map(len, batches)), positions))
    return WorkerShare(*map(max, zip(*shares, strict=True)))
