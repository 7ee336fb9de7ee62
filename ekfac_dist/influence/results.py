"""The format of the results directory that `query` writes, with its writer and its reader.

    manifest.json         what was scored, with which factors, damping, sign and scale
    queries.jsonl         one line per query group: its queries, with their tokens, and the
                          "split_token" that begins in the prompt and ends in the completion, and
                          so carries no label, or null; of a contrast, "against" has the same of the
                          completion that it is against
    scores.safetensors    scores [Q, N] float32, indices [N] in the data, and if asked for
                          self_influence [N], module_scores [Q, modules, N], layer_scores
                          [Q, layers, N], token_scores [Q, positions] with token_offsets [N + 1];
                          with a normalisation its divisors, query_norms [Q] and norms [N];
                          (all these come from the scan, so are approximate at low rank);
                          with re-scoring exact_query, exact_index, exact_scores, scan_scores [E]
    top.jsonl             one line per (query group, rank), the most positive first: query, rank,
                          index, score, share, nats, text; scan_score after re-scoring; of a part
                          of a row of the data, document (the row) and first_token (in it), too
    bottom.jsonl          the same, the most negative first
    details.safetensors   for the P pairs of a query group and a sequence listed for it: pair_query,
                          pair_index [P], offsets [P + 1], token_scores [positions],
                          layer_token_scores [layers, positions], module_scores [P, modules]
                          (the manifest's "tokens" says what a position's score is of: its input
                          or its loss)
    sequences.jsonl       one line per listed sequence: index, text, tokens, is_label

Q counts query groups, each of one query or several that are summed, by whose index "query" names
them; N counts the scored sequences, in data order.

A share is the score over the sum of |scores| of the same sign for the query group (of `scores`, so
of the scan's where there was one), null if there are none; it has the score's sign. Nats are null
without the training set's size. They are to first order; where a value is above the group's −log p,
which is impossible, the line has a note that says so. A group with a contrast has no such limit.

Position t of a sequence reads token t and predicts token t + 1, so a sequence of T positions has
T + 1 tokens. Some tokens can be read only together, such as those that share a character's bytes:
then `tokens` has their text at the first of them, and "" at the others. All tokens joined are the
text; there is still one score and one is_label per token.

This module knows files; no model and no factors.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ekfac_dist.errors import OutputError, StoreError, first_line
from ekfac_dist.runtime.files import file_sha256, safetensors_parts, write_listed, write_whole
from ekfac_dist.runtime.lock import LOCK, require_unlocked

FORMAT = "ekfac_dist/scores/1"
MANIFEST = "manifest.json"
QUERIES = "queries.jsonl"
SCORES = "scores.safetensors"
TOP = "top.jsonl"
BOTTOM = "bottom.jsonl"
DETAILS = "details.safetensors"
SEQUENCES = "sequences.jsonl"

_ADVICE = "Run `query` again."


class Results(Protocol):
    """Complete results, wherever they are.

    Attributes:
        manifest: Their manifest.
    """

    manifest: dict[str, Any]

    @property
    def path(self) -> str | Path:
        """What errors call them."""

    def has(self, file: str) -> bool:
        """Whether the run wrote that file."""

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Every tensor of a safetensors file, by name."""

    def lines(self, file: str) -> list[dict[str, Any]]:
        """The object in each line of a JSONL file."""


class ResultsSink(Protocol):
    """What takes results, one file after another, and the manifest last."""

    def tensors(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Takes one file of tensors."""

    def lines(self, file: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes one file of lines."""

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Takes every entry of the manifest but format, complete and files."""


class ResultsWriter:
    """Writes a directory of results, the manifest last; on worker 0 only.

    Args:
        path: The directory, new or empty.
        is_begun: Whether the directory holds this run's unfinished results, as `unfinished` makes
            them; it is not checked then.

    Attributes:
        path: The directory.

    Raises:
        OutputError: If the directory cannot be made, or is not empty.
    """

    def __init__(self, path: str | Path, *, is_begun: bool = False) -> None:
        self.path = Path(path)
        self._files: dict[str, dict[str, Any]] = {}
        if not is_begun:
            check_new(self.path)
            make_directory(self.path)

    def tensors(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes one safetensors file."""
        self._write(file, safetensors_parts(tensors))

    def lines(self, file: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes one JSONL file."""
        self._write(file, [_json(row).encode() + b"\n" for row in rows])

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest that makes the results complete.

        Args:
            manifest: Every entry but format, complete and files.
        """
        write_results_manifest(self.path, {"complete": True, **manifest, "files": self._files})

    def _write(self, file: str, parts: list[bytes | memoryview]) -> None:
        self._files[file] = write_listed(self.path / file, parts)


class ResultsReader:
    """Reads a complete directory of results, after checking the SHA-256 of every file.

    Args:
        path: The directory.

    Attributes:
        path: The directory.
        manifest: Its manifest.

    Raises:
        StoreError: If the directory is missing, incomplete or of another format, or one of its
            files is missing or has changed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / MANIFEST
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise StoreError(
                f"{file} cannot be read: {error.strerror or error}. Give the output directory of a "
                "`query` run."
            ) from error
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{file} is not JSON: {first_line(error)}. {_ADVICE}") from error
        stored_format = manifest.get("format") if isinstance(manifest, dict) else None
        if stored_format != FORMAT:
            raise StoreError(
                f"{path} has format {stored_format!r}; this version reads {FORMAT!r}, the output "
                "of a `query` run."
            )
        if manifest.get("complete") is not True:
            raise StoreError(
                f"{path} is incomplete: its run did not finish. Run the same `query` again, which "
                "goes on from what is done."
            )
        self.manifest: dict[str, Any] = manifest
        self._check_files()

    def _check_files(self) -> None:
        """Compares every listed file with its SHA-256."""
        file, files = self.path / MANIFEST, self.manifest.get("files")
        if not isinstance(files, dict):
            raise StoreError(f"{file} has no list of files. {_ADVICE}")
        for name, listed in files.items():
            digest = listed.get("sha256") if isinstance(listed, dict) else None
            if Path(name).name != name or not isinstance(digest, str):
                raise StoreError(
                    f"{file} lists {name!r} as {listed!r}; it must list files beside it, each with "
                    f"its sha256. {_ADVICE}"
                )
            part = self.path / name
            if not part.is_file():
                raise StoreError(f"{part} is missing, though the manifest lists it. {_ADVICE}")
            if file_sha256(part) != digest:
                raise StoreError(
                    f"{part} has changed since it was written: another SHA-256. {_ADVICE}"
                )

    def has(self, file: str) -> bool:
        """Whether the run wrote that file."""
        return file in self.manifest["files"]

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Every tensor of a safetensors file, by name.

        Raises:
            StoreError: If the manifest does not list the file, or it cannot be read.
        """
        path = self._listed(file)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{path} cannot be read: {first_line(error)}. {_ADVICE}") from error

    def lines(self, file: str) -> list[dict[str, Any]]:
        """The object in each line of a JSONL file."""
        with self._listed(file).open(encoding="utf-8") as opened:
            return [json.loads(line) for line in opened]

    def _listed(self, file: str) -> Path:
        if not self.has(file):
            raise StoreError(f"{self.path / MANIFEST} does not list {file}. {_ADVICE}")
        return self.path / file


def write_results_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest of results, complete or not.

    Args:
        path: The results' directory.
        manifest: Every entry but format.
    """
    whole = {"format": FORMAT, **manifest}
    write_whole(path / MANIFEST, [_json(whole, indent=1).encode(), b"\n"])


def make_directory(path: Path) -> None:
    """Makes a directory, and those above it.

    Raises:
        OutputError: If one cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be_made(path, error) from error


def check_new(
    path: str | Path, *, own: bool = False, is_left: Callable[[Path], bool] = lambda entry: False
) -> None:
    """Checks that an output directory is empty, or can be made; nothing of the check remains.

    Args:
        path: The directory.
        own: Whether this process holds the directory's lock.
        is_left: Whether an entry, beside the lock and a manifest that is not in place yet, is what
            a run leaves that was killed before it had begun.

    Raises:
        OutputError: If it is not empty, cannot be made or written, or a run is writing it.
    """
    path = Path(path)
    if os.path.lexists(path):
        if not path.is_dir():
            raise OutputError(f"output {path} exists and is no directory; give another.")
        if not os.access(path, os.W_OK | os.X_OK):
            raise OutputError(f"output {path} cannot be written; give another directory.")
        # All that a run leaves that was killed before its manifest was in place.
        startup_files = re.compile(rf"{re.escape(LOCK)}|\.{re.escape(MANIFEST)}\..*\.tmp")
        found = list(path.iterdir())
        others = sorted(
            entry.name
            for entry in found
            if not startup_files.fullmatch(entry.name) and not is_left(entry)
        )
        if not own and len(others) < len(found):
            require_unlocked(path)
        if others:
            raise OutputError(
                f"output {path} exists already (it holds {others[0]}); give a directory "
                "that is new or empty, or remove this one."
            )
        return
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"output {path} cannot be made: {parent} is no directory that can be written. Give "
            "another directory."
        )
    try:
        _make_and_remove(path)
    except OSError as error:
        raise _cannot_be_made(path, error) from error


def _make_and_remove(path: Path) -> None:
    """Makes a directory on trial: a file system, or the name's length, may forbid it too."""
    new_directories = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        path.mkdir(parents=True)
    finally:
        for directory in new_directories:
            with suppress(OSError):  # not made, or in use by now
                directory.rmdir()


def _cannot_be_made(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"output {path} cannot be made: {error.strerror or error}. Give a directory that can be "
        "written."
    )


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
