"""Data of every kind that is rewritten in place, so that only its bytes tell."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, DatasetDict

from helpers.workshop import write_jsonl

Writer = Callable[[Path, list[str]], object]


def _write_json(path: Path, rows: list[str]) -> None:
    path.write_text(json.dumps([{"text": text} for text in rows]))


def _write_csv(path: Path, rows: list[str]) -> None:
    path.write_text("".join(f"{text}\n" for text in ["text", *rows]))


def _write_txt(path: Path, rows: list[str]) -> None:
    path.write_text("".join(f"{text}\n" for text in rows))


REWRITERS: dict[str, Writer] = {
    "rows.jsonl": lambda path, rows: write_jsonl(path, [{"text": text} for text in rows]),
    "rows.json": _write_json,
    "rows.csv": _write_csv,
    "rows.parquet": lambda path, rows: Dataset.from_dict({"text": rows}).to_parquet(path),
    "rows.txt": _write_txt,
    "saved": lambda path, rows: Dataset.from_dict({"text": rows}).save_to_disk(path),
    "saved dictionary": lambda path, rows: DatasetDict(
        train=Dataset.from_dict({"text": rows}), dev=Dataset.from_dict({"text": ["held out"]})
    ).save_to_disk(path),
}


def rewrite_with_time_restored(name: str, path: Path, rows: list[str]) -> None:
    """Writes other rows, as `cp -p` and `touch -r` do: with the times that there were before.

    Of a saved data set the files that describe it stay too, so that its own fingerprint does; rows
    of as many bytes as before keep its description true.
    """
    if path.is_file():
        before = path.stat()
        REWRITERS[name](path, rows)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return
    fresh = path.with_name(f"{path.name} rewritten")
    REWRITERS[name](fresh, rows)
    for new in fresh.rglob("*.arrow"):
        old = path / new.relative_to(fresh)
        before = old.stat()
        new.replace(old)
        os.utime(old, ns=(before.st_atime_ns, before.st_mtime_ns))
    shutil.rmtree(fresh)
