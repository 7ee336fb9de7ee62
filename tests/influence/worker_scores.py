"""Started by test_query_workers.py on W workers: answers queries in several ways."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from helpers.networks import build, examples
from helpers.workshop import leave

from ekfac_dist import influence_scores, load_factors

FAMILIES = ("llama_bias", "llama", "gpt2")
ANSWERS = {
    "exact": {"per_token": "top", "per_module": True},
    "eigenbasis": {"normalize": "cosine", "self_influence": True, "per_token": "all"},
    "two stages": {"rank": 2, "rescore": 5, "per_token": "top"},
    "blocks": {"query_memory_gb": 2e-5, "per_layer": True},
    "one candidate": {"candidates": [3], "top_k": 1, "per_token": "top"},
}


def main(root: Path) -> None:
    """Answers everything with the factors in `root`, on all workers; each keeps what it got."""
    accelerator = Accelerator(cpu=True)
    for family in FAMILIES:
        answer(root, family, accelerator.num_processes, accelerator.process_index)


def answer(root: Path, family: str, workers: int, rank: int) -> None:
    """Everything that is asked of one family."""
    model = build(family)
    factors = load_factors(root / family, model=model)
    queries, train = examples(4, seed=2, prompts=True), examples(11, seed=1, prompts=True)
    queries[1]["group"] = queries[3]["group"] = "pair"
    answers = {}
    asked = ANSWERS if family == FAMILIES[0] else {"exact": ANSWERS["exact"]}
    for name, options in asked.items():
        options = {"batch_tokens": 20, "top_k": 2, **options}
        found = influence_scores(model, factors, queries, train, **options)
        answers[name] = {
            "scores": found.scores,
            "shares": found.shares,
            "losses": found.query_losses,
            "top": [end.columns.tolist() for end in found.top],
            "num_scans": found.num_scans,
            "self_influence": found.self_influence,
            "token_scores": found.token_scores,
            "parts": found.module_scores if found.layer_scores is None else found.layer_scores,
            "details": None if found.details is None else found.details.layer_token_scores,
            "exact": [row.exact_scores for row in found.rescored],
        }
    torch.save(answers, root / f"{family}-{workers}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
