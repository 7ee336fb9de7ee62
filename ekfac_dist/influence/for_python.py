"""`influence_scores`, for Python: checks the caller's objects on every worker, and scores."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ekfac_dist.config import (
    Normalize,
    PerToken,
    RefineConfig,
    RefineMethod,
    ScoresConfig,
    Tokens,
    field_types,
    require_checkpointing,
    require_positive,
    require_refinable,
    require_rescorable,
    with_rescoring,
)
from ekfac_dist.curvature.damping import DEFAULT, Damping
from ekfac_dist.errors import ConfigError
from ekfac_dist.factors.comparison import require_fitted_task
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.opening import load_factors
from ekfac_dist.influence.candidates import pick_candidates, read_candidates
from ekfac_dist.influence.checks import (
    check_model_and_sequences,
    require_same_inputs,
    scoring_context,
)
from ekfac_dist.influence.examples import queries_of, sequences_of
from ekfac_dist.influence.index.reader import GradientIndex
from ekfac_dist.influence.refinement_sample import RefinementSample
from ekfac_dist.influence.refinement_start import require_refinable_model
from ekfac_dist.influence.scores import InfluenceScores
from ekfac_dist.influence.scoring import compute_scores
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.capture.task_fingerprint import task_fingerprint
from ekfac_dist.models.capture.tasks import CausalLM, Task, require_task
from ekfac_dist.models.load.on_workers import unwrapped
from ekfac_dist.models.modules import device_of
from ekfac_dist.models.sharding import is_sharded
from ekfac_dist.passes.owners import require_divisor
from ekfac_dist.runtime.heartbeat import heartbeat
from ekfac_dist.runtime.out_of_memory import saying_what_would_do
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.same_settings import require_same_settings


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
    index: GradientIndex | str | Path | None = None,
    rank: int | None = None,
    rescore: int | None = None,
    top_k: int | None = None,
    bottom_k: int | None = None,
    per_token: PerToken = "none",
    tokens: Tokens = "inputs",
    per_module: bool = False,
    per_layer: bool = False,
    self_influence: bool = False,
    candidates: Iterable[int] | None = None,
    training_size: int | None = None,
    batch_tokens: int = 4096,
    max_tokens: int | None = None,
    query_memory_gb: float = 4.0,
    shard: int | Literal["auto"] = "auto",
    gradient_checkpointing: bool | Literal["auto"] = "auto",
    progress: bool = False,
    task: Task | None = None,
    allow_changes: bool = False,
    refine: RefineMethod | Mapping[str, Any] = "none",
) -> InfluenceScores:
    """Scores training sequences for queries: ∇log p(q)ᵀ (F + λ)⁻¹ ∇log p(z) (Grosse et al. 2023).

    Under `accelerate launch`, call it on every worker with the same arguments; it shards the
    training data itself, and every worker returns the whole answer. The model must be on the
    worker's device and comes back as it was.

    Args:
        model: The Hugging Face model that the factors were fitted for.
        factors: From `load_factors` or `estimate_factors`; or the directory of a store.
        queries: Examples as `estimate_factors` takes, with `input_ids` and `labels` (−100 for the
            prompt); or, with a tokenizer, mappings with "prompt" and "completion", or "text", or
            the "messages" of a chat. What a completion, or the last message, is "against" is
            subtracted, ∇(log p(completion) − log p(against)); what an example is against is another
            example. Queries with the same "group" are summed, and have one row of scores.
        train: The training sequences: examples; or, with a tokenizer, mappings with "text" and
            perhaps "prompt", or with "messages".
        tokenizer: For queries and training sequences that are text.
        damping: λ of every module; or of each module, by its name or a glob.
        relative: Whether `damping` is a multiple of the module's mean(Λ); else it is λ itself.
        normalize: "none"; "cosine", in the inner product of (F + λ)⁻¹; or RelatIF (Barshan et al.
            2020): "relatif_l" divides by the root of a sequence's self-influence, "relatif_theta"
            by ‖(F + λ)⁻¹ ∇log p(z)‖.
        index: Directory of a gradient index of `train` with these factors, which is scanned in the
            place of the training data; None: the data are run through the model.
        rank: Rank of query gradients in the scan, such as 32; None: whole gradients.
        rescore: With a rank or an index, score this many of the scan's highest, of its lowest, and
            of sequences spread over the data again, exactly; None: 100 with an index, else none.
        top_k: Length of the list of the most positive sequences; None: 20 or all.
        bottom_k: Length of the list of the most negative; None: as `top_k`.
        per_token: Scores of positions: of the listed sequences ("top"), of "all", or "none".
        tokens: What a position's score is of: what its input adds to the sequence's gradient
            ("inputs"), or the loss of the token that it predicts ("outputs").
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
        shard: Number of workers that share out one copy of the factors and query gradients, a
            divisor of the number of workers. "auto": the fewest that hold all query gradients in
            one block, or all workers.
        gradient_checkpointing: Compute each layer again in the backward instead of holding its
            activations; "auto": where they would not fit into memory.
        progress: Show progress on worker 0.
        task: The task that the factors were fitted with; None for causal language modelling. Other
            tasks' queries and training sequences are their examples.
        allow_changes: Accept a model that differs from the fitted one outside the tracked modules,
            with a warning.
        refine: How query gradients are refined: "none", "cg" or "astra"; or a mapping of fields of
            the configuration `refine`, such as {"method": "cg", "sequences": 64}.

    Returns:
        The scores, on the CPU; `model_differs` and `not_compared` say how the model compares with
        the fitted one.

    Raises:
        UserError: If the caller can correct the cause; on every worker alike.
    """
    arguments = {**locals()}  # all of them, so that none can be forgotten here
    for name in (
        "model",
        "factors",
        "queries",
        "train",
        "tokenizer",
        "candidates",
        "progress",
        "index",
    ):
        del arguments[name]  # compared by content later, or without effect on scores
    world = World.start()
    world.meet()
    model = unwrapped(model, world)
    with world.agree():
        config = ScoresConfig(
            normalize=normalize,
            top_k=top_k,
            bottom_k=bottom_k,
            per_token=per_token,
            tokens=tokens,
            per_module=per_module,
            per_layer=per_layer,
            self_influence=self_influence,
            rank=rank,
            rescore=rescore,
            candidates=None if candidates is None else list(candidates),
            training_size=training_size,
            query_memory_gb=query_memory_gb,
            shard=shard,
        )
        refine_config = _refine_config(refine)
        require_rescorable(config, from_index=index is not None)
        require_refinable(config, refine_config)
        require_divisor("shard", shard, world.size)
        require_checkpointing("gradient_checkpointing", gradient_checkpointing)
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
        require_fitted_task(name, factors, task)
        query_set = queries_of(queries, tokenizer, model, task)
        sequences = sequences_of(train, tokenizer, max_tokens, model, task)
        if refine_config.is_on:
            RefinementSample.draw(sequences, refine_config)  # refuses more than there are
            require_refinable_model(model, task, refine_config)
        scored = sequences.take(pick_candidates(sequences, read_candidates(config.candidates)))
        if index is not None:
            if not isinstance(index, GradientIndex):
                index = GradientIndex(index, factors)
            index.require_data(sequences)
            config = with_rescoring(config, len(scored))
        advice = "give max_tokens={context}"
        if not isinstance(task, CausalLM):
            advice = "cut the examples to {context} or less"
        if not is_sharded(model):
            world = world.at(device_of(model))
    watching = heartbeat(world, owns_process=False)
    with watching, saying_what_would_do(), torch.inference_mode(False):
        comparison = check_model_and_sequences(
            name,
            factors,
            model,
            scored,
            query_set,
            world,
            advice=advice,
            allow_changes=allow_changes,
        )
        require_same_inputs(world, factors, model, scored, query_set, comparison)
        if index is not None:
            with world.agree():
                index.require_model(comparison.fingerprints.whole)
            world.require_same("index, by fingerprint,", index.fingerprint)
        if world.is_main:
            comparison.warn()
        context = scoring_context(
            model,
            factors,
            damping_rule,
            world,
            batch_tokens,
            progress,
            config,
            len(query_set.members),
            task,
            refine_config,
        )
        with prepared(model):
            scores = compute_scores(
                context,
                query_set,
                scored,
                config,
                checkpointing=gradient_checkpointing,
                train=sequences,
                index=index,
            )
    scores.model_differs, scores.not_compared = comparison.differs, comparison.not_compared
    return scores


def _refine_config(refine: str | Mapping[str, Any]) -> RefineConfig:
    """The configuration of a refinement.

    Raises:
        ConfigError: If it has a field that is none, or a value that cannot be meant.
    """
    if not isinstance(refine, (str, Mapping)):
        raise ConfigError(
            f"refine is {refine!r}; give none, cg or astra, or a mapping of the fields of refine."
        )
    fields = {"method": refine} if isinstance(refine, str) else dict(refine)
    unknown = [name for name in fields if name not in field_types(RefineConfig)]
    if unknown:
        raise ConfigError(
            f"refine has {unknown[0]!r}; its fields are {', '.join(field_types(RefineConfig))}."
        )
    return RefineConfig(**fields)
