"""What a run reads is what its data hold now, whatever their times say."""

import json

import pytest
from datasets import Dataset
from helpers.rewriting import REWRITERS, rewrite_with_time_restored
from helpers.workshop import logged, save_tiny_llama, texts, tiny_tokenizer, write_jsonl

from ekfac_dist.config import DataConfig, EstimateConfig, FactorsConfig, ModelConfig, QueryConfig
from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.errors import OutputError
from ekfac_dist.fit import group as fit
from ekfac_dist.fit.estimate import run_estimate
from ekfac_dist.influence.run import run_query
from ekfac_dist.passes.sequences import load_sequences
from ekfac_dist.runtime.processes import World

TOKENIZER = tiny_tokenizer()


def tokens(rows):
    """The fingerprint of texts, tokenised here."""
    return from_examples([TOKENIZER(rows)]).fingerprint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def config_of(model, source, output, **data):
    return EstimateConfig(
        model=ModelConfig(name=str(model)),
        data=DataConfig(source=str(source), **data),
        factors=FactorsConfig(labels="data"),
        output=str(output),
    )


@pytest.mark.parametrize("name", REWRITERS)
def test_sequences_are_those_of_a_rewritten_source_with_its_time_restored(name, tmp_path):
    path, config = tmp_path / name, DataConfig(source=str(tmp_path / name))
    # of one length, so that a saved data set's description stays true of both
    before, after = ["a worker sums", "each batch"], ["a module ends", "one label?"]
    for rows in (before, after):
        if path.exists():
            rewrite_with_time_restored(name, path, rows)
        else:
            REWRITERS[name](path, rows)
        found = load_sequences(config, TOKENIZER, "the same", World.start())
        assert found.fingerprint == tokens(rows)


def test_an_estimate_reads_a_rewritten_file_anew_and_one_that_has_begun_is_not_gone_on_with(
    model, tmp_path, monkeypatch
):
    path, world = tmp_path / "rows.jsonl", World.start()
    before, after = texts(5, seed=1), texts(5, seed=2)
    REWRITERS["rows.jsonl"](path, before)
    run_estimate(config_of(model, path, tmp_path / "one"), world)
    with monkeypatch.context() as stopped:
        stopped.setattr(fit, "run_eigenbasis", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_estimate(config_of(model, path, tmp_path / "two"), world)
    rewrite_with_time_restored("rows.jsonl", path, after)
    with pytest.raises(OutputError, match="data"):
        run_estimate(config_of(model, path, tmp_path / "two"), world)
    run_estimate(config_of(model, path, tmp_path / "three"), world)
    for output, rows in (("one", before), ("three", after)):
        manifest = json.loads((tmp_path / output / "manifest.json").read_text())
        assert manifest["data"]["fingerprint"] == tokens(rows)


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_the_texts_of_results_are_those_that_were_scored_and_split_tokens_are_told(model, tmp_path):
    path, world = tmp_path / "saved", World.start()
    rows = [
        {"prompt": "The worker ", "text": f"sends {text}"}
        if k % 2
        else {"prompt": "The worker", "text": f" sends {text}"}
        for k, text in enumerate(texts(6, words=(1, 4)))
    ]
    Dataset.from_list(rows).save_to_disk(path)
    config = config_of(model, path, tmp_path / "store", prompt="prompt")
    with logged() as said:
        run_estimate(config, world)
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["data"]["num_split_tokens"] == 3
    assert any("in 3 of 6 rows, first in row 1" in line for line in said)
    queries = [
        {"prompt": "Each layer ", "completion": "sums one batch."},
        {"prompt": "Each layer", "completion": " sums one batch."},
    ]
    query = QueryConfig(
        factors=str(tmp_path / "store"),
        queries=str(write_jsonl(tmp_path / "queries.jsonl", queries)),
        output=str(tmp_path / "scores"),
    )

    def change_source(line):
        if line.startswith("data "):  # the sequences are read; the scoring begins
            others = [{"prompt": "", "text": "other"}] * 6
            Dataset.from_list(others).save_to_disk(tmp_path / "others")
            for file in (tmp_path / "others").iterdir():
                file.replace(path / file.name)

    with logged(change_source) as told:
        run_query(query, world)
    top = [json.loads(line) for line in (tmp_path / "scores/top.jsonl").read_text().splitlines()]
    assert len(top) == 2 * 6
    for line in top:
        row = rows[line["index"]]
        assert line["text"] == row["prompt"] + row["text"]
    asked = [json.loads(x) for x in (tmp_path / "scores/queries.jsonl").read_text().splitlines()]
    assert [line["members"][0]["split_token"] for line in asked] == [" s", None]
    (note,) = (line for line in told if line.startswith("split token "))
    assert "line 1: the token ' s' begins in the prompt and ends in the completion" in note
    assert any(line.startswith("split tokens") and "in 3 of 6" in line for line in told)
