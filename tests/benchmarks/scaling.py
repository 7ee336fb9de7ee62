"""How a fit grows: with tokens, with layers, and with workers.

    python tests/benchmarks/scaling.py                  all three, some 15 minutes on 2 cores
    python tests/benchmarks/scaling.py --of workers --repeats 3

Each fit is a process of its own, or several started by `accelerate launch`, on a saved
random-weight Llama (hidden 768, MLP 2048) and sequences of 256 tokens with their own labels. Shown
are the seconds of each pass, over those of the first line and over what is proportional to work: 1
is linear. Peak memory is that of the largest process. Two workers have one thread each, and are
compared with one worker of one thread, in turns; the median is shown.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent / "peers"))  # where the shared modules are
from model_shapes import Shape
from peer_sides import Settings, fit_command, make_rows, prepare, run

from ekfac_dist.report.tables import table

PASSES = ("covariance", "eigenbasis", "refit")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ["tokens", "layers", "workers"]
    parser.add_argument("--of", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--repeats", type=int, default=2, help="fits of each kind of workers")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--small", action="store_true", help="hidden 64, MLP 160, 16 sequences")
    args = parser.parse_args()
    args.hidden, args.mlp = (64, 160) if args.small else (768, 2048)
    args.sequences = 16 if args.small else args.sequences
    return args


def fit(args, *, sequences, layers=4, workers=1, threads=2):
    """One fit in a new folder; the report of its first worker."""
    settings = Settings(None, "cpu", threads, workers, batch_tokens=4096, batch=1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        rows = make_rows(sequences, (256, 256), 4096, torch.Generator().manual_seed(1))
        prepare(work, Shape(args.hidden, args.mlp, layers, 4096), "float32", fit=rows)
        return run(fit_command("ours", work, settings), settings, Path(folder) / "log")


def growth(name, sizes, reports):
    """A table of fits of several sizes."""
    first = reports[0]["passes"]
    rows = []
    for size, report in zip(sizes, reports, strict=True):
        row = [str(size)]
        for part in PASSES:
            seconds = report["passes"][part]
            relative = seconds / first[part] / (size / sizes[0])
            row.append(f"{seconds:.1f} ({relative:.2f})")
        rows.append([*row, f"{report['peak_bytes'] / 1e9:.2f}"])
    return table([name, *(f"{part}, s (linear: 1)" for part in PASSES), "peak GB"], rows)


def workers_table(one, two):
    """Median seconds of each pass by one and by two workers of one thread."""
    rows = []
    for part in PASSES:
        medians = [statistics.median(r["passes"][part] for r in runs) for runs in (one, two)]
        rows.append([part, *(f"{m:.1f}" for m in medians), f"{medians[0] / medians[1]:.2f}"])
    return table(["pass", "1 worker, s", "2 workers, s", "times faster"], rows)


def main():
    args = arguments()
    sys.stdout.reconfigure(line_buffering=True)
    if "tokens" in args.of:
        sizes = [args.sequences // 2, args.sequences, args.sequences * 2]
        reports = [fit(args, sequences=size) for size in sizes]
        print(growth("sequences", sizes, reports) + "\n")
    if "layers" in args.of:
        sizes = [2, 4, 8]
        reports = [fit(args, sequences=args.sequences // 2, layers=size) for size in sizes]
        print(growth("layers", sizes, reports) + "\n")
    if "workers" in args.of:
        one, two = [], []
        for _ in range(args.repeats):
            one.append(fit(args, sequences=args.sequences, threads=1))
            two.append(fit(args, sequences=args.sequences, workers=2))
        print(workers_table(one, two))


if __name__ == "__main__":
    main()
