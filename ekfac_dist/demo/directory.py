"""The demo's directory: what it is made with, where in it everything lies, and whose it is.

    demo.json        whose directory this is, and what its contents were made with
    corpus.jsonl     text                               (`demo.corpus`)
    model/           tokenizer and model                (`demo.model`)
    accelerate.yaml  how many workers
    estimate.yaml    configuration of `estimate`
    factors/         the factor store                   (`ekfac-dist estimate`)
    queries.jsonl    three queries                      (`demo.answers`)
    query.yaml       configuration of `query`
    scores/          the queries' answers               (`ekfac-dist query`)
    report.html      a page to look at them in          (`ekfac-dist report`)

This module writes the marker and removes what is out of date; it makes none of the rest.
"""

import json
import platform
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ekfac_dist.demo.model import ModelShape
from ekfac_dist.errors import OutputError
from ekfac_dist.runtime.files import write_whole

FORMAT = "ekfac_dist/demo/1"


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo makes; other settings give another demo, made from the start.

    Args:
        vocab_size: Size of the tokenizer's vocabulary.
        shape: Sizes of the model.
        training_seconds: Time budget of the model's training; None: `max_steps` alone.
        max_steps: Most steps of it.
        max_sequences: How many texts to fit factors on, and to score.
        max_tokens: Where those are cut.
        batch_tokens: Token budget of a batch, per worker.
    """

    vocab_size: int = 4096
    shape: ModelShape = field(default_factory=ModelShape)
    training_seconds: float | None = 60.0
    max_steps: int = 2000
    max_sequences: int = 1000
    max_tokens: int = 256
    batch_tokens: int = 4096


@dataclass(frozen=True)
class DemoPaths:
    """Where in its directory the demo keeps what.

    Args:
        directory: The demo's directory.
    """

    directory: Path

    @property
    def marker(self) -> Path:
        """Says that the directory is a demo's, and what its contents were made with."""
        return self.directory / "demo.json"

    @property
    def corpus(self) -> Path:
        """The text."""
        return self.directory / "corpus.jsonl"

    @property
    def model(self) -> Path:
        """The model and its tokenizer."""
        return self.directory / "model"

    @property
    def accelerate_config(self) -> Path:
        """The configuration of Accelerate's launcher."""
        return self.directory / "accelerate.yaml"

    @property
    def estimate_config(self) -> Path:
        """The configuration of `estimate`."""
        return self.directory / "estimate.yaml"

    @property
    def factors(self) -> Path:
        """The factor store."""
        return self.directory / "factors"

    @property
    def queries(self) -> Path:
        """The queries."""
        return self.directory / "queries.jsonl"

    @property
    def query_config(self) -> Path:
        """The configuration of `query`."""
        return self.directory / "query.yaml"

    @property
    def scores(self) -> Path:
        """The queries' answers."""
        return self.directory / "scores"

    @property
    def report(self) -> Path:
        """The page to look at them in."""
        return self.directory / "report.html"


def claim(paths: DemoPaths, settings: DemoSettings) -> None:
    """Marks the directory as this demo's, after clearing away another demo's parts.

    Args:
        paths: The directory; one that holds anything else is never touched.
        settings: What the demo makes.

    Raises:
        OutputError: It holds something else, or cannot be made or written.
    """
    wanted = {
        "format": FORMAT,
        "python": platform.python_version(),
        "settings": json.loads(json.dumps(asdict(settings))),
    }
    found = _read_marker(paths)
    if found == wanted:
        return
    if found is not None:
        print(f"{paths.directory} holds a demo with other settings; it is made anew.", flush=True)
        remove(paths.report, paths.scores, paths.factors, paths.model, paths.corpus)
    try:
        paths.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{paths.directory} cannot be made: {error.strerror or error}. Give another directory."
        ) from error
    write_whole(paths.marker, [json.dumps(wanted, indent=1).encode(), b"\n"])


def remove(*paths: Path) -> None:
    """Removes files and whole directories, those of them that are there.

    Raises:
        OutputError: One cannot be removed.
    """
    for path in paths:
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{path} cannot be removed: {error.strerror or error}.") from error


def _read_marker(paths: DemoPaths) -> dict[str, Any] | None:
    """What the directory's contents were made with; None for a new or empty directory."""
    try:
        if not paths.directory.exists() or not any(paths.directory.iterdir()):
            return None
        marker = json.loads(paths.marker.read_text(encoding="utf-8"))
        if str(marker["format"]).startswith("ekfac_dist/demo/"):
            return marker
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"{paths.directory} is not an earlier demo's directory; give one that is new or empty."
        ) from error
    raise OutputError(
        f"{paths.marker} is no demo's, but of {marker['format']!r}; give a directory that is new "
        "or empty."
    )
