"""Data that is tokenised already: the same sequences as text, and what is none."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from helpers.tokenised import TOKENIZER, sequences_of, with_prompts
from helpers.workshop import save_tiny_llama, texts, write_jsonl
from safetensors.torch import load_file

from ekfac_dist.config import DataConfig, EstimateConfig, FactorsConfig, ModelConfig
from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.source import open_source
from ekfac_dist.data.tokenizing import tokenize
from ekfac_dist.errors import ConfigError, DataError
from ekfac_dist.fit.estimate import run_estimate
from ekfac_dist.runtime.processes import World

TEXTS = texts(9, words=(2, 12))
IDS = [TOKENIZER(text)["input_ids"] for text in TEXTS]


def packed(ids, rows=3):
    """The documents in a few rows, with the place of each document's first token."""
    found = []
    for k in range(0, len(ids), -(-len(ids) // rows)):
        own = ids[k : k + -(-len(ids) // rows)]
        starts = [sum(map(len, own[:n])) for n in range(len(own))]
        found.append({"input_ids": [*itertools.chain(*own)], "starts": starts})
    return found


def read(path, **fields):
    config = DataConfig(source=str(path), **fields)
    return tokenize(open_source(config), config, None, "")


def test_packed_documents_are_the_sequences_of_their_texts():
    found = sequences_of(packed(IDS), None, tokens="input_ids", documents="starts")
    expected = sequences_of([{"text": text} for text in TEXTS])
    assert found.fingerprint == expected.fingerprint
    assert found.origins[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.origins[1].tolist() == [0, len(IDS[0])]


def test_a_row_without_documents_is_one_sequence_as_it_was_trained_on():
    (row,) = packed(IDS, rows=1)
    found = sequences_of([row], None, tokens="input_ids", max_tokens=2000)
    assert len(found) == 1
    assert [*found[0].inputs, found[0].targets[-1]] == row["input_ids"]
    assert found[0].targets.tolist() == row["input_ids"][1:]


def test_a_label_mask_says_which_tokens_carry_labels():
    pairs = [("the worker ", "reads"), ("a batch ", "of it")]
    expected = with_prompts(pairs)
    rows = []
    for prompt, text in pairs:
        ids = TOKENIZER(prompt + text)["input_ids"]
        number = expected.num_labels[len(rows)]
        rows.append({"ids": ids, "mask": [0] * (len(ids) - number) + [1] * int(number)})
    found = sequences_of(rows, None, tokens="ids", label_mask="mask")
    assert [s.targets.tolist() for s in found] == [s.targets.tolist() for s in expected]
    assert NO_LABEL in found[0].targets


def test_longer_rows_are_cut_or_taken_in_windows():
    (row,) = packed(IDS, rows=1)
    cut = sequences_of([row], None, tokens="input_ids", max_tokens=20)
    assert (cut.counts.truncated, cut.counts.tokens_cut) == (1, len(row["input_ids"]) - 20)
    windows = sequences_of([row], None, tokens="input_ids", max_tokens=20, window=10)
    assert windows.num_labels.sum() == len(row["input_ids"]) - 1
    both = sequences_of(
        packed(IDS), None, tokens="input_ids", documents="starts", max_tokens=8, window=3
    )
    assert both.num_labels.sum() == sum(len(ids) - 1 for ids in IDS)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_every_source_of_columns_gives_the_same_sequences(kind, tmp_path):
    rows = packed(IDS)
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).save_to_disk(path)
    found = read(path, tokens="input_ids", documents="starts")
    expected = sequences_of([{"text": text} for text in TEXTS])
    assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_a_numpy_file_has_a_sequence_in_each_row_or_is_one(dtype, tmp_path):
    rows = np.arange(24, dtype=dtype).reshape(3, 8)
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "flat.npy", rows[0])
    found = read(tmp_path / "rows.npy", tokens="ids")
    assert [s.inputs.tolist() for s in found] == rows[:, :-1].tolist()
    assert len(read(tmp_path / "flat.npy", tokens="ids")) == 1
    assert len(read(tmp_path / "rows.npy", tokens="ids", max_sequences=2)) == 2


def test_a_numpy_file_that_changes_is_read_anew(tmp_path):
    np.save(tmp_path / "rows.npy", np.arange(8)[None])
    read(tmp_path / "rows.npy", tokens="ids")
    np.save(tmp_path / "rows.npy", np.arange(10, 18)[None])
    assert read(tmp_path / "rows.npy", tokens="ids")[0].inputs[0] == 10


def save(path, array):
    np.save(path, array, allow_pickle=True)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.ones((2, 3)), "array of float64 of shape"),
        (np.ones((2, 3, 4), dtype=int), "it must be of integers"),
        (np.array([[1, -2]]), "holds -2; token ids are from 0"),
        (np.array([[1, 2**40]]), "token ids are from 0"),
        (np.array([{}], dtype=object), "not what its ending .npy says"),
    ],
)
def test_a_numpy_file_of_something_else_is_a_sentence(array, sentence, tmp_path):
    save(tmp_path / "rows.npy", array)
    with pytest.raises(DataError, match=sentence):
        read(tmp_path / "rows.npy", tokens="ids")


def test_a_numpy_file_needs_its_columns_name(tmp_path):
    np.save(tmp_path / "rows.npy", np.arange(8)[None])
    with pytest.raises(DataError, match=r"set data\.tokens"):
        read(tmp_path / "rows.npy")
    with pytest.raises(DataError, match="has no splits"):
        read(tmp_path / "rows.npy", tokens="ids", split="test")
    Path(tmp_path / "bad.npy").write_bytes(b"no numbers")
    with pytest.raises(DataError, match=r"not what its ending .npy says"):
        read(tmp_path / "bad.npy", tokens="ids")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"ids": [1, -1]}, "'ids' holds -1 in row 0"),
        ({"ids": [1, 2**31]}, "'ids' holds 2147483648 in row 0"),
        ({"ids": [0.5, 1.0]}, "no list of whole numbers in row 0"),
        ({"ids": "1 2"}, "no list of whole numbers in row 0"),
        ({"ids": [1, 2], "mask": [1]}, "has 2 tokens, but 1 values in 'mask'"),
        ({"ids": [1, 2], "mask": [1, 2]}, "'mask' holds 2 in row 0"),
        ({"ids": [1, 2], "starts": [1]}, "place of each document's first token"),
        ({"ids": [1, 2, 3], "starts": [0, 2, 1]}, "ascending from 0"),
        ({"ids": [1, 2], "starts": [0, 2]}, "'starts' holds 2 in row 0"),
    ],
)
def test_a_row_of_something_else_is_a_sentence(row, sentence):
    fields = {"label_mask": "mask"} if "mask" in row else {}
    fields |= {"documents": "starts"} if "starts" in row else {}
    with pytest.raises(DataError, match=sentence):
        sequences_of([row], None, tokens="ids", **fields)


@pytest.mark.parametrize("name", ["label_mask", "documents"])
def test_a_mask_or_documents_need_tokens(name):
    with pytest.raises(ConfigError, match=rf"data\.{name} is given without data\.tokens"):
        DataConfig(source="rows", **{name: "a"})


def fitted(tmp_path, name, model, **data):
    config = EstimateConfig(
        model=ModelConfig(name=str(model)),
        data=DataConfig(**data),
        factors=FactorsConfig(accumulate="float64"),
        output=str(tmp_path / name),
    )
    run_estimate(config, World.start())
    return {
        file.relative_to(tmp_path / name): load_file(file)
        for file in sorted((tmp_path / name).rglob("*.safetensors"))
    }


def test_packed_and_tokenised_data_give_the_factors_of_the_same_texts(tmp_path):
    """Also without a tokenizer beside the model."""
    model = save_tiny_llama(tmp_path / "model")
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    expected = fitted(tmp_path, "of-texts", model, source=str(data))
    for file in model.glob("tokenizer*"):
        file.unlink()
    Dataset.from_list(packed(IDS)).to_parquet(tmp_path / "tokens.parquet")
    columns = {"tokens": "input_ids", "documents": "starts"}
    source = str(tmp_path / "tokens.parquet")
    found = fitted(tmp_path, "of-tokens", model, source=source, **columns)
    assert set(found) == set(expected)
    for file, tensors in expected.items():
        for name, tensor in tensors.items():
            assert tensor.equal(found[file][name]), (file, name)


def test_ids_above_the_vocabulary_are_a_sentence(tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    np.save(tmp_path / "rows.npy", np.array([[1, 2, 5000]]))
    with pytest.raises(DataError, match="token id 5000, but the model knows 321 tokens"):
        fitted(tmp_path, "factors", model, source=str(tmp_path / "rows.npy"), tokens="ids")
    assert not (tmp_path / "factors").exists()
