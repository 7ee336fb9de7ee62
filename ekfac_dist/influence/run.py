"""Answering queries from start to end: `run_query` for the command, `influence_scores` for Python.

Both take the same steps, on every worker:

    read      factors, queries, training sequences and model, from files or from arguments
    check     model against factors, sequences against the model, workers against each other
    score     `compute_scores`
    write     a directory of results; the command only
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ekfac_dist.config import (
    DataConfig,
    ModelConfig,
    Normalize,
    PerToken,
    QueryConfig,
    ScoresConfig,
    require_positive,
)
from ekfac_dist.curvature.damping import DEFAULT, Damping
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.errors import DataError, ModelError
from ekfac_dist.factors.comparison import require_fitted_task
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.opening import load_factors
from ekfac_dist.influence.answer import Answer, parameters_without_factors
from ekfac_dist.influence.checks import check_inputs, require_same_inputs, scoring_context
from ekfac_dist.influence.examples import queries_of, sequences_of
from ekfac_dist.influence.output import write_answer
from ekfac_dist.influence.queries import (
    Query,
    pick_candidates,
    read_candidates,
    read_queries,
    tokenize_queries,
)
from ekfac_dist.influence.saved_blocks import opened_results, run_inputs
from ekfac_dist.influence.scores import InfluenceScores
from ekfac_dist.influence.scoring import compute_scores, list_lengths
from ekfac_dist.influence.unfinished import check_results_output
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.capture.task_fingerprint import task_fingerprint
from ekfac_dist.models.capture.tasks import CAUSAL_LM, CausalLM, Task, require_task
from ekfac_dist.models.load.on_workers import load, refuse_sharded, unwrapped
from ekfac_dist.models.load.pretrained import context_length, load_tokenizer
from ekfac_dist.models.modules import device_of
from ekfac_dist.passes.sequences import load_with_rows
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.heartbeat import heartbeat
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.same_settings import require_same_settings


def run_query(config: QueryConfig, world: World) -> Answer:
    """Answers the configured queries and writes the results; an unfinished run is resumed.

    Args:
        config: The run's configuration.
        world: The workers.

    Raises:
        UserError: If the user can correct the cause; on every worker alike.
    """
    output, queries_file, store = map(str, (config.output, config.queries, config.factors))
    start = time.perf_counter()
    world.on_main(lambda: check_results_output(output, config.as_dict()))
    with world.agree():
        refuse_sharded(world)
        damping = Damping(config.damping.value, config.damping.relative, config.damping.modules)
        texts = read_queries(queries_file)
        candidates = read_candidates(config.scores.candidates)
        factors = load_factors(store)
        require_fitted_task(store, factors, CAUSAL_LM)
        fitted_config = factors.manifest["config"]
        model_config = config.model.over(fitted_config["model"])
        data_config = config.data.over(fitted_config["data"])
    with _named_by(store, "model.name", model_config.name, config.model.name):
        tokenizer, tokenizer_print = world.main_first(lambda: load_tokenizer(model_config))
    with world.agree():
        # Before the model is loaded, without its context: refuses queries with nothing to predict.
        tokenize_queries(texts, tokenizer, None)
    with _named_by(store, "data.source", data_config.source, config.data.source):
        train, rows = load_with_rows(data_config, tokenizer, tokenizer_print, world)
    with world.agree():
        columns = pick_candidates(train, candidates)
        list_lengths(config.scores, len(columns))
    scored = train.take(columns)
    _log_data(world, train, scored, factors)
    inputs = _Inputs(
        store=store,
        factors=factors,
        damping=damping,
        texts=texts,
        train=train,
        scored=scored,
        rows=rows,
        data=data_config,
        model=model_config,
        tokenizer=tokenizer,
    )
    return _answer(config, inputs, world, start)


@dataclass(frozen=True)
class _Inputs:
    """The inputs of a run of `query` that are read before its model; attributes as of `Answer`.

    Attributes:
        texts: The queries' texts.
        rows: The rows of the training data.
    """

    store: str
    factors: Factors
    damping: Damping
    texts: list[Query]
    train: Sequences
    scored: Sequences
    rows: Dataset
    data: DataConfig
    model: ModelConfig
    tokenizer: Any


def _answer(config: QueryConfig, inputs: _Inputs, world: World, start: float) -> Answer:
    """Loads the model, checks it, scores, and writes the results.

    Args:
        config: The run's configuration.
        inputs: The other inputs, which have been read.
        world: The workers.
        start: When the run began, by `time.perf_counter`.
    """
    store, factors, scored = inputs.store, inputs.factors, inputs.scored
    model = load(inputs.model, world)
    with prepared(model):
        with world.agree():
            queries = tokenize_queries(inputs.texts, inputs.tokenizer, context_length(model))
            comparison = check_inputs(
                store,
                factors,
                model,
                scored,
                queries,
                advice="set data.max_tokens to {context} or less",
                allow_changes=config.model.allow_changes,
            )
            _log_split_tokens(world, queries.split_notes)
            context = scoring_context(
                model, factors, inputs.damping, world, config.batch_tokens, True
            )
        require_same_inputs(context, scored, queries, comparison)
        for sentence in comparison.differs:
            log_on_main(world, f"model differs {sentence}")
        for sentence in comparison.not_compared:
            log_on_main(world, f"not compared  {sentence}")
        whole = comparison.fingerprints.whole
        recorded = run_inputs(store, whole, inputs.train, scored, queries, context)
        with (
            opened_results(str(config.output), config.as_dict(), recorded, world) as saved,
            preemption.deferred(),
        ):
            scores = compute_scores(context, queries, scored, config.scores, saved)
            scores.model_differs = comparison.differs
            scores.not_compared = comparison.not_compared
            answer = Answer(
                scores=scores,
                queries=queries,
                train=inputs.train,
                scored=scored,
                factors=factors,
                store=store,
                damping=inputs.damping,
                data=inputs.data,
                model=inputs.model,
                dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
                whole=whole,
                config=config,
                tokenizer=inputs.tokenizer,
                workers=world.size,
                seconds=time.perf_counter() - start,
            )
            saved.finish(lambda writer: write_answer(writer, answer, inputs.rows))
    return answer


def influence_scores(
    model: nn.Module,
    factors: Factors | str | Path,
    queries: Iterable[Any],
    train: Iterable[Any],
    *,
    tokenizer: Any = None,
    damping: float | Mapping[str, float] | Damping = DEFAULT,
    relative: bool = True,
    normalize: Normalize = "none",
    rank: int | None = None,
    rescore: int = 0,
    top_k: int | None = None,
    bottom_k: int | None = None,
    per_token: PerToken = "none",
    per_module: bool = False,
    per_layer: bool = False,
    self_influence: bool = False,
    candidates: Iterable[int] | None = None,
    training_size: int | None = None,
    batch_tokens: int = 4096,
    max_tokens: int | None = None,
    query_memory_gb: float = 4.0,
    progress: bool = False,
    task: Task | None = None,
    allow_changes: bool = False,
) -> InfluenceScores:
    """Scores training sequences for queries: ∇log p(q)ᵀ (F + λ)⁻¹ ∇log p(z) (Grosse et al. 2023).

    Under `accelerate launch`, call it on every worker with the same arguments; it shards the
    training data itself, and every worker returns the whole answer. The model must be on the
    worker's device and comes back as it was.

    Args:
        model: The Hugging Face model that the factors were fitted for.
        factors: From `load_factors` or `estimate_factors`; or the directory of a store.
        queries: Examples as `estimate_factors` takes, with `input_ids` and `labels` (−100 for the
            prompt); or, with a tokenizer, mappings with "prompt" and "completion", or "text".
            Queries with the same "group" are summed, and have one row of scores.
        train: The training sequences: examples; or, with a tokenizer, mappings with "text" and
            perhaps "prompt".
        tokenizer: For queries and training sequences that are text.
        damping: λ of every module; or of each module, by its name or a glob.
        relative: Whether `damping` is a multiple of the module's mean(Λ); else it is λ itself.
        normalize: "none"; "cosine", in the inner product of (F + λ)⁻¹; or RelatIF (Barshan et al.
            2020): "relatif_l" divides by the root of a sequence's self-influence, "relatif_theta"
            by ‖(F + λ)⁻¹ ∇log p(z)‖.
        rank: Rank of query gradients in the scan, such as 32; None: whole gradients.
        rescore: With a rank, score this many of the scan's highest, of its lowest, and of sequences
            spread over the data again, exactly.
        top_k: Length of the list of the most positive sequences; None: 20 or all.
        bottom_k: Length of the list of the most negative; None: as `top_k`.
        per_token: Scores of positions: of the listed sequences ("top"), of "all", or "none".
        per_module: Compute the scores of each module too.
        per_layer: Compute the scores of each layer too.
        self_influence: Compute each training sequence's influence on itself.
        candidates: Score only the sequences with these indices in `train`.
        training_size: How many sequences the model was trained on, if it was trained on `train`.
            Scores divided by it are in nats, to first order. None: no nats.
        batch_tokens: Token budget of a batch, padding included.
        max_tokens: Longer training sequences are cut to this many tokens; None leaves them whole.
        query_memory_gb: Each worker's budget for query gradients, in units of 10⁹ bytes; queries
            that exceed it take more scans.
        progress: Show progress on worker 0.
        task: The task that the factors were fitted with; None for causal language modelling. Other
            tasks' queries and training sequences are their examples.
        allow_changes: Accept a model that differs from the fitted one outside the tracked modules,
            with a warning.

    Returns:
        The scores, on the CPU; `model_differs` and `not_compared` say how the model compares with
        the fitted one.

    Raises:
        UserError: If the caller can correct the cause; on every worker alike.
    """
    arguments = {**locals()}  # all of them, so that none can be forgotten here
    for name in ("model", "factors", "queries", "train", "tokenizer", "candidates", "progress"):
        del arguments[name]  # compared by content later, or without effect on scores
    world = World.start()
    model = unwrapped(model, world)
    with world.agree():
        config = ScoresConfig(
            normalize=normalize,
            top_k=top_k,
            bottom_k=bottom_k,
            per_token=per_token,
            per_module=per_module,
            per_layer=per_layer,
            self_influence=self_influence,
            rank=rank,
            rescore=rescore,
            candidates=None if candidates is None else list(candidates),
            training_size=training_size,
            query_memory_gb=query_memory_gb,
        )
        task = require_task(task)
        arguments |= {"task": task.name, "the task's fingerprint": task_fingerprint(task)}
    require_same_settings(world, arguments, "arguments")
    with heartbeat(world, owns_process=False), world.agree(), torch.inference_mode(False):
        name = "factors" if isinstance(factors, Factors) else str(factors)
        if not isinstance(factors, Factors):
            factors = load_factors(factors)
        require_positive("batch_tokens", batch_tokens)
        if max_tokens is not None:
            require_positive("max_tokens", max_tokens)
        damping_rule = Damping.of(damping, relative)
        refuse_sharded(world, model)
        require_fitted_task(name, factors, task)
        query_set = queries_of(queries, tokenizer, model, task)
        sequences = sequences_of(train, tokenizer, max_tokens, model, task)
        scored = sequences.take(pick_candidates(sequences, read_candidates(config.candidates)))
        advice = "give max_tokens={context}"
        if not isinstance(task, CausalLM):
            advice = "cut the examples to {context} or less"
        comparison = check_inputs(
            name, factors, model, scored, query_set, advice=advice, allow_changes=allow_changes
        )
        world = world.at(device_of(model))
        context = scoring_context(model, factors, damping_rule, world, batch_tokens, progress, task)
    require_same_inputs(context, scored, query_set, comparison)
    if world.is_main:
        comparison.warn()
    watching = heartbeat(world, owns_process=False)
    with watching, torch.inference_mode(False), prepared(model):
        scores = compute_scores(context, query_set, scored, config)
    scores.model_differs, scores.not_compared = comparison.differs, comparison.not_compared
    return scores


@contextmanager
def _named_by(store: str, field: str, name: str | None, given: str | None) -> Iterator[None]:
    """Adds to errors about a name that was not given that it comes from the factors' manifest.

    Args:
        store: Directory of the factor store.
        field: The configuration field that overrides the name.
        name: The name of the model or the source of the data, as in the manifest.
        given: The field's value in this run's configuration; None: the manifest's name is used.
    """
    try:
        yield
    except (DataError, ModelError) as error:
        if given is None and not Path(str(name)).exists():
            error.args = (
                f"{error} It is what the factors in {store} were fitted with, perhaps in another "
                f"directory; give --{field}.",
            )
        raise


def _log_split_tokens(world: World, notes: list[str], at_most: int = 5) -> None:
    for note in notes[:at_most]:
        log_on_main(world, f"split token   {note}")
    if len(notes) > at_most:
        log_on_main(
            world,
            f"              and of {len(notes) - at_most} more queries: see the results' queries",
        )


def _log_data(world: World, train: Sequences, scored: Sequences, factors: Factors) -> None:
    counts = train.counts
    some = "" if len(scored) == len(train) else f", {len(scored)} of them scored"
    log_on_main(
        world,
        f"data          {len(train)} of {counts.rows} sequences ({counts.unlabelled} left out: no "
        f"label){some}, {int(scored.num_positions.sum())} positions",
    )
    if counts.split_note:
        log_on_main(world, f"split tokens  {counts.split_note}")
    if train.fingerprint != factors.manifest["data"]["fingerprint"]:
        log_on_main(
            world,
            "              not the sequences that the factors were fitted on: scores are of "
            "these, in the curvature of those",
        )
    absent = parameters_without_factors(factors.manifest)
    if absent:
        log_on_main(
            world,
            f"not scored    {len(absent)} MLP parameters or experts that have no factors, listed "
            "in the results' manifest",
        )
