"""The measurements that the choices in `ekfac_dist/curvature/costs.py` rest on.

    python tests/benchmarks/choices.py --threads 2

- covariance: GFLOP/s of the half that is needed, by the number of block rows.
- refit: seconds of both orders of each side, and which of them the cost function takes.
- scores: milliseconds of whole queries' scores by position and from tiles of several sizes, those
  that the costs predict for tiles from those by position, and which way is taken.
- step: seconds of a covariance pass and peak memory, by tokens in a step. Each is a process.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

import torch

from ekfac_dist import estimate_factors
from ekfac_dist.curvature import costs
from ekfac_dist.curvature.blocks import rotate_rows
from ekfac_dist.curvature.covariance import add_outer_products_
from ekfac_dist.curvature.products import GradientTiles, ScratchBuffer
from ekfac_dist.curvature.refit import add_sequence_squares_
from ekfac_dist.influence.preconditioned import WholeGradients
from ekfac_dist.report.tables import table

sys.path.append(str(Path(__file__).parent / "peers"))  # where the shared modules are
from model_shapes import Shape, gemm_rate
from peer_sides import make_rows

TILES = GradientTiles()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--of", nargs="+", default=["covariance", "refit", "scores", "step"])
    return parser.parse_args()


def best(function, seconds=1.0):
    """The shortest time of a call, tried for some seconds."""
    found, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        function()
        found = min(found, time.perf_counter() - start)
    return found


def covariance(num_rows=2040):
    """GFLOP/s by size and number of blocks."""
    counts, rows = (1, 2, 4, 8, 16), []
    for size in (768, 2048, 4096):
        acts, total = torch.randn(num_rows, size), torch.zeros(size, size)
        cells = []
        for count in counts:
            costs.MIN_BLOCK, costs.MAX_BLOCKS = 1, count
            seconds = best(partial(add_outer_products_, total, acts, bias=False))
            cells.append(f"{num_rows * size * (size + 1) / seconds / 1e9:.0f}")
        rows.append([str(size), *cells])
    return table(["n", *(f"{count} blocks" for count in counts)], rows)


def refit():
    """Seconds of the four orders, by shape."""
    rows = []
    for length, size_I, size_O in ((64, 768, 2048), (255, 768, 2048), (511, 2048, 768)):
        check_orders(rows, length, size_I, size_O)
    for length, size_I, size_O in ((1024, 256, 688), (2048, 256, 688), (2048, 688, 256)):
        check_orders(rows, length, size_I, size_O)
    return table(["T, I, O", "rows, rows", "rows, G", "G, rows", "G, G", "taken"], rows)


def check_orders(rows, length, size_I, size_O):
    """Adds a line: input side and output side, each by rows or by the matrix G."""
    count = max(1, 2048 // length)
    acts, grads = torch.randn(count * length, size_I), torch.randn(count * length, size_O)
    basis_II, basis_OO = torch.randn(size_I, size_I), torch.randn(size_O, size_O)
    total, cells = torch.zeros(size_O, size_I), []
    for by_input in (True, False):
        for by_output in (True, False):

            def run(by_input=by_input, by_output=by_output):
                add_sequence_squares_(
                    total,
                    rotate_rows(acts, [basis_II]) if by_input else acts,
                    rotate_rows(grads, [basis_OO]) if by_output else grads,
                    [length] * count,
                    basis_II=None if by_input else [basis_II],
                    basis_OO=None if by_output else [basis_OO],
                    bias=False,
                )

            cells.append(f"{best(run):.3f}")
    taken = [
        "rows" if rows_are_cheaper else "G"
        for rows_are_cheaper in (
            costs.rotates_inputs(len(acts), count, [size_O]),
            costs.rotates_output_gradients(len(acts), count, size_I),
        )
    ]
    rows.append([f"{length}, {size_I}, {size_O}", *cells, ", ".join(taken)])


def scores(num_positions=1024):
    """Milliseconds of the scores of a batch, by length, shape and number of queries."""
    sizes, rows = (1, 2, 4, 8, 16), []
    for length in (1, 2, 4, 8, 16, 32, 128):
        for (size_I, size_O), count in product(((576, 1536), (1536, 576)), (1, 3, 8)):
            lengths = [length] * (num_positions // length)
            acts, grads = torch.randn(num_positions, size_I), torch.randn(num_positions, size_O)
            queries = WholeGradients(torch.randn(count, size_O, size_I))
            by_position = best(partial(queries.all_position_scores, acts, grads), 0.3)
            cells = [f"{1e3 * by_position:.0f}"]
            for size in sizes:
                costs.TILE_BYTES = {True: size * 2**20, False: size * 2**20}
                cells.append(
                    f"{1e3 * best(partial(by_tiles, queries, acts, grads, lengths), 0.3):.0f}"
                )
            cost = costs.from_gradients(num_positions, len(lengths), count)
            cells.append(f"{1e3 * by_position * cost / (num_positions * count):.0f}")
            taken = "position" if queries.by_position(lengths, are_formed=False) else "tiles"
            rows.append([f"{length}, {size_I}, {size_O}, {count}", *cells, taken])
    heads = [f"{size} MiB" for size in sizes]
    return table(["T, I, O, Q", "by position", *heads, "predicted", "taken"], rows)


def by_tiles(queries, acts, grads, lengths):
    """The scores of sequences, as `Scan` computes them."""
    found, scratch = torch.zeros(len(queries.matrices_QOI), len(lengths)), ScratchBuffer()
    for part, rows, tile in TILES.of(acts, grads, lengths):
        for slots, few in queries.rows_of(rows, scratch):
            found[slots, part].addmm_(few.flatten(1), tile.flatten(1).T)


def one_step(tokens, threads, answers):
    """One covariance pass in a process of its own."""
    torch.set_num_threads(threads)
    costs.TOKENS_PER_THREAD = tokens
    model = Shape(768, 2048, 4, 4096).model(256)
    data = make_rows(64, (256, 256), 4096, torch.Generator().manual_seed(1))
    factors = estimate_factors(model, data, labels="data", refit="none", batch_tokens=tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers.put((factors.manifest["passes"]["covariance"]["seconds"], peak / 1e6))


def step(threads):
    """Seconds and memory by tokens in a step."""
    rows = []
    for tokens in (512, 1024, 2048, 4096):
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        process = context.Process(target=one_step, args=(tokens, threads, answers))
        process.start()
        seconds, peak = answers.get()
        process.join()
        rows.append([str(tokens), f"{seconds:.1f}", f"{peak:.2f}"])
    return table(["tokens in a step", "covariance, s", "peak, GB"], rows)


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads: float32 GEMM {gemm_rate('cpu') / 1e9:,.0f} GFLOP/s\n")
    for name in args.of:
        sections = {"covariance": covariance, "refit": refit, "scores": scores}
        found = step(args.threads) if name == "step" else sections[name]()
        print(f"{name}\n{found}\n", flush=True)


if __name__ == "__main__":
    main()
