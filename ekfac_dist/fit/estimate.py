"""What a fit begins with: model, sequences, and a store that takes its factors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ekfac_dist.config import DataConfig, EstimateConfig, FactorsConfig, ModelConfig, leaves
from ekfac_dist.curvature.blocks import block_sizes
from ekfac_dist.curvature.costs import step_tokens
from ekfac_dist.curvature.eigenbasis import check_size
from ekfac_dist.data.examples import Examples, TaskExamples
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.opening import load_factors
from ekfac_dist.factors.output import check_output
from ekfac_dist.factors.sinks import FactorSink, MemoryStore, NullStore
from ekfac_dist.factors.writer import StoreWriter
from ekfac_dist.fit.checkpoints import Checkpoints, SavedCheckpoints
from ekfac_dist.fit.fit_factors import fit_factors
from ekfac_dist.fit.manifest import FitInputs, FitSummary, coverage_line, steps_line
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.capture.task_fingerprint import task_fingerprint
from ekfac_dist.models.capture.tasks import (
    CAUSAL_LM,
    Task,
    few_examples,
    read_examples,
    require_task,
)
from ekfac_dist.models.find.discovery import Discovery
from ekfac_dist.models.find.on_workers import find
from ekfac_dist.models.load.configuration import attention_implementation, configuration
from ekfac_dist.models.load.on_workers import load, model_fingerprints, unwrapped
from ekfac_dist.models.load.pretrained import load_tokenizer
from ekfac_dist.models.modules import device_of
from ekfac_dist.models.sharding import class_of, is_sharded
from ekfac_dist.passes.sequences import (
    check_sequences,
    exactly_batched,
    load_sequences,
    require_harmless_padding,
)
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.heartbeat import heartbeat
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress
from ekfac_dist.runtime.same_settings import require_same_settings
from ekfac_dist.runtime.software import NUMERIC_SOFTWARE, software
from ekfac_dist.runtime.terminal import show


def find_modules(config: EstimateConfig, world: World) -> Discovery:
    """What `run_estimate` would track: loads the model and runs a few tokens, and nothing else.

    Raises:
        UserError: Anything about the model that the user can mend, on every worker.
    """
    model = load(config.model, world)
    with prepared(model):
        return find(model, config.model.modules, world)


def run_estimate(
    config: EstimateConfig, world: World, say: Any = show, *, overwrite: bool = False
) -> FitSummary:
    """Fits and stores factors as configured; an unfinished run of the same is gone on with.

    Args:
        config: The run's configuration.
        world: The workers.
        say: Takes a line of text for people; called on worker 0 only.
        overwrite: Whether a store in its output that is not this run's own, unfinished, is
            replaced, as soon as something of the new one is on the disk.

    Raises:
        UserError: Anything that the user can mend, on every worker.
    """
    tell = say if world.is_main else (lambda line: None)
    assert config.output is not None
    output = config.output
    # First of all, for it costs nothing: whether the result has somewhere to go.
    world.on_main(lambda: check_output(output, config.as_dict(), replace=overwrite))
    tokenizer, tokenizer_print = world.main_first(lambda: load_tokenizer(config.model))
    sequences = load_sequences(config.data, tokenizer, tokenizer_print, world)
    counts = sequences.counts
    tell(
        f"data          {len(sequences)} of {counts.rows} sequences ({counts.unlabelled} left out: "
        f"no label), {int(sequences.num_positions.sum())} counted positions, "
        f"{int(sequences.num_labels.sum())} labels"
    )
    if counts.truncated:
        tell(
            f"truncation    {counts.truncated} sequences cut to {config.data.max_tokens} tokens, "
            f"{counts.tokens_cut} tokens lost"
        )
    if counts.split_note:
        tell(f"split tokens  {counts.split_note}")
    model = load(config.model, world)
    with prepared(model):
        inputs = check_inputs(config, model, sequences, world)
        coverage = inputs.discovery.coverage
        tell(
            f"model         {class_of(model).__name__}, {coverage.model_parameters} parameters, "
            f"{str(next(model.parameters()).dtype).removeprefix('torch.')}"
            f"{f', sharded over {world.size} workers' if is_sharded(model) else ''}"
        )
        tell(f"tracked       {coverage_line(inputs.discovery)}")
        for name, why in coverage.skipped.items():
            tell(f"not tracked   {name}: {why}")
        tell(f"steps         {steps_line(inputs)}")
        with (
            opened_store(output, inputs, world, tell, overwrite=overwrite, show_progress=True) as (
                sink,
                checkpoints,
            ),
            preemption.deferred(),
        ):
            return fit_factors(inputs, world, sink, checkpoints, show_progress=True)


def estimate_factors(
    model: nn.Module,
    data: Any,
    *,
    output: str | Path | None = None,
    modules: str | Sequence[str] | None = None,
    labels: str = "sampled",
    seed: int = 0,
    refit: str = "per_sequence",
    accumulate: str = "float32",
    eigen: str = "rank0",
    partitions: int | str = "auto",
    blocks: int = 1,
    batch_tokens: int = 4096,
    max_tokens: int | None = None,
    keep_covariance: bool = True,
    save_minutes: float | None = 10,
    overwrite: bool = False,
    progress: bool = False,
    task: Task | None = None,
) -> Factors:
    """Fits EK-FAC factors of a transformer's MLP modules (Grosse et al. 2023, §2.2).

    Under `accelerate launch`, call it on every worker with the same model and the same whole data;
    it shards the data itself. The model must be on the worker's device and comes back as it was.

    Args:
        model: A Hugging Face causal language model; or the model of another task.
        data: A `datasets.Dataset` or an iterable of examples or batches with `input_ids` and, if
            wanted, `labels` (−100 for none) and `attention_mask`; padding is taken off. What other
            tasks' examples hold, the task says.
        output: Directory of the factor store, seen by every worker; None keeps the factors in
            memory, on every worker. If it holds an unfinished run of the same arguments, model and
            data, that is gone on with.
        modules: A glob of module names, or several; None for every MLP linear.
        labels: "sampled" from the model's softmax, or "data" for the data's own.
        seed: Seed of sampled labels.
        refit: "per_sequence", "per_token" or "none".
        accumulate: Precision of running sums, "float32" or "float64".
        eigen: Who decomposes the factors: "rank0", or every worker its share, "sharded".
        partitions: Number of groups of modules, one pair of passes each; "auto": the fewest that
            fit into the workers' memory.
        blocks: Diagonal blocks of each factor, for very large dimensions; 1: factors are whole.
        batch_tokens: Token budget of a batch, padding included.
        max_tokens: Longer sequences are cut to this many tokens; None leaves them whole.
        keep_covariance: Store the raw covariance sums too.
        save_minutes: How often each worker saves the state of a pass under `output`; 0: after
            every step; None: never.
        overwrite: Replace a factor store in `output` that cannot be gone on with, finished or of
            another run; it stays as it is until something of the new one is on the disk.
        progress: Show progress on worker 0.
        task: What the model is asked, and what its loss is: `MaskedLM()`,
            `SequenceClassification()`, `Seq2SeqLM()`, or a `Task` or `LossTask` of one's own; None
            for causal language modelling.

    Returns:
        The factors, ready to solve with, on every worker.

    Raises:
        UserError: Anything that the caller can mend, on every worker alike.
    """
    arguments = {**locals()}  # those that will be added one day too
    for name in ("model", "data", "task", "progress"):  # compared by content, or of no consequence
        del arguments[name]
    if isinstance(modules, str):
        modules = [modules]
    world = World.start()
    model = unwrapped(model, world)
    with world.agree():
        task = require_task(task)
        arguments |= {"task": task.name, "the task's fingerprint": task_fingerprint(task)}
        arguments["output"] = None if output is None else str(output)
    require_same_settings(world, arguments, "arguments")
    with heartbeat(world, owns_process=False), world.agree():
        sequences = read_examples(task, model, data, max_tokens)
        config = EstimateConfig(
            model=ModelConfig(
                name=str(getattr(model, "name_or_path", "") or class_of(model).__name__),
                dtype="auto",
                modules=None if modules is None else list(modules),
            ),
            data=DataConfig(
                source=type(data).__name__, max_tokens=max_tokens or _max_tokens(sequences)
            ),
            factors=FactorsConfig(
                labels=labels,  # type: ignore[arg-type]
                seed=seed,
                refit=refit,  # type: ignore[arg-type]
                accumulate=accumulate,  # type: ignore[arg-type]
                eigen=eigen,  # type: ignore[arg-type]
                partitions=partitions,  # type: ignore[arg-type]
                blocks=blocks,
                keep_covariance=keep_covariance,
            ),
            batch_tokens=batch_tokens,
            save_minutes=save_minutes,
            output=str(output) if output is not None else "(memory)",
        )
        if not is_sharded(model):
            world = world.at(device_of(model))
    if output is not None:
        world.on_main(lambda: check_output(output, config.as_dict(), replace=overwrite))
    memory = MemoryStore()
    watching = heartbeat(world, owns_process=False)
    with watching, torch.inference_mode(False), prepared(model):
        inputs = check_inputs(config, model, sequences, world, task)
        if output is None:
            fit_factors(inputs, world, memory, Checkpoints(), show_progress=progress)
        else:
            with opened_store(
                output, inputs, world, overwrite=overwrite, show_progress=progress
            ) as opened:
                fit_factors(inputs, world, *opened, show_progress=progress)
    world.barrier()
    return Factors(memory) if output is None else load_factors(output)


def _max_tokens(sequences: Examples) -> int:
    return sequences.max_tokens if isinstance(sequences, Sequences) else max(2, sequences.longest)


@contextmanager
def opened_store(
    output: str | Path,
    inputs: FitInputs,
    world: World,
    tell: Callable[[str], None] = lambda line: None,
    *,
    overwrite: bool,
    show_progress: bool,
) -> Iterator[tuple[FactorSink, Checkpoints]]:
    """A store that worker 0 writes, or what it has found there, and how passes are saved beside it.

    Args:
        output: The store's directory.
        inputs: What the run begins with.
        world: The workers.
        tell: Takes a line of text for people.
        overwrite: Whether a store that is there and cannot be gone on with is replaced.
        show_progress: Whether worker 0 shows how far it is with comparing what is there.

    Raises:
        OutputError: It cannot be written; or holds a finished store, or a run of another
            configuration, model, data or software, that is not to be overwritten.
    """
    versions = software()
    begins = {
        "data": inputs.sequences.fingerprint,
        "task": inputs.task.name,
        "fingerprint of the task": inputs.task_fingerprint,
        "model": inputs.fingerprints.whole,
        **{
            f"{name} in the model's configuration": value
            for name, value in leaves(configuration(inputs.model)).items()
        },
        "attention implementation": attention_implementation(inputs.model),
        **{f"version of {name}": versions[name] for name in NUMERIC_SOFTWARE},
    }

    def opened() -> StoreWriter:
        writer = StoreWriter(output, inputs.config.as_dict(), begins, replace=overwrite)
        sizes = sum(listed["bytes"] for listed in writer.files.values())
        with Progress("verifying", total=sizes, unit="bytes", enabled=show_progress) as progress:
            lost = writer.drop_damaged(progress.update)
        for file in lost:
            tell(f"damaged       {file} has changed since it was written; it is made again")
        if writer.stored.files or writer.stored.records:
            tell(f"goes on       {len(writer.stored.files)} files are in place")
        if writer.will_replace:
            tell(f"replaces      the store in {output}, once something of this run is on the disk")
        return writer

    writer = world.on_main(opened)
    try:
        found = world.share(None if writer is None else writer.stored)
        sink = NullStore(found) if writer is None else writer
        checkpoints, minutes = Checkpoints(), inputs.config.save_minutes
        if minutes is not None:
            checkpoints = SavedCheckpoints(
                output, world, sink, inputs.sequences, inputs.step_tokens, minutes
            )
        yield sink, checkpoints
    finally:
        if writer is not None:
            writer.close()


def check_inputs(
    config: EstimateConfig,
    model: nn.Module,
    sequences: Examples,
    world: World,
    task: Task = CAUSAL_LM,
) -> FitInputs:
    """Finds the modules and checks, on every worker, all that can be known to fail later.

    Raises:
        ModelError: As `discover` does.
        DataError: A sequence is longer than the model's context, or has tokens it does not know.
        LaunchError: Workers hold different data or models.
        DecompositionError: A factor is too large for worker 0's device.
    """
    probe = None
    with world.agree():
        advice = "set data.max_tokens to {context} or less"
        if isinstance(sequences, TaskExamples):
            advice = "cut the examples to {context} or less"
        check_sequences(model, sequences, advice)
    if isinstance(sequences, TaskExamples):
        require_harmless_padding(model, sequences, task, world, config.batch_tokens)
        with world.agree():
            probe = few_examples(task, model, sequences).to(world.device)
    discovery = find(model, config.model.modules, world, task, probe)
    main_device = torch.device(world.share(world.device.type))
    with world.agree():
        for factor, size in discovery.factors.items():
            largest = max(block_sizes(size, config.factors.blocks))
            check_size(factor, largest, main_device)
    world.require_same("data, by fingerprint,", sequences.fingerprint)
    step = world.share(step_tokens(config.batch_tokens, world.device))  # all cut alike
    sequences = exactly_batched(model, sequences, task, world, step)
    weights = model_fingerprints(model, discovery.modules, world)
    code = task_fingerprint(task)
    return FitInputs(config, model, sequences, discovery, weights, task, code, step)
