"""`query` and `report`, as commands: files on disk against dense autograd, and what people see."""

import hashlib
import itertools
import json
import subprocess
import sys

import pytest
import torch
from helpers.dense import relative
from helpers.dense_scores import DenseScores
from helpers.workshop import (
    run_cli,
    run_here,
    save_tiny_gpt2,
    save_tiny_llama,
    texts,
    write_jsonl,
    write_yaml,
)
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from ekfac_dist.runtime.terminal import visible

QUERIES = [
    {"prompt": "The worker reads", "completion": " a batch of tokens", "against": " one matrix"},
    {"text": "Each layer keeps one factor."},
    {"prompt": "Label", "completion": " sums", "group": "pair"},
    {"prompt": "Gradient", "completion": " counts", "group": "pair"},
]


# What differs by the model is compared for both; of the rest the second is among the slow tests.
BOTH = pytest.mark.parametrize("fitted", ["llama", "gpt2"], indirect=True, scope="module")
ONE = pytest.mark.parametrize(
    "fitted",
    ["llama", pytest.param("gpt2", marks=pytest.mark.slow)],
    indirect=True,
    scope="module",
)


@pytest.fixture(scope="module")
def fitted(request, tmp_path_factory):
    """A directory with a model, text, queries and factors; gpt2's text has prompts."""
    directory = tmp_path_factory.mktemp(request.param)
    prompt = request.param == "gpt2"
    if prompt:
        save_tiny_gpt2(directory / "model", dtype=torch.float64)
    else:
        save_tiny_llama(directory / "model", dtype=torch.float64, mlp_bias=True)
    rows = [
        {"said": text[3 * (k % 4) :], "asked": text[: 3 * (k % 4)] if prompt else None}
        for k, text in enumerate(texts(11, words=(1, 12)))
    ]
    config = write_yaml(
        directory / "estimate.yaml",
        {
            "model": {"name": directory / "model", "dtype": "float64"},
            "data": {
                "source": write_jsonl(directory / "text.jsonl", rows),
                "max_tokens": 20,
                "text": "said",
                "prompt": "asked" if prompt else None,
            },
            "factors": {"labels": "data", "accumulate": "float64"},
            "batch_tokens": 64,
            "output": directory / "store",
        },
    )
    assert run_here(["estimate", "--config", config]).returncode == 0
    write_jsonl(directory / "queries.jsonl", QUERIES)
    return directory


def ask(directory, output, *options, run=run_here):
    """Runs `query`; the store's bytes are the same before and after."""
    before = hashes(directory / "store")
    arguments = ["query", "--factors", directory / "store", "--output", output]
    arguments += ["--queries", directory / "queries.jsonl", "--batch_tokens", "64", *options]
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert hashes(directory / "store") == before
    return done


def on_two_workers(arguments):
    return run_cli(arguments, workers=2)


def hashes(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def dense_answer(directory):
    """[rows, N], and −log p of the first query and of what it is against, from the files alone."""
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    names = json.loads((directory / "store" / "manifest.json").read_text())["modules"]

    def example(prompt, text, limit):
        found = tokenizer(prompt + text, return_offsets_mapping=True)
        ids = torch.tensor(found["input_ids"][:limit])
        starts = [start for start, _ in found["offset_mapping"]][:limit]
        labels = [i if s >= len(prompt) else -100 for i, s in zip(ids, starts, strict=True)]
        return {"input_ids": ids, "labels": torch.tensor(labels)}

    rows = [json.loads(line) for line in (directory / "text.jsonl").read_text().splitlines()]
    train = [example(row["asked"] or "", row["said"], 20) for row in rows]
    train = [t for t in train if (t["labels"][1:] != -100).any()]
    asked = [(q.get("prompt", ""), q.get("completion") or q["text"]) for q in QUERIES]
    asked.append((QUERIES[0]["prompt"], QUERIES[0]["against"]))
    queries = [example(prompt, completion, None) for prompt, completion in asked]
    scores = DenseScores(model, names, train).scores(queries, train)
    nats = []
    for query in (queries[0], queries[4]):
        logits = model(input_ids=query["input_ids"][None]).logits[0, :-1]
        nats.append(cross_entropy(logits, query["labels"][1:], reduction="sum").item())
    return torch.stack([scores[0] - scores[4], scores[1], scores[2] + scores[3]]), nats


@BOTH
def test_two_workers_files_hold_what_dense_autograd_says(fitted, tmp_path):
    done = ask(fitted, tmp_path / "scores", "--scores.top_k", "4", run=on_two_workers)
    found = load_file(tmp_path / "scores" / "scores.safetensors")
    expected, nats = dense_answer(fitted)
    assert found["scores"].dtype == torch.float32
    assert relative(found["scores"].double(), expected) < 1e-6
    manifest = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    assert manifest["format"] == "ekfac_dist/scores/1"
    assert manifest["complete"] is True
    assert manifest["scores"]["training_size"] is None
    assert manifest["data"]["num_sequences"] == expected.shape[1]
    top = [json.loads(x) for x in (tmp_path / "scores" / "top.jsonl").read_text().splitlines()]
    assert [(line["query"], line["rank"]) for line in top] == [
        (query, rank) for query in range(3) for rank in range(1, 5)
    ]
    rows = [json.loads(line) for line in (fitted / "text.jsonl").read_text().splitlines()]
    indices = found["indices"].tolist()
    for line in top:
        order = expected[line["query"]].argsort(descending=True)
        column = order[line["rank"] - 1].item()
        row = rows[line["index"]]
        assert line["index"] == indices[column]
        assert line["score"] == pytest.approx(expected[line["query"], column].item(), rel=1e-6)
        assert line["nats"] is None
        assert "note" not in line
        score, scores = expected[line["query"], column], expected[line["query"]]
        share = score / scores[scores.sign() == score.sign()].abs().sum()
        assert line["share"] == pytest.approx(share.item(), rel=1e-6)
        assert line["text"] == (row["asked"] or "") + row["said"]
    lines = [json.loads(x) for x in (tmp_path / "scores" / "queries.jsonl").open()]
    (contrast,) = lines[0]["members"]
    other = contrast["against"]
    assert [contrast["nats"], other["nats"]] == pytest.approx(nats)
    for side, text in ((contrast, " a batch of tokens"), (other, " one matrix")):
        assert side["completion"] == text
        pairs = zip(side["tokens"], side["is_label"], strict=True)
        assert "".join(token for token, is_label in pairs if is_label) == text
    assert not any("against" in member for line in lines[1:] for member in line["members"])
    assert "log p(completion) − log p(against)" in manifest["scores"]["scale"]
    assert f"−log p {nats[0]:.2f}, rather than {nats[1]:.2f}" in done.stdout
    for said in ("workers       2", "empirical Fisher", "0.1 · mean(Λ)", "positive: more of"):
        assert said in done.stdout
    assert "nats" not in done.stdout


@ONE
def test_every_option_is_in_the_files(fitted, tmp_path):
    options = {
        "normalize": "relatif_l",
        "per_token": "all",
        "per_module": "true",
        "per_layer": "true",
        "self_influence": "true",
        "rank": 3,
        "rescore": 6,
        "top_k": 3,
        "bottom_k": 2,
    }
    given = [part for name, value in options.items() for part in (f"--scores.{name}", str(value))]
    done = ask(fitted, tmp_path / "scores", *given, "--damping.value", "0.2")
    found = load_file(tmp_path / "scores" / "scores.safetensors")
    scores, norms = found["scores"].double(), found["norms"].double()
    assert torch.allclose(found["self_influence"].double().sqrt(), norms, rtol=1e-5)
    assert relative(found["module_scores"].double().sum(1), scores) < 1e-5
    assert relative(found["layer_scores"].double().sum(1), scores) < 1e-5
    starts = found["token_offsets"].tolist()
    for column, (start, end) in enumerate(itertools.pairwise(starts)):
        sums = found["token_scores"][:, start:end].double().sum(1)
        assert relative(sums, scores[:, column]) < 1e-4
    manifest = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    assert manifest["scan"]["rank"] == 3
    assert manifest["scan"]["ends"] == ["top", "bottom"]
    assert manifest["scan"]["spread"] == manifest["scan"]["rescored"] > 0
    for name in ("spearman", "spearman_top", "overlap"):
        assert len(manifest["scan"][name]) == 3
    assert manifest["model"]["dtype"] == "float64"
    assert manifest["data"]["max_tokens"] == 20
    stored = (fitted / "store" / "manifest.json").read_bytes()
    assert manifest["factors"]["manifest_sha256"] == hashlib.sha256(stored).hexdigest()
    assert manifest["damping"]["value"] == 0.2
    assert manifest["config"]["scores"]["normalize"] == "relatif_l"
    details = load_file(tmp_path / "scores" / "details.safetensors")
    exact = {
        (q, i): s
        for q, i, s in zip(
            found["exact_query"].tolist(),
            found["exact_index"].tolist(),
            found["exact_scores"].tolist(),
            strict=True,
        )
    }
    for pair, (q, i) in enumerate(
        zip(details["pair_query"].tolist(), details["pair_index"].tolist(), strict=True)
    ):
        assert details["module_scores"][pair].sum().item() == pytest.approx(exact[q, i], rel=1e-4)
    assert "rank correlation" in done.stdout
    assert "relatif_l" in done.stdout


@ONE
def test_the_same_query_twice_writes_the_same_bytes(fitted, tmp_path):
    for name, run in (("one", run_here), ("two", run_cli)):
        ask(fitted, tmp_path / name, "--scores.rank", "4", run=run)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        if name != "manifest.json":
            one, two = (tmp_path / k / name for k in ("one", "two"))
            assert one.read_bytes() == two.read_bytes(), name


@ONE
def test_other_data_can_be_scored_and_that_is_said(fitted, tmp_path):
    data = write_jsonl(tmp_path / "other.jsonl", [{"text": text} for text in texts(7, seed=5)])
    done = ask(fitted, tmp_path / "scores", "--data.source", data, "--data.max_tokens", "30")
    assert "not the sequences that the factors were fitted on" in done.stdout
    manifest = json.loads((tmp_path / "scores" / "manifest.json").read_text())
    assert manifest["data"]["same_as_fitted"] is False
    assert manifest["data"]["num_scored"] == 7
    assert manifest["data"]["max_tokens"] == 30


SCRIPTS = "Ο ταχύς 敏捷的狐 👩🏿\u200d🚀👍🏽 "
ACTING = "\x1b]0;mine\x07\x1b[31mred\x1b[2J\x9b1m\x7f\u202eevil\u2066\r\nbelow\tit"


@ONE
def test_text_of_any_kind_is_read_and_nats_that_cannot_be_are_marked(fitted, tmp_path):
    rows = [{"text": f"{SCRIPTS}{ACTING} {text}"} for text in texts(4, seed=6, words=(1, 3))]
    data = write_jsonl(tmp_path / "other.jsonl", rows)
    groups = [None, ACTING, ACTING]
    asked = [{"prompt": f"{ACTING}{k}", "completion": SCRIPTS} for k in range(3)]
    asked = [row | {"group": name} for row, name in zip(asked, groups, strict=True)]
    command = [sys.executable, "-m", "ekfac_dist", "query", "--factors", fitted / "store"]
    command += ["--queries", write_jsonl(tmp_path / "asked.jsonl", asked)]
    command += ["--data.source", data, "--data.text", "text", "--data.max_tokens", "120"]
    command += ["--output", tmp_path / "scores", "--scores.training_size", "1"]
    done = subprocess.run([str(part) for part in command], capture_output=True)
    assert done.returncode == 0, done.stderr
    for said in (done.stdout, done.stderr):
        lines = said.decode().split("\n")
        assert lines == [visible(line) for line in lines]
    said = done.stdout.decode()
    assert "␛]0;mine␇␛[31mred␛[2JU+009B1m␡U+202EevilU+2066" in said
    assert not any(line.startswith("below") for line in said.splitlines())

    def lines_of(name):
        return [json.loads(line) for line in (tmp_path / "scores" / name).open()]

    members = [query["members"] for query in lines_of("queries.jsonl")]
    losses = [sum(member["nats"] for member in row) for row in members]
    assert [len(row) for row in members] == [1, 2]
    top = lines_of("top.jsonl")
    for line in top:
        assert line["text"] == rows[line["index"]]["text"]
        assert line["nats"] == pytest.approx(line["score"], rel=1e-6)
        assert ("note" in line) == (line["nats"] > losses[line["query"]])
    notes = {line["note"] for line in top if line["query"] == 0 and "note" in line}
    assert notes == {
        f"above the query's −log p, {losses[0]:.3g} nats, which is all that it can gain: too far "
        "for first order"
    }
    assert "nats, first order" in said
    assert all(f"! {note}" in said for note in notes)
    for line in lines_of("sequences.jsonl"):
        whole = f"<|bos|>{line['text']}"
        assert whole.startswith("".join(line["tokens"]).rstrip("�"))
        assert "".join(line["tokens"]).startswith(f"<|bos|>{SCRIPTS}{ACTING}")
        assert len(line["tokens"]) == len(line["is_label"])


@pytest.mark.slow
@ONE
def test_a_narrower_model_answers_with_the_same_factors(fitted, tmp_path):
    ask(fitted, tmp_path / "exact")
    ask(fitted, tmp_path / "low", "--model.dtype", "bfloat16")
    exact, low = (
        load_file(tmp_path / name / "scores.safetensors")["scores"] for name in ("exact", "low")
    )
    assert relative(low, exact) < 0.2
    manifest = json.loads((tmp_path / "low" / "manifest.json").read_text())
    assert manifest["model"]["dtype"] == "bfloat16"
    assert manifest["factors"]["model"]["dtype"] == "float64"


@ONE
def test_a_rank_above_the_matrixs_is_reduced_and_that_is_said(fitted, tmp_path):
    done = ask(fitted, tmp_path / "scores", "--scores.rank", "99")
    assert "99 is more than" in done.stdout
    assert "reduced" in done.stdout


@ONE
def test_a_report_is_written_from_the_results(fitted, tmp_path):
    ask(fitted, tmp_path / "scores")
    done = run_here(["report", tmp_path / "scores"])
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "scores.html").read_text()
    assert "batch of tokens" in page
    again = run_here(["report", tmp_path / "scores"])
    assert again.returncode == 2
    assert "exists" in again.stderr
