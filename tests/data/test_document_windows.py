"""Windows over long documents: every token is labelled once, whatever the window."""

from collections import Counter

import pytest
from helpers.tokenised import TOKENIZER, sequences_of, with_prompts
from helpers.workshop import texts
from hypothesis import given
from hypothesis import strategies as st

from ekfac_dist.config import DataConfig
from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.windows import in_parts, window_starts
from ekfac_dist.errors import ConfigError


def parts_of(documents, max_tokens, stride):
    columns = {
        "input_ids": documents,
        "labels": documents,
        "tokens_cut": [0] * len(documents),
        "split_token": [None] * len(documents),
        "document": list(range(len(documents))),
        "first_token": [0] * len(documents),
    }
    return in_parts(columns, max_tokens, stride)


@given(st.lists(st.integers(0, 60), max_size=6), st.integers(2, 20), st.data())
def test_every_token_of_every_document_is_labelled_exactly_once(lengths, max_tokens, data):
    stride = data.draw(st.integers(1, max_tokens - 1))
    documents = [[1000 * d + t for t in range(length)] for d, length in enumerate(lengths)]
    parts = parts_of(documents, max_tokens, stride)
    labelled = Counter()
    for ids, labels, document, first in zip(
        *(parts[name] for name in ("input_ids", "labels", "document", "first_token")), strict=True
    ):
        assert ids == documents[document][first : first + max_tokens]
        assert first % stride == 0
        assert len(labels) == len(ids)
        for token, label in list(zip(ids, labels, strict=True))[1:]:
            assert label in (token, NO_LABEL)
            labelled.update([label] if label != NO_LABEL else [])
    assert labelled == Counter(token for document in documents for token in document[1:])
    assert sum(parts["tokens_cut"]) == 0


def test_windows_begin_every_so_many_tokens_until_one_reaches_the_end():
    assert list(window_starts(10, 6, 4)) == [0, 4]
    assert list(window_starts(11, 6, 4)) == [0, 4, 8]
    assert list(window_starts(6, 6, 4)) == [0]
    assert list(window_starts(0, 6, 4)) == [0]


def test_a_short_document_is_the_same_with_windows_and_without():
    rows = [{"text": text} for text in texts(5, words=(2, 6))]
    whole = sequences_of(rows, max_tokens=64)
    windowed = sequences_of(rows, max_tokens=64, window=16)
    assert windowed.fingerprint == whole.fingerprint
    assert windowed.origins is None
    assert windowed.counts == whole.counts


def test_sequences_count_windows_and_know_their_document_and_first_token():
    rows = [{"text": text} for text in texts(3, words=(30, 40))]
    lengths = [len(TOKENIZER(row["text"])["input_ids"]) for row in rows]
    sequences = sequences_of(rows, max_tokens=32, window=20)
    expected = [
        [document, first]
        for document, length in enumerate(lengths)
        for first in range(0, max(1, length - 12), 20)
    ]
    assert sequences.origins.tolist() == expected
    assert sequences.indices.tolist() == list(range(len(expected)))
    assert sequences.counts.rows == len(expected)
    assert sequences.counts.documents == 3
    assert sequences.counts.truncated == 0
    assert sequences.num_labels.sum() == sum(lengths) - 3
    assert sequences.take([2, 0]).origins.tolist() == [expected[2], expected[0]]


def test_a_prompt_is_labelled_in_no_window_and_what_follows_in_one():
    prompt, text = texts(2, words=(20, 24))
    ids = TOKENIZER(prompt + text)["input_ids"]
    alone = len(TOKENIZER(prompt)["input_ids"])
    whole = with_prompts([(prompt, text)], max_tokens=len(ids))
    sequences = with_prompts([(prompt, text)], max_tokens=24, window=7)
    assert sequences.num_labels.sum() == whole.num_labels.sum() == len(ids) - alone
    assert sequences.counts.unlabelled > 0  # windows that are all prompt


def test_another_window_is_not_read_from_the_cache():
    rows = [{"text": text} for text in texts(3, words=(30, 40))]
    some, other = (
        sequences_of(rows, name="windows", max_tokens=32, window=window) for window in (20, 10)
    )
    assert len(other) > len(some)


@pytest.mark.parametrize("window", [32, 40])
def test_windows_must_overlap_for_the_first_token_of_one_is_not_predicted(window):
    with pytest.raises(ConfigError, match=f"data.window is {window}.*give 31 or less"):
        DataConfig(source="rows", max_tokens=32, window=window)


# -- templates -------------------------------------------------------------------------------------


def test_a_template_joins_columns_into_a_text():
    rows = [{"title": "A {brace}", "body": "b", "text": "not this"}, {"title": None, "body": "c"}]
    found = sequences_of(rows, template="{title}: {{{body}}} {title}")
    expected = sequences_of([{"text": "A {brace}: {b} A {brace}"}, {"text": ": {c} "}])
    assert found.fingerprint == expected.fingerprint


def test_a_template_may_follow_a_prompt():
    rows = [{"ask": "Say a word: ", "first": "small", "last": "batch"}]
    found = sequences_of(rows, template="{first} {last}", prompt="ask")
    expected = with_prompts([("Say a word: ", "small batch")])
    assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("no column", "names no column"),
        ("{title", "expected '}'"),
        ("{}", "column's name alone"),
        ("{title!r}", "column's name alone"),
        ("{title.__class__}", "column's name alone"),
        ("{title[0]}", "column's name alone"),
        ("{title:>9}", "column's name alone"),
    ],
)
def test_a_template_of_anything_but_columns_is_refused(template, fault):
    with pytest.raises(ConfigError, match=f"data.template is .*{fault}"):
        DataConfig(source="rows", template=template)


def test_a_templates_columns_are_those_that_are_read():
    config = DataConfig(source="rows", template="{title}: {body} {title}", prompt="ask")
    assert config.columns == ["title", "body", "ask"]
