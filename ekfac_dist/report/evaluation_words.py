"""What an evaluation measured and found, in sentences."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ekfac_dist.config import RefineConfig
from ekfac_dist.report.evaluation import LDS, OVER_PLAIN
from ekfac_dist.report.evaluation_rows import families_of, row_name
from ekfac_dist.report.html import Facts
from ekfac_dist.runtime.progress import clock

_SCHEDULES = {
    "constant": "constant",
    "linear": "then linearly to zero",
    "cosine": "then to zero along a cosine",
}
_BATCHES = {
    "gaps": "a subset's batches are those of all sequences with gaps, so that all models take the "
    "same steps",
    "refilled": "a subset's batches are full ones, in the same order",
}
_LABELS = {"sampled": "labels sampled from the model", "data": "the data's labels"}


def measured(results: Mapping[str, Any]) -> Facts:
    """What was measured: model, recipe, data, queries, protocols and time."""
    return list(_measured(results))


def _measured(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    config, data, model = results["config"], results["data"], results["model"]
    recipe, limit = config["training"], config["data"]["max_tokens"]
    starts = {"model": "trained from its weights", "random": "trained from random weights"}
    start = starts[recipe["start"]] if recipe["epochs"] else "not trained, but explained as it is"
    yield (
        "Model",
        f"{config['model']['name']} ({model['class']}, {model['num_parameters']:,} parameters, "
        f"{config['model']['dtype']}), {start}",
    )
    if recipe["epochs"]:
        yield "Recipe", _recipe(recipe)
    yield (
        "Data",
        f"{_count(data['num_sequences'], 'sequence')}, {data['num_positions']:,} positions, of "
        f"{config['data']['source']}{f', at most {limit} tokens each' if limit else ''}",
    )
    yield "Queries", _queries(results)
    seeds = [str(seed["seed"]) for seed in results["seeds"]]
    yield (
        "Seeds",
        f"{_among(seeds)}{', each with' if len(seeds) > 1 else ':'} a model, factors and retrained "
        f"models of its own",
    )
    yield "Factors", f"{_LABELS[config['factors']['labels']]}; damping multiplies mean(Λ)"
    if config["rank"] is not None:
        yield "Query gradients", f"of rank {config['rank']}, approximate"
    for name, title in (("cg", "CG"), ("astra", "ASTRA")):
        if f"ekfac_{name}" in config["methods"]:
            yield title, _refinement(RefineConfig(**config[name]), data["num_sequences"])
    for protocol, sentence in _PROTOCOLS.items():
        if protocol in config["protocols"]:
            yield sentence(results)
    yield "Machine", f"{_count(results['workers'], 'worker')}; {results['processor']}"


def _recipe(recipe: Mapping[str, Any]) -> str:
    clip, warmup = recipe["clip_norm"], recipe["warmup_steps"]
    rising = f"after {_count(warmup, 'step')} of warm-up, " if warmup else ""
    parts = [
        f"AdamW on the mean loss per token; {_count(recipe['epochs'], 'epoch')}, "
        f"{_count(recipe['batch_size'], 'sequence')} in a step",
        f"learning rate {recipe['learning_rate']:g}, {rising}{_SCHEDULES[recipe['schedule']]}",
        f"weight decay {recipe['weight_decay']:g}",
        "gradients not clipped" if clip is None else f"gradients clipped to norm {clip:g}",
        _BATCHES[recipe["batches"]],
    ]
    return "; ".join(parts)


def _refinement(refine: RefineConfig, num_sequences: int) -> str:
    drawn = min(refine.drawn[1] or refine.default_drawn, num_sequences)
    where = "the same in all" if refine.method == "cg" else "others in each"
    return (
        f"at most {_count(refine.num_iterations, 'iteration')}, with "
        f"{_count(drawn, 'training sequence')}, {where}"
    )


def _queries(results: Mapping[str, Any]) -> str:
    queries = results["queries"]
    lines = sum(len(query["members"]) for query in queries)
    summed = f" of {lines:,} lines, those of a group summed" if lines > len(queries) else ""
    number = f"{len(queries):,} quer{'y' if len(queries) == 1 else 'ies'}"
    return f"{number}{summed}, from {results['config']['queries']}"


def _lds(results: Mapping[str, Any]) -> tuple[str, str]:
    keep, seeds = results["config"]["lds"]["keep"], results["seeds"]
    share = "random halves" if keep == 0.5 else f"random {100 * keep:.4g} % of the sequences"
    models = [seed["models"] for seed in seeds]
    seconds = sum(seed["bank_seconds"] for seed in seeds)
    return (
        "Retrained models",
        f"{_models(models)}, on {share}; {clock(seconds)} of training in all. LDS is the rank "
        "correlation, over them, of the scores' sum over the kept sequences with the query's "
        "log-probability",
    )


def _removal(results: Mapping[str, Any]) -> tuple[str, str]:
    removal, seeds = results["config"]["removal"], results["seeds"]
    seconds = sum(seed["removal_seconds"] for seed in seeds)
    share = f"{100 * removal['share']:.4g} % of the sequences"
    return (
        "Removal",
        f"The first {removal['queries']:,} queries, each without its top {share}, against "
        f"{removal['random']} random removals; each method at the damping with the highest LDS on "
        "the other queries. "
        f"{_models([seed['removal_models'] for seed in seeds])}, {clock(seconds)} of training",
    )


def _tail_patch(results: Mapping[str, Any]) -> tuple[str, str]:
    top = results["config"]["tail_patch"]["top"]
    return "Tail patch", f"One step on each of a query's {top} top sequences, and the mean of them"


def _recall(results: Mapping[str, Any]) -> tuple[str, str]:
    asked = sum(bool(query["gold"]) for query in results["queries"])
    return "Recall", f"{asked:,} of the queries name the sequences that say it"


_PROTOCOLS = {"lds": _lds, "removal": _removal, "tail_patch": _tail_patch, "recall": _recall}


def found(results: Mapping[str, Any]) -> list[str]:
    """What was found, in a few sentences; empty without LDS."""
    rows = [row for row in results["rows"] if "lds" in row]
    if not rows:
        return []
    best = max(rows, key=lambda row: row["lds"]["mean"])
    sentences = [f"The highest LDS is {LDS.of(best)}: {row_name(best)}."]
    plain = next((row for row in rows if row["key"] == results["plain"]), None)
    if plain is None:
        return sentences
    if plain is not best:
        sentences.append(
            f"Plain EK-FAC at its best damping has {LDS.of(plain)}: {row_name(plain)}."
        )
    above = [row for row in _at_their_best(results) if row["over_plain"]["low"] > 0]
    sentences.append(
        "Above plain EK-FAC beyond the 95 % interval, at the best damping of each: "
        + "; ".join(f"{row_name(row)} ({OVER_PLAIN.of(row)})" for row in above)
        + "."
        if above
        else "No method is above plain EK-FAC beyond the 95 % interval."
    )
    return sentences


def _at_their_best(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [
        next(row for row in family.rows if family.best in (None, row["key"]))
        for family in families_of(results)
    ]


def _models(numbers: Sequence[int]) -> str:
    """Numbers of models by seed, as "100 for each seed" where they are equal."""
    total = sum(numbers)
    if len(numbers) > 1 and len(set(numbers)) == 1:
        return f"{numbers[0]:,} for each seed, {total:,} in all"
    return _count(total, "model")


def _among(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
