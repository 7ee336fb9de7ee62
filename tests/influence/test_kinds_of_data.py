"""Results of a query on windows, tokens and chats: what lists say of a sequence."""

import json

import numpy as np
import pytest
from helpers.tokenised import TOKENIZER
from helpers.workshop import run_here, save_tiny_llama, texts, tiny_tokenizer, write_jsonl

from ekfac_dist.influence.results import ResultsReader
from ekfac_dist.report.answers import answer_tables
from ekfac_dist.report.page_data import page_data

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "a batch"}, {"role": "assistant", "content": "the sum"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def answered(directory, model, source, queries, *options):
    """The results of a fit and a query."""
    fit = ["estimate", "--model.name", model, "--data.source", source, *options]
    done = run_here([*fit, "--output", directory / "factors"])
    assert done.returncode == 0, done.stderr
    asked = write_jsonl(directory / "queries.jsonl", queries)
    ask = ["query", "--factors", directory / "factors", "--queries", asked]
    done = run_here([*ask, "--output", directory / "scores", "--scores.top_k", "4"])
    assert done.returncode == 0, done.stderr
    return ResultsReader(directory / "scores")


def test_lists_name_a_windows_document_and_first_token_and_show_its_own_text(model, tmp_path):
    rows = [{"text": text} for text in texts(4, words=(30, 40))]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    windows = ["--data.max_tokens", "24", "--data.window", "16"]
    queries = [{"prompt": "the", "completion": " worker"}]
    reader = answered(tmp_path, model, source, queries, *windows)
    sequences = {line["index"]: line for line in reader.lines("sequences.jsonl")}
    page = page_data(reader)
    for line in [*reader.lines("top.jsonl"), *sequences.values()]:
        ids = TOKENIZER(rows[line["document"]]["text"])["input_ids"]
        own = ids[line["first_token"] : line["first_token"] + 24]
        expected = TOKENIZER.decode(own)
        assert line["first_token"] % 16 == 0
        assert line["text"].removeprefix("<|bos|>") == expected.removeprefix("<|bos|>")
        assert page.origins[line["index"]] == (line["document"], line["first_token"])
    first = reader.lines("top.jsonl")[0]
    place = f"{first['index']} (row {first['document']}, token {first['first_token']})"
    assert place in answer_tables(str(tmp_path / "scores"))


def test_lists_of_whole_documents_are_as_ever(model, tmp_path):
    rows = [{"text": text} for text in texts(5)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    reader = answered(tmp_path, model, source, [{"text": "the worker"}])
    for line in reader.lines("top.jsonl"):
        assert line["text"] == rows[line["index"]]["text"]
        assert "document" not in line
    assert page_data(reader).origins == {}


def test_texts_of_a_template_and_of_tokens_are_shown(model, tmp_path):
    rows = [{"a": text, "b": "end"} for text in texts(5)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "of-template").mkdir()
    query = [{"text": "the worker"}]
    reader = answered(
        tmp_path / "of-template", model, source, query, "--data.template", "{a} and {b}"
    )
    for line in reader.lines("top.jsonl"):
        assert line["text"] == f"{rows[line['index']]['a']} and end"
    ids = np.array([[1, 40, 41, 42], [1, 50, 51, 52], [1, 60, 61, 62], [1, 70, 71, 72]])
    np.save(tmp_path / "ids.npy", ids)
    (tmp_path / "of-tokens").mkdir()
    reader = answered(
        tmp_path / "of-tokens", model, tmp_path / "ids.npy", query, "--data.tokens", "ids"
    )
    for line in reader.lines("top.jsonl"):
        assert line["text"] == "<|bos|>" + TOKENIZER.decode(ids[line["index"]][1:])


def test_chats_are_asked_and_scored(model, tmp_path):
    rows = [{"chat": [CHAT[0], {"role": "assistant", "content": text}]} for text in texts(5)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    queries = [{"messages": CHAT}]
    reader = answered(tmp_path, model, source, queries, "--data.messages", "chat")
    (query,) = reader.lines("queries.jsonl")
    (member,) = query["members"]
    assert member["prompt"] == "<user>a batch\n<assistant>"
    assert member["completion"] == "the sum\n"
    assert sum(member["is_label"]) == len(
        TOKENIZER("the sum\n", add_special_tokens=False)["input_ids"]
    )
    for line in reader.lines("top.jsonl"):
        text = rows[line["index"]]["chat"][1]["content"]
        assert line["text"] == f"<user>a batch\n<assistant>{text}\n"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": [CHAT[0]]}, "the last message is the user's"),
        ({"messages": [*CHAT[:1], {"role": "assistant", "content": ""}]}, "not empty"),
        ({"messages": CHAT, "prompt": "a"}, "has prompt and messages"),
    ],
)
def test_a_query_that_is_no_chat_is_status_2(model, tmp_path, fields, sentence):
    asked = write_jsonl(tmp_path / "queries.jsonl", [fields])
    ask = ["query", "--factors", tmp_path, "--queries", asked, "--output", tmp_path / "scores"]
    done = run_here(ask)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "line 1" in done.stderr
    assert json.loads(asked.read_text()) == fields
