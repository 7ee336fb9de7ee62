"""What a worker holds when it answers queries, with 1 and with 4 workers to a copy of the factors.

    python tests/benchmarks/query_memory.py                 some minutes on 2 cores, 8 GB
    python tests/benchmarks/query_memory.py --rank 16       query gradients of low rank

A random-weight Llama in float32 (hidden 512, MLP 1408, 4 layers) is fitted by one process, and then
4 workers answer the same queries with `shard` 1 and with `shard` 4, in processes of their own.
Shown are, of the worker that has most: the factors that it has read and the query gradients that it
holds; its peak of anonymous memory above what it had before the scores were asked for, to which the
work of a step adds, but not the factors, whose files are mapped; and the seconds of the call.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ekfac_dist import estimate_factors, influence_scores, load_factors
from ekfac_dist.influence import scoring
from ekfac_dist.report.tables import table

sys.path.append(str(Path(__file__).parents[1]))  # where the tests' helpers are
sys.path.append(str(Path(__file__).parent / "peers"))  # where the shared modules are
from helpers.workshop import cpu_launcher_config, leave
from model_shapes import Shape
from peak_memory import PeakMemory
from peer_sides import make_rows

VOCABULARY, TOKENS, WORKERS = 1024, 64, 4


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--mlp", type=int, default=1408)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--rank", type=int, default=None)
    parser.add_argument("--shard", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def answer(args):
    """One worker's part; writes down what it held."""
    rank = int(os.environ["RANK"])
    model = Shape(args.hidden, args.mlp, args.layers, VOCABULARY).model(TOKENS)
    rows = make_rows(args.sequences + args.queries, (TOKENS, TOKENS), VOCABULARY, seeded(1))
    factors = load_factors(args.folder / "store")
    held = {}
    prepare = scoring.prepare

    def noting(*given):
        prepared = prepare(*given)
        tensors = [t for each in prepared.gradients.values() for t in each.tensors()]
        held["gradients"] = sum(t.nbytes for t in tensors)
        return prepared

    scoring.prepare = noting
    watch = PeakMemory()
    watch.start()
    start = time.perf_counter()
    influence_scores(
        model,
        factors,
        rows[args.sequences :],
        rows[: args.sequences],
        shard=args.shard,
        rank=args.rank,
        batch_tokens=4 * TOKENS,
        top_k=1,
    )
    held["seconds"] = time.perf_counter() - start
    held["peak"] = watch.end()
    bases = [block for blocks in factors._bases.values() for block in blocks]
    held["factors"] = sum(t.nbytes for t in [*bases, *factors._lambdas.values()])
    Path(args.folder, f"{args.shard}-{rank}.json").write_text(json.dumps(held))
    torch.distributed.barrier()
    leave()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def main():
    args = arguments()
    if args.shard is not None:
        answer(args)
    with tempfile.TemporaryDirectory() as folder:
        model = Shape(args.hidden, args.mlp, args.layers, VOCABULARY).model(TOKENS)
        rows = make_rows(args.sequences, (TOKENS, TOKENS), VOCABULARY, seeded(1))
        estimate_factors(model, rows, output=Path(folder) / "store", labels="data")
        del model
        lines = []
        for shard in (1, WORKERS):
            launcher = cpu_launcher_config(Path(folder) / "launcher.yaml", WORKERS)
            command = [sys.executable, "-m", "accelerate.commands.launch"]
            command += ["--config_file", str(launcher), __file__, *sys.argv[1:]]
            command += ["--shard", str(shard), "--folder", folder]
            threads = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            subprocess.run(command, check=True, env={**os.environ, **threads})
            found = [json.loads(file.read_text()) for file in Path(folder).glob(f"{shard}-*.json")]
            lines.append({key: max(each[key] for each in found) for key in found[0]})
    names = {"factors": "factors", "gradients": "query gradients", "peak": "peak"}
    shown = []
    for key, name in names.items():
        one, four = (line[key] / 1e6 for line in lines)
        shown.append([name, f"{one:.1f}", f"{four:.1f}", f"{four / one:.2f}"])
    one, four = (line["seconds"] for line in lines)
    shown.append(["seconds", f"{one:.1f}", f"{four:.1f}", f"{four / one:.2f}"])
    print(table(["a worker of 4, MB", "shard 1", "shard 4", "ratio"], shown))


if __name__ == "__main__":
    main()
