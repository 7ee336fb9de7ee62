"""Before query gradients are refined: what forbids it, and what it will take.

Whether a model can be linearised is not decided by its name: on a short sequence it is tried that
its two products, J v and Jᵀu, are each other's transpose. A function whose backward autograd cannot
differentiate, but does not refuse to, would fail here.
"""

import time
from dataclasses import dataclass

import torch
from torch import nn

from ekfac_dist.config import RefineConfig, ScoresConfig
from ekfac_dist.curvature.iterative import HELD_BLOCKS, Vectors
from ekfac_dist.data.examples import Examples
from ekfac_dist.errors import ModelError
from ekfac_dist.influence.blocks import plan_blocks, refined_at_a_time
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.preconditioned import bytes_per_group
from ekfac_dist.influence.refined import METHOD_NAMES
from ekfac_dist.influence.refinement import Refinement
from ekfac_dist.influence.refinement_sample import RefinementSample
from ekfac_dist.models.capture.linearised import Linearisation
from ekfac_dist.models.capture.prepare import precisely
from ekfac_dist.models.capture.tasks import LossTask, Task
from ekfac_dist.models.modules import is_quantised, linear_modules
from ekfac_dist.models.sharding import is_sharded
from ekfac_dist.passes.sequences import check_sequences, exactly_batched
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.memory import as_text
from ekfac_dist.runtime.progress import clock

# Allowed difference of uᵀ(J v) and (Jᵀu)ᵀv, over ‖u‖ ‖J v‖; some models take norms in float32.
_TOLERANCE = 1e-3


def require_refinable_model(model: nn.Module, task: Task, settings: RefineConfig) -> None:
    """Refuses to refine with a model, or for a task, for which it is not defined.

    Args:
        model: The model.
        task: What the model is asked, and what its loss is.
        settings: How query gradients are refined.

    Raises:
        ModelError: If it cannot be refined.
    """
    if not settings.is_on:
        return
    advice = "or set refine.method: none"
    asked = f"refine.method is {settings.method}, but"
    if isinstance(task, LossTask):
        raise ModelError(
            f"{asked} the task {task.name} has losses of its own and no logits, so that the "
            f"Gauss–Newton matrix of its loss is not known; derive it from Task, {advice}."
        )
    quantised = [name for name, m in linear_modules(model).items() if is_quantised(m)]
    if quantised:
        raise ModelError(
            f"{asked} module {quantised[0]} has quantised weights, whose backward cannot be "
            f"differentiated; load the model without model.quantization, {advice}."
        )
    if is_sharded(model):
        raise ModelError(
            f"{asked} the model is sharded over the workers by FSDP, which gathers weights for one "
            f"backward alone; start without it, {advice}."
        )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    narrow = dtypes - {torch.float32, torch.float64}
    if narrow:
        dtype = str(narrow.pop()).removeprefix("torch.")
        raise ModelError(
            f"{asked} the model's weights are {dtype}, in which products with the Gauss–Newton "
            f"matrix are too coarse for a solve; set model.dtype: float32, {advice}."
        )


def start_refinement(
    context: ScoringContext, train: Examples, config: ScoresConfig, num_groups: int
) -> Refinement:
    """The refinement that a context asks for; a collective.

    Args:
        context: Model, factors, workers, and how gradients are refined.
        train: The training set.
        config: The scores that are asked for.
        num_groups: Q, the number of query groups.

    Raises:
        ConfigError: If the training set has fewer sequences than are asked for.
        DataError: If the model cannot read one that was drawn.
        ModelError: If what the model gives for a sequence depends on its batch.
    """
    world = context.world
    with world.agree():
        sample = RefinementSample.draw(train, context.refine)
        check_sequences(context.model, sample.sequences, "set data.max_tokens to {context} or less")
    batched = exactly_batched(
        context.model, sample.sequences, context.task, world, context.batch_tokens
    )
    residuals = torch.full(
        (num_groups, context.refine.num_iterations + 1), torch.nan, dtype=torch.float64
    )
    return Refinement(context, sample.over(batched), config, residuals)


@dataclass(frozen=True)
class _Seconds:
    """What the parts of a product take, in seconds for the longest batch of this worker.

    Attributes:
        forward: The forward, and the backward that is differentiated.
        products: Both products for one right-hand side.
        share: The batch's part of this worker's positions of a product.
    """

    forward: float
    products: float
    share: float


def try_and_tell(refinement: Refinement) -> None:
    """Tries the linearised model on a short sequence, and says what the solves will take.

    Args:
        refinement: The refinement.

    Raises:
        ModelError: If the model cannot be linearised.
    """
    context, sample = refinement.context, refinement.sample
    world, settings = context.world, context.refine
    lengths = sample.sequences.num_positions
    with world.agree():
        _require_transposes(refinement, [int(lengths.argmin())])
        own = sample.own_batches(context, 0)
        seconds = _measure(refinement, own[0], own) if own else None
    num_groups = len(refinement.residuals)
    at_a_time = min(num_groups, refined_at_a_time(context, refinement.config, _rank(refinement)))
    blocks = plan_blocks(num_groups, context, refinement.config)
    vectors = HELD_BLOCKS * bytes_per_group(context.modules, None, context.dtype)
    chosen = sample.of_product(0)
    log_on_main(
        world,
        f"refine        {METHOD_NAMES[settings.method]}, G of {len(chosen):,} of "
        f"{sample.num_training:,} sequences ({int(lengths[chosen].sum()):,} positions), at most "
        f"{settings.num_iterations} steps",
    )
    log_on_main(
        world,
        f"              {HELD_BLOCKS} vectors of each row of scores: {as_text(vectors)}, "
        f"{at_a_time} rows at a time: {as_text(at_a_time * vectors)} on every worker",
    )
    if seconds is not None:
        num_products = settings.num_iterations + 1
        num_solves = sum(-(-len(block) // at_a_time) for block in blocks)
        forwards = num_solves * num_products * seconds.forward / seconds.share
        right_sides = num_groups * num_products * seconds.products / seconds.share
        log_on_main(
            world,
            f"              at most about {clock(forwards + right_sides)}, "
            f"{clock(right_sides / num_groups)} of it for each row (one batch was timed)",
        )


def _rank(refinement: Refinement) -> int | None:
    return refinement.config.effective_rank


def _require_transposes(refinement: Refinement, indices: list[int]) -> None:
    """Refuses a model whose products J v and Jᵀu are not each other's transpose."""
    context = refinement.context
    batch = refinement.sample.sequences.batch(indices).to(context.world.device)
    vectors = _random_vectors(context, 1)
    with _linearised(context) as linearisation, precisely(context.world.device):
        linearised = linearisation.of(batch)
        tangent = linearised.tangent({name: values[0] for name, values in vectors.items()})
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(tangent.shape, generator=generator).to(tangent)
        one = torch.dot(cotangent.double().flatten(), tangent.double().flatten())
        other = torch.zeros_like(one)
        for module, acts_MI, grads_MO in linearised.gradients(cotangent):
            product_OI = (grads_MO.T @ acts_MI).to(vectors[module.name])
            other += (product_OI * vectors[module.name][0]).sum(dtype=torch.float64)
    difference = (one - other).abs() / (cotangent.double().norm() * tangent.double().norm())
    if not difference <= _TOLERANCE:  # NaN, too
        raise ModelError(
            "The model's backward cannot be differentiated: products with its Jacobian and with "
            f"the transpose of it differ by {float(difference):.2g}, relative; perhaps a kernel "
            "of its own has no second derivative. Use a plain implementation of it, or set "
            "refine.method: none."
        )


def _measure(refinement: Refinement, batch: list[int], own: list[list[int]]) -> _Seconds:
    """Times the parts of a product on one batch of this worker's."""
    context, sequences = refinement.context, refinement.sample.sequences
    vectors, sums = _random_vectors(context, 1), _random_vectors(context, 1)
    on_device = sequences.batch(batch).to(context.world.device)
    with _linearised(context) as linearisation, precisely(context.world.device):
        times = [_now(context)]
        linearised = linearisation.of(on_device)
        times.append(_now(context))
        linearised.add_gauss_newton_products_(vectors, sums)
        times.append(_now(context))
    all_own = [index for indices in own for index in indices]
    lengths = sequences.num_positions
    share = int(lengths[batch].sum()) / int(lengths[all_own].sum())
    return _Seconds(times[1] - times[0], times[2] - times[1], share)


def _now(context: ScoringContext) -> float:
    """The time, in seconds, once the device has finished what it was given."""
    if context.world.device.type == "cuda":
        torch.cuda.synchronize(context.world.device)
    return time.perf_counter()


def _linearised(context: ScoringContext) -> Linearisation:
    return Linearisation(context.model, context.modules, context.dtype, context.task)


def _random_vectors(context: ScoringContext, number: int) -> Vectors:
    """Vectors [number, O, I] of each module, the same on every worker."""
    generator = torch.Generator().manual_seed(0)
    return {
        m.name: torch.randn(number, m.num_outputs, m.input_size, generator=generator).to(
            context.zeros()
        )
        for m in context.modules
    }
