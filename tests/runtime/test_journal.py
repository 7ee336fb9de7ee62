"""A journal holds what was appended, whatever a killed run has left after it."""

import errno
import os
from pathlib import Path

import pytest

from ekfac_dist.errors import OutputError, StoreError
from ekfac_dist.runtime.journal import JOURNAL, Journal

RECORDS = [{"file": f"covariance/ä{k}.safetensors", "bytes": k} for k in range(4)]


@pytest.fixture
def written(tmp_path: Path) -> bytes:
    journal = Journal(tmp_path)
    for record in RECORDS:
        journal.append(record)
    return (tmp_path / JOURNAL).read_bytes()


def test_what_was_appended_is_there_again(tmp_path: Path, written: bytes):
    assert Journal(tmp_path).records == RECORDS


def test_a_last_line_that_is_not_whole_is_cut_off_and_written_over(tmp_path: Path, written: bytes):
    starts = [k + 1 for k, byte in enumerate(written) if byte == ord("\n")]
    for size in range(len(written)):
        (tmp_path / JOURNAL).write_bytes(written[:size])
        journal = Journal(tmp_path)
        whole = sum(start <= size for start in starts)
        assert journal.records == RECORDS[:whole]
        journal.append(RECORDS[0])
        assert Journal(tmp_path).records == [*RECORDS[:whole], RECORDS[0]]


def test_a_byte_that_changed_is_refused_with_its_line(tmp_path: Path, written: bytes):
    last = written[:-1].rindex(b"\n")
    for place in range(0, last):
        if written[place] == ord("\n"):
            continue
        changed = bytearray(written)
        changed[place] ^= 1
        if changed[place] == ord("\n"):
            continue
        (tmp_path / JOURNAL).write_bytes(changed)
        line = written[:place].count(b"\n") + 1
        with pytest.raises(StoreError, match=rf"journal\.jsonl is damaged in line {line};"):
            Journal(tmp_path)


def test_a_full_disk_leaves_a_journal_as_it_was(
    tmp_path: Path, written: bytes, monkeypatch: pytest.MonkeyPatch
):
    journal = Journal(tmp_path)

    def no_room(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(OutputError, match=r"journal\.jsonl cannot be written: No space"):
            journal.append(RECORDS[0])
    assert (tmp_path / JOURNAL).read_bytes() == written
    journal.append(RECORDS[0])
    assert Journal(tmp_path).records == [*RECORDS, RECORDS[0]]
