"""The same work with this package, through its public functions.

    ours.py WORK --phase fit | scores

`fit.py`, `scores.py` and `evaluation_scores.py` call this; `peer_files.py` says what is read from
WORK. Factors stay in WORK/ours, in the package's own format. It prints one line of JSON: the
seconds of each pass, the peak of this process. On several workers it is started by `accelerate
launch`, every worker decomposes its share, and the first one prints.
"""

import argparse
import os
import time
from pathlib import Path

from peer_files import factor_dtype, load_rows, print_report, status_bytes
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from ekfac_dist import estimate_factors, influence_scores, load_factors


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--phase", default="fit", choices=["fit", "scores"])
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--eigen", default="rank0", choices=["rank0", "sharded"])
    parser.add_argument("--labels", default="data", choices=["data", "sampled"])
    parser.add_argument("--damping", type=float, default=0.1, help="a multiple of mean(Λ)")
    parser.add_argument("--rank", type=int, default=None, help="of query gradients; none: exact")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser.parse_args()


def fit(args, model):
    """Fits and stores factors; the seconds of each pass."""
    factors = estimate_factors(
        model,
        load_rows(args.work / "data.safetensors", "fit"),
        output=args.work / "ours",
        labels=args.labels,
        accumulate=str(factor_dtype(model.dtype)).removeprefix("torch."),
        eigen=args.eigen,
        batch_tokens=args.batch_tokens,
    )
    return {name: part["seconds"] for name, part in factors.manifest["passes"].items()}


def score(args, model):
    """Writes the scores [queries, train]; the path of their file."""
    data = args.work / "data.safetensors"
    result = influence_scores(
        model,
        load_factors(args.work / "ours", model=model),
        load_rows(data, "queries"),
        load_rows(data, "train"),
        damping=args.damping,
        rank=args.rank,
        per_token="none",
        batch_tokens=args.batch_tokens,
    )
    path = args.work / f"ours_{args.rank or 'exact'}_{args.damping:g}.safetensors"
    save_file({"scores": result.scores.contiguous()}, path)
    return str(path)


def main():
    args = arguments()
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.work / "model").to(args.device)
    report = {"bytes_before": status_bytes("VmRSS")}
    start, cpu_start = time.perf_counter(), time.process_time()
    if args.phase == "fit":
        report["passes"] = fit(args, model)
    else:
        report["scores"] = score(args, model)
    report["seconds"] = time.perf_counter() - start
    report["cpu_seconds"] = time.process_time() - cpu_start
    if os.environ.get("RANK", "0") == "0":
        print_report("ekfac_dist", args.device, **report)


if __name__ == "__main__":
    main()
