"""Tokens, labels and counts of sequences, from text and from examples that are tokens already."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tokenised import TOKENIZER, fresh, labelled, sequences_of, tokens, with_prompts
from helpers.workshop import BOS, EOS, sentencepiece_like, texts, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ekfac_dist.config import DataConfig
from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.data.tokenizing import encode, tokenize
from ekfac_dist.errors import DataError

TRIMMING = tiny_tokenizer(trims=True)


# -- text ------------------------------------------------------------------------------------------


def test_targets_are_the_inputs_one_position_on():
    (text,) = texts(1)
    ids = TOKENIZER(text)["input_ids"]
    sequence = sequences_of([{"text": text}])[0]
    assert sequence.inputs.tolist() == ids[:-1]
    assert sequence.targets.tolist() == ids[1:]


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False,) * 2])
def test_special_tokens_are_those_that_the_tokenizer_puts_by_default(bos: bool, eos: bool):
    tokenizer = tiny_tokenizer(bos=bos, eos=eos)
    found = tokenizer.convert_ids_to_tokens(tokens(sequences_of([{"text": "a batch"}], tokenizer)))
    assert (found[0] == BOS, found[-1] == EOS) == (bos, eos)
    assert found.count(BOS) + found.count(EOS) == bos + eos


def test_an_end_token_after_a_prompt_is_a_label():
    tokenizer = tiny_tokenizer(eos=True)
    sequences = with_prompts([("the prompt", " ends"), ("the prompt", "")], tokenizer=tokenizer)
    for number in (0, 1):
        assert tokenizer.convert_ids_to_tokens(labelled(sequences, number))[-1] == EOS


def test_tokens_that_begin_after_the_prompts_end_carry_the_labels():
    sequences = with_prompts([("what a worker does:", " it sums.")])
    assert TOKENIZER.decode(labelled(sequences)) == " it sums."


def test_a_token_across_the_prompts_end_carries_no_label():
    """Prompt and text are tokenised together, so a token may belong to both."""
    assert "mpty" in TOKENIZER.tokenize("an empty batch")
    sequences = with_prompts([("an em", "pty batch")])
    assert tokens(sequences) == TOKENIZER("an empty batch")["input_ids"]
    assert TOKENIZER.decode(labelled(sequences)) == " batch"


# -- tokens that a prompt's end splits -------------------------------------------------------------


TOKENIZERS = {
    "byte-level": TOKENIZER,
    "byte-level, trimmed": TRIMMING,
    "Metaspace": sentencepiece_like("Metaspace"),
    "Metaspace, first": sentencepiece_like("Metaspace, first"),
    "normalizer": sentencepiece_like("normalizer"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_token_that_begins_in_a_prompts_last_space_is_told(kind: str):
    tokenizer = TOKENIZERS[kind]
    split, whole = ("a worker\n ", "module sums"), ("a worker\n", " module sums")
    columns = encode(tokenizer, *map(list, zip(split, whole, strict=True)), None)
    found = columns["split_token"][0]
    assert found.startswith(" m")
    assert columns["split_token"][1] is None
    first, second = columns["labels"]
    position = next(t for t, label in enumerate(second) if label != NO_LABEL)
    assert (first[position], first[position + 1 :]) == (NO_LABEL, second[position + 1 :])
    (token,) = tokenizer.convert_ids_to_tokens([second[position]])
    assert token.replace("Ġ", " ").replace("▁", " ") == found


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(prompt=st.text("abworkes \né日", max_size=9), text=st.text("abworkes \né日", max_size=9))
def test_a_split_token_is_told_where_the_prompts_own_tokens_are_not_the_first_of_all(
    kind: str, prompt: str, text: str
):
    """Where the prompt ends between two tokens, both of its sides hold whole characters."""
    tokenizer = TOKENIZERS[kind]
    columns = encode(tokenizer, [prompt, "x"], [text, "y"], None)
    ids, labels = columns["input_ids"][0], columns["labels"][0]
    found = columns["split_token"][0]
    behind = [token for token, label in zip(ids, labels, strict=True) if label != NO_LABEL]
    written = read(tokenizer, behind)
    if not prompt:
        assert found is None
    elif found is None:
        assert written == text
    else:
        assert written != text
        assert text.endswith(written)
        assert found.endswith(text.removesuffix(written))
        assert prompt.endswith(found.removesuffix(text.removesuffix(written)))


def read(tokenizer: Any, ids: list[int]) -> str:
    """The text of tokens in the midst of one."""
    joined = [token for token in tokenizer.convert_ids_to_tokens(ids) if token not in (BOS, EOS)]
    if any(token.startswith("Ġ") for token in joined) or "Ġ" in tokenizer.get_vocab():
        return tokenizer.convert_tokens_to_string(joined)
    pieces = [
        bytes([int(token[3:-1], 16)]) if token.startswith("<0x") else token.encode()
        for token in joined
    ]
    return b"".join(pieces).decode().replace("▁", " ")


def test_rows_with_a_split_token_are_counted_also_from_the_cache_and_when_left_out():
    rows = [("a label:", " sum"), ("a label: ", "a"), ("a label: ", "sends"), ("", "no prompt")]
    named = [{"prompt": prompt, "text": text} for prompt, text in rows]
    tokenizer, name = Counting(), f"cached {next(fresh)}"
    first, second = (sequences_of(named, tokenizer, name, prompt="prompt") for _ in range(2))
    assert tokenizer.calls == 1
    assert first.counts == second.counts
    assert (first.counts.split, first.counts.first_split) == (2, 1)
    assert first.indices.tolist() == [0, 2, 3], "of row 1 nothing is left"
    assert "in 2 of 4 rows, first in row 1 (from 0)" in first.counts.split_note
    assert with_prompts(rows[:1]).counts.split_note is None


def test_a_split_token_that_is_cut_off_is_none():
    length = len(TOKENIZER("a label: sends")["input_ids"])
    prompt = "a label: "
    position = len(TOKENIZER("a label:")["input_ids"])
    assert TOKENIZER.tokenize("a label: sends")[position - 1].startswith("Ġ")
    for limit, split in ((length, 1), (position + 1, 1), (position, 0)):
        rows = [(prompt, "sends"), ("", "kept as it is")]
        assert with_prompts(rows, max_tokens=limit).counts.split == split


words = st.text(st.sampled_from("aeorstwk .:\n"), max_size=12)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, TRIMMING], ids=["whole", "trimmed"])
@given(prompt=words, text=words)
def test_labels_are_the_shortest_end_that_leaves_the_prompt_whole(
    tokenizer: Any, prompt: str, text: str
):
    ids = TOKENIZER(prompt + text)["input_ids"]
    plain = TOKENIZER.decode(ids[1:])
    assert plain == prompt + text, "a byte-level tokenizer loses nothing"
    try:
        sequences = with_prompts([(prompt, text)], tokenizer=tokenizer)
    except DataError:
        # Each token but the BOS begins inside the prompt.
        assert len(ids) == 1 or len(TOKENIZER.decode(ids[1:-1])) < len(prompt)
        return
    assert tokens(sequences) == ids
    num_unlabelled = len(ids) - len(labelled(sequences))
    assert len(TOKENIZER.decode(ids[1:num_unlabelled])) >= len(prompt)
    if num_unlabelled > 1:
        assert len(TOKENIZER.decode(ids[1 : num_unlabelled - 1])) < len(prompt)


def test_an_empty_prompt_is_no_prompt():
    (text,) = texts(1)
    plain = sequences_of([{"text": text}])
    for nothing in ("", None):
        assert labelled(with_prompts([(nothing, text)])) == labelled(plain)
        mixed = with_prompts([("a prompt: ", "a text"), (nothing, text)])
        assert labelled(mixed, 1) == labelled(plain)


def test_rows_without_a_label_are_left_out_and_counted():
    rows = [("p", ""), ("p", " first"), (None, None), ("", ""), ("", "second"), ("prompt only", "")]
    sequences = with_prompts(rows)
    assert len(sequences) == 2
    assert (sequences.counts.rows, sequences.counts.unlabelled) == (6, 4)
    assert sequences.indices.tolist() == [1, 4]
    assert [sequences[number].index for number in (0, 1)] == [1, 4]


def test_null_texts_are_empty_texts():
    sequences = sequences_of([{"text": None}, {"text": "one"}, {"text": ""}])
    assert sequences.indices.tolist() == [1]
    assert sequences.counts.unlabelled == 2


def test_no_label_at_all_is_refused():
    with pytest.raises(DataError, match="None of the 2 sequences has a label"):
        with_prompts([("a prompt", ""), ("a prompt", None)])


def test_text_of_one_token_has_nothing_to_predict():
    with pytest.raises(DataError, match="None of the 1 sequences"):
        sequences_of([{"text": "a"}], tiny_tokenizer(bos=False))


def test_longer_sequences_are_cut_and_counted():
    written = texts(9)
    lengths = [len(ids) for ids in TOKENIZER(written)["input_ids"]]
    limit = sorted(lengths)[4]
    sequences = sequences_of([{"text": text} for text in written], max_tokens=limit)
    assert sequences.counts.truncated == sum(n > limit for n in lengths) > 0
    assert sequences.counts.tokens_cut == sum(max(0, n - limit) for n in lengths)
    assert sequences.num_positions.tolist() == [min(n, limit) - 1 for n in lengths]
    assert sequences.max_tokens == limit


def test_a_prompt_that_fills_the_limit_leaves_no_label():
    sequences = with_prompts([("a long prompt " * 9, "lost"), ("", "kept")], max_tokens=8)
    assert sequences.indices.tolist() == [1]
    assert sequences.counts.truncated == 1


def test_positions_after_the_last_label_are_not_counted():
    sequences = from_examples([{"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, -100, -100]}])
    assert sequences.num_positions.tolist() == [2]
    assert sequences.num_labels.tolist() == [2]
    assert sequences[0].inputs.tolist() == [1, 2]
    assert sequences[0].targets.tolist() == [2, 3]


def test_a_column_that_holds_no_text_is_refused():
    with pytest.raises(DataError, match=r"Column 'text' holds 3 \(int\); it must hold text"):
        sequences_of([{"text": 3}])


def test_a_prompt_needs_a_tokenizer_that_tells_where_tokens_begin():
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match=r"'prompt'.*\(Slow\).*fast tokenizer"):
        with_prompts([("a", "b")], tokenizer=Slow())


# -- the cache -------------------------------------------------------------------------------------


class Counting:
    """A tokenizer that counts its calls."""

    is_fast = True
    backend_tokenizer = TOKENIZER.backend_tokenizer

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return TOKENIZER(*arguments, **options)


def test_a_second_tokenisation_is_read_from_the_cache():
    rows, tokenizer, name = [{"text": t} for t in texts(5)], Counting(), f"cached {next(fresh)}"
    first = sequences_of(rows, tokenizer, name)
    assert tokenizer.calls == 1
    second = sequences_of(rows, tokenizer, name)
    assert tokenizer.calls == 1
    assert second.fingerprint == first.fingerprint
    assert second.counts == first.counts
    assert [tokens(second, n) for n in range(5)] == [tokens(first, n) for n in range(5)]


@pytest.mark.parametrize("change", ["tokenizer", "limit", "column", "rows", "prompt"])
def test_whatever_changes_the_tokens_misses_the_cache(change: str):
    rows = [{"text": text, "other": text[::-1], "prompt": "a: "} for text in texts(5)]
    tokenizer, name = Counting(), f"cached {next(fresh)}"
    first = sequences_of(rows, tokenizer, name)
    fields: dict[str, Any] = {}
    if change == "tokenizer":
        name += "'s neighbour"
    elif change == "limit":
        fields["max_tokens"] = 7
    elif change == "column":
        fields["text"] = "other"
    elif change == "prompt":
        fields["prompt"] = "prompt"
    else:
        rows[2]["text"] += " changed"
    second = sequences_of(rows, tokenizer, name, **fields)
    assert tokenizer.calls == 2
    assert (second.fingerprint == first.fingerprint) == (change == "tokenizer")


def test_progress_tells_the_rows_that_were_tokenised():
    done: list[int] = []
    rows = Dataset.from_dict({"text": texts(600)})
    tokenize(rows, DataConfig(source="rows"), TOKENIZER, f"fresh {next(fresh)}", done.append)
    assert sum(done) == 600
    assert len(done) > 1


# -- examples --------------------------------------------------------------------------------------

IDS = [[5, 6, 7, 8], [9, 3], [4, 4, 4]]


def padded(side: str, garbage: int) -> dict[str, torch.Tensor]:
    """The examples as one batch, padded with any id."""
    longest = max(map(len, IDS))
    ids = torch.full((len(IDS), longest), garbage)
    mask = torch.zeros_like(ids)
    for row, given_ids in enumerate(IDS):
        columns = slice(longest - len(given_ids), None) if side == "left" else slice(len(given_ids))
        ids[row, columns] = torch.tensor(given_ids)
        mask[row, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}


def all_tokens(sequences: Sequences) -> list[list[int]]:
    return [tokens(sequences, number) for number in range(len(sequences))]


def one_by_one() -> Iterator[dict[str, list[int]]]:
    for ids in IDS:
        yield {"input_ids": ids}


@pytest.mark.parametrize(
    "data",
    [
        [{"input_ids": ids} for ids in IDS],
        [{"input_ids": torch.tensor(ids)} for ids in IDS],
        [{"input_ids": np.array(ids, dtype=np.int32)} for ids in IDS],
        [{"input_ids": torch.tensor([ids])} for ids in IDS],
        [{"input_ids": IDS}],
        [{"input_ids": [torch.tensor(ids) for ids in IDS]}],
        one_by_one(),
        Dataset.from_dict({"input_ids": IDS}),
        Dataset.from_dict({"input_ids": IDS}).with_format("torch"),
        [padded("right", 0)],
        [padded("left", 0)],
        [padded("right", 311)],
        [padded("left", -7)],
        DataLoader(
            [{name: tensor[row] for name, tensor in padded("left", 9).items()} for row in range(3)],
            batch_size=2,
        ),
    ],
    ids=lambda data: type(data).__name__,
)
def test_examples_are_the_same_in_every_shape(data: Any):
    sequences = from_examples(data)
    assert all_tokens(sequences) == IDS
    assert sequences.indices.tolist() == [0, 1, 2]
    assert sequences.fingerprint == from_examples([{"input_ids": ids} for ids in IDS]).fingerprint


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizers_own_batches_are_examples(side: str):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    written = texts(4)
    batch = tokenizer(written, padding=True, return_tensors="pt")
    assert all_tokens(from_examples([batch])) == tokenizer(written)["input_ids"]


def test_labels_in_padding_are_taken_off_with_it():
    batch = padded("left", 2) | {"labels": padded("left", 9)["input_ids"]}
    assert all_tokens(from_examples([batch])) == IDS


def test_labels_may_differ_from_the_ids():
    sequences = from_examples([{"input_ids": [1, 2, 3], "labels": [-100, 8, 9]}])
    assert sequences[0].inputs.tolist() == [1, 2]
    assert sequences[0].targets.tolist() == [8, 9]
    assert sequences.max_id == 9


def test_the_index_is_the_source_row_after_rows_that_are_left_out():
    rows = [[], [1], [1, 2], [3], [4, 5, 6]]
    sequences = from_examples([{"input_ids": ids} for ids in rows])
    assert sequences.indices.tolist() == [2, 4]
    assert sequences[1].index == 4
    assert sequences.counts.unlabelled == 3


def test_examples_are_cut_and_counted_too():
    sequences = from_examples([{"input_ids": ids} for ids in IDS], max_tokens=3)
    assert all_tokens(sequences) == [ids[:3] for ids in IDS]
    assert (sequences.counts.truncated, sequences.counts.tokens_cut) == (1, 1)


def test_the_fingerprint_tells_ids_labels_and_order_apart():
    def of(*rows: list[int], **more: Any) -> str:
        return from_examples([{"input_ids": ids, **more} for ids in rows]).fingerprint

    variants = [
        of([1, 2], [3, 4]),
        of([3, 4], [1, 2]),
        of([1, 2, 3, 4]),
        of([1, 2], [3, 5]),
        of([1, 2], [3, 4], labels=[-100, 2]),
    ]
    assert len(set(variants)) == len(variants)
    assert of([1, 2], [3, 4]) == variants[0]


def test_thousands_of_rows_keep_their_order():
    rows = [[n % 300, (n * 7) % 300] for n in range(2500)]
    sequences = from_examples([{"input_ids": rows}])
    assert [tokens(sequences, number) for number in range(0, 2500, 99)] == rows[::99]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "no sequences"),
        ([[1, 2, 3]], "holds a list without 'input_ids'"),
        ([{"ids": [1]}], "without 'input_ids'"),
        ([{"input_ids": [1, 2], "labels": [1]}], r"different lengths: \[2\], \[1\]"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 1, 1]}], "different lengths"),
        ([{"input_ids": 3}], "input_ids is no sequence of whole numbers"),
        ([{"input_ids": "text"}], "input_ids is no sequence of whole numbers"),
        ([{"input_ids": None}], "input_ids is no sequence of whole numbers"),
        ([{"input_ids": [1.5, 2.0]}], "input_ids is no sequence of whole numbers"),
        ([{"input_ids": torch.zeros(1, 2, 3, dtype=torch.long)}], "nor a batch of them"),
        ([{"input_ids": [1, 2], "labels": ["a", "b"]}], "labels is no sequence of whole numbers"),
        ([{"input_ids": [1, -2]}], "token id below 0"),
        ([{"input_ids": [1, 2], "labels": [1, -1]}], "token id below 0.*-100"),
        ([{"input_ids": [1]}, {"input_ids": []}], "None of the 2 sequences"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "None of the 1 sequences"),
        ([{"input_ids": [1, 2], "labels": [-100, -100]}], "None of the 1 sequences"),
        (
            [{"input_ids": [1]}, {"input_ids": [1, 2, 3, 4], "attention_mask": [1, 0, 0, 1]}],
            r"Example 1 has an attention_mask with zeros inside \(at position 1\).*leave tokens",
        ),
        (
            [
                {
                    "input_ids": torch.ones(3, 5, dtype=torch.long),
                    "attention_mask": torch.tensor(
                        [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 0, 1, 0]]
                    ),
                }
            ],
            r"Example 2 has an attention_mask with zeros inside \(at position 2\)",
        ),
        (
            [{"input_ids": [1, 2, 3, 4], "attention_mask": [1, 1, 2, 2]}],
            "Example 0 has 2 in its attention_mask; it must be 1 at real tokens and 0 at padding",
        ),
        ([{"input_ids": [1, 2], "attention_mask": [-1, 1]}], "Example 0 has -1 in its attention"),
        (
            [{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3], "position_ids": [0, 1, 0]}],
            r"Example 1 has position_ids of its own \(0, 1, 0, …\).*leave position_ids out",
        ),
        ([{"input_ids": [1, 2, 3], "position_ids": [4, 5, 6]}], "position_ids of its own"),
        (
            [{"input_ids": [1, 2], "attention_mask": [0, 1], "position_ids": [0, 1]}],
            "position_ids of its own",
        ),
        ([{"input_ids": [1, 2, 3], "position_ids": [0, 1]}], r"position_ids of lengths \[2\]"),
        (
            [{"input_ids": [1, 2, 3], "token_type_ids": [0, 0, 1]}],
            "Example 0 has token_type_ids of its own.*no token types but 0",
        ),
        (
            [{"input_ids": [1, 2], "inputs_embeds": torch.zeros(2, 4)}],
            "Example 0 has inputs_embeds, which the model takes, but .* leave it out",
        ),
    ],
)
def test_what_is_no_example_is_refused(data: Any, says: str):
    with pytest.raises(DataError, match=says):
        from_examples(data)


@pytest.mark.parametrize("side", ["left", "right"])
def test_fields_that_say_nothing_may_be_there(side: str):
    batch = padded(side, 0)
    count = (batch["attention_mask"].cumsum(1) - 1).masked_fill(batch["attention_mask"] == 0, 1)
    more = {
        "position_ids": count,
        "token_type_ids": 1 - batch["attention_mask"],  # only padding has others
        "special_tokens_mask": torch.ones_like(count),
        "inputs_embeds": None,
        "name": ["a", "b", "c"],
    }
    assert all_tokens(from_examples([batch | more])) == IDS


def test_what_the_model_takes_and_a_sequence_does_not_keep_is_refused():
    example = {"input_ids": [1, 2], "pixel_values": [0.5], "use_cache": False, "weights": [3]}
    assert len(from_examples([example], inputs=["input_ids", "use_cache"])) == 1
    with pytest.raises(DataError, match="Example 0 has pixel_values, which the model takes"):
        from_examples([example], inputs=["pixel_values", "use_cache"])


def test_a_tokenizer_that_pads_on_the_left_or_has_no_padding_token_makes_the_same_sequences():
    plain, left, without = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    left.padding_side = left.truncation_side = "left"
    without.pad_token = None
    assert without.pad_token_id is None
    given = texts(6)
    prompts = [text[:7] for text in given]
    rests = [text[7:] for text in given]
    for limit in (None, 5):
        expected = encode(plain, prompts, rests, limit)
        assert encode(left, prompts, rests, limit) == expected
        assert encode(without, prompts, rests, limit) == expected
