"""The demo's directory: its settings, the paths in it, and the marker that it is a demo's.

    demo.json        marks a demo's directory, and has the settings of its contents
    downloads/       packages of model and texts        (`demo.packages`, with a real model)
    corpus.jsonl     text                               (`demo.corpus`, or `demo.summaries`)
    model/           tokenizer and model                (`demo.model`, or from a package)
    accelerate.yaml  how many workers
    estimate.yaml    configuration of `estimate`
    factors/         the factor store                   (`ekfac-dist estimate`)
    queries.jsonl    the queries                        (`demo.answers`, or `demo.summaries`)
    query.yaml       configuration of `query`
    scores/          the queries' scores                (`ekfac-dist query`)
    report.html      a page that shows them             (`ekfac-dist report`)

This module writes the marker and removes contents of other settings; other modules make the rest.
"""

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ekfac_dist.demo.model import ModelShape
from ekfac_dist.errors import OutputError
from ekfac_dist.runtime.files import write_whole

FORMATS = "ekfac_dist/demo/"
FORMAT = f"{FORMATS}1"
REAL_FORMAT = f"{FORMATS}real/1"


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of the demo. A directory made with others is emptied and made anew.

    Args:
        vocab_size: Size of the tokenizer's vocabulary.
        shape: Sizes of the model.
        training_seconds: Time limit of the model's training in seconds; None for `max_steps` only.
        max_steps: Largest number of training steps.
        max_sequences: Number of texts that factors are fitted on and that are scored.
        max_tokens: Length in tokens that these are cut to.
        batch_tokens: Largest number of tokens in a batch of one worker.
    """

    vocab_size: int = 4096
    shape: ModelShape = field(default_factory=ModelShape)
    training_seconds: float | None = 60.0
    max_steps: int = 2000
    max_sequences: int = 1000
    max_tokens: int = 256
    batch_tokens: int = 4096

    def marker(self) -> dict[str, Any]:
        """What is kept in the demo's directory, to tell it from a demo of other settings."""
        settings = json.loads(json.dumps(asdict(self)))
        return {"format": FORMAT, "python": platform.python_version(), "settings": settings}


@dataclass(frozen=True, kw_only=True)
class RealDemoSettings:
    """Settings of the demo with a real model. A directory made with others is made anew.

    Args:
        max_sequences: Number of summaries that factors are fitted on and that are scored.
        max_tokens: Length in tokens that these are cut to.
        batch_tokens: Largest number of tokens in a batch of one worker; so few for small memory.
        rank: Rank of the query gradients with which the summaries are scanned.
        rescore: So many summaries at either end of the scan are scored again, exactly.
    """

    max_sequences: int = 256
    max_tokens: int = 96
    batch_tokens: int = 512
    rank: int = 32
    rescore: int = 20

    def marker(self) -> dict[str, Any]:
        """What is kept in the demo's directory, to tell it from a demo of other settings."""
        return {"format": REAL_FORMAT, "settings": asdict(self)}


@dataclass(frozen=True)
class DemoPaths:
    """Paths of all files and folders in the demo's directory.

    Args:
        directory: The demo's directory.
    """

    directory: Path

    @property
    def marker(self) -> Path:
        """Marks the directory as a demo's and has the settings of its contents."""
        return self.directory / "demo.json"

    @property
    def downloads(self) -> Path:
        """The packages with the real model and its texts."""
        return self.directory / "downloads"

    @property
    def corpus(self) -> Path:
        """The corpus."""
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
        """The results of `query`."""
        return self.directory / "scores"

    @property
    def report(self) -> Path:
        """The report of the scores."""
        return self.directory / "report.html"


def claim(paths: DemoPaths, marker: Mapping[str, Any]) -> None:
    """Marks the directory as this demo's, after removing the contents of a demo of other settings.

    Downloads are kept: they do not depend on settings.

    Args:
        paths: The directory; created if it does not exist. One that is neither empty nor a demo's
            of this kind is not changed.
        marker: The demo's kind, as its format, and its settings.

    Raises:
        OutputError: If the directory is neither empty nor such a demo's, or cannot be created or
            written.
    """
    existing_marker = _read_marker(paths)
    if existing_marker == marker:
        return
    if existing_marker is not None:
        if (existing_marker["format"] == REAL_FORMAT) != (marker["format"] == REAL_FORMAT):
            kinds = ("a real", "the small")
            held, wanted = kinds if marker["format"] != REAL_FORMAT else kinds[::-1]
            raise OutputError(
                f"{paths.directory} holds the demo with {held} model, and this is the one with "
                f"{wanted} model; give another directory with --directory."
            )
        print(f"{paths.directory} holds a demo with other settings; it is made anew.", flush=True)
        remove_paths(paths.report, paths.scores, paths.factors, paths.model, paths.corpus)
    try:
        paths.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{paths.directory} cannot be made: {error.strerror or error}. Give another directory."
        ) from error
    write_whole(paths.marker, [json.dumps(marker, indent=1).encode(), b"\n"])


def remove_paths(*paths: Path) -> None:
    """Removes files and directories with their contents; paths that do not exist are ignored.

    Raises:
        OutputError: If one cannot be removed.
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
    """The content of the directory's marker; None for a new or empty directory."""
    try:
        if not paths.directory.exists() or not any(paths.directory.iterdir()):
            return None
        marker = json.loads(paths.marker.read_text(encoding="utf-8"))
        if str(marker["format"]).startswith(FORMATS):
            return marker
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"{paths.directory} is not an earlier demo's directory; give one that is new or empty."
        ) from error
    raise OutputError(
        f"{paths.marker} is no demo's, but of {marker['format']!r}; give a directory that is new "
        "or empty."
    )
