"""Does influence find the article that says a fact? Beside BM25, by damping and normalisation.

    python tests/benchmarks/facts.py runs/demo-real        a directory that `demo --real` made
    python tests/benchmarks/facts.py runs/demo-real --table  what was measured so far, as a table

Of the demo's summaries, in the demo's order (by a hash of their titles), the first 60 that have a
description are asked about: "Photosynthesis:" → " Biological process to convert light into chemical
energy". Gold is the article's own summary, among all summaries of the demo. Chosen before any score
was known. What counts is the gold's rank r among all summaries, for each question:

    mean reciprocal rank    mean of 1/r
    first, recall@10        share of questions with r = 1, with r ≤ 10

    EK-FAC          ∇log p(q)ᵀ (F + λ)⁻¹ ∇log p(z), of rank 32
    relatif_l       the same over the root of z's self-influence; ranks as cosine does
    relatif_theta   the same over ‖(F + λ)⁻¹ ∇log p(z)‖
    BM25            on words, in lower case: the question's, title and description

Each damping and normalisation is written to facts.jsonl in the directory as soon as it is known;
another run goes on. The summary of an article and its description are by different authors, and
neither is known to be what the model was trained on.
"""

import argparse
import json
import re
import time
from pathlib import Path

import bm25s
import numpy as np
import torch

from ekfac_dist import influence_scores, load_factors
from ekfac_dist.config import ModelConfig
from ekfac_dist.demo.directory import DemoPaths
from ekfac_dist.demo.summaries import read_summaries
from ekfac_dist.models.load.pretrained import load_model, load_tokenizer
from ekfac_dist.report.tables import table

NUM_QUESTIONS = 60
DAMPINGS = (0.1, 0.01, 1.0, 10.0)
RANK = 32


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="directory of a demo with a real model")
    parser.add_argument("--dampings", type=float, nargs="*", default=DAMPINGS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_tokens", type=int, default=512)
    parser.add_argument("--table", action="store_true", help="show what was measured, and end")
    return parser.parse_args()


def questions(summaries):
    """Indices of the summaries that are asked about, and the queries."""
    asked = [k for k, summary in enumerate(summaries) if summary.description][:NUM_QUESTIONS]
    queries = [
        {"prompt": f"{summaries[k].title}:", "completion": f" {summaries[k].description}"}
        for k in asked
    ]
    return asked, queries


def quality(scores_QN, asked):
    """Mean reciprocal rank, share of first places, and recall@10; ties count against the gold."""
    gold_Q = scores_QN[np.arange(len(asked)), asked]
    ranks = (scores_QN >= gold_Q[:, None]).sum(1)
    return {
        "mrr": float((1 / ranks).mean()),
        "first": float((ranks == 1).mean()),
        "recall10": float((ranks <= 10).mean()),
    }


def words(text):
    """A text's words, as BM25 counts them."""
    return re.findall(r"[^\W_]+", text.lower())


def bm25_scores(summaries, queries):
    """BM25 of each question's words against the summaries' [Q, N]."""
    index = bm25s.BM25()
    index.index([words(summary.text) for summary in summaries], show_progress=False)
    asked = [words(query["prompt"] + query["completion"]) for query in queries]
    return np.stack([index.get_scores(each) for each in asked])


def measured(results):
    """What the file of results holds."""
    lines = results.read_text().splitlines() if results.is_file() else []
    return [json.loads(line) for line in lines]


def note(results, **line):
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


def show(lines):
    header = ["method", "damping", "mean reciprocal rank", "first", "recall@10"]
    cells = [
        [
            line["method"],
            "" if line["damping"] is None else f"{line['damping']:g}",
            f"{line['mrr']:.2f}",
            f"{line['first']:.0%}",
            f"{line['recall10']:.0%}",
        ]
        for line in sorted(lines, key=lambda line: (line["method"], line["damping"] or 0))
    ]
    print(table(header, cells))


def main():
    args = arguments()
    paths, results = DemoPaths(args.directory), args.directory / "facts.jsonl"
    if args.table:
        show(measured(results))
        return
    summaries = read_summaries(paths.corpus)
    asked, queries = questions(summaries)
    done = {(line["method"], line["damping"]) for line in measured(results)}
    print(f"{len(asked)} questions, {len(summaries)} summaries", flush=True)
    if ("BM25", None) not in done:
        scores = bm25_scores(summaries, queries)
        note(results, method="BM25", damping=None, **quality(scores, asked))
    fitted = load_factors(paths.factors).manifest["config"]
    config = ModelConfig(**{**fitted["model"], "name": str(paths.model)})
    model = load_model(config, torch.device(args.device))
    tokenizer, _ = load_tokenizer(config)
    factors = load_factors(paths.factors, model=model)
    for damping in args.dampings:
        for normalize, names in {
            "cosine": ("EK-FAC", "EK-FAC, relatif_l"),  # raw scores come with it
            "relatif_theta": ("EK-FAC, relatif_theta",),
        }.items():
            if all((name, damping) in done for name in names):
                continue
            start = time.perf_counter()
            answer = influence_scores(
                model,
                factors,
                queries,
                [{"text": summary.text} for summary in summaries],
                tokenizer=tokenizer,
                damping=damping,
                normalize=normalize,
                rank=RANK,
                max_tokens=fitted["data"]["max_tokens"],
                batch_tokens=args.batch_tokens,
                progress=True,
            )
            assert answer.indices.tolist() == list(range(len(summaries)))
            divided = answer.scores.double()
            by_name = {names[-1]: divided.numpy()}
            if len(names) > 1:
                raw = divided * answer.norms * answer.query_norms[:, None]
                by_name[names[0]] = raw.numpy()
            for name, scores in by_name.items():
                note(results, method=name, damping=damping, **quality(scores, asked))
            print(f"{normalize} at {damping:g}: {time.perf_counter() - start:.0f} s", flush=True)
    show(measured(results))


if __name__ == "__main__":
    main()
