"""Fitting factors as a whole: the command `estimate`, and `estimate_factors` for Python."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ekfac_dist.config import DataConfig, EstimateConfig, FactorsConfig, ModelConfig
from ekfac_dist.data.examples import Examples
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.errors import ConfigError
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.opening import load_factors
from ekfac_dist.factors.output import check_output
from ekfac_dist.factors.sinks import MemoryStore
from ekfac_dist.fit.checkpoints import Checkpoints
from ekfac_dist.fit.fit_factors import fit_factors
from ekfac_dist.fit.halves import advice
from ekfac_dist.fit.manifest import FitInputs, FitSummary, coverage_line, steps_line
from ekfac_dist.fit.settings import FitSettings
from ekfac_dist.fit.start import checked_inputs, opened_store
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.capture.task_examples import read_examples
from ekfac_dist.models.capture.task_fingerprint import task_fingerprint
from ekfac_dist.models.capture.tasks import Task, require_task
from ekfac_dist.models.find.discovery import Discovery
from ekfac_dist.models.find.on_workers import find
from ekfac_dist.models.load.on_workers import load, unwrapped
from ekfac_dist.models.load.pretrained import load_tokenizer
from ekfac_dist.models.modules import device_of
from ekfac_dist.models.sharding import class_of, is_sharded
from ekfac_dist.passes.owners import require_divisor
from ekfac_dist.passes.sequences import load_sequences
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.heartbeat import heartbeat
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.out_of_memory import saying_what_would_do
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.same_settings import require_same_settings


def find_modules(config: EstimateConfig, world: World) -> Discovery:
    """The modules that `run_estimate` would track; loads the model and runs a few tokens.

    Raises:
        UserError: For everything about the model that the user can mend, on every worker.
    """
    model = load(config.model, world)
    with prepared(model):
        return find(model, config.model.modules, world)


def run_estimate(config: EstimateConfig, world: World, *, overwrite: bool = False) -> FitSummary:
    """Fits and stores factors as configured, or resumes an unfinished run of the same.

    What it finds is logged, a line each, by worker 0 under the name "ekfac_dist".

    Args:
        config: The configuration.
        world: The workers.
        overwrite: Whether a store in the output directory that is not this run's own, unfinished
            one is replaced, as soon as something of the new one is on the disk.

    Raises:
        UserError: For everything that the user can mend, on every worker.
    """
    assert config.output is not None
    output = config.output
    # First, because it costs nothing: can the factors be shared out so, and the result be written?
    with world.agree():
        require_divisor("factors.shard", config.factors.shard, world.size)
    world.on_main(lambda: check_output(output, config.as_dict(), replace=overwrite))
    tokenizer, tokenizer_fingerprint = None, ""
    if config.data.tokens is None:
        tokenizer, tokenizer_fingerprint = world.main_first(lambda: load_tokenizer(config.model))
    sequences = load_sequences(config.data, tokenizer, tokenizer_fingerprint, world)
    for line in _data_lines(config, sequences):
        log_on_main(world, line)
    model = load(config.model, world)
    with prepared(model):
        inputs = checked_inputs(FitSettings.of_config(config), model, sequences, world)
        for line in _model_lines(inputs, world):
            log_on_main(world, line)
        store = opened_store(output, inputs, world, overwrite=overwrite, show_progress=True)
        with store as (sink, checkpoints), preemption.deferred():
            return fit_factors(inputs, world, sink, checkpoints, show_progress=True)


def _data_lines(config: EstimateConfig, sequences: Sequences) -> list[str]:
    counts = sequences.counts
    lines = [
        f"data          {len(sequences)} of {counts.rows} sequences ({counts.unlabelled} left out: "
        f"no label), {int(sequences.num_positions.sum())} counted positions, "
        f"{int(sequences.num_labels.sum())} labels"
    ]
    if counts.documents is not None:
        lines.append(f"parts         the sequences are parts of {counts.documents} rows")
    if counts.truncated:
        lines.append(
            f"truncation    {counts.truncated} sequences cut to {config.data.max_tokens} tokens, "
            f"{counts.tokens_cut} tokens lost"
        )
    if counts.split_note:
        lines.append(f"split tokens  {counts.split_note}")
    return lines


def _model_lines(inputs: FitInputs, world: World) -> list[str]:
    model, coverage = inputs.model, inputs.discovery.coverage
    return [
        f"model         {class_of(model).__name__}, {coverage.model_parameters} parameters, "
        f"{str(next(model.parameters()).dtype).removeprefix('torch.')}"
        f"{f', sharded over {world.size} workers' if is_sharded(model) else ''}",
        f"tracked       {coverage_line(inputs.discovery)}",
        *(f"not tracked   {name}: {why}" for name, why in coverage.skipped.items()),
        f"steps         {steps_line(inputs)}",
    ]


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
    eigen: str = "auto",
    shard: int | str = "auto",
    gradient_checkpointing: bool | str = "auto",
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
            memory, whole on every worker. If it holds an unfinished run of the same arguments,
            model and data, that run is resumed.
        modules: A glob of module names, or several; None for every MLP linear.
        labels: "sampled" from the model's softmax, or "data" for the data's own.
        seed: Seed of sampled labels.
        refit: "per_sequence", "per_token" or "none".
        accumulate: Precision of running sums, "float32" or "float64".
        eigen: Who decomposes the factors: worker 0 alone, "rank0", or every worker a share,
            "sharded"; "auto": "rank0" if the shard is 1, else each worker those that it holds.
        shard: Number of workers that share out one copy of the factors, a divisor of the number of
            workers; above 1 only with `output`. "auto": 1 where one copy fits a worker, or without
            `output`; else the fewest that fit one pair of passes.
        gradient_checkpointing: Compute each layer again in the backward instead of holding its
            activations; "auto": where they would not fit into memory.
        partitions: Number of groups of modules, one pair of passes each; "auto": the fewest that
            fit into the workers' memory.
        blocks: Diagonal blocks of each factor, for very large dimensions; 1: factors are whole.
        batch_tokens: Token budget of a batch, padding included; less is taken where it would not
            fit into memory.
        max_tokens: Longer sequences are cut to this many tokens; None leaves them whole.
        keep_covariance: Store the raw covariance sums too.
        save_minutes: How often each worker saves the state of a pass under `output`; 0: after
            every step; None: never.
        overwrite: Replace a factor store in `output` that cannot be resumed, finished or of
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
    arguments = {**locals()}  # all of them, those added later too
    for name in ("model", "data", "task", "progress"):  # compared by content, or of no consequence
        del arguments[name]
    world = World.start()
    world.meet()
    model = unwrapped(model, world)
    with world.agree():
        task = require_task(task)
        arguments |= {"task": task.name, "the task's fingerprint": task_fingerprint(task)}
        arguments["output"] = None if output is None else str(output)
    require_same_settings(world, arguments, "arguments")
    with heartbeat(world, owns_process=False), world.agree():
        sequences = read_examples(task, model, data, max_tokens)
        globs = [modules] if isinstance(modules, str) else modules
        settings = FitSettings.of_arguments(
            ModelConfig(
                name=str(getattr(model, "name_or_path", "") or class_of(model).__name__),
                dtype="auto",
                modules=None if globs is None else list(globs),
                gradient_checkpointing=gradient_checkpointing,  # type: ignore[arg-type]
            ),
            DataConfig(source=type(data).__name__, max_tokens=max_tokens or _max_tokens(sequences)),
            FactorsConfig(
                labels=labels,  # type: ignore[arg-type]
                seed=seed,
                refit=refit,  # type: ignore[arg-type]
                accumulate=accumulate,  # type: ignore[arg-type]
                eigen=eigen,  # type: ignore[arg-type]
                shard=shard,  # type: ignore[arg-type]
                partitions=partitions,  # type: ignore[arg-type]
                blocks=blocks,
                keep_covariance=keep_covariance,
            ),
            batch_tokens=batch_tokens,
            save_minutes=save_minutes,
            output=None if output is None else str(output),
        )
        if output is None:
            settings = _held_whole(settings)
        require_divisor("shard", settings.factors.shard, world.size)
        if not is_sharded(model):
            world = world.at(device_of(model))
    if output is not None:
        world.on_main(lambda: check_output(output, settings.recorded, replace=overwrite))
    memory = MemoryStore()
    watching = heartbeat(world, owns_process=False)
    with watching, saying_what_would_do(), torch.inference_mode(False), prepared(model):
        inputs = checked_inputs(settings, model, sequences, world, task)
        if output is None:
            fit_factors(inputs, world, memory, Checkpoints(), show_progress=progress)
        else:
            store = opened_store(
                output,
                inputs,
                world,
                overwrite=overwrite,
                show_progress=progress,
            )
            with store as (sink, checkpoints):
                fit_factors(inputs, world, sink, checkpoints, show_progress=progress)
    world.barrier()
    factors = Factors(memory) if output is None else load_factors(output)
    sentence = advice(factors.manifest["halves"])
    if sentence is not None:
        log_on_main(world, f"more data     {sentence}")
    return factors


def _held_whole(settings: FitSettings) -> FitSettings:
    """The settings of a fit that keeps its factors in memory, whole on every worker.

    Raises:
        ConfigError: If they are to be shared out.
    """
    if settings.factors.shard not in ("auto", 1):
        raise ConfigError(
            f"shard is {settings.factors.shard} and output is None: each worker keeps whole "
            "factors in memory. Give an output directory for factors that are shared out, or "
            "shard=1."
        )
    return dataclasses.replace(settings, factors=dataclasses.replace(settings.factors, shard=1))


def _max_tokens(sequences: Examples) -> int:
    return sequences.max_tokens if isinstance(sequences, Sequences) else max(2, sequences.longest)
