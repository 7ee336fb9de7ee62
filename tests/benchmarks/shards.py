"""What it costs, and saves, that workers share out the factors among themselves.

    python tests/benchmarks/shards.py time          both passes, 2 workers: `shard` 2 beside 1
    python tests/benchmarks/shards.py memory        what a worker holds, 4 workers: 4 beside 1

Models are random-weight Llamas in float32, sequences of 256 tokens. `time` runs both sides in turns
in the same processes, of one thread each, without the decompositions (see `timed_passes.py`); shown
are the medians, and where the time goes.
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
from timed_passes import PARTS, PASSES, REST, PassTimes

from ekfac_dist.report.tables import table

sys.path.append(str(Path(__file__).parents[1]))  # where the tests' helpers are
sys.path.append(str(Path(__file__).parent / "peers"))  # where the shared modules are
from helpers.workshop import cpu_launcher_config, leave
from model_shapes import Shape, processor
from peer_sides import make_rows

TOKENS, VOCABULARY = 256, 4096


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("of", choices=["time", "memory"])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--mlp", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--batch_tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def on_workers(args, workers, folder):
    """Runs this script on workers of one thread; what each has written."""
    launcher = cpu_launcher_config(Path(folder) / "launcher.yaml", workers)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launcher)]
    command += [__file__, *sys.argv[1:], "--folder", folder]
    quiet = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1"}
    subprocess.run(command, check=True, env={**os.environ, **quiet})
    files = [Path(folder) / f"{rank}.json" for rank in range(workers)]
    return [json.loads(file.read_text()) for file in files]


def model_and_rows(args):
    model = Shape(args.hidden, args.mlp, args.layers, VOCABULARY).model(TOKENS)
    generator = torch.Generator().manual_seed(1)
    return model, make_rows(args.sequences, (TOKENS, TOKENS), VOCABULARY, generator)


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
    for name in PASSES:
        for shard in ("1", "2"):
            # A pass is as long as that of the worker that ends last.
            of_rounds = zip(*(report[shard] for report in reports), strict=True)
            seconds[name, shard] = [max(each[name]["seconds"] for each in one) for one in of_rounds]
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
    lines = []
    names = {part: part for part in (REST, *PARTS)}
    names |= {"cpu": "CPU, this thread", "gloo": "CPU, gloo's threads"}
    for part, shown in names.items():
        lines.append([shown])
        for name in PASSES:
            for shard in ("1", "2"):
                found = [each[name][part] for report in reports for each in report[shard]]
                lines[-1].append(f"{statistics.mean(found):.2f}")
    header = [f"{name}, {shard}" for name in PASSES for shard in ("shard 1", "2")]
    return f"{whole}\n\n{table(['seconds of a worker', *header], lines)}"


def main():
    args = arguments()
    if args.folder is not None:
        report = time_worker(args)
        rank = os.environ["RANK"]
        Path(args.folder, f"{rank}.json").write_text(json.dumps(report))
        torch.distributed.barrier()
        leave()
    with tempfile.TemporaryDirectory() as folder:
        reports = on_workers(args, 2, folder)
    print(
        f"{Shape(args.hidden, args.mlp, args.layers, VOCABULARY)}; {args.sequences} sequences of "
        f"{TOKENS} tokens in steps of {args.batch_tokens}; {args.rounds} rounds\n{processor()}\n"
    )
    print(time_tables(reports))


if __name__ == "__main__":
    main()
