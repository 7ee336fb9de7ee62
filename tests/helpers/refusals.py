"""How bad input is tested: one sentence, exit status 2, promptly, and nothing is lost.

CASES: list[Case] = []
case = table(CASES)

@case("a model directory that is missing", "no model directory", "nowhere")
def _(setting):
    setting.config["model"]["name"] = setting.path("nowhere")

def test_one_worker_refuses(...):
    require_refusal(CASES[0], setting, lambda arguments: in_this_process(arguments, capfd))
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from ekfac_dist import cli
from helpers.workshop import run_cli, run_workers

PROMPT_SECONDS = 60
SAID = "ekfac-dist: error: "
BINARY = bytes(range(256)) * 4

Run = Callable[[list[str]], tuple[int, str, str]]


class Spoilt(Protocol):
    """A run in a directory of its own, for a case to spoil."""

    directory: Path

    def arguments(self) -> list[str]:
        """The command line."""


Spoil = Callable[[Any], None]


@dataclass(frozen=True)
class Case:
    """One way to go wrong.

    Attributes:
        name: What is wrong.
        spoil: Makes it so.
        says: What the sentence must hold.
        begun: Whether the run has begun its store, `factors`, when it fails.
    """

    name: str
    spoil: Spoil
    says: tuple[str, ...]
    begun: bool = False


def table(cases: list[Case]) -> Callable[..., Callable[[Spoil], Spoil]]:
    """A decorator that puts a function into a table of cases."""

    def case(name: str, *says: str, begun: bool = False) -> Callable[[Spoil], Spoil]:
        def add(spoil: Spoil) -> Spoil:
            assert name not in {case.name for case in cases}
            cases.append(Case(name, spoil, says, begun))
            return spoil

        return add

    return case


def contents(directory: Path) -> dict[str, str]:
    """What each thing below a directory is: a file's SHA-256, a link's target, or a directory."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "directory"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def require_refusal(case: Case, setting: Spoilt, run: Run) -> None:
    """Spoils a run, and requires that it is refused as a case says."""
    case.spoil(setting)
    arguments = setting.arguments()
    before = contents(setting.directory)
    status, _, stderr = run(arguments)
    require_sentence(case, status, stderr)
    after = contents(setting.directory)
    if case.begun:
        manifest = json.loads((setting.directory / "factors/manifest.json").read_text())
        assert manifest["complete"] is False
        after = {name: what for name, what in after.items() if not name.startswith("factors")}
    assert after == before


def require_sentence(case: Case, status: int, stderr: str) -> None:
    """Requires status 2 and one whole sentence that says what a case wants said."""
    assert "Traceback" not in stderr, stderr
    said = [line for line in stderr.splitlines() if line.startswith(SAID)]
    assert len(said) == 1, stderr
    assert status == 2
    for words in case.says:
        assert re.search(words, said[0]), f"{words!r} is not in: {said[0]}"
    assert re.search(r"[.?]$", said[0]), f"no whole sentence: {said[0]}"


def in_this_process(arguments: list[str], capfd: pytest.CaptureFixture) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command run here."""
    capfd.readouterr()
    status = cli.main(arguments)
    return status, *capfd.readouterr()


def on_real_workers(arguments: list[str], workers: int) -> tuple[int, str, str]:
    """The same of a command run in processes of its own."""
    done = run_cli(arguments, workers, timeout=PROMPT_SECONDS)
    return done.returncode, done.stdout, done.stderr


def on_two_workers_in_turn(
    runs: list[Any], directory: Path, timeout: float
) -> list[list[tuple[int, str]]]:
    """Exit status and standard error of commands that two workers run one after another.

    One launch serves all: workers that have refused together are still in step.

    Args:
        runs: Command lines, or lists of one for each worker.
        directory: Where the workers write how each ended.
        timeout: Seconds for all of it.

    Returns:
        Of each worker, the ends in the runs' order.
    """
    (directory / "runs.json").write_text(json.dumps(runs))
    script = Path(__file__).with_name("worker_refusals.py")
    done = run_workers(script, 2, directory / "runs.json", directory, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in (0, 1)]
