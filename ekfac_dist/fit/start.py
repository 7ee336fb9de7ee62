"""The start of a fit: checks of model and data on all workers, and the store that is opened."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ekfac_dist.config import dotted
from ekfac_dist.curvature.blocks import block_sizes
from ekfac_dist.curvature.costs import step_tokens
from ekfac_dist.data.examples import Examples, TaskExamples
from ekfac_dist.errors import ModelError
from ekfac_dist.factors.sinks import FactorSink, NullStore, StoredWork
from ekfac_dist.factors.writer import FileWriter, StoreWriter
from ekfac_dist.fit.checkpoints import Checkpoints, SavedCheckpoints
from ekfac_dist.fit.decomposition_places import check_decompositions
from ekfac_dist.fit.directories import workers_that_write
from ekfac_dist.fit.manifest import FitInputs
from ekfac_dist.fit.settings import FitSettings
from ekfac_dist.models.capture.task_examples import few_examples
from ekfac_dist.models.capture.task_fingerprint import task_fingerprint
from ekfac_dist.models.capture.tasks import CAUSAL_LM, Task
from ekfac_dist.models.find.on_workers import find
from ekfac_dist.models.load.configuration import attention_implementation, configuration
from ekfac_dist.models.load.on_workers import model_fingerprints
from ekfac_dist.passes.sequences import (
    check_sequences,
    exactly_batched,
    require_harmless_padding,
    why_not_checkpointed,
    with_chunked_head,
)
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress
from ekfac_dist.runtime.software import NUMERIC_SOFTWARE, software


def checked_inputs(
    settings: FitSettings,
    model: nn.Module,
    sequences: Examples,
    world: World,
    task: Task = CAUSAL_LM,
) -> FitInputs:
    """Finds the modules to track, and refuses now, on every worker, what would fail later.

    Args:
        settings: The settings of the fit.
        model: The prepared model.
        sequences: All sequences.
        world: The workers.
        task: What the model is asked, and what its loss is.

    Raises:
        ModelError: As of `discover`, if what the model gives a sequence depends on its batch, or if
            gradient checkpointing is configured and the model's layers cannot be computed again.
        DataError: If a sequence is longer than the model's context or has an unknown token.
        LaunchError: If workers hold different data or models.
        DecompositionError: If a factor is too large for worker 0's device.
    """
    probe = None
    with world.agree():
        advice = "set data.max_tokens to {context} or less"
        if isinstance(sequences, TaskExamples):
            advice = "cut the examples to {context} or less"
        check_sequences(model, sequences, advice)
    if isinstance(sequences, TaskExamples):
        require_harmless_padding(model, sequences, task, world, settings.batch_tokens)
        with world.agree():
            probe = few_examples(task, model, sequences).to(world.device)
    discovery = find(model, settings.modules, world, task, probe)
    blocks = settings.factors.blocks
    check_decompositions(
        {factor: max(block_sizes(size, blocks)) for factor, size in discovery.factors.items()},
        world,
    )
    world.require_same("data, by fingerprint,", sequences.fingerprint)
    step = world.share(step_tokens(settings.batch_tokens, world.device))  # the same batches for all
    pass_task = with_chunked_head(model, discovery.modules, sequences, task, world)
    sequences = exactly_batched(model, sequences, pass_task, world, step)
    if settings.gradient_checkpointing is True:
        reason = why_not_checkpointed(model, discovery.modules, sequences, pass_task, world)
        with world.agree():
            if reason is not None:
                raise ModelError(reason)
    return FitInputs(
        settings,
        model,
        sequences,
        discovery,
        model_fingerprints(model, discovery.modules, world),
        pass_task,
        task_fingerprint(task),
        step,
    )


@contextmanager
def opened_store(
    output: str | Path,
    inputs: FitInputs,
    world: World,
    *,
    overwrite: bool,
    show_progress: bool,
) -> Iterator[tuple[FactorSink, Checkpoints]]:
    """Opens the store that worker 0 leads, new or of an unfinished run, and its saved states.

    Args:
        output: The store's directory.
        inputs: What the run starts from.
        world: The workers.
        overwrite: Whether a store that cannot be resumed is replaced.
        show_progress: Whether worker 0 shows the progress of verifying an unfinished store.

    Yields:
        Where factors go, and how the states of passes are saved.

    Raises:
        OutputError: If the directory cannot be written, or holds a finished store or the run of
            another configuration, model, data or software that is not to be overwritten.
    """

    def opened() -> StoreWriter:
        writer = StoreWriter(output, inputs.settings.recorded, _identity(inputs), replace=overwrite)
        size = sum(listed["bytes"] for listed in writer.files.values())
        with Progress("verifying", total=size, unit="bytes", enabled=show_progress) as progress:
            lost_files = writer.drop_damaged(progress.update)
        for file in lost_files:
            log_on_main(
                world, f"damaged       {file} has changed since it was written; it is made again"
            )
        if writer.stored.files or writer.stored.records:
            log_on_main(world, f"goes on       {len(writer.stored.files)} files are in place")
        if writer.will_replace:
            log_on_main(
                world,
                f"replaces      the store in {output}, once something of this run is on the disk",
            )
        return writer

    writer = world.on_main(opened)
    try:
        minutes = inputs.settings.save_minutes
        earlier = world.share(StoredWork() if writer is None else writer.stored)
        writers = workers_that_write(output, world, saves=minutes is not None)
        sink: FactorSink
        if writer is not None:
            writer.writers, sink = writers, writer
        elif world.rank in writers:
            sink = FileWriter(output, earlier, writers)
        else:
            sink = NullStore(earlier, writers)
        checkpoints = Checkpoints()
        if minutes is not None:
            checkpoints = SavedCheckpoints(output, world, sink, inputs.sequences, minutes)
        yield sink, checkpoints
    finally:
        if writer is not None:
            writer.close()


def _identity(inputs: FitInputs) -> dict[str, Any]:
    """What must be the same, beside the configuration, for an unfinished run to be resumed."""
    versions = software()
    return {
        "data": inputs.sequences.fingerprint,
        "task": inputs.task.name,
        "fingerprint of the task": inputs.task_fingerprint,
        "model": inputs.fingerprints.whole,
        **{
            f"{name} in the model's configuration": value
            for name, value in dotted(configuration(inputs.model)).items()
        },
        "attention implementation": attention_implementation(inputs.model),
        **{f"version of {name}": versions[name] for name in NUMERIC_SOFTWARE},
    }
