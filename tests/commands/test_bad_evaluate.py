"""Bad input to `evaluate` is answered as bad input to the other commands is; see `refusals`."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from helpers.refusals import (
    Command,
    case,
    config,
    each,
    here,
    in_this_process,
    lose_tokenizer,
    on_real_workers,
    options,
    require_refusal,
    require_sentence,
    rows,
    tensors,
    without,
    write,
)
from helpers.workshop import run_here, save_tiny_llama, texts, write_jsonl
from safetensors.torch import load_file, save_file

NUM = 10
QUERIES = [
    {"prompt": "Which one sends ", "completion": "every gradient?", "gold": 1},
    {"text": "A worker waits for the last batch."},
    {"text": "Each layer keeps one factor."},
]


class Evaluate(Command):
    """An evaluation of a tiny model, with all protocols."""

    name = "evaluate"

    def begin(self):
        self.config = {
            "model": {"name": self.good / "tiny"},
            "data": {"source": self.good / "text.jsonl", "max_tokens": 16},
            "queries": write_jsonl(self.path("queries.jsonl"), QUERIES),
            "training": {"epochs": 2, "batch_size": 4, "learning_rate": 0.003},
            "methods": ["bm25", "gradient_dot"],
            "protocols": ["lds", "recall"],
            "lds": {"subsets": 3},
            "bootstrap": 10,
            "output": self.path("evaluation"),
        }


def queries(*lines):
    return config("queries", lambda command: write_jsonl(command.path("other.jsonl"), lines))


def scores(**held):
    def change(command):
        save_file(held, command.path("theirs.safetensors"))
        command.config["scores"] = {"theirs": str(command.path("theirs.safetensors"))}

    return change


def finished(change):
    """The evaluation is there already, of other settings."""

    def spoil(command):
        shutil.copytree(command.good / "evaluation", command.path("evaluation"))
        change(command)

    return spoil


def spoilt_entry(command):
    bank = command.path("evaluation") / "seed-0" / "bank" / "losses"
    file = min(bank.iterdir())
    file.write_bytes(file.read_bytes()[:-4])


def with_weights_of(value):
    def change(held):
        held["model.embed_tokens.weight"].fill_(value)

    return tensors(change)


CASES = [
    case("no model", without("model.name"), "model.name is not given"),
    case("no queries", without("queries"), "queries is not given"),
    case("no output", without("output"), "output is not given"),
    case(
        "a model that is missing", config("model.name", here("gone")), "no model directory .*gone"
    ),
    case(
        "a model without a tokenizer", lose_tokenizer, "tokenizer of model .* could not be loaded"
    ),
    case("data that is missing", config("data.source", here("gone.jsonl")), "gone.jsonl"),
    case("data without a label", rows([{"text": ""}]), "has a label|nothing|empty"),
    case(
        "queries that are missing",
        config("queries", here("gone.jsonl")),
        "queries .*gone.jsonl cannot be read",
    ),
    case(
        "a query with nothing to predict",
        queries({"prompt": "what?", "completion": ""}),
        "completion is empty",
    ),
    case("gold that is no number", queries({**QUERIES[0], "gold": "one"}), "line 1: gold is 'one'"),
    case(
        "gold outside the data",
        queries({**QUERIES[0], "gold": [0, 10]}),
        "line 1: gold is 10 … index 0 to 9",
    ),
    case("recall without gold", queries(*QUERIES[1:]), "recall, but no query … gold"),
    case("no protocol", config("protocols", []), "protocols is empty"),
    case("an unknown protocol", config("protocols", ["lsd"]), "protocols"),
    case("a protocol twice", config("protocols", ["lds", "lds"]), "protocols is .* give each once"),
    case("an unknown method", config("methods", ["ekfak"]), "methods"),
    case("no method", config("methods", []), "methods is empty"),
    case("removal without lds", config("protocols", ["removal"]), "removal without lds"),
    case("a damping of 0", config("dampings", [0.0]), "dampings is 0.0 … above 0"),
    case("a negative seed", config("seeds", [-1]), "seeds is -1"),
    case("no seed", config("seeds", []), "seeds is empty"),
    case(
        "a learning rate of 0",
        config("training.learning_rate", 0.0),
        "training.learning_rate is 0.0",
    ),
    case("no epoch", config("training.epochs", 0), "training.epochs is 0"),
    case("an unknown schedule", config("training.schedule", "linaer"), "training.schedule"),
    case(
        "an unknown field", config("training.optimizer", "sgd"), "unknown field training.optimizer"
    ),
    case("too few subsets", config("lds.subsets", 2), "lds.subsets is 2 … 3 subsets or more"),
    case("subsets of nothing", config("lds.keep", 0.01), "lds.keep is 0.01 of 10 … hold nothing"),
    case("subsets of everything", config("lds.keep", 0.99), "lds.keep is 0.99 of 10 … hold all"),
    case("a share of 1", config("lds.keep", 1.0), "lds.keep is 1.0 … above 0 and below 1"),
    case(
        "a removal of none",
        (
            config("protocols", ["lds", "removal"]),
            config("removal.share", 0.001),
            config("removal.queries", 1),
        ),
        "removal.share is 0.001 … none",
    ),
    case(
        "a removal of all queries",
        (config("protocols", ["lds", "removal"]), config("removal.share", 0.2)),
        "removal.queries is 10 of 3",
    ),
    case(
        "a model in 16 bits",
        config("model.dtype", "bfloat16"),
        "model.dtype is bfloat16 … trains models, in float32 or float64",
    ),
    case(
        "a quantised model",
        config("model.quantization", "8bit"),
        "model.quantization is '8bit' … whole models",
    ),
    case(
        "an adapter", config("model.adapter", here("adapter")), "model.adapter is .* … whole models"
    ),
    case(
        "an output that is a file",
        (write("evaluation", "here"),),
        "output .*evaluation is no directory",
    ),
    case(
        "an output that holds something else",
        (write("evaluation/notes.txt", "mine"),),
        "holds notes.txt … new or empty",
    ),
    case(
        "an unknown option",
        options("--lds.subset", 4),
        "no option --lds.subset; did you mean --lds.subsets",
    ),
    case(
        "a bank of another recipe",
        finished(config("training.epochs", 3)),
        r"bank .* other settings \(training.epochs: 2 there, 3 here\); nothing of it was changed",
    ),
    case(
        "a bank of another seed's order",
        finished(config("training.batch_size", 5)),
        "training.batch_size: 4 there, 5 here",
    ),
    case(
        "a bank of other data", finished(config("data.max_tokens", 15)), "sequences, by fingerprint"
    ),
    case("a bank of other queries", finished(queries(*QUERIES[:2])), "queries, by fingerprint"),
    case(
        "a bank of another model",
        finished(tensors(lambda held: held["model.norm.weight"].mul_(2))),
        "initial weights, by fingerprint",
    ),
    case(
        "a bank with a damaged file",
        finished(spoilt_entry),
        "of the bank is missing or damaged; remove it",
    ),
]
# What is found only after training has begun: the sentence is the same, and the bank stays.
LATE = [
    case(
        "a query longer than the model reads",
        queries({"text": "a " * 300, "gold": 0}),
        "longest sequence has .* shorten the query",
    ),
    case(
        "a recipe that diverges",
        with_weights_of(float("nan")),
        "diverges: the loss of step 1 of 6 is nan",
    ),
    case(
        "a recipe that unlearns",
        config("training.learning_rate", 5.0),
        "diverges: the mean loss per token rose from .* in the first epoch to",
    ),
    case(
        "scores that are missing",
        config("scores", {"theirs": "gone.safetensors"}),
        "scores gone.safetensors cannot be read",
    ),
    case(
        "scores whose name has braces",
        config("scores", {"theirs": "a{b}.safetensors"}),
        r"scores a\{b\}.safetensors cannot be read",
    ),
    case(
        "scores of another shape",
        scores(scores=torch.zeros(3, 9)),
        "are 3 × 9, but there are 3 queries and 10 sequences",
    ),
    case(
        "scores with another name",
        scores(score=torch.zeros(3, 10)),
        "theirs.safetensors cannot be read … tensor scores",
    ),
    case(
        "scores that are not finite",
        scores(scores=torch.full((3, 10), np.nan)),
        "hold NaN or infinity",
    ),
]


ON_TWO_WORKERS = ("a bank of another recipe", "a recipe that diverges", "gold outside the data")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    save_tiny_llama(directory / "tiny")
    write_jsonl(directory / "text.jsonl", [{"text": text} for text in texts(NUM, words=(4, 9))])
    return directory


@pytest.fixture(scope="module")
def finished_evaluation(good, tmp_path_factory):
    command = made(tmp_path_factory.mktemp("finished") / "command", good)
    command.set("output", good / "evaluation")
    done = run_here(command.arguments())
    assert done.returncode == 0, done.stderr


def made(directory, good):
    directory.mkdir(exist_ok=True)
    return Evaluate(directory, good)


@pytest.fixture
def command(tmp_path, good, finished_evaluation):
    return made(tmp_path / "command", good)


@each(CASES)
def test_one_worker_refuses_before_it_changes_anything(case, command, capfd):
    require_refusal(case, command, lambda arguments: in_this_process(arguments, capfd))


@each(LATE)
def test_what_is_found_late_is_a_sentence_too(case, command, capfd):
    case.spoil(command)
    status, _, stderr = in_this_process(command.arguments(), capfd)
    require_sentence(case, status, stderr)


@pytest.mark.slow
@each([*CASES, *LATE], ON_TWO_WORKERS)
def test_two_workers_refuse_alike(case, command):
    case.spoil(command)
    status, _, stderr = on_real_workers(command.arguments(), 2)
    require_sentence(case, status, stderr)


def test_without_its_packages_the_extra_is_named(command, capfd, monkeypatch):
    find = importlib.util.find_spec
    without = {"bm25s": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: without.get(name, find(name)))
    status, _, stderr = in_this_process(command.arguments(), capfd)
    assert status == 2
    assert "evaluate needs bm25s, which is not installed" in stderr
    assert not command.path("evaluation").exists()


def test_scores_of_a_contrast_are_not_used_for_one_of_other_sides(command, capfd):
    """The same sequences, of which another query is against the last."""
    command.config |= {
        "methods": ["gradient_dot"],
        "protocols": ["recall"],
        "training": {"epochs": 0},
    }
    asked = [{"prompt": "Each", "completion": f" {word}.", "gold": 1} for word in ("layer", "one")]
    file = command.path("evaluation") / "seed-0" / "scores" / "gradient_dot.safetensors"
    scores = []
    for contrast in (0, 1):
        lines = [asked[k] | ({"against": " worker."} if k == contrast else {}) for k in (0, 1)]
        write_jsonl(command.path("queries.jsonl"), lines)
        status, _, stderr = in_this_process(command.arguments(), capfd)
        assert status == 0, stderr
        scores.append(load_file(file)["scores"])
    assert not torch.equal(*scores)


def test_a_run_that_was_refused_goes_on_with_what_would_do(command, capfd):
    good_rate = command.config["training"]["learning_rate"]
    command.config["scores"] = {"theirs": "gone.safetensors"}
    assert in_this_process(command.arguments(), capfd)[0] == 2
    trained = command.path("evaluation") / "seed-0" / "model" / "model.safetensors"
    before = trained.stat().st_mtime_ns
    del command.config["scores"]
    assert command.config["training"]["learning_rate"] == good_rate
    assert in_this_process(command.arguments(), capfd)[0] == 0
    assert trained.stat().st_mtime_ns == before
    results = json.loads((command.path("evaluation") / "results.json").read_text())
    assert [row["key"] for row in results["rows"]] == ["bm25", "gradient_dot"]
