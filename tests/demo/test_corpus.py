import json

import pytest

from ekfac_dist.demo import corpus
from ekfac_dist.demo.corpus import Row, corpus_rows, read_corpus, split_by_module, write_corpus
from ekfac_dist.errors import DataError, OutputError

SOURCE = '''\
"""What this module is for, in a sentence that is long enough to be text for people."""

import functools

\x0c
@functools.cache
def decorated(value):
    """Return the value with one added to it; the cache makes the second call quick."""
    return value + 1


class Holder:
    """Holds one thing at a time, and forgets the one before as soon as another comes."""

    def put(self, thing):
        self.thing = thing


def tiny(): pass
'''


@pytest.fixture
def stdlib(tmp_path):
    folder = tmp_path / "stdlib"
    for name in ("one.py", "package/__init__.py", "package/two.py", "package/test/three.py"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(SOURCE.replace("one added", f"{name} added"))
    (folder / "template.py").write_text("def {name}(:\n")
    return folder


def test_rows_are_functions_classes_and_docstrings_of_the_modules_that_are_no_tests(stdlib):
    rows = corpus_rows(stdlib)
    assert {row.module for row in rows} == {"one", "package", "package.two"}
    of_one = {(row.kind, row.text.splitlines()[0]) for row in rows if row.module == "one"}
    assert of_one == {
        (
            "doc",
            "What this module is for, in a sentence that is long enough to be text for people.",
        ),
        ("doc", "Return the value with one.py added to it; the cache makes the second call quick."),
        ("doc", "Holds one thing at a time, and forgets the one before as soon as another comes."),
        ("source", "@functools.cache"),
        ("source", "class Holder:"),
    }


def test_a_form_feed_does_not_shift_the_lines_of_what_follows_it(stdlib):
    (row,) = [row for row in corpus_rows(stdlib) if row.text.startswith("class")]
    assert row.text.endswith("self.thing = thing")


def test_no_text_comes_twice(stdlib):
    texts = [row.text for row in corpus_rows(stdlib)]
    assert len(texts) == len(set(texts))


def test_long_definitions_are_cut_between_lines_and_nothing_of_them_is_lost(tmp_path):
    body = "".join(f"    line_{number} = {number}\n" for number in range(300))
    (tmp_path / "long.py").write_text(f"def long():\n{body}")
    texts = [row.text for row in corpus_rows(tmp_path)]
    assert len(texts) > 4
    assert max(map(len, texts)) <= corpus.MAX_CHARACTERS
    lines = {line for text in texts for line in text.splitlines()}
    assert lines == set(f"def long():\n{body}".splitlines())


def test_lines_that_are_data_are_left_out_and_the_rest_is_kept(tmp_path):
    data = "x" * (corpus.MAX_CHARACTERS + 1)
    before, after = "before = 1  # " + "-" * 70, "after = 2  # " + "-" * 70
    (tmp_path / "data.py").write_text(f"def f():\n    {before}\n    t = '{data}'\n    {after}\n")
    text = "\n".join(row.text for row in corpus_rows(tmp_path))
    assert before in text
    assert after in text
    assert data not in text


def test_half_a_surrogate_pair_in_a_docstring_can_be_written(tmp_path):
    (tmp_path / "odd.py").write_text(f'"""Half \\ud800 of a pair. {"Words. " * 20}"""\n')
    write_corpus(tmp_path / "corpus.jsonl", tmp_path)
    assert read_corpus(tmp_path / "corpus.jsonl")[0].text.startswith("Half ? of a pair.")


def test_what_is_written_is_read_back_and_is_the_same_bytes_each_time(stdlib, tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    num_rows = write_corpus(first, stdlib)
    write_corpus(second, stdlib)
    assert first.read_bytes() == second.read_bytes()
    assert read_corpus(first) == corpus_rows(stdlib)
    assert len(read_corpus(first)) == num_rows
    assert set(json.loads(first.read_text().splitlines()[0])) == {"text", "module", "kind"}


def test_the_real_library_gives_thousands_of_rows_in_a_fair_order(library_rows):
    rows = library_rows
    assert len(rows) > 5000
    assert {row.kind for row in rows} == {"source", "doc"}
    assert len({row.module for row in rows[:1000]}) > 100
    assert not any(part == "test" for row in rows for part in row.module.split("."))


def test_splitting_holds_whole_modules_out():
    rows = [Row(f"text {n}", f"module{n % 100}", "doc") for n in range(1000)]
    kept, held_out = split_by_module(rows, share=0.2)
    assert sorted(kept + held_out, key=rows.index) == rows
    assert not {row.module for row in kept} & {row.module for row in held_out}
    assert 0.1 < len(held_out) / len(rows) < 0.3


def test_a_write_that_fails_leaves_the_old_file_and_no_other(stdlib, tmp_path, monkeypatch):
    target = tmp_path / "out" / "corpus.jsonl"
    target.parent.mkdir()
    target.write_text("old\n")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus.os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_corpus(target, stdlib)
    assert target.read_text() == "old\n"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_without_sources_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no Python sources"):
        corpus_rows(tmp_path)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("not json", "line 1: is no row"),
        ('{"text": "a"}', "line 1: is no row"),
        ('["text"]', "line 1: is no row"),
        ('{"text": 1, "module": "m", "kind": "doc"}', "must be strings"),
        ('{"text": "a", "module": "m", "kind": "other"}', "kind is 'other'"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, why):
    file = tmp_path / "corpus.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(DataError, match=why):
        read_corpus(file)


def test_a_missing_corpus_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_corpus(tmp_path / "none.jsonl")
