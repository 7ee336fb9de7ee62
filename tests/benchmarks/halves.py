"""Whether a fit's predicted agreement is that of real fits: on 1/2, 1/4 and 1/8 of its sequences.

    python tests/benchmarks/halves.py MODEL texts.jsonl --number 400 --queries 40
    python tests/benchmarks/halves.py runs/demo/model runs/demo/corpus.jsonl

Factors are fitted on the first N texts, and on the first N/2, N/4 and N/8 of them. `--scored` of
the N texts, spread evenly, are scored for queries, which are texts after the first N; with each
fit's factors at each damping. Measured is the mean over queries of the correlation between scores
from a part and from all; Spearman's besides. Predicted is what the fit on all N says of itself:
with v from its manifest's correlation for half of the data, 1 / √(1 + (N/n − 1) v).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from ekfac_dist import estimate_factors, influence_scores, load_factors
from ekfac_dist.config import ModelConfig
from ekfac_dist.curvature.score_change import DAMPINGS
from ekfac_dist.models.load.pretrained import load_model, load_tokenizer
from ekfac_dist.report.tables import table


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, help="a .jsonl with a column text")
    parser.add_argument("--gguf", default=None, help="name of a GGUF file in MODEL")
    parser.add_argument("--modules", nargs="*", default=None, help="globs; all MLPs")
    parser.add_argument("--number", type=int, default=400, help="N")
    parser.add_argument("--parts", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--scored", type=int, default=200)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--labels", default="sampled")
    parser.add_argument("--refit", default="per_sequence")
    parser.add_argument("--batch_tokens", type=int, default=512)
    parser.add_argument("--dampings", type=float, nargs="*", default=list(DAMPINGS))
    parser.add_argument("--rank", type=int, default=None, help="of query gradients")
    return parser.parse_args()


def correlations(one_QN, other_QN):
    """The correlation of each query's scores [Q]."""
    one, other = (x.double() - x.double().mean(1, keepdim=True) for x in (one_QN, other_QN))
    return (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))


def places(scores_QN):
    """Each score's place among its query's [Q, N]."""
    return scores_QN.argsort(1).argsort(1)


def predicted(correlation_of_half, part):
    """The correlation of scores from 1/part of the data, from that of half of it."""
    variance = 1 / correlation_of_half**2 - 1
    return (1 + (part - 1) * variance) ** -0.5


def main():
    args = arguments()
    config = ModelConfig(name=str(args.model), gguf=args.gguf)
    model, (tokenizer, _) = load_model(config, torch.device("cpu")), load_tokenizer(config)
    lines = args.texts.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[: args.number + args.queries]]
    ids = [torch.tensor(tokenizer(text)["input_ids"][: args.max_tokens]) for text in texts]
    data = [{"input_ids": each, "labels": each.clone()} for each in ids]
    queries, scored = data[args.number :], data[: args.number : args.number // args.scored]
    print(f"N = {args.number}, {len(queries)} queries, {len(scored)} texts scored", flush=True)
    scores, halves = {}, {}
    for part in (1, *args.parts):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            store = Path(directory) / "factors"
            estimate_factors(
                model,
                data[: args.number // part],
                output=store,
                modules=args.modules,
                labels=args.labels,
                refit=args.refit,
                batch_tokens=args.batch_tokens,
                keep_covariance=False,
            )
            factors = load_factors(store, model=model)
            halves = halves or factors.manifest["halves"]
            for damping in args.dampings:
                scores[part, damping] = influence_scores(
                    model, factors, queries, scored, damping=damping, rank=args.rank, top_k=1
                ).scores
        print(f"1/{part}: {time.perf_counter() - start:.0f} s", flush=True)
    rows = []
    for damping in args.dampings:
        of_fit = halves["scores"][str(damping)]
        for part in args.parts:
            one, other = scores[1, damping], scores[part, damping]
            cells = [
                predicted(of_fit["half"], part),
                correlations(one, other).mean().item(),
                correlations(places(one), places(other)).mean().item(),
            ]
            rows.append([f"{damping:g}", f"1/{part}", *(f"{cell:.4f}" for cell in cells)])
    print(table(["damping", "part", "predicted", "measured", "Spearman"], rows))
    print(json.dumps({k: v for k, v in halves.items() if k != "modules"}))
    for name, each in halves["modules"].items():
        print(name, {k: v and round(v, 4) for k, v in each.items()})


if __name__ == "__main__":
    main()
