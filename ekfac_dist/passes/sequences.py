"""The sequences of a run: loaded on every worker, and batched so that batches change no result."""

from collections.abc import Sequence as SequenceOf
from typing import Any

from datasets import Dataset
from torch import nn

from ekfac_dist.config import DataConfig
from ekfac_dist.data.batches import Batch
from ekfac_dist.data.examples import Examples, TaskExamples
from ekfac_dist.data.sequences import Sequence, Sequences, collate
from ekfac_dist.data.source import content_of, open_source
from ekfac_dist.data.tokenizing import tokenize
from ekfac_dist.errors import DataError, ModelError, UserError
from ekfac_dist.models.capture.batch_checks import BatchChecks
from ekfac_dist.models.capture.checkpointing_checks import why_not_repeated
from ekfac_dist.models.capture.chunked_head import CausalLMInChunks
from ekfac_dist.models.capture.chunked_head_checks import in_chunks
from ekfac_dist.models.capture.padding_checks import require_unpadded_losses
from ekfac_dist.models.capture.rotary import equal_lengths_above
from ekfac_dist.models.capture.tasks import CausalLM, Task
from ekfac_dist.models.load.pretrained import context_length
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import agreeing, class_of
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress

# Positions of a sequence that a chunked head is tried with, and that checkpointing is, for which
# the host keeps all inputs and output-gradients.
_TRIED_POSITIONS = 64
_KEPT_POSITIONS = 16


def load_sequences(
    config: DataConfig, tokenizer: Any, tokenizer_fingerprint: str, world: World
) -> Sequences:
    """Opens and tokenises a data set; each host's first worker goes first and fills the cache.

    Raises:
        DataError: As of `open_source` and `tokenize`, on every worker.
    """
    return load_with_examples(config, tokenizer, tokenizer_fingerprint, world)[0]


def load_with_examples(
    config: DataConfig, tokenizer: Any, tokenizer_fingerprint: str, world: World
) -> tuple[Sequences, Dataset]:
    """As `load_sequences`, with the examples that the sequences were made of.

    Raises:
        DataError: As of `load_sequences`.
    """
    source, content = world.once_per_host(lambda: (config.source, content_of(config)))
    with world.agree():
        if source != config.source:  # the difference is refused later, with a better sentence
            content = content_of(config)

    def load() -> tuple[Sequences, Dataset]:
        examples, shown = open_source(config, content), world.is_main
        progress = Progress("tokenising", total=len(examples), unit="sequences", enabled=shown)
        with progress:
            update = progress.update
            return tokenize(examples, config, tokenizer, tokenizer_fingerprint, update), examples

    return world.main_first(load)


def check_sequences(model: nn.Module, sequences: Examples, advice: str) -> None:
    """Refuses sequences that a model cannot process.

    Args:
        model: The model.
        sequences: The sequences.
        advice: What to do if one is too long; {context} stands for the model's limit.

    Raises:
        DataError: If one is longer than the model's context, or has an unknown token.
    """
    longest = sequences.longest
    context = context_length(model)
    if context is not None and longest > context:
        raise DataError(
            f"The longest sequence has {longest} positions, but the model reads {context} at "
            f"most; {advice.format(context=context)}."
        )
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(embeddings, nn.Embedding) and sequences.max_id >= embeddings.num_embeddings:
        raise DataError(
            f"The data has token id {sequences.max_id}, but the model knows "
            f"{embeddings.num_embeddings} tokens; use the tokenizer that belongs to the model."
        )


def with_chunked_head(
    model: nn.Module,
    modules: SequenceOf[TrackedModule],
    sequences: Examples,
    task: Task,
    world: World,
) -> Task:
    """The task as passes compute it: with a chunked head where that is the same; a collective.

    Args:
        model: The prepared model.
        modules: The tracked modules.
        sequences: The sequences; the beginnings of two are tried.
        task: What the model is asked, and what its loss is.
        world: The workers.
    """
    if not isinstance(sequences, Sequences) or type(task) is not CausalLM:
        return task
    batch = _short_batch(sequences, _TRIED_POSITIONS).to(world.device)
    with agreeing(world, model):
        chunked = in_chunks(model, modules, batch)
    return chunked if all(world.gather(chunked is not None)) and chunked is not None else task


# What is said where layers are computed again.
COMPUTED_AGAIN = "activations   of one layer at a time (model.gradient_checkpointing)"


def why_not_checkpointed(
    model: nn.Module,
    modules: SequenceOf[TrackedModule],
    sequences: Examples,
    task: Task,
    world: World,
) -> str | None:
    """Why passes cannot use gradient checkpointing: a sentence; None if they can; a collective.

    Args:
        model: The prepared model.
        modules: The tracked modules.
        sequences: The sequences; the shortest one, or the beginnings of two, are tried.
        task: What the model is asked, and what its loss is, as passes compute it.
        world: The workers.

    Raises:
        ModelError: If a pass without checkpointing would raise it, too.
    """
    if isinstance(sequences, Sequences):
        batch = _short_batch(sequences, _KEPT_POSITIONS)
    else:
        batch = sequences.batch([int(sequences.num_positions.argmin())])
    with agreeing(world, model, ModelError):
        reason = why_not_repeated(model, modules, batch.to(world.device), task)
    return next((each for each in world.gather(reason) if each is not None), None)


def _short_batch(sequences: Sequences, num_positions: int) -> Batch:
    """The beginnings of two sequences, of up to as many positions and of half of that."""
    lengths = sequences.num_positions
    shortest = sequences[int(lengths.argmin())].inputs[:num_positions]
    # No longer ones: whether the model remembers those is tried by `exactly_batched`.
    tried = [shortest, sequences[int(lengths.argmax())].inputs[: -(-len(shortest) // 2)]]
    return collate([Sequence(k, ids, ids) for k, ids in enumerate(tried)])


def exactly_batched(
    model: nn.Module, sequences: Examples, task: Task, world: World, batch_tokens: int
) -> Examples:
    """The same sequences, batched so that each gets the logits that it would get alone.

    They are packed, without padding, if the model computes packed sequences so on every worker.

    Args:
        model: The prepared model.
        sequences: The sequences; passes may read all or some of them.
        task: What the model is asked, and what its loss is.
        world: The workers.
        batch_tokens: Token budget of the passes' batches; the same on every worker.

    Raises:
        ModelError: If a sequence's logits change beside, or after, a longer one.
    """
    if not isinstance(sequences, Sequences) or not isinstance(task, CausalLM):
        return sequences
    if type(task) not in (CausalLM, CausalLMInChunks):
        return sequences
    sequences = sequences.batched_equal_above(equal_lengths_above(model))
    with agreeing(world, model, ModelError):
        checks = BatchChecks(model, sequences, world.device, batch_tokens, task)
        checks.require_exact()
        can_pack = checks.can_pack()
    return sequences.packing() if all(world.gather(can_pack)) else sequences


def require_harmless_padding(
    model: nn.Module, examples: TaskExamples, task: Task, world: World, batch_tokens: int
) -> None:
    """Refuses a task whose losses depend on the other examples of a batch.

    Args:
        model: The prepared model.
        examples: The examples.
        task: What the model is asked, and what its loss is.
        world: The workers.
        batch_tokens: Token budget of the passes' batches; 1: each example has its own batch.

    Raises:
        ModelError: If an example's loss changes beside a longer one.
    """
    if batch_tokens == 1:
        return
    with agreeing(world, model, UserError):
        if equal_lengths_above(model) is not None:
            raise ModelError(
                f"The frequencies of {class_of(model).__name__}'s rotary embedding follow the "
                f"longest sequence of a batch, and batches of the task {task.name} are not cut by "
                "length; give batch_tokens=1, so that each example has a batch of its own."
            )
        require_unpadded_losses(task, model, examples, world.device)
