"""The directory that `query` writes, and how it is read again. Knows files; no model, no factors.

    manifest.json         what was scored, with which factors, damping, sign and scale
    queries.jsonl         a line per row of the scores: its queries, with their tokens, and the
                          "split_token" that begins in the prompt and ends in the completion, so
                          that it has no label, or null
    scores.safetensors    scores [Q, N] float32, indices [N] (rows in the data), and if asked for
                          self_influence [N], module_scores [Q, modules, N], layer_scores
                          [Q, layers, N], token_scores [Q, positions] with token_offsets [N + 1];
                          with a normalisation its divisors, query_norms [Q] and norms [N];
                          (of a low-rank run these are the scan's, approximate);
                          with re-scoring exact_query, exact_index, exact_scores, scan_scores [E]
    top.jsonl             a line per (query, rank), the most positive first: query, rank, index,
                          score, share, nats, text; scan_score where there was a low-rank scan
    bottom.jsonl          the same, the most negative first
    details.safetensors   for the sequences of both lists ("pairs", a query and a sequence each):
                          pair_query, pair_index [P], offsets [P + 1], token_scores [positions],
                          layer_token_scores [layers, positions], module_scores [P, modules]
    sequences.jsonl       a line per sequence in either list: index, text, tokens, is_label

A share is the score over the sum of the absolute values of the row's scores of its sign (those of
`scores`, so the scan's where there was one), null if there is none; it has the score's sign. Nats
are null without the training set's size. They are to first order, and where one is above the row's
−log p (of its queries together) a note says that it cannot be.

Tokens that can be read only together, as those that share a character's bytes, are a run: `tokens`
has its text at the first of them and "" at the others. All tokens joined are the text; scores and
is_label stay one for each token.

Position t of a sequence reads token t and predicts token t + 1, so a sequence with L positions has
L + 1 tokens. Q counts rows, each a query or a group of them; N counts the scored sequences, in data
order.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

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

_MEND = "Run `query` again."


class ResultsWriter:
    """Writes one directory of results, the manifest last. Worker 0 owns it.

    Args:
        path: The directory, new or empty.
        is_begun: Whether the directory is this run's already; see `unfinished`.

    Raises:
        OutputError: It cannot be made, or holds anything.
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
        write_manifest(self.path, {"complete": True, **manifest, "files": self._files})

    def _write(self, file: str, parts: list[bytes | memoryview]) -> None:
        self._files[file] = write_listed(self.path / file, parts)


class ResultsReader:
    """Reads a complete directory of results.

    Args:
        path: The directory.

    Attributes:
        path: The directory.
        manifest: Its manifest.

    Raises:
        StoreError: It is missing, of another format, incomplete, or a file of it has changed.
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
            raise StoreError(f"{file} is not JSON: {first_line(error)}. {_MEND}") from error
        found = manifest.get("format") if isinstance(manifest, dict) else None
        if found != FORMAT:
            raise StoreError(
                f"{path} has format {found!r}; this version reads {FORMAT!r}, the output of a "
                "`query` run."
            )
        if manifest.get("complete") is not True:
            raise StoreError(
                f"{path} is incomplete: its run did not finish. Run the same `query` again, which "
                "goes on from what is done."
            )
        self.manifest: dict[str, Any] = manifest
        files = manifest.get("files")
        if not isinstance(files, dict):
            raise StoreError(f"{file} has no list of files. {_MEND}")
        for name, listed in files.items():
            digest = listed.get("sha256") if isinstance(listed, dict) else None
            if Path(name).name != name or not isinstance(digest, str):
                raise StoreError(
                    f"{file} lists {name!r} as {listed!r}; it must list files beside it, each with "
                    f"its sha256. {_MEND}"
                )
            part = self.path / name
            if not part.is_file():
                raise StoreError(f"{part} is missing, though the manifest lists it. {_MEND}")
            if file_sha256(part) != digest:
                raise StoreError(
                    f"{part} has changed since it was written: another SHA-256. {_MEND}"
                )

    def has(self, file: str) -> bool:
        """Whether the run wrote that file."""
        return file in self.manifest["files"]

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Every tensor of a safetensors file."""
        path = self._listed(file)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{path} cannot be read: {first_line(error)}. {_MEND}") from error

    def lines(self, file: str) -> list[dict[str, Any]]:
        """Every row of a JSONL file."""
        with self._listed(file).open(encoding="utf-8") as opened:
            return [json.loads(line) for line in opened]

    def _listed(self, file: str) -> Path:
        if not self.has(file):
            raise StoreError(f"{self.path / MANIFEST} does not list {file}. {_MEND}")
        return self.path / file


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest of results, finished or not.

    Args:
        path: Their directory.
        manifest: Every entry but format.
    """
    whole = {"format": FORMAT, **manifest}
    write_whole(path / MANIFEST, [_json(whole, indent=1).encode(), b"\n"])


def make_directory(path: Path) -> None:
    """Makes a directory, and those above it.

    Raises:
        OutputError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be_made(path, error) from error


def check_new(path: str | Path, *, own: bool = False) -> None:
    """Refuses an output directory that holds anything or cannot be made; leaves nothing.

    Args:
        path: The directory.
        own: Whether this process holds its lock.

    Raises:
        OutputError: It exists and is not empty, or cannot be written, or a run is writing it.
    """
    path = Path(path)
    if os.path.lexists(path):
        if not path.is_dir():
            raise OutputError(f"output {path} exists and is no directory; give another.")
        if not os.access(path, os.W_OK | os.X_OK):
            raise OutputError(f"output {path} cannot be written; give another directory.")
        # A run that was killed before its manifest was in place leaves nothing else.
        false_start = re.compile(rf"{re.escape(LOCK)}|\.{re.escape(MANIFEST)}\..*\.tmp")
        names = [entry.name for entry in path.iterdir()]
        entries = [name for name in names if not false_start.fullmatch(name)]
        if not own and len(entries) < len(names):
            require_unlocked(path)
        if entries:
            raise OutputError(
                f"output {path} exists already (it holds {sorted(entries)[0]}); give a directory "
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
    """Tries it: a file system, or the length of a name, may forbid what permissions allow."""
    made = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        path.mkdir(parents=True)
    finally:
        for directory in made:
            with suppress(OSError):  # not made, or in use by now
                directory.rmdir()


def _cannot_be_made(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"output {path} cannot be made: {error.strerror or error}. Give a directory that can be "
        "written."
    )


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
