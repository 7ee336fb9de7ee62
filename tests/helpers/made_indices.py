"""Indices of a tiny model, made in this process."""

import json
from pathlib import Path

from helpers.workshop import run_here, save_tiny_llama, texts, write_jsonl

NUMBER, MORE = 20, 7
STEP = ("--batch_tokens", "16")  # so few that there are many shards


def make_store(root: Path) -> Path:
    """A tiny model, its data, more data, queries and its factors."""
    save_tiny_llama(root / "model")
    rows = [{"text": text} for text in texts(NUMBER + MORE)]
    write_jsonl(root / "text.jsonl", rows[:NUMBER])
    write_jsonl(root / "more.jsonl", rows)
    write_jsonl(root / "queries.jsonl", [{"text": text} for text in texts(2, seed=3)])
    fit = ["estimate", "--model.name", root / "model", "--data.source", root / "text.jsonl"]
    done = run_here([*fit, "--output", root / "store"])
    assert done.returncode == 0, done.stderr
    return root


def arguments(root: Path, output: Path, *options: str | Path) -> list[str | Path]:
    """The command that makes an index of many shards."""
    return ["index", "--factors", root / "store", "--output", output, *STEP, *options]


def adding(root: Path, output: Path) -> list[str | Path]:
    """The command that adds sequences to it."""
    return arguments(root, output, "--add", "--data.source", root / "more.jsonl")


def content(index: Path) -> dict[str, bytes]:
    """Every file's bytes; of the manifest, what does not name the directory or the workers."""
    found = {str(p.relative_to(index)): p.read_bytes() for p in index.rglob("*") if p.is_file()}
    manifest = json.loads(found.pop("manifest.json"))
    del manifest["checksum"], manifest["workers"], manifest["config"]["output"]
    return found | {"manifest.json": json.dumps(manifest).encode()}
