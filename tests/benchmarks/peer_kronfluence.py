"""One phase of the same work with kronfluence, run by the Python of an environment that has it.

    peer_kronfluence.py WORK --phase covariance | eigenbasis | refit | scores [--rank 32]

`against_kronfluence.py` calls this, and writes what it reads from WORK:

    model/                 a saved Hugging Face model
    data.safetensors       for fit, train and queries: <set>.ids, <set>.labels, <set>.lengths, the
                           rows of a set laid end to end; -100 for no label
    modules.json           names of the modules to track

Each phase is a process of its own, so that its peak memory is its own. It prints one line of JSON:
seconds of the call, the process's peak and what it held before, in bytes. Factors and scores stay
where kronfluence writes them, WORK/kronfluence/{factors_*,scores_*}.

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
- Every dtype is the model's.
"""

import argparse
import json
import logging
import re
import time
from pathlib import Path

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

NO_LABEL = -100


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    phases = ["covariance", "eigenbasis", "refit", "scores"]
    parser.add_argument("--phase", required=True, choices=phases)
    parser.add_argument("--rank", type=int, default=None, help="of query gradients; none: exact")
    parser.add_argument("--full_svd", action="store_true", help="not its default, svd_lowrank")
    parser.add_argument("--train_batch", type=int, default=32, help="sequences")
    parser.add_argument("--query_batch", type=int, default=32, help="sequences")
    parser.add_argument(
        "--query_steps", type=int, default=1, help="query batches to a pass over the training data"
    )
    parser.add_argument(
        "--order", default="given", choices=["given", "length"], help="of the sequences in batches"
    )
    parser.add_argument("--name", default=None, help="of the scores; exact or rank<RANK>")
    parser.add_argument("--threads", type=int, default=None)
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


def read_rows(tensors, part):
    """A list of {input_ids, targets}, each ending with its last target."""
    lengths = tensors[f"{part}.lengths"].tolist()
    rows = []
    columns = (tensors[f"{part}.ids"].split(lengths), tensors[f"{part}.labels"].split(lengths))
    for ids, labels in zip(*columns, strict=True):
        end = int((labels != NO_LABEL).nonzero().max())
        rows.append({"input_ids": ids[:end], "targets": labels[1 : end + 1]})
    return rows


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


def status_bytes(field):
    """This process's VmHWM (peak resident memory) or VmRSS (resident now).

    Not getrusage's peak, which a child inherits from the process that started it.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)  # of svd_lowrank
    logging.disable(logging.WARNING)
    tensors = load_file(args.work / "data.safetensors")
    task = Summed(json.loads((args.work / "modules.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(args.work / "model")
    dtype = model.dtype
    analyzer = Analyzer(
        analysis_name="kronfluence",
        model=prepare_model(model, task),
        task=task,
        cpu=args.device == "cpu",
        disable_tqdm=True,
        output_dir=str(args.work),
    )
    factor_args = FactorArguments(
        strategy="ekfac",
        use_empirical_fisher=True,
        activation_covariance_dtype=dtype,
        gradient_covariance_dtype=dtype,
        per_sample_gradient_dtype=dtype,
        lambda_dtype=dtype,
    )
    loader = DataLoaderKwargs(collate_fn=collate)
    report = {"phase": args.phase}
    before = status_bytes("VmRSS")
    start = time.perf_counter()
    if args.phase == "eigenbasis":
        analyzer.perform_eigendecomposition(
            "fit", factor_args=factor_args, overwrite_output_dir=True
        )
    elif args.phase == "scores":
        scores_name = args.name or ("exact" if args.rank is None else f"rank{args.rank}")
        train, places = ordered(read_rows(tensors, "train"), args.order)
        analyzer.compute_pairwise_scores(
            scores_name=scores_name,
            factors_name="fit",
            query_dataset=read_rows(tensors, "queries"),
            train_dataset=train,
            per_device_query_batch_size=args.query_batch,
            per_device_train_batch_size=args.train_batch,
            dataloader_kwargs=loader,
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
        scores = analyzer.load_pairwise_scores(scores_name)["all_modules"][:, places]
        folder = analyzer.scores_output_dir(scores_name)
        save_file({"scores": scores.contiguous()}, folder / "in_given_order.safetensors")
        report["scores"] = str(folder / "in_given_order.safetensors")
    else:
        fit = {
            "covariance": analyzer.fit_covariance_matrices,
            "refit": analyzer.fit_lambda_matrices,
        }[args.phase]
        rows, _ = ordered(read_rows(tensors, "fit"), args.order)
        fit(
            factors_name="fit",
            dataset=rows,
            per_device_batch_size=args.train_batch,
            dataloader_kwargs=loader,
            factor_args=factor_args,
            overwrite_output_dir=True,
        )
    report["seconds"] = time.perf_counter() - start
    report["bytes_before"] = before
    report["peak_bytes"] = status_bytes("VmHWM")
    if args.device == "cuda":
        report["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    report["factors"] = str(analyzer.factors_output_dir("fit"))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
