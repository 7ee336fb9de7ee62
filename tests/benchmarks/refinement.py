"""What a refined query costs beside a plain one, and where the time goes.

    python tests/benchmarks/refinement.py                           a minute on 2 cores
    python tests/benchmarks/refinement.py --hidden 576 --mlp 1536 --layers 30 --vocabulary 49152 \\
        --queries 2 --sequences 16 --iterations 2                   of the shape of SmolLM2-135M

A random-weight Llama in float32 is fitted, and answers the same queries without refinement and with
conjugate gradients on some of its training sequences. Shown are the seconds of a row of scores in a
solve of all of its steps, by part, and the peak of anonymous memory above what there was before.
"""

import argparse
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import torch

from ekfac_dist import estimate_factors, influence_scores
from ekfac_dist.influence.refinement import Refinement
from ekfac_dist.models.capture import labelled_logits
from ekfac_dist.models.capture.linearised import Linearisation, LinearisedBatch
from ekfac_dist.report.tables import table

sys.path.append(str(Path(__file__).parent / "peers"))  # where the shared modules are
from model_shapes import Shape
from peak_memory import PeakMemory
from peer_sides import make_rows

# The parts of a solve, and the function that each is the time of.
PARTS = {
    "forward, and its backward's graph": (Linearisation, "of"),
    "J v, to the head": (LinearisedBatch, "tangent"),
    "head, softmax's Hessian, and back": (labelled_logits, "hessian_products"),
    "Jᵀ u, products with inputs": (LinearisedBatch, "add_gauss_newton_products_"),
    "(E + λ)⁻¹": (Refinement, "_precondition"),
    "inner products, updates": (Refinement, "_solve"),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, size in (
        *(("hidden", 128), ("mlp", 344), ("layers", 3), ("vocabulary", 2048), ("tokens", 64)),
        *(("queries", 8), ("sequences", 64), ("iterations", 5), ("training", 256)),
    ):
        parser.add_argument(f"--{name}", type=int, default=size)
    return parser.parse_args()


@contextmanager
def timed():
    """The seconds of each part while it lasts, and under "solve" those of all of them."""
    seconds, running = Counter(), []

    def timing(name, function):
        @wraps(function)
        def run(*given, **named):
            start, inner = time.perf_counter(), seconds.total()
            running.append(name)
            try:
                return function(*given, **named)
            finally:
                running.pop()
                # What the parts within it took is theirs.
                own = time.perf_counter() - start - (seconds.total() - inner)
                if name == "inner products, updates" or (name in PARTS and in_solve(running)):
                    seconds[name] += own

        return run

    def in_solve(names):
        return "inner products, updates" in names

    originals = {name: getattr(*place) for name, place in PARTS.items()}
    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, timing(name, originals[name]))
    try:
        yield seconds
    finally:
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, originals[name])


def main():
    args = arguments()
    model = Shape(args.hidden, args.mlp, args.layers, args.vocabulary).model(args.tokens)
    draw = torch.Generator().manual_seed(1)
    rows = make_rows(args.training + args.queries, (args.tokens,) * 2, args.vocabulary, draw)
    train, queries = rows[: args.training], rows[args.training :]
    factors = estimate_factors(model, train)
    refine = {"method": "cg", "sequences": args.sequences, "iterations": args.iterations}
    refine["tolerance"] = 0.0
    options = {"top_k": 1, "query_memory_gb": 8.0}
    answers = {}
    with timed() as seconds:
        for name, how in (("plain", "none"), ("refined", refine)):
            watch = PeakMemory()
            watch.start()
            start = time.perf_counter()
            influence_scores(model, factors, queries, train, refine=how, **options)
            answers[name] = time.perf_counter() - start, watch.end()
    lines = [
        [name, f"{seconds[name] / args.queries:.3f}", f"{seconds[name] / seconds.total():.0%}"]
        for name in PARTS
    ]
    lines.append(["a solve", f"{seconds.total() / args.queries:.3f}", "100%"])
    steps = f"{args.iterations} steps, {args.sequences} sequences of {args.tokens}"
    print(table([f"seconds a row of scores ({steps})", "seconds", "share"], lines))
    print()
    shown = [
        [name, f"{taken / args.queries:.3f}", f"{peak / 1e6:,.0f}"]
        for name, (taken, peak) in answers.items()
    ]
    print(table([f"the whole answer, {args.training} scored", "seconds a row", "MB"], shown))


if __name__ == "__main__":
    main()
