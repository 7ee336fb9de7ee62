"""What a query's passes hold in memory: activations or only layers' inputs, and which factors."""

from ekfac_dist.config import Checkpointing, ScoresConfig
from ekfac_dist.curvature.blocks import num_elements
from ekfac_dist.curvature.split_matrices import SPLIT_BYTES, splits
from ekfac_dist.data.examples import Examples
from ekfac_dist.errors import ModelError
from ekfac_dist.influence.blocks import groups_at_a_time, held_bytes_per_group
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.device_factors import DeviceFactors
from ekfac_dist.models.modules import factor_sizes
from ekfac_dist.passes.owners import Places
from ekfac_dist.passes.sequences import COMPUTED_AGAIN, why_not_checkpointed
from ekfac_dist.passes.step_memory import needs_checkpoints, room_beside_steps
from ekfac_dist.runtime.logs import log_on_main


def factors_on_device(
    context: ScoringContext, scored: Examples, num_groups: int, config: ScoresConfig
) -> DeviceFactors:
    """The factors on this worker's device; as many as fit stay there; a collective.

    Args:
        context: Model, factors, workers.
        scored: The scored sequences.
        num_groups: Number of query groups.
        config: The scores that are asked for.
    """
    world, dtype = context.world, context.dtype
    if world.device.type == "cpu":  # they are there
        return DeviceFactors(context.factors, world.device, dtype, 0)
    sizes = factor_sizes(context.own_modules)
    blocks = context.factors.num_blocks
    squares = [num_elements(size, blocks) for size in sizes.values()]
    lambdas = [module.num_outputs * module.input_size for module in context.own_modules]
    on_their_way = 2 * dtype.itemsize * max(*squares, *lambdas, 0)
    # Of queries' bases, which they are rotated back by, there are two whole ones at a time.
    is_split = context.in_eigenbasis and splits(world.device, context.model_dtype, dtype)
    on_their_way += 2 * dtype.itemsize * max(squares, default=0) * is_split
    room = room_beside_steps(
        context.over(scored),
        context.modules,
        context.batch_tokens,
        _held_gradients(context, num_groups, config) + on_their_way,
        (SPLIT_BYTES if is_split else dtype.itemsize) * sum(squares)
        + dtype.itemsize * sum(lambdas),
        Places.of(context.modules, context.shard),
    )
    return DeviceFactors(context.factors, world.device, dtype, room, splits=is_split)


def _held_gradients(context: ScoringContext, num_groups: int, config: ScoresConfig) -> int:
    """Bytes of the query gradients that are held at once."""
    rank = config.effective_rank
    each = held_bytes_per_group(context, rank)
    return each * min(num_groups, groups_at_a_time(context, config, rank))


def computes_again(
    context: ScoringContext,
    scored: Examples,
    num_groups: int,
    config: ScoresConfig,
    checkpointing: Checkpointing,
) -> bool:
    """Whether layers are computed again in the backward; a collective.

    Args:
        context: Model, factors, workers.
        scored: The scored sequences.
        num_groups: Number of query groups.
        config: The scores that are asked for.
        checkpointing: Whether it is asked for; "auto": where activations would not fit.

    Raises:
        ModelError: If it is asked for, and the model's layers cannot be computed again.
    """
    world, modules = context.world, context.modules
    if checkpointing == "auto":
        held = _held_gradients(context, num_groups, config)
        places = Places.of(modules, context.shard)
        if not needs_checkpoints(context.over(scored), modules, context.batch_tokens, held, places):
            return False
    elif not checkpointing:
        return False
    reason = why_not_checkpointed(context.model, modules, scored, context.task, world)
    if reason is None:
        log_on_main(world, COMPUTED_AGAIN)
        return True
    with world.agree():
        if checkpointing is True:
            raise ModelError(reason)
    return False
