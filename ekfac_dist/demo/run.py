"""The demo on a small model: corpus, model, factors on several workers, queries, a report.

Everything is written to one directory, whose contents `directory` lists. Complete parts of an
earlier demo are reused; when a part is made anew, everything made from the old one is removed. The
steps from the factors on are those of `steps`.
"""

import platform
import time
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from ekfac_dist.config import DataConfig, EstimateConfig, ModelConfig, QueryConfig
from ekfac_dist.demo.answers import QUERIES, answers_with_modules
from ekfac_dist.demo.configs import Job, write_configs
from ekfac_dist.demo.corpus import read_corpus, split_by_module, write_corpus
from ekfac_dist.demo.directory import DemoPaths, DemoSettings, claim, remove_paths
from ekfac_dist.demo.model import train_model, train_tokenizer
from ekfac_dist.demo.steps import ANSWERS, Steps, elapsed, print_step, require_workers
from ekfac_dist.runtime.terminal import show


def run_demo(directory: str | Path, workers: int = 2, settings: DemoSettings | None = None) -> int:
    """Makes corpus, tokenizer, model and factors, answers queries with them, and makes a report.

    Args:
        directory: The output directory: new, empty, or of an earlier demo, whose complete parts are
            reused.
        workers: Number of workers that fit the factors and answer the queries.
        settings: Settings of the demo; None for the defaults.

    Returns:
        The exit status: 0, or that of the step that failed.

    Raises:
        ConfigError: If `workers` is below 1.
        OutputError: If the directory is neither empty nor a demo's, or cannot be written.
    """
    require_workers(workers)
    settings = settings or DemoSettings()
    paths = DemoPaths(Path(directory).expanduser().resolve())
    start = time.monotonic()
    claim(paths, settings.marker())
    make_corpus(paths)
    make_model(paths, settings)
    job = job_of(paths, settings)
    write_configs(paths, job, workers)
    return Steps(paths, job, workers).take(start, lambda: show_answers(paths))


def job_of(paths: DemoPaths, settings: DemoSettings) -> Job:
    """What the demo fits and asks."""
    estimate = EstimateConfig(
        model=ModelConfig(name=str(paths.model)),
        data=DataConfig(
            source=str(paths.corpus),
            max_tokens=settings.max_tokens,
            max_sequences=settings.max_sequences,
        ),
        batch_tokens=settings.batch_tokens,
        output=str(paths.factors),
    )
    query = QueryConfig(
        factors=str(paths.factors),
        queries=str(paths.queries),
        batch_tokens=settings.batch_tokens,
        output=str(paths.scores),
    )
    return Job(estimate=estimate, query=query, queries=QUERIES)


def make_corpus(paths: DemoPaths) -> None:
    """Step 1: writes the corpus, unless it exists."""
    if paths.corpus.is_file():
        print_step(1, "corpus", f"reused: {paths.corpus}")
        return
    start = time.monotonic()
    num_rows = write_corpus(paths.corpus)
    print_step(
        1,
        "corpus",
        f"{num_rows:,} texts from the sources of Python {platform.python_version()}'s own library "
        f"({elapsed(start)})",
    )


def make_model(paths: DemoPaths, settings: DemoSettings) -> None:
    """Steps 2 and 3: trains tokenizer and model, unless they exist."""
    if paths.model.is_dir():
        print_step(2, "tokenizer", f"reused: {paths.model}")
        print_step(3, "model", f"reused: {paths.model}")
        return
    remove_paths(
        paths.report, paths.scores, paths.factors
    )  # made from a model that no longer exists
    rows, held_out = split_by_module(read_corpus(paths.corpus))
    start = time.monotonic()
    tokenizer = train_tokenizer([row.text for row in rows], settings.vocab_size)
    print_step(2, "tokenizer", f"byte-level BPE, {len(tokenizer):,} tokens ({elapsed(start)})")
    budget = (
        f"about {settings.training_seconds:.0f} seconds"
        if settings.training_seconds is not None
        else f"{settings.max_steps} steps"
    )
    shape = settings.shape
    disable_progress_bar()  # Transformers would show one for every file that it writes
    print_step(
        3,
        "model",
        f"training a Llama of {shape.layers} layers, width {shape.hidden}, MLP {shape.mlp}, for "
        f"{budget}",
    )
    training = train_model(
        paths.model,
        tokenizer,
        [row.text for row in rows],
        [row.text for row in held_out],
        shape=shape,
        seconds=settings.training_seconds,
        max_steps=settings.max_steps,
    )
    print(
        f"    loss {training.loss_from:.2f} -> {training.loss_to:.2f} nats per token on held-out "
        f"modules, {training.steps} steps in {training.seconds:.0f} s",
        flush=True,
    )


def show_answers(paths: DemoPaths) -> None:
    """Step 7: prints each query's top texts and their modules."""
    print_step(
        ANSWERS, "answers", "the texts that make each completion most likely, and their modules"
    )
    show(f"\n{answers_with_modules(paths)}\n")
