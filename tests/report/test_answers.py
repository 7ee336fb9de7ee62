"""The table that `query` ends with: shares, nats where they are known, and text of any kind."""

import pytest
from helpers.made_results import Made

from ekfac_dist.report.answers import answer_tables
from ekfac_dist.report.tables import table
from ekfac_dist.runtime.terminal import visible


def columns(said, name):
    """The cells of a column of the first table, by row."""
    lines = said.splitlines()
    head = next(k for k, line in enumerate(lines) if line.startswith("index"))
    end = lines[head].index(name) + len(name)
    rows = lines[head + 2 : head + 7]
    return [row[:end].rstrip(" !").split()[-1] for row in rows]


def test_without_a_training_size_there_is_no_word_of_nats(tmp_path):
    made = Made()
    said = answer_tables(str(made.write(tmp_path / "scores")))
    assert "nats" not in said.lower()
    shares = [float(cell.rstrip("%")) / 100 for cell in columns(said, "share")]
    assert shares == pytest.approx([made.share(0, i) for i in made.top[0][:5]], abs=1e-4)
    assert "share         score / sum of |scores|" in said


def test_with_one_nats_are_of_first_order_and_what_cannot_be_is_marked(tmp_path):
    made = Made(num_queries=1, training_size=60, loss=4.0)
    said = answer_tables(str(made.write(tmp_path / "scores")))
    nats = [float(cell) for cell in columns(said, "nats, first order")]
    assert nats == pytest.approx([made.nats(0, i) for i in made.top[0][:5]], rel=1e-2)
    rows = [line for line in said.splitlines() if line.split()[:1] == [str(made.top[0][0])]]
    assert nats[0] > 4 > nats[-1]
    assert f"{made.nats(0, made.top[0][0]):+.3g} !" in rows[0]
    assert said.count(" !") == sum(one > 4 for one in nats)
    assert said.count("! too far for first order") == 1


def test_both_texts_of_a_contrast_are_told_with_both_losses(tmp_path):
    made = Made(num_queries=1, against=" Rome", loss=1.25)
    said = answer_tables(str(made.write(tmp_path / "scores")))
    assert "The tower was built in → Paris\n  rather than Rome\n" in said
    assert "−log p 1.25, rather than 3.25" in said


def test_nothing_of_the_data_acts_on_the_terminal(tmp_path):
    text = "\x1b]0;mine\x07\x1b[31mred\x9b1m\x7f\u202eevil\u2066\r\nbelow"
    made = Made(num_queries=1, prompt=text, completion=text, group=text, model=text)
    made.tokens = {i: [text] for i in range(60)}
    said = answer_tables(str(made.write(tmp_path / "scores")))
    assert said == "\n".join(visible(line) for line in said.split("\n"))
    assert "␛]0;mine␇␛[31mredU+009B1m␡U+202EevilU+2066" in said
    assert not any(line.startswith("below") for line in said.splitlines())


def test_columns_of_a_table_stand_under_each_other_whatever_they_hold():
    said = table(["name", "n"], [["a\x1b\nb", "1"], ["c", "\x9b"]], last=["\ttext", ""])
    first, rule, one, two = said.split("\n")
    assert first == "name       n"
    assert rule == "----  ------"
    assert one == "a␛↵b       1  →text"
    assert two == "c     U+009B  "
