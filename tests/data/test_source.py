"""Every kind of source gives the same rows; what cannot be read is refused in words."""

import csv
import gzip
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict, Split
from datasets.packaged_modules.json.json import Json
from helpers.rewriting import REWRITERS, rewrite_with_time_restored
from helpers.workshop import texts, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from ekfac_dist.config import DataConfig
from ekfac_dist.data import source, source_copy
from ekfac_dist.data.source import content_of, open_source
from ekfac_dist.data.tokenizing import cache_directory
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


# -- what a local source holds ---------------------------------------------------------------------


@pytest.mark.parametrize("name", REWRITERS)
def test_a_rewritten_source_with_its_time_restored_gives_its_new_rows(
    name: str, tmp_path: Path
) -> None:
    path, before, after = tmp_path / name, ["one", "two"], ["six", "ten"]
    REWRITERS[name](path, before)
    config = DataConfig(source=str(path))
    first = open_source(config)
    assert first["text"][:] == before
    rewrite_with_time_restored(name, path, after)
    second = open_source(config)
    assert second["text"][:] == after
    assert second._fingerprint != first._fingerprint
    assert first["text"][:] == before, "rows that are open stay what they were"


def test_a_packed_file_that_is_rewritten_is_unpacked_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in ("zip", "pip"):
        path.write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
        assert opened(path) == [text]


def test_the_same_content_is_known_again_at_another_path_and_time(tmp_path: Path) -> None:
    one, two = (
        open_source(DataConfig(source=str(write_jsonl(tmp_path / name, [{"text": "same"}]))))
        for name in ("one.jsonl", "two.jsonl")
    )
    assert one._fingerprint == two._fingerprint


def test_a_source_that_did_not_change_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "once"}])
    assert opened(path) == ["once"]

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(Json, "_generate_tables", never)
    assert opened(path) == ["once"]
    os.utime(path, ns=(0, 0))
    assert opened(path) == ["once"]


@pytest.mark.parametrize("name", REWRITERS)
def test_a_source_that_changes_while_it_is_read_is_refused_and_leaves_no_rows_behind(
    name: str, tmp_path: Path
) -> None:
    path, before, after = tmp_path / name, ["one", "two"], ["six", "ten"]
    REWRITERS[name](path, before)
    config = DataConfig(source=str(path))
    content = content_of(config)
    rewrite_with_time_restored(name, path, after)
    with pytest.raises(DataError, match="changed while it was read; run it again"):
        open_source(config, content)
    assert opened(path) == after
    rewrite_with_time_restored(name, path, before)
    assert opened(path) == before


def test_copies_that_a_killed_run_left_unfinished_are_made_anew_and_former_ones_go_in_time(
    tmp_path: Path,
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "first"}])
    before = set((cache_directory() / "sources").glob("*"))
    assert opened(path) == ["first"]
    (home,) = set((cache_directory() / "sources").iterdir()) - before
    (former,) = (folder for folder in home.iterdir() if folder.is_dir())
    write_jsonl(path, [{"text": "second"}])
    assert opened(path) == ["second"]
    assert former.exists(), "another run may still read it"
    (home / "killed.part").mkdir()
    (home / "killed.part" / "rows").write_bytes(b"half")
    os.utime(former, (0, time.time() - source_copy._KEEP_SECONDS - 1))
    write_jsonl(path, [{"text": "third"}])
    assert opened(path) == ["third"]
    assert not former.exists()
    assert not list(home.glob("*.part"))


def test_results_that_datasets_keeps_beside_a_saved_data_set_are_none_of_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "saved"
    WRITERS["saved"](path)
    first = content_of(DataConfig(source=str(path)))
    datasets.load_from_disk(str(path)).map(lambda row: {"more": 1})
    assert any(file.name.startswith("cache-") for file in path.iterdir())
    assert content_of(DataConfig(source=str(path))) == first


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}])
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(DataError, match=r"cannot be cached under .*set HF_HOME"):
        opened(path)


# -- cells are text --------------------------------------------------------------------------------

WORDS = ["", "None", "NA", "N/A", "nan", "NaN", "null", "<NA>", "#N/A", "-inf", "007", "1.50"]
WORDS += ["true", "False", "1e5", "2020-01-01", "  ", " x ", "\n", "\r\n", "a,b", '"q"', "\t", "é"]
CELLS = st.sampled_from(WORDS) | st.text(st.characters(codec="utf-8"), max_size=6)
TABLES = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=1, max_size=20)
)


@pytest.fixture(scope="module")
def table_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("csv") / "table.csv"


@settings(max_examples=20)
@given(
    rows=TABLES,
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    ends=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    place=st.integers(0, 2),
)
def test_a_csv_cell_is_what_pythons_own_reader_says(
    table_file: Path, rows: list[list[str]], quoting: Any, ends: str, encoding: str, place: int
) -> None:
    names = ["prompt", "other", "third"][: len(rows[0])]
    names[place % len(names)] = "text"
    if any(character in cell for row in rows for cell in row for character in "\r\n"):
        quoting = csv.QUOTE_ALL  # of which Python's writer leaves some unquoted
    written = io.StringIO(newline="")
    csv.writer(written, quoting=quoting, lineterminator=ends).writerows([names, *rows])
    with table_file.open("w", newline="", encoding=encoding) as file:
        file.write(written.getvalue())
    expected = list(csv.DictReader(io.StringIO(written.getvalue(), newline="")))
    prompt = "prompt" if "prompt" in names else None
    found = open_source(DataConfig(source=str(table_file), prompt=prompt))
    for name in ("text", prompt):
        if name is not None:
            assert found[name][:] == [row[name] for row in expected]


def test_a_csv_of_one_column_keeps_cells_of_spaces(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('text\nNone\n""\n   \nnull\n')
    assert opened(tmp_path / "rows.csv") == ["None", "", "   ", "null"]


def test_missing_last_cells_of_a_csv_are_empty(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("other,text\n1\n2,\n3,NA\n")
    assert opened(tmp_path / "rows.csv") == ["", "", "NA"]


@pytest.mark.parametrize(
    "content",
    ["text\nHello, world\n", "text\nHello, world\nBye\n", "text,n\na,1,\nb,2,\n"],
    ids=["every row", "some", "an empty one"],
)
def test_more_cells_than_columns_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(DataError, match="a row has more cells than the first line names; quote"):
        opened(tmp_path / "rows.csv")


def test_a_long_csvs_columns_may_change_their_kind(tmp_path: Path) -> None:
    expected = ["007"] * 12000 + ["None", "x", ""]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["number", "text"])
        table.writerows([k if k < 11000 else "many", text] for k, text in enumerate(expected))
    assert opened(tmp_path / "rows.csv") == expected


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_words_that_mean_nothing_elsewhere_are_texts_and_null_is_empty(
    ending: str, tmp_path: Path
) -> None:
    path, expected = tmp_path / f"rows.{ending}", [*WORDS, None]
    if ending == "jsonl":
        write_jsonl(path, [{"text": text} for text in expected])
    elif ending == "json":
        path.write_text(json.dumps([{"text": text} for text in expected]))
    else:
        Dataset.from_dict({"text": expected}).to_parquet(path)
    assert opened(path) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.txt", "first\nsecond\n"),
        ("rows.csv", "text\nfirst\nsecond\n"),
        ("rows.jsonl", '{"text": "first"}\n{"text": "second"}\n'),
        ("rows.json", '[{"text": "first"}, {"text": "second"}]'),
    ],
)
def test_a_byte_order_mark_is_no_text(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert opened(tmp_path / name) == ["first", "second"]


def test_a_hub_data_sets_csv_cells_are_texts_too(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("n,text\n1,None\n,NA\n3,\n4,x\n")
    rows = source._open_hub(str(tmp_path), None, "train")
    assert rows["text"][:] == ["None", "NA", None, "x"]


# -- columns ---------------------------------------------------------------------------------------


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
