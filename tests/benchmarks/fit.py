"""Fits factors of a random-weight Llama of a given shape, and says how near to the limit it is.

    python tests/benchmarks/fit.py                                    64 sequences of 256 tokens
    python tests/benchmarks/fit.py --sequences 128 --lengths 32 256   ragged

For each pass: seconds, tokens/s, the least operations that it can do with, and the share of the
machine's own measured GEMM rate that this is. The least operations, in multiply-add pairs, for each
counted position and tracked module of I inputs and O outputs:

    forward, and backward of activations     2·I·O   (also of every other linear map)
    covariance     I²/2 once for each shared input, and O²/2
    refit          for each sequence of T positions the cheapest order of
                   min(T, O)·I² once for each shared input, min(T, I)·O², and T·I·O

Attention scores, norms, activations and the softmax are not counted: they are overhead here.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ekfac_dist import estimate_factors
from ekfac_dist.report.tables import table


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--mlp", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs=2, default=(256, 256), metavar=("MIN", "MAX"))
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--labels", default="sampled", choices=["sampled", "data"])
    parser.add_argument("--refit", default="per_sequence", choices=["per_sequence", "per_token"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    return parser.parse_args()


def make_model(args):
    torch.manual_seed(0)
    heads = max(1, args.hidden // 64)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=args.lengths[1],
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype))


def make_data(args):
    generator = torch.Generator().manual_seed(0)
    low, high = args.lengths
    lengths = torch.randint(low, high + 1, (args.sequences,), generator=generator).tolist()
    return [
        {"input_ids": torch.randint(0, args.vocabulary, (n,), generator=generator)} for n in lengths
    ]


def gemm_rate(device, size=2048, seconds=2.0):
    """Operations a second, two for each multiply-add, of a float32 square product: the best."""
    a, b = torch.randn(2, size, size, device=device)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def least_operations(args, lengths):
    """Operations (two for each multiply-add) of each pass: {pass: (model's, curvature's)}."""
    h, m, layers = args.hidden, args.mlp, args.layers
    positions = sum(lengths)
    # All linear maps forward; backward all but those below the first MLP and its first linears.
    linears = layers * (4 * h * h + 3 * h * m) + h * args.vocabulary
    backward = linears - 4 * h * h - 2 * h * m
    model = positions * (linears + backward)
    covariance = positions * layers * (h * h + m * m + 2 * m * m + h * h) / 2
    refit = 0
    for length in lengths:
        if args.refit == "per_token":
            refit += layers * length * (2 * h * h + 3 * m * m + 3 * h * m)
            continue
        gate_and_up = min(length, 2 * m) * h * h + 2 * min(length, h) * m * m + 2 * length * h * m
        down = min(length, h) * m * m + min(length, m) * h * h + length * h * m
        refit += layers * (gate_and_up + down)
    return {"covariance": (2 * model, 2 * covariance), "refit": (2 * model, 2 * refit)}


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, data = make_model(args), make_data(args)
    lengths = [len(row["input_ids"]) - 1 for row in data]  # counted positions
    before = gemm_rate(args.device)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        factors = estimate_factors(
            model,
            data,
            output=Path(directory) / "store",
            labels=args.labels,
            refit=args.refit,
            batch_tokens=args.batch_tokens,
        )
        whole = time.perf_counter() - start
        passes = factors.manifest["passes"]
    rate = max(before, gemm_rate(args.device))
    rows = []
    for name, (of_model, of_curvature) in least_operations(args, lengths).items():
        seconds = passes[name]["seconds"]
        least = of_model + of_curvature
        rows.append(
            [
                name,
                f"{seconds:.2f}",
                f"{sum(lengths) / seconds:,.0f}",
                f"{of_model / 1e9:,.0f}",
                f"{of_curvature / 1e9:,.0f}",
                f"{least / seconds / 1e9:,.0f}",
                f"{least / seconds / rate:.0%}",
            ]
        )
    rows.insert(1, ["eigenbasis", f"{passes['eigenbasis']['seconds']:.2f}", *[""] * 5])
    rows.append(["whole call", f"{whole:.2f}", *[""] * 5])
    threads = f"{torch.get_num_threads()} threads" if args.device == "cpu" else ""
    print(
        f"hidden {args.hidden}, MLP {args.mlp}, {args.layers} layers, vocabulary "
        f"{args.vocabulary}; {args.sequences} sequences, {args.lengths[0]}-{args.lengths[1]} "
        f"tokens, {sum(lengths)} counted positions; {args.dtype}, {args.labels} labels, "
        f"{args.refit}"
    )
    print(f"{args.device} {threads}: float32 GEMM {rate / 1e9:,.0f} GFLOP/s\n")
    header = ["pass", "seconds", "tokens/s", "GFLOP model", "GFLOP curvature", "GFLOP/s", "of GEMM"]
    print(table(header, rows))
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB (host)")
    if args.device == "cuda":
        print(f"            {torch.cuda.max_memory_allocated() / 1e9:.2f} GB (device)")


if __name__ == "__main__":
    main()
