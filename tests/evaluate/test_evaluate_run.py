"""`evaluate` from text to a table, on a tiny model; and what is used again."""

import json

import numpy as np
import pytest
import torch
from helpers.dense import dense_modules, relative
from helpers.dense_scores import DenseScores
from helpers.made_evaluation import made_evaluation
from helpers.networks import shifted
from helpers.pages import Page
from helpers.workshop import run_cli, run_here, save_tiny_llama, texts, write_jsonl, write_yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ekfac_dist.evaluate import seed_run
from ekfac_dist.factors.reader import StoreReader
from ekfac_dist.report.evaluation import evaluation_table

NUM, QUERIES, SUBSETS = 14, 5, 6


def made(directory):
    """A directory with a model, text, queries and the configuration of an evaluation."""
    save_tiny_llama(directory / "model", dtype=torch.float64, mlp_bias=True)
    lines = texts(NUM, words=(3, 9))
    write_jsonl(directory / "text.jsonl", [{"text": text} for text in lines])
    queries = [
        {"prompt": line[:8], "completion": line[8:], "gold": k, "group": "pair" if k > 3 else None}
        for k, line in enumerate(lines[: QUERIES + 1])
    ]
    queries[1]["gold"] = [1, 2]
    del queries[2]["gold"]
    queries[3]["against"] = " no worker waits."
    write_jsonl(directory / "queries.jsonl", queries)
    config = {
        "model": {"name": directory / "model", "dtype": "float64"},
        "data": {"source": directory / "text.jsonl", "max_tokens": 20},
        "queries": directory / "queries.jsonl",
        "training": {"epochs": 2, "batch_size": 4, "learning_rate": 0.003},
        "factors": {"labels": "data", "accumulate": "float64"},
        "protocols": ["lds", "removal", "tail_patch", "recall"],
        "dampings": [0.1, 1.0],
        "lds": {"subsets": SUBSETS},
        "removal": {"queries": 2, "share": 0.2, "random": 2},
        "tail_patch": {"top": 2},
        "tracked": {"attention": ["*.mlp.*", "*.self_attn.*"]},
        "seeds": [0, 1],
        "bootstrap": 30,
        "batch_tokens": 128,
        "output": directory / "evaluation",
    }
    return write_yaml(directory / "evaluate.yaml", config)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The directory of a finished evaluation, with what it printed."""
    directory = tmp_path_factory.mktemp("evaluated")
    done = run_here(["evaluate", "--config", made(directory)])
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


def results_in(directory):
    return json.loads((directory / "evaluation" / "results.json").read_text())


def scores_in(directory, key, seed=0):
    return load_file(directory / "evaluation" / f"seed-{seed}" / "scores" / f"{key}.safetensors")[
        "scores"
    ].double()


def explained(directory, seed=0):
    path = directory / "evaluation" / f"seed-{seed}" / "model"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(path)


def labelled(tokenizer, prompt, text, limit):
    encoded = tokenizer(prompt + text, return_offsets_mapping=True)
    ids = torch.tensor(encoded["input_ids"][:limit])
    labels = ids.clone()
    for t, (start, _) in enumerate(encoded["offset_mapping"][:limit]):
        if prompt and start < len(prompt):
            labels[t] = -100
    return {"input_ids": ids, "labels": labels}


def examples_of(directory):
    _, tokenizer = explained(directory)
    rows = [json.loads(line) for line in (directory / "queries.jsonl").read_text().splitlines()]
    train = [labelled(tokenizer, "", text, 20) for text in texts(NUM, words=(3, 9))]
    queries = [labelled(tokenizer, r["prompt"], r["completion"], None) for r in rows]
    return [*queries, labelled(tokenizer, rows[3]["prompt"], rows[3]["against"], None)], train


def grouped(scores):
    """Rows of queries as rows of groups: 4 and 5 are one, and 3 is against the last."""
    return torch.cat([scores[:3], scores[3:4] - scores[6:], scores[4:6].sum(0, keepdim=True)])


def test_the_scores_of_each_method_are_those_of_dense_autograd(evaluated):
    directory, _ = evaluated
    model, _ = explained(directory)
    queries, train = examples_of(directory)
    store = directory / "evaluation" / "seed-0" / "factors"
    names = StoreReader(store).manifest["modules"]
    dense = DenseScores(model, names, train, 0.1)
    assert relative(scores_in(directory, "ekfac-0.1"), grouped(dense.scores(queries, train))) < 1e-6
    q, z = dense.gradients(queries), dense.gradients(train)
    dot = grouped(sum(q[n] @ z[n].T for n in names))
    assert relative(scores_in(directory, "gradient_dot"), dot) < 1e-6
    norms = sum(z[n].square().sum(1) for n in names).sqrt()
    query_norms = sum(grouped(q[n]).square().sum(1) for n in names).sqrt()
    cosine = dot / norms / query_norms[:, None]
    assert relative(scores_in(directory, "gradient_cosine"), cosine) < 1e-6
    kfac = 0
    for name, module in dense_modules(model, [shifted(e) for e in train], names).items():
        K = module.K
        inverse = torch.linalg.inv(K + 0.1 * K.diagonal().mean() * torch.eye(len(K)).double())
        kfac = kfac + q[name] @ inverse @ z[name].T
    assert relative(scores_in(directory, "kfac-0.1"), grouped(kfac)) < 1e-6
    with_attention = StoreReader(store.with_name("factors-attention")).manifest["modules"]
    assert any("self_attn" in name for name in with_attention)
    wide = DenseScores(model, with_attention, train, 1.0)
    expected = grouped(wide.scores(queries, train))
    assert relative(scores_in(directory, "ekfac-attention-1"), expected) < 1e-6


def test_every_row_has_every_measure_and_the_table_shows_them(evaluated):
    directory, shown = evaluated
    results = results_in(directory)
    keys = [row["key"] for row in results["rows"]]
    assert len(keys) == len(set(keys)) == 4 + 2 * 3 + 2
    for row in results["rows"]:
        assert len(row["lds"]["by_query"]) == QUERIES
        assert row["lds"]["low"] <= row["lds"]["mean"] <= row["lds"]["high"]
        assert 0 <= row["recall"]["mrr"]["mean"] <= 1
    families = [row for row in results["rows"] if "removal" in row]
    assert len(families) == 8  # one for each method, and one for attention
    assert all("tail_patch" in row for row in families)
    assert results["plain"] in ("ekfac-0.1", "ekfac-1")
    assert -1 <= results["ceiling"]["mean"] <= 1
    table = evaluation_table(results)
    assert table in shown
    for text in ("EK-FAC, attention", "gradient cosine", "Noise ceiling", "removal", "recall@10"):
        assert text in table


def test_results_say_what_was_evaluated_and_with_what(evaluated):
    directory, _ = evaluated
    results = results_in(directory)
    model, _ = explained(directory)
    assert results["model"] == {
        "class": type(model).__name__,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    lines = [json.loads(line) for line in (directory / "queries.jsonl").read_text().splitlines()]
    members = [member for query in results["queries"] for member in query["members"]]
    assert members == [
        {"line": k, **{name: line.get(name) for name in ("prompt", "completion", "against")}}
        for k, line in enumerate(lines, start=1)
    ]
    assert [query["group"] for query in results["queries"]] == [None] * 4 + ["pair"]
    assert [query["gold"] for query in results["queries"]] == [[0], [1, 2], [], [3], [4, 5]]
    assert results["workers"] == 1
    bank = directory / "evaluation" / "seed-1" / "bank" / "losses"
    assert results["seeds"][1]["removal_models"] == len(list(bank.iterdir())) - 1 - SUBSETS


def test_the_page_and_the_plot_are_beside_the_results(evaluated):
    directory, shown = evaluated
    output = directory / "evaluation"
    for name, file in (("page", "evaluation.html"), ("plot", "lds.svg")):
        assert (output / file).is_file()
        assert f"{name:<14}{output / file}" in shown
    page = Page((output / "evaluation.html").read_text(encoding="utf-8"))
    results = results_in(directory)
    found = [row["by_query"] for row in page.data["rows"]]
    assert found == [row["lds"]["by_query"] for row in results["rows"]]


def test_made_up_results_have_the_fields_of_these(evaluated):
    directory, _ = evaluated

    def fields(value):
        if isinstance(value, list):
            merged = {}
            for each in value:
                merged |= fields(each)
            return merged
        if isinstance(value, dict):
            return {name: fields(each) for name, each in value.items()}
        return {}

    made, results = fields(made_evaluation()), fields(results_in(directory))
    for different in ("config", "software"):
        del made[different], results[different]
    assert made == results


def test_seeds_have_models_and_banks_of_their_own(evaluated):
    directory, _ = evaluated
    losses = []
    for seed in (0, 1):
        files = list((directory / "evaluation" / f"seed-{seed}" / "bank" / "losses").iterdir())
        # all; halves; random removals, and those of each method, of which some are the same
        assert 1 + SUBSETS + 2 < len(files) <= 1 + SUBSETS + 2 + 2 * 8
        losses.append({file.name: load_file(file)["losses"] for file in files})
    shared = set(losses[0]) & set(losses[1])
    assert len(shared) >= 1 + SUBSETS + 2
    assert not any(torch.equal(losses[0][name], losses[1][name]) for name in shared)


def test_the_bank_is_what_training_on_the_subset_gives(evaluated):
    """The losses of one subset, by training again from the start in plain steps."""
    directory, _ = evaluated
    bank = directory / "evaluation" / "seed-1" / "bank" / "losses"
    stored = next(
        tensors
        for tensors in map(load_file, sorted(bank.iterdir()))
        if tensors["kept"].sum() == NUM // 2
    )
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float64)
    queries, train = examples_of(directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.0)
    kept, step = stored["kept"].bool(), 0
    total = 2 * 4  # four batches in each of two epochs
    for epoch in range(2):
        order = np.random.default_rng([1, 1_000_003 + epoch]).permutation(NUM)
        for start in range(0, NUM, 4):
            optimizer.param_groups[0]["lr"] = 0.003 * (total - step) / total
            step += 1
            batch = [train[k] for k in order[start : start + 4] if kept[k]]
            if not batch:
                continue
            loss = sum(nats(model, example) for example in batch)
            optimizer.zero_grad()
            (loss / sum(len(example["input_ids"]) - 1 for example in batch)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.eval()
    expected = torch.stack([nats(model, query).detach() for query in queries])
    assert relative(stored["losses"], expected) < 1e-9


def nats(model, example):
    logs = model(input_ids=example["input_ids"][None]).logits[0, :-1].log_softmax(-1)
    labels = example["labels"][1:]
    at = torch.nonzero(labels != -100)[:, 0]
    return -logs[at, labels[at]].sum()


def test_the_same_run_again_trains_and_computes_nothing(evaluated, monkeypatch):
    directory, _ = evaluated
    before = results_in(directory)
    for name in ("train", "scores_of", "run_estimate"):
        monkeypatch.setattr(seed_run, name, None)
    tail = {name: row for name, row in enumerate(before["rows"]) if "tail_patch" in row}
    config = directory / "evaluate.yaml"
    done = run_here(["evaluate", "--config", config, "--protocols", "[lds,removal,recall]"])
    assert done.returncode == 0, done.stderr
    after = results_in(directory)
    for number, row in enumerate(after["rows"]):
        expected = dict(before["rows"][number])
        if number in tail:
            del expected["tail_patch"]
        assert row == expected
    assert after["ceiling"] == before["ceiling"]
    write_results(directory, before)


def write_results(directory, results):
    (directory / "evaluation" / "results.json").write_text(json.dumps(results))


def test_other_tools_scores_are_a_row(evaluated, tmp_path):
    directory, _ = evaluated
    for seed in (0, 1):
        scores = scores_in(directory, "ekfac-0.1", seed).float()
        save_file({"scores": scores}, tmp_path / f"theirs-{seed}.safetensors")
    before = results_in(directory)
    theirs = json.dumps({"theirs": str(tmp_path / "theirs-{seed}.safetensors")})
    options = ["--config", directory / "evaluate.yaml", "--protocols", "[lds]", "--scores", theirs]
    done = run_here(["evaluate", *options])
    assert done.returncode == 0, done.stderr
    by_key = {row["key"]: row for row in results_in(directory)["rows"]}
    write_results(directory, before)
    assert by_key["scores-theirs"]["lds"] == by_key["ekfac-0.1"]["lds"]


@pytest.mark.slow
def test_two_workers_give_the_same_bank(evaluated, tmp_path):
    directory, _ = evaluated
    done = run_cli(
        ["evaluate", "--config", directory / "evaluate.yaml", "--output", tmp_path / "two"],
        workers=2,
    )
    assert done.returncode == 0, done.stderr
    for seed in (0, 1):
        one = directory / "evaluation" / f"seed-{seed}" / "bank" / "losses"
        two = tmp_path / "two" / f"seed-{seed}" / "bank" / "losses"
        assert {f.name for f in one.iterdir()} == {f.name for f in two.iterdir()}
        for file in one.iterdir():
            found, expected = load_file(two / file.name), load_file(file)
            assert torch.equal(found["kept"], expected["kept"])
            assert relative(found["losses"], expected["losses"]) < 1e-9
