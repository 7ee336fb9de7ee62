"""Made-up results of an evaluation, with every protocol and with numbers drawn at random."""

import json
from pathlib import Path

import numpy as np

from ekfac_dist.config import DataConfig, EvaluateConfig, ModelConfig

PROTOCOLS = ("lds", "removal", "tail_patch", "recall")
# (method, name, choice of modules, whether it has a damping)
METHODS = (
    ("random", "random", "", False),
    ("bm25", "BM25", "", False),
    ("gradient_dot", "gradient dot", "", False),
    ("gradient_cosine", "gradient cosine", "", False),
    ("kfac", "K-FAC", "", True),
    ("ekfac", "EK-FAC", "", True),
    ("ekfac_cosine", "EK-FAC, cosine", "", True),
    ("ekfac", "EK-FAC, attention", "attention", True),
    ("scores", "theirs", "", False),
)
DAMPINGS = (0.001, 0.1, 10.0)


def made_evaluation(
    *,
    seeds=(0, 1),
    protocols=PROTOCOLS,
    num_queries=12,
    methods=METHODS,
    dampings=DAMPINGS,
    text="Paris",
    model="runs/base",
    seed=0,
    **settings,
):
    """Results as `evaluate` writes them.

    Args:
        seeds: Seeds of the evaluation.
        protocols: What was measured.
        num_queries: Number of query groups; the last is a named group of two queries.
        methods: The methods, as METHODS.
        dampings: Dampings of the methods that have one.
        text: A text that all queries have in common.
        model: Name of the model.
        seed: Of the numbers.
        settings: Other fields of the configuration.
    """
    numbers = np.random.default_rng(seed)
    rows = []
    for number, (method, name, tracked, damped) in enumerate(methods):
        for damping in dampings if damped else (None,):
            height = 0.06 * number + (0.1 if damping == 0.1 else 0.0)
            rows.append(_row(numbers, method, name, tracked, damping, height, num_queries))
    chosen = {}
    for row in rows:
        chosen.setdefault((row["method"], row["tracked"] or row["name"]), row)
    for row in chosen.values():
        row["removal"] = {
            **_estimate(numbers, 0.3),
            "by_query": numbers.normal(0.3, 0.1, 4).tolist(),
        }
        row["tail_patch"] = _estimate(numbers, 0.2)
    plain = [row for row in rows if row["method"] == "ekfac" and not row["tracked"]]
    best = max(plain, key=lambda row: row["lds"]["mean"]) if plain else None
    for row in rows if best else []:
        gain = row["lds"]["mean"] - best["lds"]["mean"]
        row["over_plain"] = {"mean": gain, "low": gain - 0.05, "high": gain + 0.05}
        equal = next((one for one in plain if one["damping"] == row["damping"]), row)
        if equal is not row:
            gain = row["lds"]["mean"] - equal["lds"]["mean"]
            row["over_equal"] = {"mean": gain, "low": gain - 0.04, "high": gain + 0.04}
    over = ["over_plain", "over_equal"] if "lds" not in protocols else []
    absent = {*PROTOCOLS, *over} - {*protocols}
    rows = [{name: value for name, value in row.items() if name not in absent} for row in rows]
    results = {
        "format": "ekfac_dist-evaluation/1",
        "config": EvaluateConfig(
            model=ModelConfig(name=model, dtype="float32"),
            data=DataConfig(source="text.jsonl", max_tokens=64),
            queries="queries.jsonl",
            protocols=list(protocols),
            seeds=list(seeds),
            output="runs/evaluation",
            **settings,
        ).as_dict(),
        "rows": rows,
        "seeds": [_seed(numbers, k, protocols) for k in seeds],
        "data": {"num_sequences": 2000, "num_positions": 124049, "num_queries": num_queries},
        "model": {"class": "LlamaForCausalLM", "num_parameters": 1234567},
        "queries": [_query(k, num_queries, text) for k in range(num_queries)],
        "workers": 2,
        "processor": "AMD EPYC 9B45",
        "software": {"ekfac_dist": "0.1", "torch": "2.13.0"},
    }
    if "lds" in protocols:
        results["plain"] = best and best["key"]
        results["ceiling"] = _estimate(numbers, 0.6) if len(seeds) > 1 else None
    return results


def write_evaluation(directory, results):
    """Writes results as the output directory of an evaluation."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return Path(directory)


def shown(estimate, signed):
    """An estimate as pages and tables show it."""
    numbers = (f"{estimate[name]:{'+' if signed else ''}.3f}" for name in ("mean", "low", "high"))
    return "{} [{}, {}]".format(*numbers).replace("-", "−")


def _row(numbers, method, name, tracked, damping, height, num_queries):
    by_query = np.clip(numbers.normal(height, 0.2, num_queries), -1, 1)
    mean = float(by_query.mean())
    key = "-".join(
        part for part in (method, tracked, "" if damping is None else f"{damping:g}") if part
    )
    return {
        "key": key,
        "method": method,
        "name": name,
        "damping": damping,
        "tracked": tracked,
        "seconds": [float(numbers.uniform(1, 20)), None],
        "lds": {
            "mean": mean,
            "low": mean - 0.08,
            "high": mean + 0.07,
            "by_query": by_query.tolist(),
        },
        "recall": {
            "mrr": _estimate(numbers, 0.5),
            "recall10": _estimate(numbers, 0.7),
            "num_queries": num_queries - 1,
        },
    }


def _estimate(numbers, height):
    mean = float(numbers.normal(height, 0.05))
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.12}


def _seed(numbers, seed, protocols):
    result = {
        "seed": seed,
        "steps": 500,
        "first_loss": float(numbers.uniform(3, 4)),
        "last_loss": float(numbers.uniform(2, 3)),
        "fit_seconds": float(numbers.uniform(10, 20)),
    }
    if "lds" in protocols:
        result |= {"models": 100, "bank_seconds": 3600.5}
    if "removal" in protocols:
        result |= {"removal_models": 85 + seed, "removal_seconds": 1800.25}
    return result


def _query(number, num_queries, text):
    is_group = number == num_queries - 1
    members = [
        {
            "line": number + k + 1,
            "prompt": f"Query {number} asks",
            "completion": f" {text} {k}",
            "against": f" not {text}" if number == 1 else None,
        }
        for k in range(2 if is_group else 1)
    ]
    return {
        "group": "pair" if is_group else None,
        "members": members,
        "gold": [] if is_group else [number],
    }
