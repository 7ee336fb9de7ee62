"""A text corpus that is on every machine: the source of Python's own standard library.

The library's top-level functions and classes, and its documentation strings, become rows {"text",
"module", "kind"} of a JSONL file. The same Python version gives the same bytes. This module reads
and writes files; it knows no model and no tokenizer.
"""

import ast
import hashlib
import inspect
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from ekfac_dist.errors import DataError
from ekfac_dist.runtime.files import write_whole

Kind = Literal["source", "doc"]

# Folders with something other than the library's code: installed packages, tests, separate tools,
# and data tables written as code.
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
# Build settings, which differ between machines with the same Python version.
SKIPPED_PREFIXES = ("_sysconfigdata",)

# Limits of a row's text.
MIN_CHARACTERS = 60
MAX_CHARACTERS = 1200
HELD_OUT_SHARE = 1 / 32

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Row:
    """One text of the corpus, a line of its file.

    Attributes:
        text: The text.
        module: Dotted name of the module that it comes from.
        kind: "source" for a function or class or a part of one; "doc" for a documentation string or
            a part of one.
    """

    text: str
    module: str
    kind: Kind


def write_corpus(path: str | Path, stdlib: str | Path | None = None) -> int:
    """Writes the corpus as JSONL, completely or not at all.

    Args:
        path: The file to write; its folder must exist.
        stdlib: Folder of the sources; None for the running Python's standard library.

    Returns:
        The number of rows.

    Raises:
        DataError: If the folder has no Python source that gives a row.
        OutputError: If the file cannot be written.
    """
    rows = corpus_rows(stdlib)
    lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    write_whole(Path(path), (line.encode() for line in lines))
    return len(rows)


def read_corpus(path: str | Path) -> list[Row]:
    """Reads the rows of a file written by `write_corpus`, in order.

    Args:
        path: The file.

    Raises:
        DataError: If the file cannot be read, or a line is no such row.
    """
    rows = []
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                rows.append(_parse_row(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Give a file of `write_corpus`."
        ) from error
    return rows


def corpus_rows(stdlib: str | Path | None = None) -> list[Row]:
    """All rows of the corpus, without duplicate texts.

    They are sorted by a hash of their texts, so that any number of first rows is a fair sample of
    all modules, and the order of rows does not change when others are added.

    Args:
        stdlib: Folder of the sources; None for the running Python's standard library.

    Raises:
        DataError: If the folder has no Python source that gives a row.
    """
    folder = Path(stdlib or sysconfig.get_path("stdlib"))
    by_digest: dict[bytes, Row] = {}
    for file in _source_files(folder):
        for row in _rows_of_file(file, _module_name(file.relative_to(folder))):
            by_digest.setdefault(hashlib.sha256(row.text.encode()).digest(), row)
    if not by_digest:
        raise DataError(
            f"{folder} holds no Python sources to make a corpus of; use a Python that was "
            "installed with its library's sources."
        )
    return [by_digest[digest] for digest in sorted(by_digest)]


def split_by_module(
    rows: Iterable[Row], share: float = HELD_OUT_SHARE
) -> tuple[list[Row], list[Row]]:
    """Splits rows into training and held-out rows, keeping each module on one side.

    A documentation string is a row and also part of a source row. Splitting by module makes sure
    that the two are not on different sides.

    Args:
        rows: Rows of a corpus.
        share: Approximate share of the modules to hold out, from 0 to 1.

    Returns:
        (training rows, held-out rows), each in the order of `rows`.
    """
    training: list[Row] = []
    held_out: list[Row] = []
    for row in rows:
        digest = hashlib.sha256(row.module.encode()).digest()
        is_held_out = int.from_bytes(digest[:4], "big") < share * 2**32
        (held_out if is_held_out else training).append(row)
    return training, held_out


def _source_files(folder: Path) -> Iterator[Path]:
    """Yields the Python files below a folder in a fixed order, except those in skipped folders."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith(SKIPPED_PREFIXES):
                yield Path(root) / name


def _module_name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _rows_of_file(file: Path, module: str) -> Iterator[Row]:
    try:
        with tokenize.open(file) as opened:
            source = opened.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return  # a template or the like, which only looks like a module
    for text in _docstrings(tree):
        for part in _cut(text):
            yield Row(part, module, "doc")
    for text in _definitions(tree, source):
        for part in _cut(text):
            yield Row(part, module, "source")


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, Documented):
            text = ast.get_docstring(node, clean=False)
            if text:
                # An escape can give a lone surrogate, which cannot be encoded in UTF-8.
                yield inspect.cleandoc(text).encode(errors="replace").decode()


def _definitions(tree: ast.Module, source: str) -> Iterator[str]:
    """Yields the source of each top-level function and class, with its decorators."""
    # Not splitlines(), which also splits at form feeds; `ast` does not count those as lines.
    lines = source.split("\n")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield "\n".join(lines[first - 1 : node.end_lineno])


def _cut(text: str) -> Iterator[str]:
    """Yields parts of a text within the limits of size; parts outside them are left out."""
    part: list[str] = []
    for line in text.split("\n"):
        while part and _length([*part, line]) > MAX_CHARACTERS:
            end = _best_end(part)
            yield from _within_limits(part[:end])
            part = part[end:]
        part.append(line)
    yield from _within_limits(part)


def _best_end(lines: list[str]) -> int:
    """Number of lines to cut after: up to the last blank line of the second half, else all."""
    for end in range(len(lines), len(lines) // 2, -1):
        if not lines[end - 1].strip():
            return end
    return len(lines)


def _length(lines: list[str]) -> int:
    return sum(len(line) + 1 for line in lines)


def _within_limits(lines: list[str]) -> Iterator[str]:
    """Yields the joined lines if their size is within the limits."""
    part = "\n".join(lines).strip("\n").rstrip()
    # A single line above the upper limit is data rather than text.
    if len(part.strip()) >= MIN_CHARACTERS and len(part) <= MAX_CHARACTERS:
        yield part


def _parse_row(line: str, where: str) -> Row:
    try:
        row = Row(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: is no row of text, module and kind ({error}).") from error
    if not isinstance(row.text, str) or not isinstance(row.module, str):
        raise DataError(f"{where}: text and module must be strings.")
    if row.kind not in get_args(Kind):
        raise DataError(f"{where}: kind is {row.kind!r}; it must be source or doc.")
    return row
