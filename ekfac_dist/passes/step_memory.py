"""The memory of a step, measured with the model at hand, and what workers have free for it."""

import socket
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ekfac_dist.data.batch_plan import padded_sizes
from ekfac_dist.data.batches import CapturedPositions
from ekfac_dist.models.capture.chunked_head import CHUNK_ELEMENTS, CausalLMInChunks
from ekfac_dist.models.capture.labels import LabelRule
from ekfac_dist.models.capture.observers import NullObserver
from ekfac_dist.models.capture.saved_tensors import StepMemory, noting_saved_tensors
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import agreeing, is_sharded
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.owners import NOT_SHARED, Places
from ekfac_dist.passes.row_memory import exchange_bytes, input_elements
from ekfac_dist.runtime.memory import available_bytes
from ekfac_dist.runtime.processes import World

# The part of free memory that is planned for; the rest is for the allocator, and for chance.
USABLE = 0.9

# What takes less than this part of free memory need not be looked into.
LARGE = 0.5

# Activations of a step over what its tracked modules read and give; more than any model has.
_ACTIVATIONS_OF_ROWS = 4


def free_bytes(world: World) -> tuple[int, int]:
    """This worker's part of the free memory of its device, and of its host; a collective."""
    places = world.gather((socket.gethostname(), str(world.device)))
    hosts = [host for host, _ in places]
    on_device = available_bytes(world.device) // places.count(places[world.rank])
    on_host = available_bytes(torch.device("cpu")) // hosts.count(hosts[world.rank])
    return on_device, on_host


def largest_step(
    context: PassContext, modules: Sequence[TrackedModule], step_tokens: int
) -> StepMemory:
    """More than the memory of any step, from what the tracked modules read and give.

    Args:
        context: Gives the model.
        modules: The tracked modules.
        step_tokens: Positions of a step.
    """
    itemsize = next(context.model.parameters()).dtype.itemsize
    rows = sum(module.num_inputs + module.num_outputs for module in modules)
    return StepMemory(
        _ACTIVATIONS_OF_ROWS * step_tokens * itemsize * rows,
        0,
        itemsize,
        gradient_itemsize=max(itemsize, torch.float32.itemsize),
    )


class _RowCounts(NullObserver):
    """An observer that counts the positions of modules that see only some of a step's."""

    def __init__(self, modules: Iterable[TrackedModule]) -> None:
        self.of_modules = {module.name: 0 for module in modules}
        self.gradient_itemsize = 0

    def on_gradient(
        self, module: TrackedModule, grads_MO: Tensor, positions: CapturedPositions
    ) -> None:
        """Counts the positions of a module."""
        self.gradient_itemsize = grads_MO.dtype.itemsize
        if positions.offsets is None:
            del self.of_modules[module.name]
        else:
            self.of_modules[module.name] = positions.num_positions


def measured_step(context: PassContext, modules: Sequence[TrackedModule]) -> StepMemory:
    """The memory of a step of this worker's largest batch, from a step of its longest sequence.

    One sequence alone is run, since the whole batch may not fit. A collective if the model is
    sharded.

    Args:
        context: Model, data and workers.
        modules: All tracked modules.

    Returns:
        Zeros where the worker has no batch.
    """
    batches, lengths = context.own_batches, context.sequences.num_positions
    if not batches and not context.runs_in_step:
        return StepMemory.nothing()
    longest = max((i for batch in batches for i in batch), key=lengths.__getitem__, default=0)
    batch = context.batch([longest])
    rule, counts = LabelRule("data", 0, 0), _RowCounts(modules)
    with (
        noting_saved_tensors(context.model) as saved,
        context.capture(modules, counts, None, saved=saved) as capture,
    ):
        result = capture.run(batch, rule)
    scale = max(padded_sizes(lengths, batches), default=0) / int(lengths[longest])
    itemsize = result.gradient.dtype.itemsize
    whole = logit_bytes = int(scale * result.logit_bytes)
    if isinstance(context.task, CausalLMInChunks):
        logit_bytes = min(whole, max(CHUNK_ELEMENTS * itemsize, result.logit_bytes))
    return StepMemory(
        int(scale * saved.num_bytes),
        logit_bytes,
        itemsize,
        context.checkpoints,
        are_logits_whole=logit_bytes == whole,
        gradient_itemsize=counts.gradient_itemsize,
        routed={name: number / batch.num_positions for name, number in counts.of_modules.items()},
        exchanges_at_end=is_sharded(context.model) and bool(counts.of_modules),
    )


def needs_checkpoints(
    context: PassContext,
    modules: Sequence[TrackedModule],
    step_tokens: int,
    held: int,
    places: Places = NOT_SHARED,
) -> bool:
    """Whether a step's activations do not fit into any worker's memory; a collective.

    Args:
        context: Model, data and workers.
        modules: The tracked modules.
        step_tokens: Positions of a step.
        held: Bytes that a worker holds besides.
        places: Who owns what, where rows travel to owners.
    """
    context = replace(context, checkpoints=False)
    left, is_certain = _left_beside_steps(context, modules, step_tokens, held, places)
    return not is_certain and any(context.world.gather(left < 0))


def room_beside_steps(
    context: PassContext,
    modules: Sequence[TrackedModule],
    step_tokens: int,
    held: int,
    wanted: int,
    places: Places = NOT_SHARED,
) -> int:
    """How many of the bytes that are wanted this worker's device has room for; a collective.

    Args:
        context: Model, data and workers.
        modules: The tracked modules.
        step_tokens: Positions of a step.
        held: Bytes that a worker holds besides.
        wanted: The bytes that are wanted.
        places: Who owns what, where rows travel to owners.
    """
    left, is_certain = _left_beside_steps(context, modules, step_tokens, held + wanted, places)
    return wanted if is_certain else max(0, min(wanted, wanted + left))


def _left_beside_steps(
    context: PassContext,
    modules: Sequence[TrackedModule],
    step_tokens: int,
    held: int,
    places: Places,
) -> tuple[int, bool]:
    """The usable memory that is left beside steps, negative where it is too little; a collective.

    Returns:
        The bytes, and whether it is certain without a step that all workers have enough: then it is
        not looked into.
    """
    world = context.world
    free, _ = free_bytes(world)
    rough = largest_step(context, modules, step_tokens).activation_bytes
    if not any(world.gather(rough + held > LARGE * free)):
        return 0, True
    with agreeing(world, context.model):
        step = measured_step(context, modules)
    waiting = step_tokens * input_elements(modules, {}) * context.dtype.itemsize
    exchanged, _ = exchange_bytes(modules, places, step, step_tokens)
    needed = step.activation_bytes + 2 * step.logit_bytes + waiting + exchanged + held
    return int(USABLE * free - needed), False
