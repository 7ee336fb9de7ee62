"""Before query gradients are refined: what forbids it, and the sequences that G is of."""

import torch
from torch import nn

from ekfac_dist.config import RefineConfig, ScoresConfig
from ekfac_dist.data.examples import Examples
from ekfac_dist.errors import ModelError
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.refinement import Refinement
from ekfac_dist.influence.refinement_sample import RefinementSample
from ekfac_dist.models.capture.tasks import LossTask, Task
from ekfac_dist.models.modules import is_quantised, linear_modules
from ekfac_dist.models.sharding import is_sharded
from ekfac_dist.passes.sequences import check_sequences, exactly_batched


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
        sample = RefinementSample.draw(train, context.refine, context.batch_tokens)
        check_sequences(context.model, sample.sequences, "set data.max_tokens to {context} or less")
    batched = exactly_batched(
        context.model, sample.sequences, context.task, world, context.batch_tokens
    )
    residuals = torch.full(
        (num_groups, context.refine.num_iterations + 1), torch.nan, dtype=torch.float64
    )
    return Refinement(context, sample.over(batched), config, residuals)
