"""What it costs, and saves, that workers share out the factors among themselves.

    python tests/benchmarks/shards.py time          both passes, 2 workers: `shard` 2 beside 1
    python tests/benchmarks/shards.py memory        what a worker holds, 4 workers: 4 beside 1

Models are random-weight Llamas in float32, workers have one thread, and factors are not decomposed
(see `timed_passes.py`). `time` runs both sides in turns in the same processes (hidden 768, MLP
2048, 4 layers); shown are the medians, and where the time goes. `memory` fits a model most of whose
memory is its factors (hidden 256, MLP 2048, 8 layers); shown are, of the worker that holds most,
its running sums and eigenvectors, the peak of its anonymous memory in each pass above what it had
before the fit, and the peak of the whole process. Beside each is what `plan` says of it, which
counts the scratch matrices of one sequence's gradient with Λ.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peak_memory import PeakMemory
from timed_passes import PASSES, ROW_ORDER, PassTimes, parts_table
from transformers.utils.logging import disable_progress_bar

from ekfac_dist.config import DataConfig, FactorsConfig, ModelConfig, PlanConfig
from ekfac_dist.fit.plan import make_plan
from ekfac_dist.report.tables import table

sys.path.append(str(Path(__file__).parents[1]))  # where the tests' helpers are
sys.path.append(str(Path(__file__).parent / "peers"))  # where the shared modules are
from helpers.workshop import cpu_launcher_config, leave
from model_shapes import Shape, processor
from peer_files import status_bytes
from peer_sides import make_rows

TOKENS, VOCABULARY = 256, 4096
MANY = 4  # workers of `memory`
PEAKS = tuple(f"{name}, peak" for name in PASSES)
WHOLE = "whole process"
WITH_ORDER = "both, and the order of rows"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("of", choices=["time", "memory"])
    parser.add_argument("--hidden", type=int, default=None)
    parser.add_argument("--mlp", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--sequences", type=int, default=40)
    parser.add_argument("--batch_tokens", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3, help="of time")
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--shard", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    hidden, layers, tokens = (768, 4, 1024) if args.of == "time" else (256, 8, 256)
    args.hidden, args.layers = args.hidden or hidden, args.layers or layers
    args.batch_tokens = args.batch_tokens or tokens
    return args


def on_workers(workers, folder, *more):
    """Runs this script on workers of one thread; what each has written."""
    launcher = cpu_launcher_config(Path(folder) / "launcher.yaml", workers)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launcher)]
    command += [__file__, *sys.argv[1:], "--folder", folder, *more]
    quiet = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1"}
    subprocess.run(command, check=True, env={**os.environ, **quiet})
    files = [Path(folder) / f"{rank}.json" for rank in range(workers)]
    return [json.loads(file.read_text()) for file in files]


def shape_of(args):
    return Shape(args.hidden, args.mlp, args.layers, VOCABULARY)


def model_and_rows(args):
    model = shape_of(args).model(TOKENS)
    generator = torch.Generator().manual_seed(1)
    return model, make_rows(args.sequences, (TOKENS, TOKENS), VOCABULARY, generator)


# -- time ------------------------------------------------------------------------------------------


def time_worker(args):
    """One worker's part: both sides in turns; the times of each round, by `shard`."""
    times = PassTimes()
    model, rows = model_and_rows(args)
    rounds = {"1": [], "2": []}
    for number in range(args.rounds + 1):
        for shard in (1, 2) if number % 2 else (2, 1):
            # The first round is short, and warms up.
            data = rows if number else rows[: 2 * args.batch_tokens // TOKENS]
            found = times.fit(model, data, args.folder, shard=shard, batch_tokens=args.batch_tokens)
            if number:
                rounds[str(shard)].append(found)
    return rounds


def time_tables(reports):
    """Medians of both sides, and the mean seconds of a worker by part."""
    seconds, lines = {}, []
    for shard in ("1", "2"):
        rounds = list(zip(*(report[shard] for report in reports), strict=True))
        for name in PASSES:  # a pass is as long as that of the worker that ends last
            seconds[name, shard] = [max(each[name]["seconds"] for each in one) for one in rounds]
        order = [max(each[ROW_ORDER] for each in one) for one in rounds]
        seconds[WITH_ORDER, shard] = [
            sum(each)
            for each in zip(order, *(seconds[name, shard] for name in PASSES), strict=True)
        ]
    for name in (*PASSES, WITH_ORDER):
        one, two = seconds[name, "1"], seconds[name, "2"]
        medians = statistics.median(one), statistics.median(two)
        ratios = [two / one for one, two in zip(one, two, strict=True)]
        lines.append(
            [
                name,
                *(f"{median:.2f}" for median in medians),
                f"{medians[1] / medians[0]:.2f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
            ]
        )
    whole = table(["pass", "shard 1, s", "shard 2, s", "ratio", "of rounds"], lines)
    columns = {
        f"{name}, shard {shard}": [each[name] for report in reports for each in report[shard]]
        for name in PASSES
        for shard in ("1", "2")
    }
    return f"{whole}\n\n{parts_table(columns)}"


# -- memory ----------------------------------------------------------------------------------------


def memory_worker(args):
    """One worker's part: bytes of what it holds in each pass."""
    times, found, watches = PassTimes(), {}, {}

    def before(world, name, sums):
        watches[name] = PeakMemory(baseline)
        watches[name].start()

    def after(world, name, sums):
        found[f"{name}, peak"] = watches[name].end()
        if name == "covariance":
            found["covariance"] = sum(t.nbytes for blocks in sums.sums.values() for t in blocks)
        else:
            bases = [block for basis in sums._bases.values() for block in basis.eigenvectors]
            found["eigenvectors"] = sum(block.nbytes for block in bases)
            found["Λ"] = sum(total.nbytes for total in sums.sums.values())

    times.before_pass, times.after_pass = before, after
    model, rows = model_and_rows(args)
    baseline = PeakMemory.now()
    times.fit(model, rows, args.folder, shard=args.shard, batch_tokens=args.batch_tokens)
    found[WHOLE] = status_bytes("VmHWM")
    return found


def planned(args, shard, model):
    """What `plan` says that a worker holds beside program and weights, as `memory_worker` does."""
    memory = make_plan(
        PlanConfig(
            model=ModelConfig(name=str(model), gradient_checkpointing=False),
            data=DataConfig(max_tokens=TOKENS),
            factors=FactorsConfig(shard=shard, partitions=1),
            batch_tokens=args.batch_tokens,
            workers=MANY,
            sequences=args.sequences,
            gflops=1,
        )
    ).memory
    before = memory.process + memory.weights
    peaks = {f"{name}, peak": memory.passes[name] - before for name in PASSES}
    sums = {"covariance": memory.covariance, "eigenvectors": memory.bases, "Λ": memory.spectra}
    return {**sums, **peaks, WHOLE: memory.peak}


def memory_table(args, folder):
    disable_progress_bar()
    model = Path(folder) / "model"
    shape_of(args).model(TOKENS).save_pretrained(model)
    held, plans = [], []
    for shard in (1, MANY):
        reports = on_workers(MANY, folder, "--shard", str(shard))
        held.append({key: max(each[key] for each in reports) for key in reports[0]})
        plans.append(planned(args, shard, model))
    for each in (*held, *plans):
        each["eigenvectors and Λ"] = each["eigenvectors"] + each["Λ"]
    lines = []
    for key in ("covariance", "eigenvectors", "Λ", "eigenvectors and Λ", *PEAKS, WHOLE):
        one, many = (each[key] / 1e6 for each in held)
        lines.append([key, f"{one:.1f}", f"{many:.1f}", f"{many / one:.3f}"])
        for measured, plan in zip((one, many), plans, strict=True):
            lines[-1].append(f"{plan[key] / 1e6:.1f} ({plan[key] / 1e6 / measured:.2f})")
    header = [f"a worker of {MANY}, MB", "shard 1", f"shard {MANY}", "ratio"]
    return table([*header, "planned, 1", f"planned, {MANY}"], lines)


def main():
    args = arguments()
    if args.folder is not None:
        report = time_worker(args) if args.of == "time" else memory_worker(args)
        rank = os.environ["RANK"]
        Path(args.folder, f"{rank}.json").write_text(json.dumps(report))
        torch.distributed.barrier()
        leave()
    with tempfile.TemporaryDirectory() as folder:
        if args.of == "time":
            shown = f"{args.rounds} rounds\n\n{time_tables(on_workers(2, folder))}"
        else:
            shown = f"{MANY} workers\n\n{memory_table(args, folder)}"
    print(f"{shape_of(args)}; {processor()}")
    print(f"{args.sequences} sequences of {TOKENS} tokens, steps of {args.batch_tokens}; {shown}")


if __name__ == "__main__":
    main()
