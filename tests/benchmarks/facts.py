"""Does influence find the article that says a fact? An evaluation of the demo with a real model.

    python tests/benchmarks/facts.py runs/demo-real     a directory that `demo --real` made
    ekfac-dist evaluate --config runs/demo-real/facts.yaml

Of the demo's summaries, in the demo's order (by a hash of their titles), the first 60 that have a
description are asked about: "Photosynthesis:" → " Biological process to convert light into chemical
energy". Gold is the article's own summary, among all summaries of the demo. Chosen before any score
was known. The summary of an article and its description are by different authors, and neither is
known to be what the model was trained on.

The model is not trained: it is explained as it is, with the demo's factors. Scans are of rank 32.
"""

import argparse
import json
from pathlib import Path

import yaml

from ekfac_dist import load_factors
from ekfac_dist.demo.directory import DemoPaths
from ekfac_dist.demo.summaries import read_summaries

NUM_QUESTIONS = 60
RANK = 32
METHODS = ["bm25", "gradient_dot", "gradient_cosine", "kfac", "ekfac", "ekfac_cosine"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="directory of a demo with a real model")
    parser.add_argument("--dampings", type=float, nargs="*", default=[0.01, 0.1, 1.0, 10.0])
    return parser.parse_args()


def main():
    args = arguments()
    paths = DemoPaths(args.directory)
    summaries = read_summaries(paths.corpus)
    asked = [k for k, summary in enumerate(summaries) if summary.description][:NUM_QUESTIONS]
    queries = [
        {
            "prompt": f"{summaries[k].title}:",
            "completion": f" {summaries[k].description}",
            "gold": k,
        }
        for k in asked
    ]
    lines = [json.dumps(query, ensure_ascii=False) + "\n" for query in queries]
    (args.directory / "facts.jsonl").write_text("".join(lines), encoding="utf-8")
    fitted = load_factors(paths.factors).manifest["config"]
    evaluation = args.directory / "facts"
    config = {
        "model": {**fitted["model"], "name": str(paths.model)},
        "data": {**fitted["data"], "source": str(paths.corpus)},
        "factors": fitted["factors"],
        "queries": str(args.directory / "facts.jsonl"),
        "training": {"epochs": 0},
        "protocols": ["recall"],
        "methods": METHODS,
        "dampings": args.dampings,
        "damping_scales": ["geometric"],
        "rank": RANK,
        "output": str(evaluation),
    }
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (args.directory / "facts.yaml").write_text(text, encoding="utf-8")
    # The demo's own factors: they are not fitted again.
    (evaluation / "seed-0").mkdir(parents=True, exist_ok=True)
    store = evaluation / "seed-0" / "factors"
    if not store.is_symlink():
        store.symlink_to(paths.factors.resolve())
    print(f"{len(asked)} questions, {len(summaries)} summaries; next:")
    print(f"ekfac-dist evaluate --config {args.directory / 'facts.yaml'}")


if __name__ == "__main__":
    main()
