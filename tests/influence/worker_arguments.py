"""Started by test_query_workers.py on 2 workers: each is given something else; both are told."""

import pytest
import torch
from accelerate import Accelerator
from helpers.networks import build, examples
from helpers.workshop import leave

from ekfac_dist import estimate_factors, influence_scores
from ekfac_dist.errors import LaunchError


def main() -> None:
    """Tries each difference."""
    rank = Accelerator(cpu=True).process_index
    model, train, queries = build("gpt2"), examples(5, seed=1), examples(2, seed=2)
    factors = estimate_factors(model, train)
    grouped = [{**query, "group": "g"} for query in queries]
    cases = [
        ({"batch_tokens": 10 + rank}, queries, train),
        ({"damping": 0.1 + rank}, queries, train),
        ({"candidates": [rank]}, queries, train),
        ({"rank": 2 + rank}, queries, train),
        ({}, grouped if rank else queries, train),
        ({}, queries, train[rank:]),
    ]
    for options, asked, given in cases:
        with pytest.raises(LaunchError, match="must be given the same"):
            influence_scores(model, factors, asked, given, top_k=1, **options)
    changed = build("gpt2")
    with torch.no_grad():
        changed.transformer.ln_f.weight[0] += rank
    with pytest.raises(LaunchError, match="other model weights outside the tracked modules"):
        influence_scores(changed, factors, queries, train, top_k=1, allow_changes=True)
    assert influence_scores(model, factors, queries, train).scores.shape == (2, 5)


if __name__ == "__main__":
    main()
    leave()
