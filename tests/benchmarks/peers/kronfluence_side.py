"""The same work with kronfluence, run by the Python of an environment that has it.

    kronfluence_side.py WORK --phase fit | scores [--rank 32]

`fit.py` and `scores.py` call this; `peer_files.py` says what is read from WORK. Factors and scores
stay where kronfluence writes them, WORK/kronfluence/{factors_*,scores_*}. It prints one line of
JSON: the seconds of each pass or of scoring, the peak of this process.

What makes the two comparable:

- A sequence's loss is the sum over its labels. Inputs are ids[:-1] and targets labels[1:], both cut
  after the last label, so every position that is not padding is a counted one.
- Padding is on the right and attention causal: padded positions have no target and reach no real
  one. They are given to kronfluence as its attention mask and not to the model, which is then free
  to use its faster kernels.
- `use_empirical_fisher`: the data's own labels.
- `damping_factor=None`: 0.1 times the mean of each module's Λ, which it divides by the number of
  sequences first.
- The measurement is the sum of -log p, as the loss is: so a positive score means that more of the
  training sequence makes the query more likely.
- Factors, gradients of sequences and scores are float32, or float64 for a float64 model.

It pads a batch to its longest and keeps the order that it is given. At its best it is given
sequences sorted by length, and a batch of the size that `fit.py` finds to be its best. What else it
offers would not be the same work (`amp_dtype`, a narrower `eigendecomposition_dtype` than its own
float64, which is ours too), or costs more passes to save memory (partitions of modules and data).
"""

import argparse
import logging
import time
from pathlib import Path

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from peer_files import (
    NO_LABEL,
    factor_dtype,
    load_modules,
    load_rows,
    print_report,
    status_bytes,
)
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--phase", default="fit", choices=["fit", "scores"])
    parser.add_argument("--batch", type=int, default=32, help="sequences to fit on, or to score")
    parser.add_argument(
        "--iterative", action="store_true", help="one sequence of a batch at a time in Λ"
    )
    parser.add_argument("--query_batch", type=int, default=32, help="sequences")
    parser.add_argument(
        "--query_steps", type=int, default=1, help="query batches to a pass over the training data"
    )
    parser.add_argument("--rank", type=int, default=None, help="of query gradients; none: exact")
    parser.add_argument("--full_svd", action="store_true", help="not its default, svd_lowrank")
    parser.add_argument(
        "--order", default="given", choices=["given", "length"], help="of the sequences"
    )
    parser.add_argument("--name", default=None, help="of the scores; exact or rank<RANK>")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser.parse_args()


class Summed(Task):
    """Language modelling with summed losses, on the named modules."""

    def __init__(self, modules):
        self.modules = modules

    def get_influence_tracked_modules(self):
        return self.modules

    def compute_train_loss(self, batch, model, sample=False):
        assert not sample, "labels are the data's own"
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return functional.cross_entropy(
            logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum"
        )

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_attention_mask(self, batch):
        return batch["mask"]


def shifted(rows):
    """A list of {input_ids, targets}, each ending with its last target."""
    found = []
    for row in rows:
        end = int((row["labels"] != NO_LABEL).nonzero().max())
        found.append({"input_ids": row["input_ids"][:end], "targets": row["labels"][1 : end + 1]})
    return found


def ordered(rows, order):
    """Rows in the order wanted, and for each of the given rows its place in it."""
    if order == "given":
        return rows, torch.arange(len(rows))
    by_length = sorted(range(len(rows)), key=lambda k: len(rows[k]["input_ids"]))
    return [rows[k] for k in by_length], torch.tensor(by_length).argsort()


def collate(rows):
    """Pads to the batch's longest, on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.int64),
        "targets": torch.full((len(rows), longest), NO_LABEL),
        "mask": torch.zeros(len(rows), longest, dtype=torch.int64),
    }
    for k, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][k, :length] = row["input_ids"]
        batch["targets"][k, :length] = row["targets"]
        batch["mask"][k, :length] = 1
    return batch


def fit(args, analyzer, dtype):
    """Fits and stores factors; the seconds of each pass."""
    factor_args = FactorArguments(
        strategy="ekfac",
        use_empirical_fisher=True,
        activation_covariance_dtype=dtype,
        gradient_covariance_dtype=dtype,
        per_sample_gradient_dtype=dtype,
        lambda_dtype=dtype,
        use_iterative_lambda_aggregation=args.iterative,
    )
    rows, _ = ordered(shifted(load_rows(args.work / "data.safetensors", "fit")), args.order)
    common = {"factors_name": "fit", "factor_args": factor_args, "overwrite_output_dir": True}
    on_rows = {
        "dataset": rows,
        "per_device_batch_size": args.batch,
        "dataloader_kwargs": DataLoaderKwargs(collate_fn=collate),
    }
    passes = {
        "covariance": lambda: analyzer.fit_covariance_matrices(**on_rows, **common),
        "eigenbasis": lambda: analyzer.perform_eigendecomposition(**common),
        "refit": lambda: analyzer.fit_lambda_matrices(**on_rows, **common),
    }
    seconds = {}
    for name, call in passes.items():
        start = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - start
    return seconds


def score(args, analyzer, dtype):
    """Writes the scores [queries, train], in the given order; the path of their file."""
    data = args.work / "data.safetensors"
    name = args.name or ("exact" if args.rank is None else f"rank{args.rank}")
    train, places = ordered(shifted(load_rows(data, "train")), args.order)
    analyzer.compute_pairwise_scores(
        scores_name=name,
        factors_name="fit",
        query_dataset=shifted(load_rows(data, "queries")),
        train_dataset=train,
        per_device_query_batch_size=args.query_batch,
        per_device_train_batch_size=args.batch,
        dataloader_kwargs=DataLoaderKwargs(collate_fn=collate),
        score_args=ScoreArguments(
            damping_factor=None,
            query_gradient_accumulation_steps=args.query_steps,
            query_gradient_low_rank=args.rank,
            use_full_svd=args.full_svd,
            per_sample_gradient_dtype=dtype,
            precondition_dtype=dtype,
            query_gradient_svd_dtype=dtype,
            score_dtype=dtype,
        ),
        overwrite_output_dir=True,
    )
    scores = analyzer.load_pairwise_scores(name)["all_modules"][:, places]
    path = analyzer.scores_output_dir(name) / "in_given_order.safetensors"
    save_file({"scores": scores.contiguous()}, path)
    return str(path)


def main():
    args = arguments()
    torch.manual_seed(0)  # of svd_lowrank
    logging.disable(logging.WARNING)
    task = Summed(load_modules(args.work))
    model = AutoModelForCausalLM.from_pretrained(args.work / "model")
    dtype = factor_dtype(model.dtype)
    analyzer = Analyzer(
        analysis_name="kronfluence",
        model=prepare_model(model, task),
        task=task,
        cpu=args.device == "cpu",
        disable_tqdm=True,
        output_dir=str(args.work),
    )
    report = {"bytes_before": status_bytes("VmRSS")}
    start = time.perf_counter()
    if args.phase == "fit":
        report["passes"] = fit(args, analyzer, dtype)
    else:
        report["scores"] = score(args, analyzer, dtype)
    report["seconds"] = time.perf_counter() - start
    print_report("kronfluence", args.device, **report)


if __name__ == "__main__":
    main()
