"""Candidates as they are read and picked."""

import pytest

from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.errors import DataError
from ekfac_dist.influence.candidates import pick_candidates, read_candidates


def test_candidates_come_from_a_list_or_either_kind_of_file(tmp_path):
    (tmp_path / "rows.json").write_text("[4, 1]\n")
    (tmp_path / "rows.txt").write_text("4\n1\n")
    assert read_candidates([4, 1]) == [4, 1]
    assert read_candidates(str(tmp_path / "rows.json")) == [4, 1]
    assert read_candidates(str(tmp_path / "rows.txt")) == [4, 1]
    assert read_candidates(None) is None


def test_candidates_are_rows_of_the_data_not_of_what_is_left_of_it():
    data = [{"input_ids": ids} for ids in ([1, 2], [3], [4, 5], [6, 7])]  # row 1 has no label
    sequences = from_examples(data)
    assert pick_candidates(sequences, [3, 0]).tolist() == [0, 2]
    assert pick_candidates(sequences, None).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="holds 1, but that row has no label"):
        pick_candidates(sequences, [0, 1])
