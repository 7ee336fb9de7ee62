"""How close an index's scores are to exact ones by its rank, and what making one takes.

    python tests/benchmarks/gradient_index.py agreement --exact RESULTS --factors F --index I \\
        --queries Q
    python tests/benchmarks/gradient_index.py times --model DIR --data FILE.jsonl --sequences 64

`agreement` compares the scores of an index with those of a `query` on all of the data, which
RESULTS holds, query by query. An index of a high rank has those of lower ranks in it: its products
are ordered, and the first c of them are the best of rank c. After re-scoring, a list is that of the
exact scores of the index's first 100.

`times` makes an index and runs a refit of the same model and data, in turns, in this process: their
passes alone, medians. Then the seconds of scans of the index, from whole and from low-rank query
gradients, beside the machine's GEMM rate and the rate at which it reads the file.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from ekfac_dist import cli, load_factors
from ekfac_dist.fit import eigenbasis, group
from ekfac_dist.influence.agreement import spearman
from ekfac_dist.influence.index import making
from ekfac_dist.influence.index import scan as index_scan
from ekfac_dist.report.tables import table

sys.path.append(str(Path(__file__).parent / "peers"))  # where the shared modules are
from exact_scan import PassTimes
from model_shapes import gemm_rate, processor
from peak_memory import PeakMemory
from timed_passes import trivial_basis

LISTED, RESCORED = 20, 100


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    agreement = commands.add_parser("agreement")
    for name in ("exact", "factors", "index", "queries"):
        agreement.add_argument(f"--{name}", type=Path, required=True)
    agreement.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    times = commands.add_parser("times")
    times.add_argument("--model", type=Path, required=True)
    times.add_argument("--gguf", default=None)
    times.add_argument("--data", type=Path, required=True)
    times.add_argument("--queries", type=Path, required=True)
    for name, default in (("sequences", 64), ("max_tokens", 96), ("rounds", 3), ("threads", 2)):
        times.add_argument(f"--{name}", type=int, default=default)
    times.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    return parser.parse_args()


def run(*words):
    if cli.main([*map(str, words)]):
        sys.exit(f"{words[0]} failed")


# -- agreement -------------------------------------------------------------------------------------


def agreement(args):
    exact_QN = load_file(args.exact / "scores.safetensors")["scores"]
    rows = []
    for rank in args.ranks:
        with tempfile.TemporaryDirectory() as folder, first_products(rank):
            given = ["--factors", args.factors, "--index", args.index, "--queries", args.queries]
            ranking = ["--scores.rescore", 0, "--scores.per_token", "none"]
            run("query", *given, *ranking, "--output", Path(folder) / "scores")
            found_QN = load_file(Path(folder, "scores", "scores.safetensors"))["scores"]
        each = [compared(*pair) for pair in zip(exact_QN, found_QN, strict=True)]
        means = np.mean(each, axis=0)
        rows.append([str(rank), *(f"{mean:.3f}" for mean in means)])
        rows[-1].append(f"{np.min(each, axis=0)[-1]:.2f}")
    header = ["rank", "Pearson", "Spearman", "top 20", "after re-scoring 100", "least"]
    print(table(header, rows))


class first_products:
    """Scores from the first products of an index alone."""

    def __init__(self, rank):
        self.rank = rank

    def __enter__(self):
        self.read = index_scan._ShardReader.read

        def read(reader, piece):
            return [(u[:, : self.rank], v[:, : self.rank]) for u, v in self.read(reader, piece)]

        index_scan._ShardReader.read = read

    def __exit__(self, *_):
        index_scan._ShardReader.read = self.read


def compared(exact_N, found_N):
    """Pearson, Spearman, and the overlaps of the first 20 before and after re-scoring."""
    wanted = set(np.argsort(-exact_N)[:LISTED])
    order = np.argsort(-found_N)
    again = order[:RESCORED]
    after = again[np.argsort(-exact_N[again])[:LISTED]]
    return (
        np.corrcoef(exact_N, found_N)[0, 1],
        spearman(torch.from_numpy(exact_N), torch.from_numpy(found_N)),
        len(wanted & set(order[:LISTED])) / LISTED,
        len(wanted & set(after)) / LISTED,
    )


# -- times -----------------------------------------------------------------------------------------


def times(args):
    torch.set_num_threads(args.threads)
    eigenbasis.decompose = trivial_basis
    passes = PassTimes(group, making)
    found, peaks, sizes = defaultdict(list), {}, {}
    model = ["--model.name", args.model, *(["--model.gguf", args.gguf] if args.gguf else [])]
    data = ["--data.source", args.data, "--data.max_sequences", args.sequences]
    data += ["--data.max_tokens", args.max_tokens]
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        for number in range(args.rounds):
            fit = ["--output", store, "--save_minutes", "null", "--overwrite"]
            run("estimate", *model, *data, "--factors.keep_covariance", "false", *fit)
            found["refit"].append(passes.of("refit"))
            for rank in args.ranks:
                output, watch = Path(folder) / f"index-{rank}-{number}", PeakMemory()
                watch.start()
                run("index", "--factors", store, "--index.rank", rank, "--output", output)
                peaks[f"index, rank {rank}"] = watch.end()
                found[f"index, rank {rank}"].append(passes.of("index"))
                sizes[f"index, rank {rank}"] = sum(f.stat().st_size for f in output.iterdir())
        scans = scan_times(args, store, Path(folder) / f"index-{args.ranks[0]}-{args.rounds - 1}")
    rate = gemm_rate("cpu") / 1e9
    print(f"{processor()}, {args.threads} threads, float32 GEMM {rate:,.0f} GFLOP/s\n")
    medians = {
        name: [statistics.median(x) for x in zip(*s, strict=True)] for name, s in found.items()
    }
    rows = [
        [
            name,
            f"{cpu:.1f}",
            f"{seconds:.1f}",
            f"{cpu / medians['refit'][0]:.2f}",
            f"{sizes[name] / args.sequences / 1e3:,.0f}" if name in sizes else "",
            f"{peaks[name] / 1e9:.2f}" if name in peaks else "",
        ]
        for name, (cpu, seconds) in medians.items()
    ]
    header = ["pass", "CPU, s", "seconds", "CPU, of the refit's", "kB a sequence", "peak, GB"]
    print(table(header, rows))
    print()
    print(table(["scan of one query", "seconds", "GFLOP/s", "GB/s of the index"], scans))


def scan_times(args, store, index):
    """The scans of an index, which is in the page cache: rows of the table."""
    parameters = sum(
        module.num_outputs * module.input_size for module in load_factors(store).modules.values()
    )
    num_bytes = sum(file.stat().st_size for file in index.glob("shard-*"))
    line = args.queries.read_text().splitlines()[0]
    one = index.parent / "one.jsonl"
    one.write_text(line + "\n")
    seconds = []
    index_scan.IndexScan.run = timed(index_scan.IndexScan.run, seconds)
    rows = []
    for name, options in (("whole", ()), ("rank 32", ("--scores.rank", 32))):
        del seconds[:]
        for number in range(args.rounds):
            output = index.parent / f"{name}-{number}".replace(" ", "-")
            ranking = ["--scores.rescore", 0, "--scores.per_token", "none", "--output", output]
            given = ["--factors", store, "--index", index, "--queries", one]
            run("query", *given, *ranking, *options)
        best = statistics.median(seconds)
        operations = 2 * parameters * args.sequences * args.ranks[0]
        rate = f"{operations / best / 1e9:,.0f}" if not options else ""
        rows.append([name, f"{best:.3f}", rate, f"{num_bytes / best / 1e9:.2f}"])
    return rows


def timed(method, seconds):
    def run_timed(*given, **named):
        start = time.perf_counter()
        result = method(*given, **named)
        seconds.append(time.perf_counter() - start)
        return result

    return run_timed


def main():
    args = arguments()
    (agreement if args.command == "agreement" else times)(args)


if __name__ == "__main__":
    main()
