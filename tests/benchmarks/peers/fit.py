"""The same fit by this package, kronfluence and bergson: agreement first, then time and memory.

    python tests/benchmarks/peers/fit.py --environments runs/peers --json runs/peers.json
    python tests/benchmarks/peers/fit.py --environments runs/peers --small --repeats 1
    python tests/benchmarks/peers/fit.py --environments runs/peers --rows qwen --device cuda

The first takes an hour on 2 cores. Each row is written to `--json` when it is done; with `--also`
rows can be run in parts, each of which compares within itself, and shown together.

The peers' environments are made in the directory that `--environments` names, where they are
missing. All sides get one saved random-weight model, the same rows of tokens with the data's own
labels, and the MLPs' modules; each run of a side is a process of its own, from its start over
reading the model, both passes and the decomposition to stored factors. What was chosen for a side
is said where it is: `ours.py`, `kronfluence_side.py`, `bergson_side.py`.

    uniform    64 sequences of 256 tokens; a Llama of hidden 768, MLP 2048, 4 layers
    ragged     the same, 128 sequences of 32 to 256 tokens
    long       the same, 32 sequences of 512 tokens
    workers    as uniform, by two workers with half of the threads each
    unsorted   as ragged, with kronfluence in the given order, which it keeps if nobody sorts for it
    qwen       64 sequences of 512 tokens; the shape of Qwen2.5-0.5B

Every side works with its best batch of those in `peer_batches.py`. For each row each is tried once
on a part of the work, a quarter of the layers and half of the sequences, and the whole is estimated
from it: the passes by layers and tokens, the decomposition by layers. `--sweep whole` tries them on
the whole work instead, three times as long as a round. `--settings` gives batches by hand, for all
rows or for one, and what is given is not swept; a sweep ends with the words that give its own.

Then the sides run in turns, `--repeats` rounds. With the factors of the first round E of every
module (see `peer_agreement.py`) is compared with ours, in the one definition that all three share:
Λ is a mean over sequences of summed losses. Where one module differs by more than rounding can
explain, no times are told and the exit status is 1. The run with the median time is shown, with the
range over rounds; ratios are within a round.

`peak` is that of all processes of a side's command, of which one worker is one process; with
`--device cuda` it is what torch has allocated on the GPU. The share of the GEMM rate is the time
that the least operations of a pass would take at the measured rate of a square product, the model's
in the model's dtype and the factors' in float32, over the time of the pass; the rate is the better
of one before and one after the runs of the row.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
from model_shapes import gemm_rate, least_operations, processor
from peer_agreement import errors_of, errors_table, median_and_worst
from peer_batches import (
    as_settings,
    best,
    candidates,
    estimated_seconds,
    given_batch,
    parsed,
    sweep_table,
)
from peer_environments import VERSIONS, peer_python
from peer_files import load_modules
from peer_results import (
    circumstances,
    markdown,
    peak_bytes,
    plot,
    readme_table,
    shares_of_gemm,
)
from peer_rows import DEFAULT_ROWS, ROWS
from peer_sides import (
    Settings,
    fit_command,
    prepare,
    read_factors,
    require_same_modules,
    run,
)
from transformers.utils.logging import disable_progress_bar

TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-1}
VARIABLES = ("OMP_WAIT_POLICY", "OMP_PROC_BIND", "KMP_BLOCKTIME", "MALLOC_ARENA_MAX", "LD_PRELOAD")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--environments", type=Path, required=True, help="directory of the peers'")
    parser.add_argument("--rows", nargs="+", default=DEFAULT_ROWS, choices=list(ROWS))
    parser.add_argument("--peers", nargs="*", default=list(VERSIONS), choices=list(VERSIONS))
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--small", action="store_true", help="tiny models and few sequences")
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCES), help="the model's")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a side, in all")
    parser.add_argument(
        "--sweep", default="part", choices=["part", "whole"], help="work to try batches on"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        default=[],
        metavar="[ROW:]SIDE=SIZE[,iterative]",
        help="batches, which are not swept then: ours=2048 kronfluence=4 long:bergson=512",
    )
    parser.add_argument("--work", type=Path, default=None, help="folder to keep everything in")
    parser.add_argument("--plot", type=Path, default=None, help="SVG file to write")
    parser.add_argument("--json", type=Path, default=None, help="file for all runs")
    parser.add_argument(
        "--also", type=Path, default=None, help="--json of an earlier run, whose rows come first"
    )
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats is at least 1")
    try:
        args.settings = [parsed(text) for text in args.settings]
    except ValueError as error:
        parser.error(f"--settings: {error}")
    strange = {row for row, _, _ in args.settings} - {None, *args.rows}
    if strange:
        parser.error(f"--settings: {', '.join(sorted(strange))} is not among --rows")
    if args.work is not None and args.work.exists():
        parser.error(f"--work {args.work} exists; name a new folder")
    if args.also is not None and not args.also.is_file():
        parser.error(f"--also {args.also} is no file; give what an earlier run wrote with --json")
    return args


def fit(args, row, side, batch, work):
    """One measured fit with a batch, into a folder without an earlier one."""
    for left in work.glob(f"{side}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    settings = Settings(
        environments=args.environments,
        device=args.device,
        threads=args.threads,
        workers=row.workers,
        batch=batch,
        order=row.order,
    )
    report = run(fit_command(side, work, settings), settings, work / f"{side}.log")
    return report | {"batch": batch.words(side)}


def num_positions(sequences):
    """Counted positions of each sequence."""
    return [len(one["input_ids"]) - 1 for one in sequences]


def prepare_row(args, row, work):
    """Writes a row's model and data into a new folder; counted positions of each sequence."""
    data = row.data()
    prepare(work, row.shape, args.dtype, fit=data)
    return num_positions(data)


def warm_up(args, sides, folder):
    """Each side once, on a tiny work: its files are read, and it runs at all."""
    row = ROWS["uniform"].small()
    prepare_row(args, row, folder)
    for side in sides:
        first, *_ = candidates(side, row.sequences, row.lengths[1], args.threads, args.device)
        fit(args, row, side, first, folder)
    shutil.rmtree(folder)


def sweep(args, name, row, sides, folder):
    """All candidates of the sides whose batch is not given: {side: [what was tried, …]}."""
    asked = [side for side in sides if given_batch(args.settings, name, side) is None]
    if not asked:
        return {}
    part = row.part() if args.sweep == "part" else row
    positions = prepare_row(args, part, folder)
    tokens = sum(num_positions(row.data())) / sum(positions)
    layers = row.shape.layers / part.shape.layers
    found = {}
    for side in asked:
        threads = max(1, args.threads // row.workers)
        found[side] = []
        for batch in candidates(side, row.sequences, row.lengths[1], threads, args.device):
            report = fit(args, part, side, batch, folder)
            seconds = estimated_seconds(report, layers, tokens)
            found[side].append({"batch": batch, "estimated_seconds": seconds, "report": report})
    shutil.rmtree(folder)
    print(f"{name}, tried on {part}\n{sweep_table(found)}\n")
    return found


def agreement(args, name, row, sides, work):
    """Errors of E of each peer's factors to ours, printed; ends the program where they differ."""
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
                f"{worst:.1e}, more than {TOLERANCES[args.dtype]:.0e}. No times are told."
            )
    return compared


def rounds(args, name, row, batches, work):
    """Measured runs of all sides, in turns, the first of which is compared.

    Args:
        batches: {side: Batch}.

    Returns:
        Errors of E and {side: [report, …]}.
    """
    runs = {side: [] for side in batches}
    for number in range(1, args.repeats + 1):
        for side, batch in batches.items():
            runs[side].append(fit(args, row, side, batch, work))
        if number == 1:
            compared = agreement(args, name, row, list(batches), work)
        for side, reports in runs.items():
            print(
                f"{name}, {number} of {args.repeats}, {side}, {reports[-1]['batch']}: "
                f"{reports[-1]['whole_seconds']:.2f} s, {peak_bytes(reports[-1]) / 1e9:.2f} GB"
            )
    return compared, runs


def gemm_rates(args):
    """The GEMM rate in the model's dtype and in the factors' float32: {dtype: operations/s}."""
    torch.set_num_threads(args.threads)
    dtypes = dict.fromkeys((args.dtype, "float32"))
    return {name: gemm_rate(args.device, getattr(torch, name)) for name in dtypes}


def least_seconds_of(args, row, positions, rates):
    """What each pass would take at the GEMM rate: {pass: seconds}.

    Args:
        positions: Counted positions of each sequence.
        rates: {dtype: GEMM rates}.
    """
    of_model, of_factors = (max(rates[dtype]) for dtype in (args.dtype, "float32"))
    return {
        part: model / of_model + curvature / of_factors
        for part, (model, curvature) in least_operations(row.shape, positions).items()
    }


def measure(args, name, row, sides, folder):
    """The sweep, the rounds and the comparison of one row: all that is kept of it."""
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    before = gemm_rates(args)
    tried = sweep(args, name, row, sides, folder / f"{name}_sweep")
    batches = {
        side: best(tried[side]) if side in tried else given_batch(args.settings, name, side)
        for side in sides
    }
    positions = prepare_row(args, row, folder / name)
    compared, runs = rounds(args, name, row, batches, folder / name)
    after = gemm_rates(args)
    rates = {dtype: [rate, after[dtype]] for dtype, rate in before.items()}
    said = ", ".join(
        f"{a / 1e9:,.0f} GFLOP/s before and {b / 1e9:,.0f} after in {dtype}"
        for dtype, (a, b) in rates.items()
    )
    print(
        f"{name}, GEMM rate: {said}\n{name}, these batches again: "
        f"--settings {as_settings({name: batches})}\n"
    )
    return {
        "work": row.work(),
        "row": asdict(row),
        "cannot": row.cannot,
        "started": started,
        "sweep": {
            side: [one | {"batch": asdict(one["batch"])} for one in of_side]
            for side, of_side in tried.items()
        },
        "settings": as_settings({name: batches}),
        "agreement": compared,
        "results": runs,
        "gemm_flops": rates,
        "least_seconds": least_seconds_of(args, row, positions, rates),
    }


def machine(args):
    """Where and how it ran, in words and numbers."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "threads": args.threads,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def earlier_rows(args, where):
    """What an earlier run kept of its rows, of the same machine and dtype."""
    if args.also is None:
        return {}
    earlier = json.loads(args.also.read_text())
    if earlier["machine"] != where or earlier["arguments"]["dtype"] != args.dtype:
        sys.exit(f"--also {args.also} is of another machine, of other settings or another dtype")
    return earlier["rows"]


def write_results(args, where, rows):
    """Writes --json, in one piece."""
    content = {
        "machine": where,
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "rows": rows,
        "circumstances": circumstances(where, rows),
        "table": readme_table(rows),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.json.with_name(args.json.name + ".part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(args.json)


def compare(args, folder):
    """The whole benchmark in a folder; prints, and writes what was asked for."""
    rows = {name: ROWS[name].small() if args.small else ROWS[name] for name in args.rows}
    sides = {n: ["ours", *(p for p in row.peers if p in args.peers)] for n, row in rows.items()}
    where = machine(args)
    kept = earlier_rows(args, where)
    warm_up(args, dict.fromkeys(side for of in sides.values() for side in of), folder / "warm_up")
    for name, row in rows.items():
        kept[name] = measure(args, name, row, sides[name], folder)
        if args.json is not None:
            write_results(args, where, kept)
    results = {name: row["results"] for name, row in kept.items()}
    said = circumstances(where, kept)
    print(f"{said}\n\n{readme_table(kept)}\n\n{markdown(results)}\n")
    print(shares_of_gemm(results, {name: row["least_seconds"] for name, row in kept.items()}))
    if args.plot is not None:
        title = f"{args.dtype} models, {where['device'] or where['processor']}"
        plot(results, args.plot, f"{title}, {args.threads} threads")


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
