"""An exact scan of a few queries beside the refit pass of the same model and data.

    python tests/benchmarks/exact_scan.py                                  two minutes on 2 cores
    python tests/benchmarks/exact_scan.py --layers 30 --vocabulary 49152 --queries 1 3 8 \\
        --sequences 400                                                    SmolLM2-135M's shape

A random-weight Llama in float32, of the layers of SmolLM2-135M (hidden 576, MLP 1536) but fewer,
with a small vocabulary. Its factors are fitted with a trivial eigenbasis in the place of the
decompositions: a pass takes as long, whatever the values of the eigenvectors are. Then every number
of queries is answered from whole gradients, the numbers in turns; shown are medians. Peak memory is
that of the whole call, query gradients among it, above what there was before. The ratio is that of
CPU seconds, which other programs on the machine change little; with one thread they are those that
a pass takes alone.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from ekfac_dist import estimate_factors, influence_scores, load_factors
from ekfac_dist.fit import eigenbasis, group
from ekfac_dist.influence import data_passes
from ekfac_dist.report.tables import table

sys.path.append(str(Path(__file__).parent / "peers"))  # where the shared modules are
from model_shapes import Shape, gemm_rate, processor
from peak_memory import PeakMemory
from peer_sides import make_rows
from timed_passes import trivial_basis


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, size in (
        *(("hidden", 576), ("mlp", 1536), ("layers", 4), ("heads", 9), ("vocabulary", 4096)),
        *(("sequences", 128), ("rounds", 3), ("threads", 2)),
    ):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 3, 8, 32])
    parser.add_argument("--tokens", type=int, nargs=2, default=[32, 128], help="shortest, longest")
    parser.add_argument("--rank", type=int, default=None)
    parser.add_argument("--norms", action="store_true", help="self-influence too")
    parser.add_argument("--positions", action="store_true", help="scores of every position too")
    return parser.parse_args()


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    heads = args.heads if args.hidden % args.heads == 0 else None
    shape = Shape(args.hidden, args.mlp, args.layers, args.vocabulary, heads)
    model = shape.model(args.tokens[1])
    generator = torch.Generator().manual_seed(1)
    rows = make_rows(args.sequences, args.tokens, args.vocabulary, generator)
    asked = make_rows(max(args.queries), (16, 32), args.vocabulary, generator)
    eigenbasis.decompose = trivial_basis
    times = PassTimes(group, data_passes)
    found, peaks = defaultdict(list), {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            output = Path(folder) / "store"
            estimate_factors(
                model, rows, labels="data", output=output, overwrite=True, save_minutes=None
            )
            found["refit"].append(times.of("refit"))
            for number in args.queries:
                watch = PeakMemory()
                watch.start()
                influence_scores(
                    model,
                    load_factors(output),
                    asked[:number],
                    rows,
                    rank=args.rank,
                    self_influence=args.norms,
                    per_token="all" if args.positions else "none",
                    query_memory_gb=100.0,
                )
                peaks[number] = watch.end()
                found[number].append(times.of("scan"))
    medians = {
        name: tuple(map(statistics.median, zip(*some, strict=True))) for name, some in found.items()
    }
    print_table(args, shape, rows, medians, peaks)


class PassTimes:
    """The seconds of passes, by name: (CPU seconds of all threads, seconds).

    Args:
        modules: The modules that call `run_pass`.
    """

    def __init__(self, *modules):
        self._of = {}
        for module in modules:
            module.run_pass = self._timed(module.run_pass)

    def _timed(self, run_pass):
        def timed(name, *given, **named):
            cpu = time.process_time()
            result = run_pass(name, *given, **named)
            self._of[name] = time.process_time() - cpu, result.seconds
            return result

        return timed

    def of(self, name):
        """Those of the last pass of a name."""
        return self._of[name]


def print_table(args, shape, rows, seconds, peaks):
    """The medians, of passes over all positions."""
    positions = sum(len(row["input_ids"]) for row in rows)
    print(f"{shape}; {len(rows)} sequences, {positions} positions")
    rate = gemm_rate("cpu") / 1e9
    print(f"{processor()}, {args.threads} threads, float32 GEMM {rate:,.0f} GFLOP/s\n")
    lines = []
    for key, (cpu, median) in seconds.items():
        pass_name = "refit" if key == "refit" else f"scan, {key} queries"
        ratio = f"{cpu / seconds['refit'][0]:.2f}"
        peak = f"{peaks[key] / 1e9:.2f}" if key in peaks else ""
        lines.append([pass_name, f"{cpu:.2f}", f"{median:.2f}", ratio, peak])
    print(table(["pass", "CPU, s", "seconds", "CPU, of the refit's", "peak, GB"], lines))


if __name__ == "__main__":
    main()
