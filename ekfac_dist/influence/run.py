"""`query`, the command: loads model, data and factors, scores, writes the results."""

import time
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset

from ekfac_dist.config import (
    DataConfig,
    ModelConfig,
    QueryConfig,
    with_rescoring,
)
from ekfac_dist.curvature.damping import Damping
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.factors.comparison import require_fitted_task
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.opening import load_factors
from ekfac_dist.influence.answer import Answer, parameters_without_factors
from ekfac_dist.influence.candidates import pick_candidates, read_candidates
from ekfac_dist.influence.checks import (
    check_model_and_sequences,
    require_same_inputs,
    scoring_context,
)
from ekfac_dist.influence.index.reader import GradientIndex
from ekfac_dist.influence.lists import list_lengths
from ekfac_dist.influence.names import named_by
from ekfac_dist.influence.output import write_answer
from ekfac_dist.influence.queries import tokenize_queries
from ekfac_dist.influence.query_texts import Query, read_queries
from ekfac_dist.influence.refinement_sample import RefinementSample
from ekfac_dist.influence.refinement_start import require_refinable_model
from ekfac_dist.influence.saved_blocks import opened_results, run_inputs
from ekfac_dist.influence.scoring import compute_scores
from ekfac_dist.influence.unfinished import check_results_output
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.capture.tasks import CAUSAL_LM
from ekfac_dist.models.load.on_workers import load
from ekfac_dist.models.load.pretrained import context_length, load_tokenizer
from ekfac_dist.passes.owners import require_divisor
from ekfac_dist.passes.sequences import load_with_examples
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.processes import World


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
    given = config.as_dict()
    world.on_main(lambda: check_results_output(output, given))
    with world.agree():
        require_divisor("scores.shard", config.scores.shard, world.size)
        damping = Damping(**vars(config.damping))
        texts = read_queries(queries_file)
        candidates = read_candidates(config.scores.candidates)
        factors = load_factors(store)
        require_fitted_task(store, factors, CAUSAL_LM)
        fitted_config = factors.manifest["config"]
        model_config = config.model.over(fitted_config["model"])
        index = None if config.index is None else GradientIndex(config.index, factors)
        data_config = (
            config.data.over(fitted_config["data"])
            if index is None
            else index.data_config(config.data)
        )
    with named_by(store, "model.name", model_config.name, config.model.name):
        tokenizer, tokenizer_print = world.main_first(lambda: load_tokenizer(model_config))
    with world.agree():
        # Before the model is loaded, without its context: refuses queries with nothing to predict.
        tokenize_queries(texts, tokenizer, None)
    with named_by(store, "data.source", data_config.source, config.data.source):
        train, examples = load_with_examples(data_config, tokenizer, tokenizer_print, world)
    with world.agree():
        if index is not None:
            index.require_data(train)
        columns = pick_candidates(train, candidates)
        if index is not None:
            config = replace(config, scores=with_rescoring(config.scores, len(columns)))
        list_lengths(config.scores, len(columns))
        if config.refine.is_on:
            RefinementSample.draw(train, config.refine)  # refuses more than there are
    scored = train.take(columns)
    _log_data(world, train, scored, factors)
    inputs = _Inputs(
        given=given,
        store=store,
        factors=factors,
        index=index,
        damping=damping,
        texts=texts,
        train=train,
        scored=scored,
        examples=examples,
        data=data_config,
        model=model_config,
        tokenizer=tokenizer,
    )
    return _answer(config, inputs, world, start)


@dataclass(frozen=True)
class _Inputs:
    """The inputs of a run of `query` that are read before its model; attributes as of `Answer`.

    Attributes:
        given: The configuration as it was given.
        index: The gradient index that is scanned; None: the data are.
        texts: The queries' texts.
        examples: The examples of the training data.
    """

    given: dict[str, Any]
    store: str
    factors: Factors
    index: GradientIndex | None
    damping: Damping
    texts: list[Query]
    train: Sequences
    scored: Sequences
    examples: Dataset
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
            require_refinable_model(model, CAUSAL_LM, config.refine)
            queries = tokenize_queries(inputs.texts, inputs.tokenizer, context_length(model))
        comparison = check_model_and_sequences(
            store,
            factors,
            model,
            scored,
            queries,
            world,
            advice="set data.max_tokens to {context} or less",
            allow_changes=config.model.allow_changes,
        )
        _log_split_tokens(world, queries.split_notes)
        require_same_inputs(world, factors, model, scored, queries, comparison)
        context = scoring_context(
            model,
            factors,
            inputs.damping,
            world,
            config.batch_tokens,
            True,
            config.scores,
            len(queries.members),
            refine=config.refine,
        )
        for sentence in comparison.differs:
            log_on_main(world, f"model differs {sentence}")
        for sentence in comparison.not_compared:
            log_on_main(world, f"not compared  {sentence}")
        whole = comparison.fingerprints.whole
        if inputs.index is not None:
            with world.agree():
                inputs.index.require_model(whole)
            world.require_same("index, by fingerprint,", inputs.index.fingerprint)
        recorded = run_inputs(store, whole, inputs.train, scored, queries, context, inputs.index)
        with (
            opened_results(str(config.output), inputs.given, recorded, world) as saved,
            preemption.deferred(),
        ):
            scores = compute_scores(
                context,
                queries,
                scored,
                config.scores,
                saved,
                inputs.model.gradient_checkpointing,
                inputs.train,
                inputs.index,
            )
            scores.model_differs = comparison.differs
            scores.not_compared = comparison.not_compared
            answer = Answer(
                scores=scores,
                queries=queries,
                train=inputs.train,
                scored=scored,
                factors=factors,
                index=inputs.index,
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
            saved.finish(lambda writer: write_answer(writer, answer, inputs.examples))
    return answer


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
