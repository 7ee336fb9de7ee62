"""The same fit and the same scores by this package and by kronfluence: agreement, time and memory.

    python tests/benchmarks/peers/scores.py --environments runs/peers
    python tests/benchmarks/peers/scores.py --environments runs/peers --small --check

kronfluence's environment is made in the directory that `--environments` names, where it is missing.
Both sides get one random-weight Llama, one data set with the data's own labels, and float32; each
phase of each side is a process of its own, one after the other. Factors are fitted on the first
`--fit` training sequences. `fit.py` compares fits on more kinds of work, and with bergson.

Compared are E, the whole approximation of each module's Fisher (see `peer_agreement.py`), and the
scores of every query against every training sequence.

`--check` adds a third opinion, for small sizes: float64 autograd, one sequence at a time. Run it
with `--dtype float64` to compare definitions rather than rounding.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from model_shapes import Shape
from peer_agreement import errors_of, errors_table
from peer_batches import Batch
from peer_environments import peer_python
from peer_files import NO_LABEL, load_modules, load_rows
from peer_sides import HERE, Settings, fit_command, make_rows, prepare, read_factors, run
from safetensors.torch import load_file
from torch.nn import functional
from transformers.utils.logging import disable_progress_bar

from ekfac_dist.report.tables import table

LENGTHS = {"uniform": (128, 128), "ragged": (32, 256)}


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--environments", type=Path, required=True, help="directory of the peers'")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--mlp", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--train", type=int, default=512, help="training sequences")
    parser.add_argument("--fit", type=int, default=128, help="of them, the first to fit factors on")
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--query_lengths", type=int, nargs=2, default=(32, 64))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument(
        "--data",
        nargs="+",
        default=list(LENGTHS),
        choices=list(LENGTHS),
        help=", ".join(f"{name}: {low}-{high} tokens" for name, (low, high) in LENGTHS.items()),
    )
    parser.add_argument("--small", action="store_true", help="hidden 64, 2 layers, 24 sequences")
    parser.add_argument("--check", action="store_true", help="compare with float64 autograd too")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="of each scoring; the best is shown")
    parser.add_argument("--batch_tokens", type=int, default=4096, help="ours")
    parser.add_argument("--peer_batch", type=int, default=32, help="training sequences")
    parser.add_argument("--peer_rank_batch", type=int, default=8, help="the same, with a rank")
    parser.add_argument("--peer_query_batch", type=int, default=32)
    parser.add_argument("--peer_query_steps", type=int, default=1)
    parser.add_argument("--only", choices=["ours", "peer"], default=None, help="for scores")
    parser.add_argument("--work", type=Path, default=None, help="folder to keep everything in")
    args = parser.parse_args()
    if args.small:
        args.hidden, args.mlp, args.layers, args.vocabulary = 64, 160, 2, 256
        args.train = args.fit = 24
        args.queries, args.query_lengths, args.rank = 6, (12, 24), 8
        args.peer_batch = args.peer_rank_batch = args.peer_query_batch = 4
    return args


# --- running both --------------------------------------------------------------------------------


def settings_of(args, side):
    """How a side is run; its batch is that of its fit."""
    return Settings(
        environments=args.environments,
        device=args.device,
        threads=args.threads,
        workers=1,
        batch=Batch(args.batch_tokens if side == "ours" else args.peer_batch),
    )


def our_scores(args, work, rank=None):
    """The report of scoring with this package."""
    command = [sys.executable, HERE / "ours.py", work, "--phase", "scores"]
    command += ["--batch_tokens", args.batch_tokens, "--device", args.device]
    command += [] if rank is None else ["--rank", rank]
    return run(command, settings_of(args, "ours"), work / "ours.log")


def peer_scores(args, work, order, rank=None):
    """The report of scoring with kronfluence."""
    python = peer_python(args.environments, "kronfluence")
    command = [python, HERE / "kronfluence_side.py", work, "--phase", "scores", "--order", order]
    command += ["--query_batch", args.peer_query_batch, "--query_steps", args.peer_query_steps]
    command += ["--batch", args.peer_batch if rank is None else args.peer_rank_batch]
    command += ["--device", args.device] + ([] if rank is None else ["--rank", rank])
    return run(command, settings_of(args, "kronfluence"), work / "kronfluence.log")


def best(repeats, call):
    return min((call() for _ in range(repeats)), key=lambda report: report["seconds"])


def fit_both(args, work):
    """Fits with both; prints times and peaks."""
    reports = {}
    for side in ("ours", "kronfluence"):
        settings = settings_of(args, side)
        reports[side] = run(fit_command(side, work, settings), settings, work / f"{side}.log")
    mine, theirs = reports.values()
    seconds = {name: (mine["passes"][name], theirs["passes"][name]) for name in mine["passes"]}
    seconds["whole command"] = (mine["whole_seconds"], theirs["whole_seconds"])
    rows = [[name, f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}"] for name, (a, b) in seconds.items()]
    print(table(["fit, seconds", "ours", "kronfluence, by length", "ratio"], rows))
    peaks = (f"{side} {report['peak_bytes'] / 1e9:.2f}" for side, report in reports.items())
    print(f"peak memory, GB: {', '.join(peaks)}\n")


def score_both(args, work, orders):
    """Times and peaks of every way of scoring, printed; {way: scores in float64}."""
    ways = {}
    for rank in (None, args.rank):
        kind = "exact" if rank is None else f"rank {rank}"
        ways[f"ours, {kind}"] = lambda rank=rank: our_scores(args, work, rank)
        for order in orders:
            named = f"kronfluence, {kind}" + (", by length" if order == "length" else "")
            ways[named] = lambda order=order, rank=rank: peer_scores(args, work, order, rank)
    reports, scores = {}, {}
    for way, call in ways.items():
        if args.only is None or (args.only == "ours") == way.startswith("ours"):
            reports[way] = best(args.repeats, call)
            scores[way] = load_file(reports[way]["scores"])["scores"].double()
    rows = []
    for way, report in reports.items():
        kind = way.split(", ")[1]
        base = reports.get(f"ours, {kind}")

        def to_ours(name, report=report, base=base):
            return f"{report[name] / base[name]:.2f}" if base else ""

        rows.append(
            [
                way,
                f"{report['seconds']:.2f}",
                to_ours("seconds"),
                f"{report['peak_bytes'] / 1e9:.2f}",
                to_ours("peak_bytes"),
                f"{(report['peak_bytes'] - report['bytes_before']) / 1e9:.2f}",
            ]
        )
        if args.device == "cuda":
            rows[-1].append(f"{report['device_peak_bytes'] / 1e9:.2f}")
    header = [f"{args.queries} queries x {args.train}", "seconds", "to ours", "peak GB", "to ours"]
    header += ["above model GB"] + (["device GB"] if args.device == "cuda" else [])
    print(table(header, rows) + "\n")
    return scores


# --- agreement -----------------------------------------------------------------------------------


def agreement_of_scores(scores):
    """Prints correlations with the first, which the others should equal."""
    reference, *others = scores
    rows = []
    for way in others:
        x, y = scores[way], scores[reference]
        per_query = correlation(x, y)
        every = correlation(x.flatten(), y.flatten())
        error = ((x - y).norm() / y.norm()).item()
        slope = ((x * y).sum() / (y * y).sum()).item()
        rows.append([way, f"{every:.6f}", f"{per_query.mean():.6f}", f"{per_query.min():.6f}"])
        rows[-1] += [f"{slope:.5f}", f"{error:.1e}"]
    header = [f"scores, to {reference}", "Pearson", "mean of queries", "worst", "slope", "error"]
    print(table(header, rows) + "\n")


def correlation(x, y):
    """Pearson's, over the last dimension."""
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


def dense(model, work):
    """Factors and scores by autograd in float64, one sequence at a time, gradients whole."""
    model = model.double()
    names = load_modules(work)
    layers = {name: model.get_submodule(name) for name in names}
    weights = [layer.weight for layer in layers.values()]

    def passed(row):
        """{module: (a [T, I], g [T, O])} and {module: G}, up to the last label."""
        end = int((row["labels"] != NO_LABEL).nonzero().max())
        kept = {}
        hooks = [
            layer.register_forward_hook(lambda _, i, o, name=name: kept.update({name: (i[0], o)}))
            for name, layer in layers.items()
        ]
        logits = model(input_ids=row["input_ids"][None, :end]).logits[0]
        loss = functional.cross_entropy(logits, row["labels"][1 : end + 1], reduction="sum")
        for hook in hooks:
            hook.remove()
        outputs = [kept[name][1] for name in names]
        grads = torch.autograd.grad(loss, [*outputs, *weights])
        pairs = {n: (kept[n][0][0].detach(), g[0]) for n, g in zip(names, grads, strict=False)}
        return pairs, dict(zip(names, grads[len(names) :], strict=True))

    data = work / "data.safetensors"
    fit = [passed(row) for row in load_rows(data, "fit")]
    factors = {}
    for name in names:
        acts, grads = (torch.cat([pairs[name][k] for pairs, _ in fit]) for k in (0, 1))
        basis_A = torch.linalg.eigh(acts.T @ acts / len(acts)).eigenvectors
        basis_S = torch.linalg.eigh(grads.T @ grads / len(grads)).eigenvectors
        rotated = torch.stack([basis_S.T @ whole[name] @ basis_A for _, whole in fit])
        factors[name] = (basis_S, basis_A, rotated.square().mean(0))
    query = [passed(row)[1] for row in load_rows(data, "queries")]
    train = [passed(row)[1] for row in load_rows(data, "train")]
    scores = 0
    for name, (basis_S, basis_A, spectrum) in factors.items():
        damped = spectrum + 0.1 * spectrum.mean()
        stacked = (torch.stack([whole[name] for whole in part]) for part in (query, train))
        q, z = (basis_S.T @ gradients @ basis_A for gradients in stacked)
        scores = scores + (q / damped).flatten(1) @ z.flatten(1).T
    return factors, scores


def without_prompts(rows):
    """The rows with an unlabelled first quarter."""
    for row in rows:
        row["labels"][: len(row["labels"]) // 4] = NO_LABEL
    return rows


def compare(args, work, kind):
    low, high = LENGTHS[kind]
    if args.small:
        low, high = low // 4, high // 4
    shape = Shape(args.hidden, args.mlp, args.layers, args.vocabulary)
    generator = torch.Generator().manual_seed(1)
    train = make_rows(args.train, (low, high), args.vocabulary, generator)
    queries = make_rows(args.queries, args.query_lengths, args.vocabulary, generator)
    queries = without_prompts(queries)
    model = prepare(work, shape, args.dtype, train=train, queries=queries, fit=train[: args.fit])
    print(
        f"{kind}: {args.train} sequences of {low}-{high} tokens, {args.queries} queries of "
        f"{args.query_lengths[0]}-{args.query_lengths[1]}; {shape}; factors of {args.fit} "
        f"sequences; {args.dtype}, {args.device}, {args.threads} threads\n"
    )
    fit_both(args, work)
    mine, theirs = (read_factors(side, work) for side in ("ours", "kronfluence"))
    pairs = {"kronfluence to ours": (theirs, mine)}
    scores = {}
    if args.check:
        factors, scores["autograd"] = dense(model, work)
        checked = factors.__getitem__
        pairs |= {"ours to autograd": (mine, checked), "kronfluence to autograd": (theirs, checked)}
    modules = load_modules(work)
    errors = {what: errors_of(modules, *pair, args.device) for what, pair in pairs.items()}
    print(errors_table(errors) + "\n")
    scores |= score_both(args, work, ["given", "length"] if low < high else ["given"])
    agreement_of_scores(scores)


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    sys.stdout.reconfigure(line_buffering=True)
    disable_progress_bar()
    for kind in args.data:
        if args.work is None:
            with tempfile.TemporaryDirectory() as work:
                compare(args, Path(work) / kind, kind)
        else:
            compare(args, args.work.resolve() / kind, kind)


if __name__ == "__main__":
    main()
