"""Our gradient index beside bergson's: time, disk, and how close their scores are to exact ones.

    python tests/benchmarks/peers/index.py --environments runs/peers --model MODEL --factors F \\
        --data DATA.jsonl --queries QUERIES.jsonl --work runs/peer-index [--gguf FILE] [--ranks 1 8]

Both sides get the first `--sequences` texts of the data, as the same tokens, and the queries. Ours
keeps each gradient at a rank in the eigenbasis of the factors F, of the same model, and answers
with EK-FAC; bergson's is its `build`, which projects both sides of each gradient at random to
`--projection` rows and columns, and answers with inner products. Each step of each side is a whole
command, from its start to its end, one after the other. Exact EK-FAC scores are those of our
`query` without an index. Shown are seconds, bytes a sequence, Pearson's correlation with the exact
scores (mean over queries), and how many of each query's exact first 20 are among a side's first 20.

What a step leaves in `--work` is used again.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from datasets import Dataset
from evaluation_scores import LINEAR, rows_of
from model_shapes import gemm_rate, processor
from peer_batches import Batch
from peer_environments import VERSIONS, peer_python
from peer_sides import HERE, Settings, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ekfac_dist import load_factors
from ekfac_dist.config import DataConfig, ModelConfig
from ekfac_dist.data.source import open_source
from ekfac_dist.data.tokenizing import tokenize
from ekfac_dist.influence.queries import tokenize_queries
from ekfac_dist.influence.query_texts import read_queries
from ekfac_dist.models.load.pretrained import load_tokenizer
from ekfac_dist.report.tables import table

LISTED = 20


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name in ("environments", "model", "factors", "data", "queries", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--gguf", default=None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--projection", type=int, default=16)
    for name, number in (
        *(("sequences", 500), ("max_tokens", 96)),
        *(("threads", 2), ("batch_tokens", 2048)),
    ):
        parser.add_argument(f"--{name}", type=int, default=number)
    return parser.parse_args()


# --- what both are given --------------------------------------------------------------------------


def prepare(args, data):
    """Writes what `bergson_index.py` reads, once; the modules that we do not track."""
    model_config = ModelConfig(name=str(args.model), gguf=args.gguf, dtype="float32")
    tokenizer, fingerprint = load_tokenizer(model_config)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, gguf_file=args.gguf, dtype=torch.float32
    )
    target = args.work / "model"
    if not target.is_dir():
        if hasattr(model.config, "quantization_config"):  # of a GGUF, whose weights are plain now
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    rows = {"train": rows_of(tokenize(open_source(data), data, tokenizer, fingerprint))}
    rows["queries"] = rows_of(
        tokenize_queries(read_queries(args.queries), tokenizer, None).sequences
    )
    for name, some in rows.items():
        columns = {key: [row[key].tolist() for row in some] for key in ("input_ids", "labels")}
        columns["length"] = [len(ids) for ids in columns["input_ids"]]
        shutil.rmtree(args.work / name, ignore_errors=True)
        Dataset.from_dict(columns).save_to_disk(args.work / name)
    linear = {name for name, part in model.base_model.named_modules() if isinstance(part, LINEAR)}
    prefix = f"{model.base_model_prefix}."
    tracked = {name.removeprefix(prefix) for name in load_factors(args.factors).modules}
    return sorted(linear - tracked)


# --- the sides ------------------------------------------------------------------------------------


def ours(args, command, output, *more):
    """What `run` measures of a command of ours."""
    shutil.rmtree(output, ignore_errors=True)
    words = [sys.executable, "-m", "ekfac_dist", command, "--factors", args.factors]
    words += ["--output", output, "--model.name", args.model, "--model.dtype", "float32"]
    words += ["--model.gguf", args.gguf] if args.gguf else []
    words += ["--data.source", args.data, "--data.text", "text"]
    words += ["--data.max_tokens", args.max_tokens, "--data.max_sequences", args.sequences]
    words += ["--batch_tokens", args.batch_tokens]
    return run([*words, *more], settings(args), output.with_suffix(".log"), reports=False)


def query(args, output, *more):
    words = ["--queries", args.queries, "--scores.per_token", "none"]
    return ours(args, "query", output, *words, *more)


def bergson(args, phase, leave_out):
    """The same of a phase of bergson's, and its report."""
    python = peer_python(args.environments, "bergson")
    words = [python, HERE / "bergson_index.py", args.work, "--phase", phase]
    words += ["--projection", args.projection, "--batch_tokens", args.batch_tokens]
    words += ["--leave_out", ",".join(leave_out)]
    return run(words, settings(args), args.work / f"bergson-{phase}.log")


def settings(args):
    return Settings(args.environments, "cpu", args.threads, 1, Batch(args.batch_tokens))


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# --- what is shown --------------------------------------------------------------------------------


def agreement(scores, exact):
    """Pearson's correlation, and the share of the exact first 20 among the first 20; means."""
    pearson, shared = [], []
    for ours_N, exact_N in zip(scores.double(), exact.double(), strict=True):
        pearson.append(torch.corrcoef(torch.stack([ours_N, exact_N]))[0, 1])
        firsts = [set(one.topk(LISTED).indices.tolist()) for one in (ours_N, exact_N)]
        shared.append(len(firsts[0] & firsts[1]) / LISTED)
    return f"{torch.stack(pearson).mean():.2f}", f"{sum(shared) / len(shared):.2f}"


def scores_of(results):
    return load_file(results / "scores.safetensors")["scores"]


def main():
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    args.work = args.work.resolve()
    data = DataConfig(
        source=str(args.data),
        text="text",
        max_tokens=args.max_tokens,
        max_sequences=args.sequences,
    )
    leave_out = prepare(args, data)
    print(
        f"{processor()}, {args.threads} threads; {gemm_rate('cpu') / 1e9:,.0f} GFLOP/s", flush=True
    )
    exact = query(args, args.work / "exact")
    exact_QN = scores_of(args.work / "exact")
    rows = [["exact", "", f"{exact['whole_seconds']:.0f}", "", "", "1", "1"]]
    found = []
    for rank in args.ranks:
        index = args.work / f"index-{rank}"
        made = ours(args, "index", index, "--index.rank", rank)
        results = args.work / f"from-{rank}"
        asked = query(args, results, "--index", index, "--scores.rescore", 0)
        found.append((f"ours, rank {rank}", made, asked, size_of(index), scores_of(results)))
    made = bergson(args, "build", leave_out)
    asked = bergson(args, "ask", leave_out)
    scores_QN = load_file(asked["scores"])["scores"]
    name = f"bergson {VERSIONS['bergson']}, {args.projection} × {args.projection}"
    found.append((name, made, asked, asked["index_bytes"], scores_QN))
    for name, made, asked, num_bytes, scores_QN in found:
        peak = max(made["all_peak_bytes"], asked["all_peak_bytes"]) / 1e9
        size = f"{num_bytes / args.sequences / 1e3:,.0f} kB"
        times = [f"{one['whole_seconds']:.0f}" for one in (made, asked)]
        rows.append([name, *times, size, f"{peak:.1f} GB", *agreement(scores_QN, exact_QN)])
    heads = ["", "index, s", "all queries, s", "a sequence", "peak", "Pearson", "first 20"]
    print(table(heads, rows))


if __name__ == "__main__":
    main()
