"""The same fit by this package, kronfluence and bergson: agreement first, then time and memory.

    python tests/benchmarks/peers/fit.py --environments runs/peers
    python tests/benchmarks/peers/fit.py --environments runs/peers --small --repeats 1
    python tests/benchmarks/peers/fit.py --environments runs/peers --rows qwen --device cuda

All rows take an hour and a half on 2 cores. With `--json` and `--also` they can be run in parts,
each of which compares within itself, and shown together.

The peers' environments are made in the directory that `--environments` names, where they are
missing. All sides get one saved random-weight model, the same rows of tokens with the data's own
labels, and the MLPs' modules; each run of a side is a process of its own, from its start over
reading the model, both passes and the decomposition to stored factors. What was chosen for a side
is said where it is: `ours.py`, `kronfluence_side.py`, `bergson_side.py`.

    uniform    64 sequences of 256 tokens; a Llama of hidden 768, MLP 2048, 4 layers
    ragged     the same, 128 sequences of 32 to 256 tokens
    unsorted   as ragged, with kronfluence in the given order, which it keeps if nobody sorts for it
    long       the same, 32 sequences of 512 tokens
    workers    as uniform, by two workers with half of the threads each
    qwen       64 sequences of 512 tokens; the shape of Qwen2.5-0.5B

First each side fits once, and E of every module (see `peer_agreement.py`) is compared with ours,
in the one definition that all three share: Λ is a mean over sequences of summed losses. Where one
module differs by more than rounding can explain, nothing is timed and the exit status is 1. Then
the sides run in turns; the run with the median time is shown. A batch has `--batch_tokens` tokens,
padding included, on every side; kronfluence counts sequences, and gets so many of the longest.

`peak` is that of all processes of a side's command, of which one worker is one process; with
`--device cuda` it is what torch has allocated on the GPU. The share of the GEMM rate is the time
that the least operations of a pass would take at the measured rate of a square product, the model's
in the model's dtype and the factors' in float32, over the time of the pass; the rate is the better
of one before and one after all runs.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from peer_agreement import errors_of, errors_table, median_and_worst
from peer_environments import VERSIONS, peer_python
from peer_files import load_modules
from peer_results import markdown, peak_bytes, plot, shares_of_gemm
from peer_sides import (
    Settings,
    fit_command,
    make_rows,
    prepare,
    read_factors,
    require_same_modules,
    run,
)
from transformers.utils.logging import disable_progress_bar

sys.path.append(str(Path(__file__).parents[1]))
from model_shapes import Shape, gemm_rate, least_operations

LLAMA = Shape(768, 2048, 4, 4096)
QWEN = Shape(896, 4864, 24, 151936, heads=14, key_value_heads=2, qwen=True)
SMALL = {LLAMA: Shape(64, 160, 2, 256), QWEN: Shape(64, 176, 2, 512, 4, 2, qwen=True)}
TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-1}
VARIABLES = ("OMP_WAIT_POLICY", "OMP_PROC_BIND", "KMP_BLOCKTIME", "MALLOC_ARENA_MAX", "LD_PRELOAD")


@dataclass(frozen=True)
class Row:
    """One kind of work.

    Attributes:
        lengths: Fewest and most tokens of a sequence.
        peers: Who can do it, or is asked.
        order: Of the sequences that kronfluence is given, "length" or "given".
    """

    shape: Shape
    sequences: int
    lengths: tuple[int, int]
    workers: int = 1
    peers: tuple[str, ...] = tuple(VERSIONS)
    order: str = "length"

    def small(self):
        """The same in seconds."""
        low, high = (length // 4 for length in self.lengths)
        return replace(self, shape=SMALL[self.shape], sequences=24, lengths=(low, high))

    def __str__(self):
        low, high = self.lengths
        tokens = str(low) if low == high else f"{low}-{high}"
        workers = f", {self.workers} workers" if self.workers > 1 else ""
        return f"{self.sequences} sequences of {tokens} tokens{workers}; {self.shape}"


ROWS = {
    "uniform": Row(LLAMA, 64, (256, 256)),
    "ragged": Row(LLAMA, 128, (32, 256)),
    "unsorted": Row(LLAMA, 128, (32, 256), peers=("kronfluence",), order="given"),
    "long": Row(LLAMA, 32, (512, 512)),
    "workers": Row(LLAMA, 64, (256, 256), workers=2, peers=("bergson",)),
    "qwen": Row(QWEN, 64, (512, 512), peers=("kronfluence",)),
}


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--environments", type=Path, required=True, help="directory of the peers'")
    rows = [name for name in ROWS if name != "qwen"]
    parser.add_argument("--rows", nargs="+", default=rows, choices=list(ROWS))
    parser.add_argument("--peers", nargs="*", default=list(VERSIONS), choices=list(VERSIONS))
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--small", action="store_true", help="tiny models and few sequences")
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCES), help="the model's")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a side, in all")
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--kronfluence_batch", type=int, default=None, help="sequences")
    parser.add_argument("--bergson_tokens", type=int, default=None, help="default: batch_tokens")
    parser.add_argument("--work", type=Path, default=None, help="folder to keep everything in")
    parser.add_argument("--plot", type=Path, default=None, help="SVG file to write")
    parser.add_argument("--json", type=Path, default=None, help="file for all runs")
    parser.add_argument(
        "--also", type=Path, default=None, help="--json of an earlier run, whose rows come first"
    )
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats is at least 1")
    if args.work is not None and args.work.exists():
        parser.error(f"--work {args.work} exists; name a new folder")
    if args.also is not None and not args.also.is_file():
        parser.error(f"--also {args.also} is no file; give what an earlier run wrote with --json")
    return args


def settings_of(args, row, side):
    """How a side does a row."""
    tokens = args.bergson_tokens if side == "bergson" else None
    return Settings(
        environments=args.environments,
        device=args.device,
        threads=args.threads,
        workers=row.workers,
        batch_tokens=tokens or args.batch_tokens,
        batch=args.kronfluence_batch or max(1, args.batch_tokens // row.lengths[1]),
        order=row.order,
    )


def fit(args, row, side, work):
    """One measured fit, into a folder without an earlier one."""
    for left in work.glob(f"{side}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    settings = settings_of(args, row, side)
    return run(fit_command(side, work, settings), settings, work / f"{side}.log")


def agreement(args, name, row, sides, work):
    """Errors of E of each peer's factors to ours, printed; ends the program where they differ."""
    for side in sides:
        fit(args, row, side, work)
    require_same_modules(sides, work)
    modules = load_modules(work)
    compared = {
        side: errors_of(modules, *(read_factors(s, work) for s in (side, "ours")), args.device)
        for side in sides
        if side != "ours"
    }
    print(f"{name}: {row}")
    print(errors_table({f"{side} to ours": errors for side, errors in compared.items()}) + "\n")
    for side, errors in compared.items():
        worst = median_and_worst(errors)[1]
        if not worst <= TOLERANCES[args.dtype]:  # NaN too
            sys.exit(
                f"{side}'s factors are not ours: E of a module of row {name} differs by "
                f"{worst:.1e}, more than {TOLERANCES[args.dtype]:.0e}. Nothing was timed."
            )
    return compared


def timings(args, name, row, sides, work):
    """Measured runs of all sides, in turns: {side: [report, …]}."""
    runs = {side: [] for side in sides}
    for number in range(1, args.repeats + 1):
        for side in sides:
            report = fit(args, row, side, work)
            runs[side].append(report)
            print(
                f"{name}, {number} of {args.repeats}, {side}: {report['whole_seconds']:.2f} s, "
                f"{peak_bytes(report) / 1e9:.2f} GB",
                flush=True,
            )
    return runs


def gemm_rates(args):
    """The GEMM rate in the model's dtype and in the factors' float32."""
    torch.set_num_threads(args.threads)
    return [gemm_rate(args.device, d) for d in (getattr(torch, args.dtype), torch.float32)]


def least_seconds_of(args, rows, positions, rates):
    """What each pass would take at the GEMM rate: {row: {pass: seconds}}.

    Args:
        positions: {row: counted positions of each sequence}.
        rates: The GEMM rates.
    """
    least = {}
    for name, row in rows.items():
        least[name] = {
            part: of_model / rates[0] + of_curvature / rates[1]
            for part, (of_model, of_curvature) in least_operations(
                row.shape, positions[name]
            ).items()
        }
    said = f"{rates[0] / 1e9:,.0f} GFLOP/s in {args.dtype}"
    if args.dtype != "float32":
        said += f", {rates[1] / 1e9:,.0f} in float32"
    print(f"GEMM rate: {said}\n")
    return least


def machine(args):
    """Where and how it ran, in words and numbers."""
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    device = torch.cuda.get_device_name() if args.device == "cuda" else None
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
        "threads": args.threads,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def earlier_rows(args, where):
    """What an earlier run found, of the same machine and dtype."""
    if args.also is None:
        return {name: {} for name in ("results", "least_seconds", "rows", "agreement")}
    earlier = json.loads(args.also.read_text())
    if earlier["machine"] != where or earlier["arguments"]["dtype"] != args.dtype:
        sys.exit(f"--also {args.also} is of another machine, of other settings or another dtype")
    return earlier


def compare(args, folder):
    """The whole benchmark in a folder; prints, and writes what was asked for."""
    rows = {name: ROWS[name].small() if args.small else ROWS[name] for name in args.rows}
    sides = {n: ["ours", *(p for p in row.peers if p in args.peers)] for n, row in rows.items()}
    compared, positions = {}, {}
    for name, row in rows.items():
        generator = torch.Generator().manual_seed(1)
        data = make_rows(row.sequences, row.lengths, row.shape.vocabulary, generator)
        positions[name] = [len(one["input_ids"]) - 1 for one in data]
        prepare(folder / name, row.shape, args.dtype, fit=data)
        compared[name] = agreement(args, name, row, sides[name], folder / name)
    where, before = machine(args), gemm_rates(args)
    earlier = earlier_rows(args, where)
    results = earlier["results"] | {
        n: timings(args, n, row, sides[n], folder / n) for n, row in rows.items()
    }
    computer = where["device"] or f"{where['processor']}, {args.threads} threads"
    said = f"median of {args.repeats}, {args.dtype} models, {computer}"
    table = markdown(results)
    print(f"\n{said}\n\n{table}\n")
    least = earlier["least_seconds"] | least_seconds_of(
        args, rows, positions, [max(rates) for rates in zip(before, gemm_rates(args), strict=True)]
    )
    print(shares_of_gemm(results, least))
    if args.plot is not None:
        plot(results, args.plot, said)
    if args.json is not None:
        content = {
            "machine": where,
            "arguments": {name: str(value) for name, value in vars(args).items()},
            "rows": earlier["rows"] | {name: asdict(row) for name, row in rows.items()},
            "agreement": earlier["agreement"] | compared,
            "results": results,
            "least_seconds": least,
            "table": table,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n")


def main():
    args = arguments()
    sys.stdout.reconfigure(line_buffering=True)
    disable_progress_bar()
    for peer in args.peers:
        if any(peer in ROWS[name].peers for name in args.rows):
            peer_python(args.environments, peer)  # made before anything else
    if args.work is not None:
        compare(args, args.work.resolve())
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


if __name__ == "__main__":
    main()
