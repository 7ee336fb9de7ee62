"""The checks before queries are answered, which the command and the Python function have in common.

In this order:

    check_model_and_sequences    the model against the factors; sequences against the model
    scoring_context              damping against the factors
    require_same_inputs          all workers against each other
"""

import torch
from torch import nn

from ekfac_dist.curvature.damping import Damping
from ekfac_dist.data.examples import Examples
from ekfac_dist.factors.comparison import Comparison, check_model
from ekfac_dist.factors.factors import Factors
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.queries import QuerySet
from ekfac_dist.models.capture.tasks import CAUSAL_LM, Task
from ekfac_dist.models.load.on_workers import require_same_model
from ekfac_dist.passes.sequences import check_sequences
from ekfac_dist.runtime.processes import World


def check_model_and_sequences(
    path: str,
    factors: Factors,
    model: nn.Module,
    scored: Examples,
    queries: QuerySet,
    *,
    advice: str,
    allow_changes: bool,
) -> Comparison:
    """Checks this worker's model against factors, training sequences and queries.

    Args:
        path: The factors' name in errors.
        factors: The factors.
        model: The model.
        scored: The training sequences that are scored.
        queries: The queries.
        advice: Advice against training sequences that are too long, with {context} for the model's
            limit.
        allow_changes: Whether the model may differ outside the tracked modules.

    Returns:
        How the model compares with the one that the factors were fitted for.

    Raises:
        StoreError: If it is another model.
        DataError: If it cannot read a sequence or a query.
    """
    comparison = check_model(path, factors, model, allow_changes=allow_changes)
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
    task: Task = CAUSAL_LM,
) -> ScoringContext:
    """The scoring context of a checked model; scores are float64 for a float64 model, else float32.

    Args:
        model: The model, on the worker's device.
        factors: The factors.
        damping: How λ is chosen.
        world: The workers, on the model's device.
        batch_tokens: Token budget of a batch, padding included.
        show_progress: Whether worker 0 shows progress.
        task: The task whose loss gradients are of.

    Raises:
        ConfigError: As of `Factors.chosen_damping`.
    """
    double = next(model.parameters()).dtype == torch.float64
    return ScoringContext(
        model=model,
        factors=factors,
        damping=factors.chosen_damping(damping),
        dtype=torch.float64 if double else torch.float32,
        world=world,
        batch_tokens=batch_tokens,
        show_progress=show_progress,
        task=task,
    )


def require_same_inputs(
    context: ScoringContext, scored: Examples, queries: QuerySet, comparison: Comparison
) -> None:
    """Checks that data, queries, factors and models have the same content on all workers.

    Workers that differ would share out different work, or wait for each other for ever.

    Raises:
        LaunchError: If something differs, on every worker.
    """
    world = context.world
    world.require_same("data, by fingerprint,", scored.fingerprint)
    world.require_same("candidates", scored.indices.tolist())
    world.require_same("queries, by fingerprint,", queries.sequences.fingerprint)
    world.require_same("groups of queries", (queries.members, queries.group_names))
    world.require_same("factors, by fingerprint,", context.factors.fingerprint)
    require_same_model(context.model, comparison.fingerprints, world)
