"""Whether influence finds a function's own module, beside gradient dot product, BM25 and chance.

    python tests/benchmarks/retrieval.py runs/demo        a directory that the demo made

The demo's corpus (`ekfac_dist.demo.corpus`) is in the order of a hash, so that its first rows of
any number are a fair sample of all modules. Of these rows,

    fitted      the first 1,000 or so: those that the demo's factors were fitted on
    candidates  the first 3,000: what is scored, and searched by BM25
    queries     functions among the rows after them: held out from both

Modules are taken in the order of how many functions they have among the later rows; the first is
the main result, the next four say how much it varies. A module's queries are its first 20 functions
there, each a row that is one whole function or method and fits into the model. They are asked as
{"text"}, whole, as the candidates are. A candidate that contains a query, or is contained in one (a
function's documentation string is a row of its own), is left out, of whatever module it is.

Each method orders the candidates; what counts is the share of its first 10 that come from the
query's module. The model itself has trained on rows of all kinds, on queries and candidates alike.

    EK-FAC         ∇log p(q)ᵀ (F + λ)⁻¹ ∇log p(z), λ = 0.1 · mean(Λ)
    gradient dot   ∇log p(q)ᵀ ∇log p(z), of the same modules' weights
    … cosine       either over the norms of q and z, in the same inner product
    BM25           on words, in lower case, identifiers cut at their underscores
    chance         the module's share of the candidates
"""

import argparse
import ast
import re
import textwrap
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import bm25s
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ekfac_dist import influence_scores, load_factors
from ekfac_dist.demo.corpus import read_corpus
from ekfac_dist.demo.directory import DemoPaths
from ekfac_dist.report.tables import table

# (F + λ)⁻¹ is 1/λ to within Λ/λ, and Λ is below 1e7 here; `check_gradient_dot` looks.
LAMBDA_OF_GRADIENT_DOT = 1e14


@dataclass(frozen=True)
class Task:
    """Numbers of rows of the corpus.

    Attributes:
        queries: Of each module, its queries.
        candidates: What is searched.
    """

    queries: dict[str, list[int]]
    candidates: list[int]
    num_contained: int

    @property
    def asked(self):
        """All queries, module after module."""
        return [number for numbers in self.queries.values() for number in numbers]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="directory of a demo")
    parser.add_argument("--modules", type=int, default=5)
    parser.add_argument("--queries", type=int, default=20, help="of each module")
    parser.add_argument("--candidates", type=int, default=3000, help="rows of the corpus to search")
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=None)
    return parser.parse_args()


def is_one_function(row):
    """Whether a row is a whole function, or a whole method, and nothing besides."""
    try:
        body = ast.parse(textwrap.dedent(row.text)).body
    except SyntaxError:
        return False
    is_function = len(body) == 1 and isinstance(body[0], ast.FunctionDef | ast.AsyncFunctionDef)
    return row.kind == "source" and is_function


def make_task(rows, args, fits):
    """Chooses modules, queries and candidates by the rules above, before any score is known."""
    functions = defaultdict(list)
    for number in range(args.candidates, len(rows)):
        if is_one_function(rows[number]) and fits(rows[number].text):
            functions[rows[number].module].append(number)
    most = sorted(functions, key=lambda module: (-len(functions[module]), module))
    chosen = {module: functions[module][: args.queries] for module in most[: args.modules]}
    if any(len(numbers) < args.queries for numbers in chosen.values()):
        raise SystemExit(f"a module has fewer than {args.queries} functions; ask for less")
    asked = [squeezed(rows[number].text) for numbers in chosen.values() for number in numbers]
    candidates = [
        number
        for number in range(args.candidates)
        if not any(
            (text := squeezed(rows[number].text)) in query or query in text for query in asked
        )
    ]
    return Task(chosen, candidates, args.candidates - len(candidates))


def squeezed(text):
    """A text without its white space, so that indentation does not hide what it contains."""
    return "".join(text.split())


def gradient_scores(model, factors, tokenizer, rows, task, args, **changes):
    """Raw and cosine scores {name: [Q, N]} of one damping."""
    fitted = factors.manifest["config"]
    start = time.perf_counter()
    answer = influence_scores(
        model,
        factors,
        [{"text": rows[number].text} for number in task.asked],
        [{"text": row.text} for row in rows[: args.candidates]],
        tokenizer=tokenizer,
        normalize="cosine",
        candidates=task.candidates,
        max_tokens=fitted["data"]["max_tokens"],
        batch_tokens=fitted["batch_tokens"],
        progress=True,
        **changes,
    )
    assert answer.indices.tolist() == task.candidates
    print(f"took {time.perf_counter() - start:.0f} s", flush=True)
    raw = answer.scores.double() * answer.norms * answer.query_norms[:, None]
    return {"": raw.numpy(), " cosine": answer.scores.double().numpy()}


def bm25_scores(rows, task):
    """BM25 of each query's words against the candidates' [Q, N]."""
    index = bm25s.BM25()
    index.index([words(rows[number].text) for number in task.candidates], show_progress=False)
    return np.stack([index.get_scores(words(rows[number].text)) for number in task.asked])


def words(text):
    """A text's words, as BM25 counts them."""
    return re.findall(r"[^\W_]+", text.lower())


def check_gradient_dot(model, tokenizer, factors, rows, task, dots_QN, num_pairs=3):
    """Largest relative difference between some dot products and autograd's own."""
    weights = [model.get_submodule(name).weight for name in factors.modules]

    def gradient(text, max_tokens=factors.manifest["config"]["data"]["max_tokens"]):
        ids = torch.tensor([tokenizer(text)["input_ids"][:max_tokens]])
        # `loss` is a mean over the tokens that are predicted.
        loss = model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
        return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, weights)])

    differences = []
    query = gradient(rows[task.asked[0]].text)
    for column, number in enumerate(task.candidates[:num_pairs]):
        expected = float(query @ gradient(rows[number].text))
        differences.append(abs(dots_QN[0, column] / expected - 1))
    return max(differences)


def shares_in_top(scores_QN, task, rows, top):
    """Share of each query's first sequences that are of its module [Q]."""
    modules = np.array([rows[number].module for number in task.candidates])
    asked = np.array([rows[number].module for number in task.asked])
    order = np.argsort(-scores_QN, axis=1, kind="stable")[:, :top]
    return (modules[order] == asked[:, None]).mean(1)


def mean_and_error(values):
    """Mean and its standard error, in percent."""
    return f"{values.mean():.0%} ± {values.std(ddof=1) / len(values) ** 0.5:.0%}"


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    paths = DemoPaths(args.directory)
    rows = read_corpus(paths.corpus)
    model = AutoModelForCausalLM.from_pretrained(paths.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(paths.model)
    factors = load_factors(paths.factors, model=model)
    num_fitted = factors.manifest["data"]["num_sequences"]
    assert args.candidates >= num_fitted, "queries would be among the fitted rows"
    context = model.config.max_position_embeddings
    task = make_task(rows, args, lambda text: len(tokenizer(text)["input_ids"]) <= context)
    print(
        f"{len(task.candidates)} candidates of {len(rows)} rows ({task.num_contained} left out: in "
        f"a query, or around one); factors of the first {num_fitted}"
    )
    methods = {"BM25": bm25_scores(rows, task)}
    common = (model, factors, tokenizer, rows, task, args)
    for name, changes in {
        "gradient dot": {"damping": LAMBDA_OF_GRADIENT_DOT, "relative": False},
        "EK-FAC": {"damping": args.damping},
    }.items():
        found = gradient_scores(*common, **changes)
        methods |= {name + suffix: scores for suffix, scores in found.items()}
    dots_QN = methods["gradient dot"] * LAMBDA_OF_GRADIENT_DOT
    difference = check_gradient_dot(model, tokenizer, factors, rows, task, dots_QN)
    print(f"gradient dot products equal autograd's to {difference:.1e}\n")
    shares = {name: shares_in_top(scores, task, rows, args.top) for name, scores in methods.items()}
    candidate_modules = [rows[number].module for number in task.candidates]
    lines = []
    for place, module in enumerate(task.queries):
        mine = slice(place * args.queries, (place + 1) * args.queries)
        count = candidate_modules.count(module)
        cells = [mean_and_error(values[mine]) for values in shares.values()]
        lines.append([module, str(count), f"{count / len(task.candidates):.1%}", *cells])
    lines[0][0] += " (main)"
    print(f"Share of the first {args.top} from the query's module, {args.queries} queries each:\n")
    print(table(["module", "candidates", "chance", *shares], lines))


if __name__ == "__main__":
    main()
