"""Queries as they are read, tokenised and grouped."""

import warnings

import pytest
import torch
from helpers.networks import build
from helpers.workshop import texts, tiny_tokenizer, write_jsonl
from tokenizers import normalizers

from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.errors import DataError
from ekfac_dist.influence.examples import queries_of, sequences_of
from ekfac_dist.influence.queries import (
    query_examples,
    tokenize_queries,
)
from ekfac_dist.influence.query_texts import parse_query, read_queries
from ekfac_dist.models.capture.tasks import CAUSAL_LM

TOKENIZER = tiny_tokenizer()


def asked(tmp_path, rows, context=None):
    path = write_jsonl(tmp_path / "queries.jsonl", rows)
    return tokenize_queries(read_queries(path), TOKENIZER, context)


def test_a_completion_alone_carries_labels(tmp_path):
    queries = asked(tmp_path, [{"prompt": "The worker", "completion": " sends a batch"}])
    sequence = queries.sequences[0]
    whole = TOKENIZER("The worker sends a batch")["input_ids"]
    labelled = [target for target in sequence.targets.tolist() if target != NO_LABEL]
    assert sequence.inputs.tolist() == whole[:-1]
    assert TOKENIZER.decode(labelled) == " sends a batch"


def test_a_text_is_a_completion_behind_nothing(tmp_path):
    text = texts(1)[0]
    one = asked(tmp_path, [{"text": text}])
    other = asked(tmp_path, [{"prompt": "", "completion": text}])
    assert one.sequences.fingerprint == other.sequences.fingerprint
    assert one.sequences[0].targets.tolist() == TOKENIZER(text)["input_ids"][1:]


def test_groups_share_a_row_in_order_of_their_first_queries(tmp_path):
    groups = ["x", None, "y", "x", None, "y"]
    rows = [{"text": text, "group": group} for text, group in zip(texts(6), groups, strict=True)]
    queries = asked(tmp_path, rows)
    assert queries.members == ((0, 3), (1,), (2, 5), (4,))
    assert queries.group_names == ("x", None, "y", None)


def test_blank_lines_count_as_lines_and_other_fields_are_ignored(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('\n{"text": "a b c", "id": 7}\n   \n{"prompt": "a", "completion": "b"}\n')
    assert [query.line for query in read_queries(path)] == [2, 4]


def test_a_query_longer_than_the_context_is_named_by_its_line(tmp_path):
    rows = [{"text": "a b"}, {"text": texts(1, words=(20, 20))[0]}]
    with pytest.raises(DataError, match=r"line 2: has \d+ tokens, but the model reads 9"):
        asked(tmp_path, rows, context=9)


def test_a_completion_in_which_no_token_begins_is_refused(tmp_path):
    assert TOKENIZER.tokenize("a token")[-1] == "Ġtoken"  # it begins in the prompt
    with pytest.raises(DataError, match=r"line 1: no token begins in the completion 'ken'"):
        asked(tmp_path, [{"prompt": "a to", "completion": "ken"}])


SPLIT = {"prompt": "The worker ", "completion": "sends a batch"}
WHOLE = {"prompt": "The worker", "completion": " sends a batch"}
INSIDE = {"prompt": "an em", "completion": "pty batch"}


def test_a_prompt_that_ends_in_a_space_is_told_with_what_would_do(tmp_path):
    queries = asked(tmp_path, [WHOLE, SPLIT, INSIDE])
    assert queries.split_tokens[:2] == (None, " s")
    first, second = queries.split_notes
    assert "line 2: the token ' s' begins in the prompt" in first
    assert first.endswith("end the prompt without the space and begin the completion with it")
    assert "line 3: the token 'mpty' begins in the prompt" in second
    assert second.endswith("end the prompt where a token ends")


def test_a_completion_that_a_prompts_last_space_swallows_is_refused_with_what_would_do(tmp_path):
    with pytest.raises(DataError, match=r"nothing to predict; the token ' token' begins in the pr"):
        asked(tmp_path, [{"prompt": "a ", "completion": "token"}])


def test_python_callers_are_warned_of_split_tokens():
    model = build("llama")
    with pytest.warns(UserWarning, match=r"query 1: the token ' s' begins in the prompt"):
        queries_of([WHOLE, SPLIT], TOKENIZER, model, CAUSAL_LM)
    rows = [{"prompt": row["prompt"], "text": row["completion"]} for row in (WHOLE, SPLIT, SPLIT)]
    with pytest.warns(UserWarning, match=r"in 2 of 3 rows, first in row 1 \(from 0\)"):
        sequences_of(rows, TOKENIZER, None, model, CAUSAL_LM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        queries_of([WHOLE], TOKENIZER, model, CAUSAL_LM)
        sequences_of(rows[:1], TOKENIZER, None, model, CAUSAL_LM)


CONTRAST = {"prompt": "The worker", "completion": " sends a batch", "against": " waits"}


def test_a_contrast_has_a_sequence_for_each_side_and_the_sides_come_last(tmp_path):
    queries = asked(
        tmp_path, [CONTRAST, {"text": "a b c", "group": "g"}, {**CONTRAST, "group": "g"}]
    )
    assert len(queries) == 3
    assert queries.members == ((0,), (1, 2))
    assert queries.against == (3, None, 4)
    assert [queries.sequences_of(group) for group in (0, 1)] == [[0, 3], [1, 2, 4]]
    assert [queries.is_subtracted(sequence) for sequence in range(5)] == [False] * 3 + [True] * 2
    assert queries.name_of(4) == "what query 2 (from 0) is against"
    alone = asked(tmp_path, [WHOLE, {**WHOLE, "completion": " waits"}]).sequences
    for sequence, expected in ((0, alone[0]), (3, alone[1])):
        assert queries.sequences[sequence].inputs.tolist() == expected.inputs.tolist()
        assert queries.sequences[sequence].targets.tolist() == expected.targets.tolist()


def test_each_side_of_a_contrast_is_told_of_its_split_token(tmp_path):
    queries = asked(tmp_path, [{**SPLIT, "against": "waits"}, WHOLE, {**WHOLE, "against": " no"}])
    assert queries.split_tokens == (" s", None, None, " w", None)
    assert [note.split(" the token")[0].split(", ")[1] for note in queries.split_notes] == [
        "line 1:",
        "line 1",
    ]
    assert "line 1, against: the token ' w' begins in the prompt" in queries.split_notes[1]


def test_a_side_that_is_too_long_or_predicts_nothing_is_named(tmp_path):
    with pytest.raises(
        DataError, match=r"line 1, against: no token begins in the completion 'ken'"
    ):
        asked(tmp_path, [{"prompt": "a to", "completion": " and more", "against": "ken"}])
    long = texts(1, words=(40, 40))[0]
    with pytest.raises(DataError, match=r"line 1, against: has \d+ tokens, but the model reads 20"):
        asked(tmp_path, [{**CONTRAST, "against": long}], context=20)


def test_different_texts_of_the_same_tokens_are_no_contrast():
    lower = tiny_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    query = parse_query({**CONTRAST, "against": " Sends a batch"}, "line 1", 1)
    with pytest.raises(DataError, match=r"line 1: .* different texts of the same tokens"):
        tokenize_queries([query], lower, None)
    assert tokenize_queries([query], TOKENIZER, None).against == (1,)


def test_an_example_that_is_no_query_is_told_from_the_training_data():
    wrong = [{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}]
    with pytest.raises(DataError, match=r"Of the queries: Example 1 has an attention_mask with ze"):
        query_examples(wrong, from_examples)


def test_examples_are_queries_and_one_without_a_label_is_named():
    good = {"input_ids": torch.tensor([1, 2, 3]), "group": "g"}
    queries = query_examples([good, good, {"input_ids": torch.tensor([3, 4])}], from_examples)
    assert queries.members == ((0, 1), (2,))
    bad = {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, NO_LABEL])}
    with pytest.raises(DataError, match=r"Query 1 .* has no label"):
        query_examples([good, bad], from_examples)


IDS, OTHER = {"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 4]}


def test_an_example_may_be_against_another():
    queries = query_examples([IDS, {**IDS, "against": OTHER, "group": "g"}], from_examples)
    assert queries.against == (None, 2)
    assert queries.sequences[2].targets.tolist() == [2, 4]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({**IDS, "against": IDS}, r"Query 1 \(from 0\) is against itself"),
        ({**IDS, "against": " text"}, r"Query 1 \(from 0\) is against ' text'; .* another example"),
        ({**IDS, "against": {"input_ids": [5]}}, r"Of what query 1 \(from 0\) is against: None of"),
        ({**IDS, "against": {"ids": [5]}}, r"Of what query 1 \(from 0\) is against: .* without 'i"),
        ({**IDS, "against": {"input_ids": [[1, 2], [3, 4]]}}, "is against a batch of 2"),
        ({"input_ids": [[1, 2], [3, 4]], "against": OTHER}, "a 'group' or an 'against'"),
    ],
)
def test_what_an_example_cannot_be_against_is_told(query, says):
    with pytest.raises(DataError, match=says):
        query_examples([OTHER, query], from_examples)
