"""Whether a query's passes compute layers again in the backward."""

from ekfac_dist.config import Checkpointing, ScoresConfig
from ekfac_dist.data.examples import Examples
from ekfac_dist.errors import ModelError
from ekfac_dist.influence.blocks import groups_at_a_time
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.preconditioned import bytes_per_group
from ekfac_dist.passes.owners import Places
from ekfac_dist.passes.sequences import COMPUTED_AGAIN, why_not_checkpointed
from ekfac_dist.passes.step_memory import needs_checkpoints
from ekfac_dist.runtime.logs import log_on_main


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
        each = bytes_per_group(modules, config.effective_rank, context.dtype, context.shard)
        held = each * min(num_groups, groups_at_a_time(context, config, config.effective_rank))
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
