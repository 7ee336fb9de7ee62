"""Wheels that carry data, in a folder that pip takes packages from instead of an index."""

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from ekfac_dist.demo.packages import Package
from ekfac_dist.runtime.files import file_sha256


def write_wheel(folder: Path, package: Package, content: dict[str, bytes]) -> Package:
    """A wheel with some files; the package with its checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / package.wheel
    info = f"{package.name.replace('-', '_')}-{package.version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {
            **content,
            f"{info}/METADATA": metadata.encode(),
            f"{info}/WHEEL": tags.encode(),
            f"{info}/RECORD": b"",
        }.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # of no time, so of the same bytes
    return replace(package, sha256=file_sha256(path))


def only_packages_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets pip find packages in a folder alone."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives pip an index that nobody answers for."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
