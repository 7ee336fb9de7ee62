"""`query`, the command, and `influence_scores`, the function: load all, score, write."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ekfac_dist.config import Normalize, PerToken, QueryConfig, ScoresConfig, require_positive
from ekfac_dist.curvature.damping import DEFAULT, Damping
from ekfac_dist.data.examples import Examples
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.errors import DataError, ModelError
from ekfac_dist.factors.comparison import Comparison, check_model, require_fitted_task
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.opening import load_factors
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.examples import queries_of, sequences_of
from ekfac_dist.influence.output import Answer, parameters_without_factors, write_answer
from ekfac_dist.influence.queries import (
    QuerySet,
    pick_candidates,
    read_candidates,
    read_queries,
    tokenize_queries,
)
from ekfac_dist.influence.saved_blocks import beginning, opened_results
from ekfac_dist.influence.scores import InfluenceScores
from ekfac_dist.influence.scoring import compute_scores, list_lengths
from ekfac_dist.influence.unfinished import check_results_output
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.capture.task_fingerprint import task_fingerprint
from ekfac_dist.models.capture.tasks import CAUSAL_LM, CausalLM, Task, require_task
from ekfac_dist.models.load.on_workers import load, refuse_sharded, require_same_model, unwrapped
from ekfac_dist.models.load.pretrained import context_length, load_tokenizer
from ekfac_dist.models.modules import device_of
from ekfac_dist.passes.sequences import check_sequences, load_with_rows
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.heartbeat import heartbeat
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.same_settings import require_same_settings
from ekfac_dist.runtime.terminal import show


def run_query(config: QueryConfig, world: World, say: Any = show) -> Answer:
    """Answers the configured queries and writes the results; an unfinished run is gone on with.

    Args:
        config: The run's configuration.
        world: The workers.
        say: Takes a line of text for people; called on worker 0 only.

    Raises:
        UserError: Anything that the user can mend, on every worker.
    """
    tell = say if world.is_main else (lambda line: None)
    output, queries_file, store = map(str, (config.output, config.queries, config.factors))
    start = time.perf_counter()
    whole_config = config.as_dict()
    world.on_main(lambda: check_results_output(output, whole_config))
    with world.agree():
        refuse_sharded(world)
        damping = _damping(config)
        texts = read_queries(queries_file)
        candidates = read_candidates(config.scores.candidates)
        factors = load_factors(store)
        require_fitted_task(store, factors, CAUSAL_LM)
        fitted = factors.manifest["config"]
        model_config = config.model.over(fitted["model"])
        data_config = config.data.over(fitted["data"])
    with _named_by(store, "model.name", model_config.name, config.model.name):
        tokenizer, tokenizer_print = world.main_first(lambda: load_tokenizer(model_config))
    with world.agree():
        # With the context unknown yet: what has nothing to predict is told before a model is read.
        tokenize_queries(texts, tokenizer, None)
    with _named_by(store, "data.source", data_config.source, config.data.source):
        train, rows = load_with_rows(data_config, tokenizer, tokenizer_print, world)
    with world.agree():
        columns = pick_candidates(train, candidates)
        list_lengths(config.scores, len(columns))
    scored = train.take(columns)
    _tell_data(tell, train, scored, factors)
    model = load(model_config, world)
    with prepared(model):
        with world.agree():
            allowed = config.model.allow_changes
            comparison = check_model(store, factors, model, allow_changes=allowed)
            advice = "set data.max_tokens to {context} or less"
            check_sequences(model, scored, advice)
            queries = tokenize_queries(texts, tokenizer, context_length(model))
            check_sequences(model, queries.sequences, "shorten the query")
            _tell_split(tell, queries.split_notes)
            context = _context(model, factors, damping, world, config.batch_tokens, True)
        _require_same(context, scored, queries, comparison)
        for sentence in comparison.differs:
            tell(f"model differs {sentence}")
        for sentence in comparison.not_compared:
            tell(f"not compared  {sentence}")
        begins = beginning(store, comparison.fingerprints.whole, train, scored, queries, context)
        with (
            opened_results(output, whole_config, begins, world, tell) as saved,
            preemption.deferred(),
        ):
            scores = compute_scores(context, queries, scored, config.scores, tell, saved)
            scores.model_differs = comparison.differs
            scores.not_compared = comparison.not_compared
            answer = Answer(
                scores=scores,
                queries=queries,
                train=train,
                scored=scored,
                factors=factors,
                store=store,
                damping=damping,
                data=data_config,
                model=model_config,
                dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
                whole=comparison.fingerprints.whole,
                config=config,
                tokenizer=tokenizer,
                workers=world.size,
                seconds=time.perf_counter() - start,
            )
            saved.finish(lambda to: write_answer(to, answer, rows))
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
            prompt); or, with a tokenizer, mappings with "prompt" and "completion", or "text". Those
            with the same "group" are summed.
        train: The training sequences: examples; or, with a tokenizer, mappings with "text" and
            perhaps "prompt".
        tokenizer: For queries and training sequences that are text.
        damping: λ of every module, or of each, by name or glob.
        relative: Whether `damping` is a multiple of the module's mean(Λ), or λ itself.
        normalize: "none"; "cosine", in the inner product of (F + λ)⁻¹; or RelatIF (Barshan et al.
            2020): "relatif_l" divides by the root of a sequence's self-influence, "relatif_theta"
            by ‖(F + λ)⁻¹ ∇log p(z)‖.
        rank: Rank of query gradients in the scan, such as 32; None: whole gradients.
        rescore: With a rank, score this many sequences at either end of the scan again, exactly.
        top_k: Length of the list of the most positive sequences; None: 20 or all.
        bottom_k: Length of the list of the most negative; None: as `top_k`.
        per_token: Scores of positions: of the listed sequences ("top"), of "all", or "none".
        per_module: Give the scores of each module too.
        per_layer: Give the scores of each layer too.
        self_influence: Give each training sequence's influence on itself.
        candidates: Score only these rows of `train`.
        training_size: How many sequences the model was trained on, if it was trained on `train`:
            what scores are divided by to be in nats, to first order. None: no nats.
        batch_tokens: Token budget of a batch, padding included.
        max_tokens: Longer training sequences are cut to this many tokens; None leaves them whole.
        query_memory_gb: Budget for query gradients (powers of 1000); more queries take more scans.
        progress: Show progress on worker 0.
        task: The task that the factors were fitted with; None for causal language modelling. Other
            tasks' queries and training sequences are their examples.
        allow_changes: Take a model that differs from the fitted one outside the tracked modules,
            and warn of it.

    Returns:
        The scores, on the CPU; `model_differs` and `not_compared` tell how the model compares with
        the fitted one.

    Raises:
        UserError: Anything that the caller can mend, on every worker alike.
    """
    arguments = {**locals()}  # those that will be added one day too
    for name in ("model", "factors", "queries", "train", "tokenizer", "candidates", "progress"):
        del arguments[name]  # compared by content, or of no consequence
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
        chosen = Damping.of(damping, relative)
        refuse_sharded(world, model)
        require_fitted_task(name, factors, task)
        asked = queries_of(queries, tokenizer, model, task)
        sequences = sequences_of(train, tokenizer, max_tokens, model, task)
        scored = sequences.take(pick_candidates(sequences, read_candidates(config.candidates)))
        advice = "give max_tokens={context}"
        if not isinstance(task, CausalLM):
            advice = "cut the examples to {context} or less"
        check_sequences(model, scored, advice)
        check_sequences(model, asked.sequences, "shorten the query")
        comparison = check_model(name, factors, model, allow_changes=allow_changes)
        world = world.at(device_of(model))
        context = _context(model, factors, chosen, world, batch_tokens, progress, task)
    _require_same(context, scored, asked, comparison)
    if world.is_main:
        comparison.warn()
    watching = heartbeat(world, owns_process=False)
    with watching, torch.inference_mode(False), prepared(model):
        say = show if progress and world.is_main else (lambda line: None)
        scores = compute_scores(context, asked, scored, config, say)
    scores.model_differs, scores.not_compared = comparison.differs, comparison.not_compared
    return scores


def _context(
    model: nn.Module,
    factors: Factors,
    damping: Damping,
    world: World,
    batch_tokens: int,
    show_progress: bool,
    task: Task = CAUSAL_LM,
) -> ScoringContext:
    double = next(model.parameters()).dtype == torch.float64
    return ScoringContext(
        model=model,
        factors=factors,
        damping=factors.chosen_damping(damping),
        dtype=torch.float64 if double else torch.float32,
        world=world,
        batch_tokens=batch_tokens,
        show_progress=show_progress,
        task=task,
    )


def _require_same(
    context: ScoringContext, scored: Examples, queries: QuerySet, comparison: Comparison
) -> None:
    """Refuses workers whose data, queries, factors or models hold something else.

    They would share out different work, or wait for each other for ever.
    """
    world = context.world
    world.require_same("data, by fingerprint,", scored.fingerprint)
    world.require_same("candidates", scored.indices.tolist())
    world.require_same("queries, by fingerprint,", queries.sequences.fingerprint)
    world.require_same("groups of queries", (queries.rows, queries.groups))
    world.require_same("factors, by fingerprint,", context.factors.fingerprint)
    require_same_model(context.model, comparison.fingerprints, world)


@contextmanager
def _named_by(store: str, field: str, name: str | None, given: str | None) -> Iterator[None]:
    """Says of a path that does not exist that it is the store's, if nothing else was given."""
    try:
        yield
    except (DataError, ModelError) as error:
        if given is None and not Path(str(name)).exists():
            error.args = (
                f"{error} It is what the factors in {store} were fitted with, perhaps in another "
                f"directory; give --{field}.",
            )
        raise


def _damping(config: QueryConfig) -> Damping:
    return Damping(config.damping.value, config.damping.relative, config.damping.modules)


def _tell_split(tell: Any, notes: list[str], at_most: int = 5) -> None:
    for note in notes[:at_most]:
        tell(f"split token   {note}")
    if len(notes) > at_most:
        tell(f"              and of {len(notes) - at_most} more queries: see the results' queries")


def _tell_data(tell: Any, train: Sequences, scored: Sequences, factors: Factors) -> None:
    counts = train.counts
    some = "" if len(scored) == len(train) else f", {len(scored)} of them scored"
    tell(
        f"data          {len(train)} of {counts.rows} sequences ({counts.unlabelled} left out: no "
        f"label){some}, {int(scored.num_positions.sum())} positions"
    )
    if counts.split_note:
        tell(f"split tokens  {counts.split_note}")
    if train.fingerprint != factors.manifest["data"]["fingerprint"]:
        tell(
            "              not the sequences that the factors were fitted on: scores are of "
            "these, in the curvature of those"
        )
    absent = parameters_without_factors(factors.manifest)
    if absent:
        tell(
            f"not scored    {len(absent)} MLP parameters or experts that have no factors, listed "
            "in the results' manifest"
        )
