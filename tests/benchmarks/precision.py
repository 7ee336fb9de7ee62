"""What lower precision of weights and activations does to factors and to scores.

    python tests/benchmarks/precision.py
    python tests/benchmarks/precision.py --model runs/demo/model --text runs/demo/corpus.jsonl

A model is fitted and queried in float32 and in bfloat16 (sums in float32 each time, the data's
labels, so that no label changes) and in float64, which both are compared with: the relative error
of E of each module, and the correlation of each query's scores. Without a model it makes a
random-weight Llama (hidden 256, MLP 688, 4 layers), whose numbers round as a trained one's do.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ekfac_dist import estimate_factors, influence_scores
from ekfac_dist.report.tables import table

sys.path.append(str(Path(__file__).parent / "peers"))  # where the shared modules are
from model_shapes import Shape
from peer_agreement import errors_of, median_and_worst
from peer_sides import make_rows


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="local directory or hub id")
    parser.add_argument("--text", type=Path, default=None, help=".jsonl with a column `text`")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--queries", type=int, default=8)
    args = parser.parse_args()
    if (args.model is None) != (args.text is None):
        parser.error("give --model and --text, or neither")
    return args


def work(args):
    """The model in float32, and its sequences; the last ones are the queries."""
    count = args.sequences + args.queries
    if args.model is None:
        generator = torch.Generator().manual_seed(0)
        return Shape(256, 688, 4, 1024).model(args.tokens), make_rows(
            count, (args.tokens // 4, args.tokens), 1024, generator
        )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with args.text.open() as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]
    rows = [{"input_ids": tokenizer(text)["input_ids"][: args.tokens]} for text in texts]
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), rows


def correlation(one, other):
    """Pearson correlation of two vectors."""
    return torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1].item()


def main():
    args = arguments()
    model, rows = work(args)
    train, queries = rows[: args.sequences], rows[args.sequences :]
    read, scores = {}, {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        own = copy.deepcopy(model).to(dtype)
        accumulate = "float64" if dtype == torch.float64 else "float32"
        factors = estimate_factors(own, train, labels="data", accumulate=accumulate)
        names = list(factors.modules)

        def bases(name, factors=factors):
            found = factors.module(name)
            return found.basis_OO, found.basis_II, found.lambda_OI

        read[dtype] = bases
        found = influence_scores(own, factors, queries, train, per_token="none")
        scores[dtype] = found.scores
    lines = []
    exact = torch.float64
    for dtype in (torch.float32, torch.bfloat16):
        median, worst = median_and_worst(errors_of(names, read[dtype], read[exact], "cpu"))
        pearson = [correlation(a, b) for a, b in zip(scores[dtype], scores[exact], strict=True)]
        name = str(dtype).removeprefix("torch.")
        medians = sorted(pearson)[len(pearson) // 2]
        lines.append(
            [name, f"{median:.1e}", f"{worst:.1e}", f"{medians:.6f}", f"{min(pearson):.6f}"]
        )
    header = ["dtype", "E, median error", "worst", "scores, median Pearson", "worst query"]
    print(table(header, lines))


if __name__ == "__main__":
    main()
