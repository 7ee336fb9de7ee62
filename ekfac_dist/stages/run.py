"""The run that joins the stages: from a model and sequences to a store of factors."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ekfac_dist.config import DataConfig, EstimateConfig, FactorsConfig, ModelConfig
from ekfac_dist.curvature.costs import step_tokens
from ekfac_dist.curvature.eigenbasis import check_size
from ekfac_dist.curvature.kronecker import kfac_lambda
from ekfac_dist.data.batches import shard
from ekfac_dist.data.examples import Examples, TaskExamples
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.models.capture import prepared
from ekfac_dist.models.discovery import Discovery, discover
from ekfac_dist.models.faults import NO_GRADIENT, NOT_ROUTED, is_routed
from ekfac_dist.models.fingerprint import fingerprint, narrower_fingerprints
from ekfac_dist.models.labels import COVARIANCE_PASS, REFIT_PASS, LabelRule
from ekfac_dist.models.loading import load_model, load_tokenizer
from ekfac_dist.models.modules import TrackedModule, device_of
from ekfac_dist.models.partition import partition
from ekfac_dist.models.tasks import (
    CAUSAL_LM,
    Task,
    few_examples,
    read_examples,
    require_task,
    require_unpadded_losses,
)
from ekfac_dist.runtime.memory import peak_bytes
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.store import (
    FactorSink,
    MemoryStore,
    NoStore,
    spectrum_file,
)
from ekfac_dist.runtime.store_writer import StoreWriter, check_output
from ekfac_dist.stages.covariance import CovarianceSums
from ekfac_dist.stages.eigenbasis import Basis, run_eigenbasis
from ekfac_dist.stages.factors import Factors
from ekfac_dist.stages.loading import check_sequences, load_sequences, packed_where_exact
from ekfac_dist.stages.passes import Work, run_pass
from ekfac_dist.stages.record import Inputs, Summary, coverage_line, manifest, steps_line
from ekfac_dist.stages.refit import LambdaSums
from ekfac_dist.stages.reload import load_factors


def find_modules(config: EstimateConfig, world: World) -> Discovery:
    """What `run_estimate` would track: loads the model and runs a few tokens, and nothing else.

    Raises:
        UserError: Anything about the model that the user can mend, on every worker.
    """
    model = world.main_first(lambda: load_model(config.model, world.device))
    with world.agree(), prepared(model):
        return discover(model, config.model.modules, world.device)


def run_estimate(config: EstimateConfig, world: World, say: Any = print) -> Summary:
    """Fits and stores factors as configured.

    Args:
        config: The run's configuration.
        world: The workers.
        say: Takes a line of text for people; called on worker 0 only.

    Raises:
        UserError: Anything that the user can mend, on every worker.
    """
    tell = say if world.is_main else (lambda line: None)
    assert config.output is not None
    output = config.output
    # First of all, for it costs nothing: whether the result has somewhere to go.
    world.on_main(lambda: check_output(output, config.as_dict()))
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
    model = world.main_first(lambda: load_model(config.model, world.device))
    with prepared(model):
        inputs = check_inputs(config, model, sequences, world)
        coverage = inputs.discovery.coverage
        tell(
            f"model         {type(model).__name__}, {coverage.model_parameters} parameters, "
            f"{str(next(model.parameters()).dtype).removeprefix('torch.')}"
        )
        tell(f"tracked       {coverage_line(inputs.discovery)}")
        for name, why in coverage.skipped.items():
            tell(f"not tracked   {name}: {why}")
        tell(f"steps         {steps_line(inputs)}")
        return fit(inputs, world, open_store(output, config, world), show_progress=True)


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
    batch_tokens: int = 4096,
    max_tokens: int | None = None,
    keep_covariance: bool = True,
    progress: bool = False,
    task: Task | None = None,
) -> Factors:
    """Fits EK-FAC factors of a transformer's MLP modules (Grosse et al. 2023, §2.2).

    Under `accelerate launch`, call it on every worker with the same model and the same whole data;
    it shards the data itself. The model must be on the worker's device and comes back as it was.
    While worker 0 decomposes a factor the others wait in a collective, for as long as the process
    group's time-out allows: give `Accelerator` an `InitProcessGroupKwargs(timeout=…)` of hours if
    factors are large and decomposed on a CPU.

    Args:
        model: A Hugging Face causal language model; or the model of another task.
        data: A `datasets.Dataset` or an iterable of examples or batches with `input_ids` and, if
            wanted, `labels` (−100 for none) and `attention_mask`; padding is taken off. What other
            tasks' examples hold, the task says.
        output: Directory of the factor store, seen by every worker; None keeps the factors in
            memory, on every worker.
        modules: A glob of module names, or several; None for every MLP linear.
        labels: "sampled" from the model's softmax, or "data" for the data's own.
        seed: Seed of sampled labels.
        refit: "per_sequence", "per_token" or "none".
        accumulate: Precision of running sums, "float32" or "float64".
        eigen: Who decomposes the factors: "rank0", or every worker its share, "sharded".
        partitions: Number of groups of modules, one pair of passes each.
        batch_tokens: Token budget of a batch, padding included.
        max_tokens: Longer sequences are cut to this many tokens; None leaves them whole.
        keep_covariance: Store the raw covariance sums too.
        progress: Show progress on worker 0.
        task: What the model is asked, and what its loss is: `MaskedLM()`,
            `SequenceClassification()`, `Seq2SeqLM()`, or a `Task` or `LossTask` of one's own; None
            for causal language modelling.

    Returns:
        The factors, ready to solve with, on every worker.

    Raises:
        UserError: Anything that the caller can mend, on every worker alike.
    """
    if isinstance(modules, str):
        modules = [modules]
    # Accelerate's containers compute the same, and speak to the other workers at every forward.
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    world = World.start()
    with world.agree():
        task = require_task(task)
        sequences = read_examples(task, model, data, max_tokens)
        config = EstimateConfig(
            model=ModelConfig(
                name=str(getattr(model, "name_or_path", "") or type(model).__name__),
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
                keep_covariance=keep_covariance,
            ),
            batch_tokens=batch_tokens,
            output=str(output) if output is not None else "(memory)",
        )
        world = world.at(device_of(model))
    given = {"labels": labels, "seed": seed, "refit": refit, "accumulate": accumulate}
    given |= {"partitions": partitions, "batch_tokens": batch_tokens, "modules": modules}
    given |= {"keep_covariance": keep_covariance, "an output": output is not None}
    given |= {"task": task.name, "eigen": eigen}
    world.require_same("arguments", given)
    if output is not None:
        world.on_main(lambda: check_output(output, config.as_dict()))
    memory = MemoryStore()
    with torch.inference_mode(False), prepared(model):
        inputs = check_inputs(config, model, sequences, world, task)
        sink = memory if output is None else open_store(output, config, world)
        fit(inputs, world, sink, show_progress=progress)
    world.barrier()
    return Factors(memory) if output is None else load_factors(output)


def _max_tokens(sequences: Examples) -> int:
    return sequences.max_tokens if isinstance(sequences, Sequences) else max(2, sequences.longest)


def open_store(output: str | Path, config: EstimateConfig, world: World) -> FactorSink:
    """The store that worker 0 writes; on the others, one that takes nothing."""
    writer = world.on_main(lambda: StoreWriter(output, config.as_dict()))
    return writer if writer is not None else NoStore()


def check_inputs(
    config: EstimateConfig,
    model: nn.Module,
    sequences: Examples,
    world: World,
    task: Task = CAUSAL_LM,
) -> Inputs:
    """Finds the modules and checks, on every worker, all that can be known to fail later.

    Raises:
        ModelError: As `discover` does.
        DataError: A sequence is longer than the model's context, or has tokens it does not know.
        LaunchError: Workers hold different data or models.
        DecompositionError: A factor is too large for worker 0's device.
    """
    with world.agree():
        advice, probe = "set data.max_tokens to {context} or less", None
        if isinstance(sequences, TaskExamples):
            advice = "cut the examples to {context} or less"
        check_sequences(model, sequences, advice)
        if isinstance(sequences, TaskExamples):
            require_unpadded_losses(task, model, sequences, world.device)
            probe = few_examples(task, model, sequences).to(world.device)
        discovery = discover(model, config.model.modules, world.device, task, probe)
    main_device = torch.device(world.share(world.device.type))
    with world.agree():
        for factor, size in discovery.factors.items():
            check_size(factor, size, main_device)
    world.require_same("data, by fingerprint,", sequences.fingerprint)
    step = world.share(step_tokens(config.batch_tokens, world.device))  # all cut alike
    sequences = packed_where_exact(model, sequences, task, world, step)
    weights = fingerprint(model, discovery.modules)
    world.require_same("model weights, by fingerprint,", weights)
    narrower = world.share(world.on_main(lambda: narrower_fingerprints(model, discovery.modules)))
    assert narrower is not None
    return Inputs(config, model, sequences, discovery, weights, narrower, task, step)


def fit(inputs: Inputs, world: World, sink: FactorSink, *, show_progress: bool) -> Summary:
    """Runs every stage for every group of modules and finishes the store.

    Args:
        inputs: Model (prepared), data and configuration.
        world: The workers.
        sink: Where factors go.
        show_progress: Whether worker 0 shows progress.
    """
    factors = inputs.config.factors
    sequences, discovery = inputs.sequences, inputs.discovery
    own = shard(sequences.num_positions, inputs.step_tokens, world.size, world.rank)
    dtype = getattr(torch, factors.accumulate)
    work = Work(inputs.model, sequences, own, world, dtype, show_progress, task=inputs.task)
    groups = partition(discovery.modules, 1 if factors.partitions == "auto" else factors.partitions)
    summary = Summary(sequences, discovery, world.size, len(groups))
    for number, group in enumerate(groups, start=1):
        suffix = f" {number}/{len(groups)}" if len(groups) > 1 else ""
        _fit_group(group, suffix, work, factors, sink, summary)
    peaks = world.gather(peak_bytes(world.device))
    summary.peak_bytes = {place: max(p.get(place, 0) for p in peaks) for place in peaks[0]}
    with world.agree(takes_part=world.is_main):
        if summary.discovery is not discovery and world.is_main:
            modules = summary.discovery.modules
            inputs.fingerprint = fingerprint(inputs.model, modules)
            inputs.narrower = narrower_fingerprints(inputs.model, modules)
        sink.finish(manifest(inputs, summary))
    return summary


def _fit_group(
    group: list[TrackedModule],
    suffix: str,
    work: Work,
    factors: FactorsConfig,
    sink: FactorSink,
    summary: Summary,
) -> None:
    """Both passes and the decomposition of one group of modules."""
    world, dtype = work.world, work.dtype
    covariance = CovarianceSums(group, dtype, world.device)
    rule = LabelRule(factors.labels, factors.seed, COVARIANCE_PASS)
    # Rows in the model's dtype: their products are as wide as the sums, whatever they are.
    result = run_pass("covariance" + suffix, work, group, covariance, rule, converted=False)
    _require_each_position_once(group, covariance.counts, work)
    for names, why in (
        ([m.name for m in group if not covariance.counts[m.output]], NOT_ROUTED),
        ([m.name for m in group if _has_no_gradient(m, covariance, work)], NO_GRADIENT),
    ):
        with world.agree():
            summary.discovery = summary.discovery.without(names, why)
        group = [module for module in group if module.name not in names]
        covariance.keep(group)
    summary.seconds["covariance"] += result.seconds
    summary.losses["covariance"] = result.loss
    summary.num_labels = result.num_labels
    if not group:
        return
    bases, seconds = run_eigenbasis(
        "eigenbasis" + suffix,
        covariance,
        world,
        sink,
        sharded=factors.eigen == "sharded",
        keep_covariance=factors.keep_covariance,
        show_progress=work.show_progress,
    )
    summary.seconds["eigenbasis"] += seconds
    start = time.perf_counter()
    num_sequences = len(work.sequences)
    if factors.refit == "none":
        spectra = _kfac(group, bases, covariance.counts, num_sequences, dtype)
    else:
        per_token = factors.refit == "per_token"
        sums = LambdaSums(group, bases, per_token=per_token, dtype=dtype, device=world.device)
        rule = LabelRule(factors.labels, factors.seed, REFIT_PASS)
        result = run_pass("refit" + suffix, work, group, sums, rule)
        summary.losses["refit"] = result.loss
        spectra = {name: total.div_(num_sequences) for name, total in sums.sums.items()}
    with world.agree(takes_part=world.is_main):
        for name, spectrum in spectra.items():
            sink.write(spectrum_file(name), {"lambda": spectrum})
    if factors.refit != "none":
        summary.seconds["refit"] += time.perf_counter() - start


def _require_each_position_once(
    group: list[TrackedModule], counts: dict[str, int], work: Work
) -> None:
    for module in group:
        expected = int(work.sequences.positions_of(module.name).sum())
        found = {counts[module.input], counts[module.output]}
        if not is_routed(work.model, module) and found != {expected}:
            raise RuntimeError(
                f"{module.name} sees {expected} counted positions, but its sums hold {found}"
            )


def _has_no_gradient(module: TrackedModule, covariance: CovarianceSums, work: Work) -> bool:
    """Whether an expert was reached by positions alone that no label's gradient comes back to."""
    if not is_routed(work.model, module) or not covariance.counts[module.output]:
        return False
    return not bool(covariance.sums[module.output].diagonal().any())


def _kfac(
    group: list[TrackedModule],
    bases: dict[str, Basis],
    counts: dict[str, int],
    num_sequences: int,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    return {
        module.name: kfac_lambda(
            bases[module.output].eigenvalues,
            bases[module.input].eigenvalues,
            counts[module.input],
            num_sequences,
        ).to(dtype)
        for module in group
    }
