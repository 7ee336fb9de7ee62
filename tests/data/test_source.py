"""Every kind of source gives the same rows; what cannot be read is refused in words."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Split
from workshop import texts, write_jsonl

from ekfac_dist.config import DataConfig
from ekfac_dist.data.source import open_source
from ekfac_dist.errors import DataError

TEXTS = texts(7)


def write_json(path: Path) -> None:
    path.write_text(json.dumps([{"text": text} for text in TEXTS]))


def write_txt(path: Path) -> None:
    path.write_text("\n".join(TEXTS) + "\n")


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: write_jsonl(path, [{"text": text} for text in TEXTS]),
    "rows.json": write_json,
    "rows.csv": lambda path: Dataset.from_dict({"text": TEXTS}).to_csv(path, index=False),
    "rows.parquet": lambda path: Dataset.from_dict({"text": TEXTS}).to_parquet(path),
    "rows.txt": write_txt,
    "ROWS.JSONL": lambda path: write_jsonl(path, [{"text": text} for text in TEXTS]),
    "saved": lambda path: Dataset.from_dict({"text": TEXTS}).save_to_disk(path),
    "saved with a split": lambda path: Dataset.from_dict(
        {"text": TEXTS}, split=Split.TRAIN
    ).save_to_disk(path),
    "saved dictionary": lambda path: DatasetDict(
        train=Dataset.from_dict({"text": TEXTS}), dev=Dataset.from_dict({"text": ["held out"]})
    ).save_to_disk(path),
}


def opened(path: Path, **fields: object) -> list[str]:
    return list(open_source(DataConfig(source=str(path), **fields))["text"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_source_gives_its_rows_in_order(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert opened(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", WRITERS)
def test_max_sequences_takes_the_first_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert opened(tmp_path / name, max_sequences=3) == TEXTS[:3]
    assert opened(tmp_path / name, max_sequences=300) == TEXTS


def test_a_file_is_read_from_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS["rows.jsonl"](tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    assert opened(Path("rows.jsonl")) == TEXTS


def test_a_part_of_a_split_can_be_taken_from_a_file(tmp_path: Path) -> None:
    WRITERS["rows.jsonl"](tmp_path / "rows.jsonl")
    assert opened(tmp_path / "rows.jsonl", split="train[2:5]") == TEXTS[2:5]


def test_a_part_of_a_split_cannot_be_taken_from_a_saved_data_set(tmp_path: Path) -> None:
    WRITERS["saved dictionary"](tmp_path / "saved")
    with pytest.raises(DataError, match=r"'train\[:2\]'.*use data\.max_sequences"):
        opened(tmp_path / "saved", split="train[:2]")


def test_the_split_of_a_saved_dictionary_is_the_one_asked_for(tmp_path: Path) -> None:
    WRITERS["saved dictionary"](tmp_path / "saved")
    assert opened(tmp_path / "saved", split="dev") == ["held out"]
    with pytest.raises(DataError, match=r"no split 'test'; it has train, dev\."):
        opened(tmp_path / "saved", split="test")


def test_a_saved_data_set_of_another_split_is_refused(tmp_path: Path) -> None:
    WRITERS["saved with a split"](tmp_path / "saved")
    with pytest.raises(DataError, match=r"no split 'dev'; it has train\."):
        opened(tmp_path / "saved", split="dev")


@pytest.mark.parametrize("part", ["train[3:3]", "train[:0]"])
def test_a_part_without_rows_is_refused(part: str, tmp_path: Path) -> None:
    WRITERS["rows.jsonl"](tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="no rows"):
        opened(tmp_path / "rows.jsonl", split=part)


def test_rows_that_change_on_disk_are_read_anew(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "before"}])
    assert opened(path) == ["before"]
    write_jsonl(path, [{"text": "after it"}])
    assert opened(path) == ["after it"]


def test_columns_that_are_not_asked_for_may_hold_anything(tmp_path: Path) -> None:
    rows = [{"text": text, "number": n, "list": [n]} for n, text in enumerate(TEXTS)]
    assert opened(write_jsonl(tmp_path / "rows.jsonl", rows)) == TEXTS


def test_null_texts_stay_rows(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": None}, {"text": "three"}]
    assert opened(write_jsonl(tmp_path / "rows.jsonl", rows)) == ["one", None, "three"]


def test_a_column_of_nulls_alone_is_a_column(tmp_path: Path) -> None:
    assert opened(write_jsonl(tmp_path / "rows.jsonl", [{"text": None}] * 2)) == [None, None]


def test_a_missing_column_is_refused_with_those_there_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "?", "answer": "!"}])
    with pytest.raises(DataError, match=r"no column 'text'; its columns are question, answer\."):
        opened(path)
    with pytest.raises(DataError, match=r"no column 'prompt'"):
        opened(path, text="answer", prompt="prompt")


def test_a_hub_id_that_cannot_be_had_is_refused_promptly() -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match="nobody/nothing is no file here and could not be had"):
        opened(Path("nobody/nothing"))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.parquet", b"PAR1 and no more"),
        ("text.jsonl", b'{"text": "whole"}\n{"text": "bro'),
        ("text.json", b"[1, 2"),
        ("text.csv", b'text,other\n"an open quote,1\n'),
        ("text.txt", b"\xff\xfe\x00 is no UTF-8"),
    ],
)
def test_a_file_that_is_not_what_its_ending_says_is_named(
    name: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is not (what its ending|UTF-8)"):
        opened(tmp_path / name)


@pytest.mark.parametrize("name", ["part[1].jsonl", "b*.jsonl", "what?.jsonl", "[a]*.jsonl"])
def test_a_files_name_is_no_pattern(tmp_path, name):
    for other in ("bb.jsonl", "part1.jsonl", "whats.jsonl", "ab.jsonl"):
        (tmp_path / other).write_text('{"text": "another file"}\n')
    (tmp_path / name).write_text('{"text": "this file"}\n')
    rows = open_source(DataConfig(source=str(tmp_path / name)))
    assert rows["text"][:] == ["this file"]
