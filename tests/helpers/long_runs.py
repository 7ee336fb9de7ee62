"""Runs of the command line that are watched from outside, and what they leave behind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from ekfac_dist.factors.layout import MANIFEST
from helpers.workshop import cpu_launcher_config

# By which file a run is seen to have come to a stage.
STAGES = {
    "covariance": "state/covariance-1/*/part.json",
    "decomposition": "eigenbasis/*.safetensors",
    "refit": "state/refit-1/*/part.json",
    "writing": "spectrum/*.safetensors",
}


def arguments(root: Path, output: Path) -> list[str | Path]:
    """A fit of the model and the text in a folder, in small steps, saved after each."""
    return [
        *("estimate", "--model.name", root / "model", "--data.source", root / "text.jsonl"),
        *("--batch_tokens", "40", "--save_minutes", "0", "--output", output),
    ]


def content(store: Path) -> dict[str, bytes]:
    """Every file's bytes; of the manifest, what does not tell the time or the workers."""
    found = {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    manifest = json.loads(found.pop(MANIFEST))
    for told in manifest["passes"].values():
        del told["seconds"]
    del manifest["config"]["output"], manifest["checksum"]
    return found | {MANIFEST: json.dumps(manifest).encode()}


@contextmanager
def running(
    root: Path,
    output: Path,
    workers: int = 2,
    env: Mapping[str, str] | None = None,
    given: Sequence[str | Path] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A run that has just been started; whatever is left of it at the end is killed.

    It is of `given`, or the fit of `arguments`.
    """
    launcher = cpu_launcher_config(root / f"{workers}.yaml", workers)
    command = [sys.executable, "-m", "ekfac_dist", "launch", "--config_file", str(launcher)]
    with subprocess.Popen(
        [*command, *map(str, given or arguments(root, output))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            for member in family(process):
                with suppress(psutil.NoSuchProcess):
                    member.kill()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The launcher and its workers."""
    with suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        return [launcher, *launcher.children(recursive=True)]
    return []


def worker(process: subprocess.Popen[str], rank: int) -> psutil.Process | None:
    """One of the workers, as soon as it is there."""
    for member in family(process)[1:]:
        with suppress(psutil.Error):
            if member.environ().get("RANK") == str(rank):
                return member
    return None


def wait_for(
    there: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60
) -> bool:
    """Whether something came about before the run ended."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        if there():
            return True
        time.sleep(0.01)
    return there()
