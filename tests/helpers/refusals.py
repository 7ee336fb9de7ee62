"""How bad input is tested: one sentence, exit status 2, promptly, and nothing is lost.

A table has a row for each way to go wrong: its name, what it changes in a good command, and words
that the sentence must hold.

    CASES = [
        case("a model that is missing", config("model.name", here("gone")), "no model … gone"),
        case("a prompt alone", rows([{"prompt": "what?", "text": ""}]), "no label … all prompt"),
    ]

    @each(CASES)
    def test_one_worker_refuses(case, command, capfd):
        require_refusal(case, command, lambda arguments: in_this_process(arguments, capfd))
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ekfac_dist import cli
from helpers.workshop import run_cli, run_workers, tiny_tokenizer, write_jsonl, write_yaml

PROMPT_SECONDS = 60
SAID = "ekfac-dist: error: "
BINARY = bytes(range(256)) * 4
WEIGHTS = "model.safetensors"

Run = Callable[[list[str]], tuple[int, str, str]]
Tensors = dict[str, torch.Tensor]


# -- what is spoilt --------------------------------------------------------------------------------


@dataclass
class Command:
    """A good command in a directory of its own, for a case to spoil.

    Attributes:
        directory: Holds all that is made for it.
        good: Holds what commands share, made once: the model `tiny` and more. It stays as it is.
        config: Goes to the YAML file.
        options: Follow `--config FILE` on the command line.
    """

    name = ""
    directory: Path
    good: Path
    config: dict[str, Any] = field(init=False, default_factory=dict)
    options: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.begin()

    def begin(self) -> None:
        """Makes all that is good in it."""
        raise NotImplementedError

    def path(self, name: str) -> Path:
        return self.directory / name

    def copy(self, name: str, shared: str, option: str) -> Path:
        """A copy of something that is shared, named as the value of an option."""
        copy = shutil.copytree(self.good / shared, self.path(name))
        self.set(option, copy)
        return copy

    def model(self) -> Path:
        """A copy of the good model."""
        return self.copy("model", "tiny", "model.name")

    def group(self, option: str) -> tuple[dict[str, Any], str]:
        """Where an option stands in the YAML file, and under what name."""
        group, _, name = option.rpartition(".")
        return (self.config.setdefault(group, {}) if group else self.config), name

    def set(self, option: str, value: Any) -> None:
        """Gives an option in the YAML file."""
        group, name = self.group(option)
        group[name] = value

    def arguments(self) -> list[str]:
        write_yaml(self.path("config.yaml"), self.config)
        return [self.name, "--config", str(self.path("config.yaml")), *self.options]


# -- what spoils it --------------------------------------------------------------------------------

# A change of a command. Values that it is made of may be functions of the command, as `here`'s are.
Change = Callable[[Any], object]


def here(name: str) -> Callable[[Command], Path]:
    """A path in the command's directory."""
    return lambda command: command.path(name)


def of(command: Command, value: Any) -> Any:
    """The value itself, or what the function gives."""
    return value(command) if callable(value) else value


def config(option: str, value: Any) -> Change:
    """An option in the YAML file."""
    return lambda command: command.set(option, of(command, value))


def without(option: str) -> Change:
    """An option that the YAML file does not give."""

    def change(command: Command) -> None:
        group, name = command.group(option)
        del group[name]

    return change


def options(*words: Any) -> Change:
    """What follows on the command line."""
    return lambda command: command.options.extend(str(of(command, word)) for word in words)


def write(name: str, content: bytes | str) -> Change:
    """A file in the command's directory."""
    return lambda command: write_into(command.path(name), content)


def write_into(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def link(name: str, target: str) -> Change:
    """A link in the command's directory."""
    return lambda command: command.path(name).symlink_to(command.path(target))


def rows(rows: Sequence[Mapping[str, Any]]) -> Change:
    """Other data."""
    return config("data.source", lambda command: write_jsonl(command.path("rows.jsonl"), rows))


def model_file(name: str, change: bytes | str | Callable[[Path], object]) -> Change:
    """A file of a copy of the model: its content, or what is done to it."""
    return lambda command: change_file(command.model() / name, change)


def change_file(path: Path, change: bytes | str | Callable[[Path], object]) -> None:
    if callable(change):
        change(path)
    else:
        write_into(path, change)


def cut(num_bytes: int) -> Callable[[Path], object]:
    """Cuts a file short."""
    return lambda path: path.write_bytes(path.read_bytes()[:-num_bytes])


def with_entries(**entries: Any) -> Callable[[Path], object]:
    """Changes entries of a JSON file."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def tensors(change: Callable[[Tensors], object]) -> Change:
    """Weights of a copy of the model."""
    return model_file(WEIGHTS, lambda path: change_tensors(path, change))


def change_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    held = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(held)
    save_file(held, path, metadata={"format": "pt"})


def infinite(character: str) -> Change:
    """The embedding of one character's token."""
    token = tiny_tokenizer()(character)["input_ids"][1]
    return tensors(lambda held: held["model.embed_tokens.weight"][token].fill_(torch.inf))


def lose_tokenizer(command: Command) -> None:
    for file in command.model().glob("tokenizer*"):
        file.unlink()


# -- a table's rows, and how they are tried --------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One way to go wrong.

    Attributes:
        name: What is wrong.
        changes: Make it so, one after the other.
        says: What the sentence must hold.
        begun: Whether the run has begun its store, `factors`, when it fails.
    """

    name: str
    changes: tuple[Change, ...]
    says: tuple[str, ...]
    begun: bool = False

    def spoil(self, command: Any) -> None:
        for change in self.changes:
            change(command)


def case(name: str, change: Change | tuple[Change, ...], *says: str, begun: bool = False) -> Case:
    """A row of a table; what the sentence must hold may stand in one text, with ` … ` between."""
    words = tuple(word for text in says for word in text.split(" … "))
    return Case(name, change if isinstance(change, tuple) else (change,), words, begun)


def each(cases: Sequence[Case], names: Container[str] | None = None) -> pytest.MarkDecorator:
    """Parametrizes a test's `case` with a table, or with the named of its rows."""
    assert len({case.name for case in cases}) == len(cases), "two cases have one name"
    wanted = [case for case in cases if names is None or case.name in names]
    return pytest.mark.parametrize("case", wanted, ids=lambda case: case.name)


def named(cases: Sequence[Case], name: str) -> Case:
    return next(case for case in cases if case.name == name)


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


def require_refusal(case: Case, command: Any, run: Run) -> None:
    """Spoils a command, and requires that it is refused as a case says."""
    case.spoil(command)
    arguments = command.arguments()
    before = contents(command.directory)
    status, _, stderr = run(arguments)
    require_sentence(case, status, stderr)
    require_unchanged(case, command.directory, before)


def require_unchanged(case: Case, directory: Path, before: dict[str, str]) -> None:
    """Requires that a directory is as it was, but for what a run had begun when it failed."""
    after = contents(directory)
    if case.begun:
        manifest = json.loads((directory / "factors/manifest.json").read_text())
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


@dataclass(frozen=True)
class Ended:
    """How two workers ended a command that a case had spoilt.

    Attributes:
        case: The case.
        directory: The command's.
        before: What was in it.
        ends: Exit status and standard error of each worker.
    """

    case: Case
    directory: Path
    before: dict[str, str]
    ends: list[tuple[int, str]]

    def require_refusal(self) -> None:
        """Requires that both refused it as the case says."""
        (status, said), (other_status, other_said) = self.ends
        assert status == other_status, f"{self.case.name}: {said} {other_said}"
        require_sentence(self.case, status, said + other_said)
        require_unchanged(self.case, self.directory, self.before)


def ended_in_turn(
    cases: Sequence[Case], make: Callable[[Path], Command], directory: Path, timeout: float
) -> list[Ended]:
    """Spoils one command by each case, and tells how two workers ended one after another.

    A good command goes well behind them; it has the last directory.
    """
    commands = [make(directory / str(number)) for number in range(len(cases) + 1)]
    for bad, command in zip(cases, commands, strict=False):
        bad.spoil(command)
    runs = [command.arguments() for command in commands]
    before = [contents(command.directory) for command in commands]
    ends = on_two_workers_in_turn(runs, directory, timeout)
    assert [mine[-1][0] for mine in ends] == [0, 0], ends[0][-1]
    return [
        Ended(bad, commands[k].directory, before[k], [mine[k] for mine in ends])
        for k, bad in enumerate(cases)
    ]
