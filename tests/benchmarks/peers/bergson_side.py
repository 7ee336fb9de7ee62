"""The same fit with bergson, run by the Python of an environment that has it.

    bergson_side.py WORK [--workers 2]

`fit.py` calls this; `peer_files.py` says what is read from WORK. Factors stay where bergson writes
them, WORK/bergson. It prints one line of JSON: the seconds of each pass, the peak of this process.

What is chosen, so that the two are comparable and bergson is at its best here:

- `approximate_hessians` with `method="kfac"` and `ev_correction`, which is its EK-FAC, in float32.
- `use_dataset_labels`: the data's own labels. `loss_reduction="sum"`: a sequence's loss is the sum.
- Every linear map of its base model is taken but those of `filter_modules`: the attention's. The
  output layer is not in the base model.
- Data are a `datasets` directory of tokens that tells their lengths, so that nothing is tokenised
  or mapped. bergson sorts documents by length and cuts batches by a token budget, padding included:
  `fit.py` finds its best. Its other options cost more passes (`module_partitions`), serve GPUs
  (`use_tf32_matmuls`, `fsdp`) or do not reach this command (`max_batch_size`, `auto_batch_size`).
- Several workers are its own processes, on gloo, and each decomposes the factors that it owns.

Its covariances are means over positions and Λ is a mean over documents, as ours are. It counts as a
position whatever is neither padding nor a sequence's last token; with every token labelled that is
what we count. gate and up projections have each their own input factor, twice the same.

Passes are told by its log: a pass lasts from the line about its modules to that about what it has
processed, its files included, and the eigenbasis is what lies between the two passes.
"""

import argparse
import logging
import os
from pathlib import Path

import torch
from bergson.config.config import DataConfig, DistributedConfig, HessianConfig, IndexConfig
from bergson.hessians.hessian_approximations import approximate_hessians
from peer_files import factor_dtype, print_report
from transformers import AutoConfig

LOG = "PEER_LOG"  # a variable of the environment, which reaches the workers
PRECISIONS = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--batch_tokens", type=int, default=4096, help="a batch, padding included")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser.parse_args()


def keep_log():
    """Writes what the passes log to the file that the environment names, with its times."""
    handler = logging.FileHandler(os.environ[LOG], delay=True)
    handler.setFormatter(logging.Formatter("%(created)f %(message)s"))
    logging.getLogger("CollectorComputer").addHandler(handler)


def seconds_of_passes(path):
    """Seconds of each pass, from the log."""
    lines = [line.split(" ", 1) for line in path.read_text().splitlines()]
    starts = [float(when) for when, what in lines if what.startswith("Tracking")]
    ends = [float(when) for when, what in lines if what.startswith("Total processed")]
    return {
        "covariance": ends[0] - starts[0],
        "eigenbasis": starts[1] - ends[0],
        "refit": ends[1] - starts[1],
    }


def main():
    args = arguments()
    dtype = AutoConfig.from_pretrained(args.work / "model").dtype
    log = args.work / "bergson_passes.log"
    log.unlink(missing_ok=True)
    os.environ[LOG] = str(log)
    keep_log()
    approximate_hessians(
        IndexConfig(
            run_path=str(args.work / "bergson"),
            model=str(args.work / "model"),
            precision=PRECISIONS[dtype],
            data=DataConfig(dataset=str(args.work / "fit")),
            token_batch_size=args.batch_tokens,
            loss_reduction="sum",
            filter_modules="*.self_attn.*",
            distributed=DistributedConfig(nproc_per_node=args.workers),
        ),
        HessianConfig(
            method="kfac",
            ev_correction=True,
            hessian_dtype=PRECISIONS[factor_dtype(dtype)],
            use_dataset_labels=True,
        ),
    )
    print_report("bergson", args.device, passes=seconds_of_passes(log))


if __name__ == "__main__":
    main()
elif LOG in os.environ:  # a worker, which imports this file first
    keep_log()
