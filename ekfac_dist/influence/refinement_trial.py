"""Tries a refinement on a few sequences: whether it can be computed, in which steps, and how long.

Whether a model can be linearised is not decided by its name. On a short sequence, derivatives of
log p along a change of the weights are compared with those that an ordinary backward gives: a
function whose backward autograd does not differentiate, but does not refuse to, fails here.

The graph of a linearised step is several times that of an ordinary one. It is measured on the
longest sequence, and steps are cut so that it fits beside the vectors of a solve.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ekfac_dist.curvature.float32_products import precisely
from ekfac_dist.curvature.iterative import HELD_BLOCKS, Vectors
from ekfac_dist.errors import ModelError
from ekfac_dist.influence.blocks import plan_blocks, refined_at_a_time
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.preconditioned import bytes_per_group
from ekfac_dist.influence.refined import METHOD_NAMES
from ekfac_dist.influence.refinement import Refinement
from ekfac_dist.models.capture.linearised import Linearisation, LinearisedBatch
from ekfac_dist.models.capture.saved_tensors import noting_saved_tensors
from ekfac_dist.passes.step_memory import USABLE, free_bytes
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.memory import as_text
from ekfac_dist.runtime.progress import clock

# Allowed difference of two computations of a derivative, over the largest: some models compute
# norms in float32, or the whole forward.
_TOLERANCE = 0.01
_NUM_COMPARED = 4  # derivatives

# The most that a step holds, over the tensors that its graph saves: measured 1.33 and 1.37 with 256
# and with 1,024 positions (hidden 576, MLP 1536, 6 layers).
_PEAK_OF_GRAPH = 1.5


@dataclass(frozen=True)
class _Trial:
    """What a step of this worker's longest sequence takes.

    Attributes:
        num_bytes: What it holds at most.
        positions: Its positions.
        forward: Seconds of the forward, and of the backward that is differentiated.
        products: Seconds of both products for one right-hand side.
    """

    num_bytes: int
    positions: int
    forward: float
    products: float


def tried(refinement: Refinement) -> Refinement:
    """Tries a refinement, and says what its solves will take; a collective.

    Args:
        refinement: The refinement.

    Returns:
        The same in steps that fit the memory of every worker.

    Raises:
        ModelError: If the model cannot be linearised.
    """
    context, lengths = refinement.context, refinement.sample.sequences.num_positions
    with context.world.agree():
        _require_derivatives(refinement, int(lengths.argmin()))
        trial = _try_step(refinement, int(lengths.argmax()))
    step_tokens = _fitting_tokens(refinement, trial)
    _tell(refinement, trial, step_tokens)
    return refinement.in_steps_of(step_tokens)


def _require_derivatives(refinement: Refinement, index: int) -> None:
    """Refuses a model whose log p do not change along a direction as a backward has it."""
    context = refinement.context
    batch = refinement.sample.sequences.batch([index]).to(context.world.device)
    direction = {name: values[0] for name, values in _random_vectors(context).items()}
    with _linearised(context) as linearisation, precisely(context.world.device):
        linearised = linearisation.of(batch)
        derivatives_L = linearised.log_probability_tangents(direction).double()
        compared = np.unique(np.linspace(0, linearised.num_labels - 1, _NUM_COMPARED).astype(int))
        expected = torch.stack([_along(linearised, int(k), direction) for k in compared])
    found = derivatives_L[torch.from_numpy(compared).to(derivatives_L.device)]
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
    if not difference <= _TOLERANCE:  # NaN, too
        raise ModelError(
            "The model's backward cannot be differentiated: derivatives of log p that are computed "
            f"from it differ from its own by {difference:.2g}, relative; perhaps a kernel has no "
            "second derivative. Use a plain implementation of it, or set refine.method: none."
        )


def _along(linearised: LinearisedBatch, number: int, direction: Vectors) -> Tensor:
    """The derivative of one label's log p along a direction, from an ordinary backward."""
    total = next(iter(direction.values())).new_zeros((), dtype=torch.float64)
    for module, acts_MI, grads_MO in linearised.log_probability_gradients(number):
        gradient_OI = (grads_MO.T @ acts_MI).to(total.device)
        total += (gradient_OI * direction[module.name]).sum(dtype=torch.float64)
    return total


def _try_step(refinement: Refinement, index: int) -> _Trial:
    """Measures a step of one sequence."""
    context, sequences = refinement.context, refinement.sample.sequences
    vectors, sums = _random_vectors(context), _random_vectors(context)
    batch = sequences.batch([index]).to(context.world.device)
    with _linearised(context) as linearisation, precisely(context.world.device):
        with noting_saved_tensors(context.model) as saved:
            linearisation.of(batch)
        num_bytes = int(_PEAK_OF_GRAPH * saved.num_bytes)
        del saved  # it holds them
        times = [_now(context)]
        linearised = linearisation.of(batch)
        times.append(_now(context))
        linearised.add_gauss_newton_products_(vectors, sums)
        times.append(_now(context))
    positions = int(sequences.num_positions[index])
    return _Trial(num_bytes, positions, times[1] - times[0], times[2] - times[1])


def _fitting_tokens(refinement: Refinement, trial: _Trial) -> int:
    """Positions of a step whose graph fits the free memory of every worker; a collective."""
    context = refinement.context
    free, _ = free_bytes(context.world)
    held = _rows_at_a_time(refinement) * _bytes_per_row(context) + context.fitted.bytes_left
    room = USABLE * free - held
    num_sequences = max(1, int(room // max(1, trial.num_bytes)))
    return min(context.world.gather(min(context.batch_tokens, num_sequences * trial.positions)))


def _rows_at_a_time(refinement: Refinement) -> int:
    rank, config = refinement.config.effective_rank, refinement.config
    at_a_time = refined_at_a_time(refinement.context, config, rank)
    return min(len(refinement.residuals), at_a_time)


def _bytes_per_row(context: ScoringContext) -> int:
    return HELD_BLOCKS * bytes_per_group(context.modules, None, context.dtype)


def _tell(refinement: Refinement, trial: _Trial, step_tokens: int) -> None:
    """Says what will be solved, what that holds, and how long it may take."""
    context, sample = refinement.context, refinement.sample
    settings, num_rows = context.refine, refinement.num_rows
    at_a_time, per_row = _rows_at_a_time(refinement), _bytes_per_row(context)
    chosen = sample.of_product(0)
    positions = int(sample.sequences.num_positions[chosen].sum())
    blocks = plan_blocks(num_rows, context, refinement.config)
    num_solves = sum(-(-len(block) // at_a_time) for block in blocks)
    scale = (settings.num_iterations + 1) * positions / trial.positions / context.world.size
    for_rows = scale * num_rows * trial.products
    graph = trial.num_bytes * max(1, step_tokens / trial.positions)
    for line in (
        f"refine        {METHOD_NAMES[settings.method]}, G of {len(chosen):,} of "
        f"{sample.num_training:,} sequences ({positions:,} positions), at most "
        f"{settings.num_iterations} steps",
        f"              {HELD_BLOCKS} vectors of each row of scores: {as_text(per_row)}, "
        f"{at_a_time} rows at a time: {as_text(at_a_time * per_row)} on every worker; steps of "
        f"{step_tokens} positions: {as_text(graph)} more",
        f"              at most about {clock(for_rows + scale * num_solves * trial.forward)}, "
        f"{clock(for_rows / num_rows)} of it for each row (one sequence was timed)",
    ):
        log_on_main(context.world, line)


def _now(context: ScoringContext) -> float:
    """The time, in seconds, once the device has finished what it was given."""
    if context.world.device.type == "cuda":
        torch.cuda.synchronize(context.world.device)
    return time.perf_counter()


def _linearised(context: ScoringContext) -> Linearisation:
    return Linearisation(context.model, context.modules, context.dtype, context.task)


def _random_vectors(context: ScoringContext) -> Vectors:
    """A vector [1, O, I] of each module, the same on every worker."""
    generator = torch.Generator().manual_seed(0)
    like = context.zeros()
    return {
        m.name: torch.randn(1, m.num_outputs, m.input_size, generator=generator).to(like)
        for m in context.modules
    }
