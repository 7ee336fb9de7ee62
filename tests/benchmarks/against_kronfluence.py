"""The same fit and the same scores by this package and by kronfluence: agreement, time and memory.

    python tests/benchmarks/against_kronfluence.py --peer_python ENV/bin/python
    python tests/benchmarks/against_kronfluence.py --peer_python ENV/bin/python --small --check

ENV is another virtual environment, with torch, transformers and kronfluence 1.0.1 (which asks for
torchvision and does not use it: where only torch's CPU build fits, install with --no-deps, and
accelerate, einops, einconv, opt_einsum and rich beside it). Both sides get one random-weight Llama,
one data set with the data's own labels, and float32; each phase of each side is a process of its
own, one after the other. Factors are fitted on the first `--fit` training sequences.

Compared are E, the whole approximation of each module's Fisher, and the scores of every query
against every training sequence. With E = (Q_S ⊗ Q_A) diag(vec Λ) (Q_S ⊗ Q_A)ᵀ, a Frobenius product
needs no matrix larger than a factor:

    <E, E'> = Σ Λ ∘ (R_S∘² Λ' (R_A∘²)ᵀ)         R_S = Q_Sᵀ Q_S',  R_A = Q_Aᵀ Q_A'

`--check` adds a third opinion, for small sizes: float64 autograd, one sequence at a time. Run it
with `--dtype float64` to compare definitions rather than rounding.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from ekfac_dist import estimate_factors, load_factors
from ekfac_dist.report.tables import table

PEER = Path(__file__).with_name("peer_kronfluence.py")
NO_LABEL = -100
LENGTHS = {"uniform": (128, 128), "ragged": (32, 256)}


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--peer_python", help="python of an environment that has kronfluence")
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
    # A phase of ours, in a process of its own.
    parser.add_argument("--phase", choices=["fit", "scores"], help=argparse.SUPPRESS)
    parser.add_argument("--phase_rank", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase is None and args.peer_python is None:
        parser.error("--peer_python is needed")
    if args.small:
        args.hidden, args.mlp, args.layers, args.vocabulary = 64, 160, 2, 256
        args.train = args.fit = 24
        args.queries, args.query_lengths, args.rank = 6, (12, 24), 8
        args.peer_batch = args.peer_rank_batch = args.peer_query_batch = 4
    return args


# --- what both sides are given -------------------------------------------------------------------


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
        max_position_embeddings=max(high for _, high in LENGTHS.values()),
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(getattr(torch, args.dtype))


def make_rows(args, num_rows, lengths, generator, *, prompt):
    """Rows of Zipf's tokens, so that they share some; a prompt is an unlabelled first quarter."""
    weights = 1 / torch.arange(10, args.vocabulary + 10).double()
    rows = []
    for length in torch.randint(lengths[0], lengths[1] + 1, (num_rows,), generator=generator):
        ids = torch.multinomial(weights, int(length), replacement=True, generator=generator)
        labels = ids.clone()
        if prompt:
            labels[: len(ids) // 4] = NO_LABEL
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def save_rows(path, **sets):
    tensors = {}
    for name, rows in sets.items():
        tensors[f"{name}.ids"] = torch.cat([row["input_ids"] for row in rows])
        tensors[f"{name}.labels"] = torch.cat([row["labels"] for row in rows])
        tensors[f"{name}.lengths"] = torch.tensor([len(row["input_ids"]) for row in rows])
    save_file(tensors, path)


def load_rows(path, name):
    tensors = load_file(path)
    lengths = tensors[f"{name}.lengths"].tolist()
    ids, labels = tensors[f"{name}.ids"].split(lengths), tensors[f"{name}.labels"].split(lengths)
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


def prepare(args, work, lengths):
    """Writes the model, the data and the modules' names; returns the model."""
    model = make_model(args)
    model.save_pretrained(work / "model")
    generator = torch.Generator().manual_seed(1)
    train = make_rows(args, args.train, lengths, generator, prompt=False)
    queries = make_rows(args, args.queries, args.query_lengths, generator, prompt=True)
    save_rows(work / "data.safetensors", train=train, queries=queries, fit=train[: args.fit])
    names = [name for name, _ in model.named_modules() if re.search(r"\.mlp\..*_proj$", name)]
    (work / "modules.json").write_text(json.dumps(names))
    return model


# --- ours ----------------------------------------------------------------------------------------


def our_scores(model, factors, queries, train, rank, batch_tokens):
    """Scores [queries, train] by this package."""
    from ekfac_dist import influence_scores

    result = influence_scores(
        model,
        factors,
        queries,
        train,
        damping=0.1,
        rank=rank,
        per_token="none",
        batch_tokens=batch_tokens,
    )
    return result.scores


def status_bytes(field):
    """This process's VmHWM (peak resident memory) or VmRSS (resident now).

    Not getrusage's peak, which a child inherits from the process that started it.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def run_our_phase(args):
    """One phase of ours; prints a line of JSON as the peer does."""
    torch.set_num_threads(args.threads)
    work, data = args.work, args.work / "data.safetensors"
    model = AutoModelForCausalLM.from_pretrained(work / "model").to(args.device)
    report = {"bytes_before": status_bytes("VmRSS")}
    start = time.perf_counter()
    if args.phase == "fit":
        factors = estimate_factors(
            model,
            load_rows(data, "fit"),
            output=work / "ours",
            labels="data",
            accumulate=args.dtype,
            batch_tokens=args.batch_tokens,
        )
        report["passes"] = {
            name: part["seconds"] for name, part in factors.manifest["passes"].items()
        }
    else:
        factors = load_factors(work / "ours", model=model)
        queries, train = load_rows(data, "queries"), load_rows(data, "train")
        scores = our_scores(model, factors, queries, train, args.phase_rank, args.batch_tokens)
        report["scores"] = str(work / f"ours_{args.phase_rank or 'exact'}.safetensors")
        save_file({"scores": scores.contiguous()}, report["scores"])
    report["seconds"] = time.perf_counter() - start
    report["peak_bytes"] = status_bytes("VmHWM")
    if args.device == "cuda":
        report["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(report))


# --- running both --------------------------------------------------------------------------------


def run(command):
    """The last line of what a phase prints, as JSON."""
    quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **quiet},
    )
    if done.returncode:
        sys.exit(f"failed with {done.returncode}: {' '.join(map(str, command))}")
    return json.loads(done.stdout.splitlines()[-1])


def ours(args, work, phase, rank=None):
    command = [sys.executable, __file__, "--work", work, "--phase", phase, "--dtype", args.dtype]
    command += ["--device", args.device, "--threads", args.threads]
    command += ["--batch_tokens", args.batch_tokens]
    return run(command if rank is None else [*command, "--phase_rank", rank])


def peer(args, work, phase, *options):
    command = [args.peer_python, PEER, work, "--phase", phase, "--device", args.device]
    batch = args.peer_rank_batch if "--rank" in options else args.peer_batch
    return run([*command, "--threads", args.threads, "--train_batch", batch, *options])


def best(repeats, call):
    return min((call() for _ in range(repeats)), key=lambda report: report["seconds"])


def fit_both(args, work):
    """Fits with both; prints times; returns {module: (Q_S, Q_A, Λ)} of each, in float64."""
    mine = ours(args, work, "fit")
    theirs = {
        phase: peer(args, work, phase, "--order", "length")
        for phase in ("covariance", "eigenbasis", "refit")
    }
    seconds = {name: (mine["passes"][name], theirs[name]["seconds"]) for name in theirs}
    seconds["all"] = (mine["seconds"], sum(report["seconds"] for report in theirs.values()))
    rows = [[name, f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}"] for name, (a, b) in seconds.items()]
    print(table(["fit, seconds", "ours", "kronfluence, by length", "ratio"], rows))
    peaks = ", ".join(f"{name} {r['peak_bytes'] / 1e9:.2f}" for name, r in theirs.items())
    print(f"peak memory, GB: ours {mine['peak_bytes'] / 1e9:.2f}; kronfluence {peaks}\n")
    stored = load_factors(work / "ours")
    fitted = {}
    for name in stored.modules:
        module = stored.module(name)
        fitted[name] = tuple(
            t.double() for t in (module.basis_OO, module.basis_II, module.lambda_OI)
        )
    return fitted, peer_factors(Path(theirs["refit"]["factors"]), list(stored.modules))


def peer_factors(folder, modules):
    def load(name):
        return load_file(folder / f"{name}.safetensors")

    bases_S, bases_A = load("gradient_eigenvectors"), load("activation_eigenvectors")
    sums, counts = load("lambda_matrix"), load("num_lambda_processed")
    return {
        name: (
            bases_S[name].double(),
            bases_A[name].double(),
            sums[name].double() / int(counts[name]),
        )
        for name in modules
    }


def score_both(args, work, orders):
    """Times and peaks of every way of scoring, printed; {way: scores in float64}."""
    ways = {}
    for rank in (None, args.rank):
        kind = "exact" if rank is None else f"rank {rank}"
        ways[f"ours, {kind}"] = lambda rank=rank: ours(args, work, "scores", rank)
        for order in orders:
            options = ["--order", order, "--query_batch", args.peer_query_batch]
            options += ["--query_steps", args.peer_query_steps]
            if rank is not None:
                options += ["--rank", rank]
            named = f"kronfluence, {kind}" + (", by length" if order == "length" else "")
            ways[named] = lambda options=options: peer(args, work, "scores", *options)
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


def product(one, other):
    """<E, E'>, see above."""
    (basis_S, basis_A, spectrum), (basis_S2, basis_A2, spectrum2) = one, other
    squares_S, squares_A = (basis_S.T @ basis_S2) ** 2, (basis_A.T @ basis_A2) ** 2
    return (spectrum * (squares_S @ spectrum2 @ squares_A.T)).sum().item()


def relative_error(one, other):
    """‖E - E'‖ / ‖E'‖."""
    norm = product(other, other)
    return (max(product(one, one) + norm - 2 * product(one, other), 0) / norm) ** 0.5


def agreement_of_factors(pairs):
    """Prints the error of E, worst module, for {what: (factors, factors)}."""
    rows = []
    for what, (one, other) in pairs.items():
        errors = {name: relative_error(one[name], other[name]) for name in other}
        worst = max(errors, key=errors.get)
        middle = sorted(errors.values())[len(errors) // 2]
        traces = [
            abs(one[n][2].sum() / other[n][2].sum() - 1).item() for n in other
        ]  # of Λ: what damping is relative to
        rows.append([what, f"{middle:.1e}", f"{errors[worst]:.1e}", worst, f"{max(traces):.1e}"])
    print(table(["relative error of E", "median", "worst", "module", "mean Λ, worst"], rows) + "\n")


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
    names = json.loads((work / "modules.json").read_text())
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


def compare(args, work, kind):
    low, high = LENGTHS[kind]
    if args.small:
        low, high = low // 4, high // 4
    model = prepare(args, work, (low, high))
    print(
        f"{kind}: {args.train} sequences of {low}-{high} tokens, {args.queries} queries of "
        f"{args.query_lengths[0]}-{args.query_lengths[1]}; hidden {args.hidden}, MLP {args.mlp}, "
        f"{args.layers} layers, vocabulary {args.vocabulary}; factors of {args.fit} sequences; "
        f"{args.dtype}, {args.device}, {args.threads} threads\n"
    )
    mine, theirs = fit_both(args, work)
    pairs = {"kronfluence to ours": (theirs, mine)}
    scores = {}
    if args.check:
        checked, scores["autograd"] = dense(model, work)
        pairs |= {"ours to autograd": (mine, checked), "kronfluence to autograd": (theirs, checked)}
    agreement_of_factors(pairs)
    scores |= score_both(args, work, ["given", "length"] if low < high else ["given"])
    agreement_of_scores(scores)


def main():
    args = arguments()
    if args.phase is not None:
        run_our_phase(args)
        return
    torch.set_num_threads(args.threads)
    sys.stdout.reconfigure(line_buffering=True)
    disable_progress_bar()
    for kind in args.data:
        if args.work is None:
            with tempfile.TemporaryDirectory() as work:
                compare(args, Path(work), kind)
        else:
            work = args.work.resolve() / kind
            work.mkdir(parents=True)
            compare(args, work, kind)


if __name__ == "__main__":
    main()
