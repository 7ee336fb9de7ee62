"""How the peak memory of a process grows with the rows of scores that it holds the gradients of.

python worker_query_memory.py ROWS OPTIONS     prints the bytes, of ROWS rows above those of one
"""

import json
import resource
import sys

import torch
from helpers.networks import examples
from transformers import LlamaConfig, LlamaForCausalLM

from ekfac_dist import estimate_factors, influence_scores


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    rows, options = int(sys.argv[1]), json.loads(sys.argv[2])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model, train = LlamaForCausalLM(config), examples(24, seed=1)
    factors = estimate_factors(model, train, labels="data", refit="none")
    queries = [examples(1, seed=2)[0]] * rows
    influence_scores(model, factors, queries[:1], train, **options)
    of_one = peak()
    influence_scores(model, factors, queries, train, query_memory_gb=100.0, **options)
    print(peak() - of_one)


if __name__ == "__main__":
    main()
