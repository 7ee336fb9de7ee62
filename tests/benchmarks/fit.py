"""Fits factors of a random-weight Llama of a given shape, and says how near to the limit it is.

    python tests/benchmarks/fit.py                                    64 sequences of 256 tokens
    python tests/benchmarks/fit.py --sequences 128 --lengths 32 256   ragged
    python tests/benchmarks/fit.py --profile                          and where the time goes

For each pass: seconds, tokens/s, the least operations that it can do with (as `model_shapes.py`
counts them), and the share of the machine's own measured GEMM rate that this is. With `--profile`
the whole call's operations too, by the time that each takes by itself, as torch's profiler sees
them on the host (which slows it down by a few percent).
"""

import argparse
import resource
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ekfac_dist import estimate_factors
from ekfac_dist.report.tables import table

sys.path.append(str(Path(__file__).parent / "peers"))  # where the shared modules are
from model_shapes import Shape, gemm_rate, least_operations


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--mlp", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs=2, default=(256, 256), metavar=("MIN", "MAX"))
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--labels", default="sampled", choices=["sampled", "data"])
    parser.add_argument("--refit", default="per_sequence", choices=["per_sequence", "per_token"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    return parser.parse_args()


def make_data(args):
    generator = torch.Generator().manual_seed(0)
    low, high = args.lengths
    lengths = torch.randint(low, high + 1, (args.sequences,), generator=generator).tolist()
    return [
        {"input_ids": torch.randint(0, args.vocabulary, (n,), generator=generator)} for n in lengths
    ]


def profile_table(events):
    """The operations that take most time by themselves."""
    events = sorted(events, key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    rows = [
        [
            event.key,
            f"{event.self_cpu_time_total / 1e6:.2f}",
            f"{event.self_cpu_time_total / total:.1%}",
            str(event.count),
        ]
        for event in events[:20]
    ]
    return table(["operation", "seconds", "share", "calls"], rows)


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = Shape(args.hidden, args.mlp, args.layers, args.vocabulary)
    model = shape.model(args.lengths[1]).to(args.device, getattr(torch, args.dtype))
    data = make_data(args)
    lengths = [len(row["input_ids"]) - 1 for row in data]  # counted positions
    before = gemm_rate(args.device)
    start = time.perf_counter()
    profiler = profile(activities=[ProfilerActivity.CPU]) if args.profile else nullcontext()
    with profiler, tempfile.TemporaryDirectory() as directory:
        factors = estimate_factors(
            model,
            data,
            output=Path(directory) / "store",
            labels=args.labels,
            refit=args.refit,
            batch_tokens=args.batch_tokens,
        )
        whole = time.perf_counter() - start
        passes = factors.manifest["passes"]
    rate = max(before, gemm_rate(args.device))
    rows = []
    for name, (of_model, of_curvature) in least_operations(shape, lengths, args.refit).items():
        seconds = passes[name]["seconds"]
        least = of_model + of_curvature
        rows.append(
            [
                name,
                f"{seconds:.2f}",
                f"{sum(lengths) / seconds:,.0f}",
                f"{of_model / 1e9:,.0f}",
                f"{of_curvature / 1e9:,.0f}",
                f"{least / seconds / 1e9:,.0f}",
                f"{least / seconds / rate:.0%}",
            ]
        )
    rows.insert(1, ["eigenbasis", f"{passes['eigenbasis']['seconds']:.2f}", *[""] * 5])
    rows.append(["whole call", f"{whole:.2f}", *[""] * 5])
    threads = f"{torch.get_num_threads()} threads" if args.device == "cpu" else ""
    print(
        f"{shape}; {args.sequences} sequences, {args.lengths[0]}-{args.lengths[1]} tokens, "
        f"{sum(lengths)} counted positions; {args.dtype}, {args.labels} labels, {args.refit}"
    )
    print(f"{args.device} {threads}: float32 GEMM {rate / 1e9:,.0f} GFLOP/s\n")
    header = ["pass", "seconds", "tokens/s", "GFLOP model", "GFLOP curvature", "GFLOP/s", "of GEMM"]
    print(table(header, rows))
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB (host)")
    if args.profile:
        print("\n" + profile_table(profiler.key_averages()))
    if args.device == "cuda":
        print(f"            {torch.cuda.max_memory_allocated() / 1e9:.2f} GB (device)")


if __name__ == "__main__":
    main()
