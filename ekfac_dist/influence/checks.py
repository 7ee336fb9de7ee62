"""The checks before queries are answered, which the command and the Python function have in common.

In this order, each a collective:

    check_model_and_sequences    the model against the factors; sequences against the model
    require_same_inputs          all workers against each other
    scoring_context              damping against the factors
"""

import dataclasses

import torch
from torch import nn

from ekfac_dist.config import RefineConfig, ScoresConfig
from ekfac_dist.curvature.costs import step_tokens
from ekfac_dist.curvature.damping import Damping
from ekfac_dist.data.examples import Examples
from ekfac_dist.errors import StoreError
from ekfac_dist.factors.comparison import Comparison, check_model
from ekfac_dist.factors.factors import Factors
from ekfac_dist.influence.blocks import choose_shard
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.queries import QuerySet
from ekfac_dist.models.capture.tasks import CAUSAL_LM, Task
from ekfac_dist.models.load.on_workers import require_same_model
from ekfac_dist.models.sharding import agreeing, is_sharded
from ekfac_dist.passes.owners import Owners
from ekfac_dist.passes.sequences import check_sequences
from ekfac_dist.runtime.processes import World


def check_model_and_sequences(
    path: str,
    factors: Factors,
    model: nn.Module,
    scored: Examples,
    queries: QuerySet,
    world: World,
    *,
    advice: str,
    allow_changes: bool,
) -> Comparison:
    """Checks each worker's model against factors, training sequences and queries.

    Args:
        path: The factors' name in errors.
        factors: The factors.
        model: The model.
        scored: The training sequences that are scored.
        queries: The queries.
        world: The workers.
        advice: Advice against training sequences that are too long, with {context} for the model's
            limit.
        allow_changes: Whether the model may differ outside the tracked modules.

    Returns:
        How the model compares with the one that the factors were fitted for.

    Raises:
        StoreError: If it is another model.
        DataError: If it cannot read a sequence or a query.
    """
    with agreeing(world, model, StoreError):
        comparison = check_model(path, factors, model, allow_changes=allow_changes)
    with world.agree():
        check_sequences(model, scored, advice)
        check_sequences(model, queries.sequences, "shorten the query")
    return comparison


def scoring_context(
    model: nn.Module,
    factors: Factors,
    damping: Damping,
    world: World,
    batch_tokens: int,
    show_progress: bool,
    config: ScoresConfig,
    num_groups: int,
    task: Task = CAUSAL_LM,
    refine: RefineConfig | None = None,
) -> ScoringContext:
    """The scoring context of a checked model; scores are float64 for a float64 model, else float32.

    A worker reads the factors of the modules that it holds, and no others.

    Args:
        model: The model, on the worker's device.
        factors: The factors.
        damping: How λ is chosen.
        world: The workers, on the model's device.
        batch_tokens: Token budget of a batch, padding included; on a CPU less may be used.
        show_progress: Whether worker 0 shows progress.
        config: The scores that are asked for.
        num_groups: Number of query groups.
        task: The task whose loss gradients are of.
        refine: How query gradients are refined; None: they are not.

    Raises:
        ConfigError: As of `Factors.chosen_damping` and `choose_shard`.
        StoreError: If a file of the factors is damaged.
    """
    double = next(model.parameters()).dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    modules, refine = list(factors.modules.values()), refine or RefineConfig()
    if refine.is_on:  # every worker holds all vectors of a solve
        config = dataclasses.replace(config, shard=1)
    with world.agree():
        shard = choose_shard(num_groups, modules, dtype, world.size, config)
    owners = Owners.of(world, shard, modules) if shard > 1 else None
    held = [module.name for module in modules if owners is None or owners.owns(module)]
    chosen = absolute_damping(factors, damping, world, owners)
    with world.agree():
        if owners is not None or is_sharded(model):
            for name in held:  # in a pass a worker that finds a damaged file would fail alone
                factors.module(name)
    return ScoringContext(
        model=model,
        factors=factors,
        damping=chosen,
        dtype=dtype,
        world=world,
        batch_tokens=world.share(step_tokens(batch_tokens, world.device)),  # the same for all
        show_progress=show_progress,
        task=task,
        owners=owners,
        refine=refine,
    )


def absolute_damping(
    factors: Factors, damping: Damping, world: World, owners: Owners | None
) -> dict[str, float]:
    """The absolute λ of every module, which each worker computes of those that it holds.

    It is a collective.

    Raises:
        ConfigError: As of `Factors.chosen_damping`.
        StoreError: If a file of the factors is damaged.
    """
    modules = factors.modules.values()
    held = [module.name for module in modules if owners is None or owners.owns(module)]
    with world.agree():
        chosen = factors.chosen_damping(damping, held)
    if owners is None:
        return chosen
    by_owner = owners.notes.gather(chosen)
    together = {name: value for of_owner in by_owner for name, value in of_owner.items()}
    return {name: together[name] for name in factors.modules}


def require_same_inputs(
    world: World,
    factors: Factors,
    model: nn.Module,
    scored: Examples,
    queries: QuerySet,
    comparison: Comparison,
) -> None:
    """Checks that data, queries, factors and models have the same content on all workers.

    Workers that differ would share out different work, or wait for each other for ever.

    Raises:
        LaunchError: If something differs, on every worker.
    """
    world.require_same("data, by fingerprint,", scored.fingerprint)
    world.require_same("candidates", scored.indices.tolist())
    world.require_same("queries, by fingerprint,", queries.sequences.fingerprint)
    world.require_same("groups of queries", (queries.members, queries.group_names, queries.against))
    world.require_same("factors, by fingerprint,", factors.fingerprint)
    require_same_model(model, comparison.fingerprints, world)
