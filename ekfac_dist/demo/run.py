"""The demo in one command: corpus, model, factors on several workers, queries, a report.

Everything is written to one directory, whose contents `directory` lists. Complete parts of an
earlier demo are reused; when a part is made anew, everything made from the old one is removed. From
the factors on, the steps are other commands of this package, started as a user would start them.
"""

import importlib.util
import platform
import time
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from ekfac_dist.demo.answers import QUERIES, answers_with_modules
from ekfac_dist.demo.commands import PROGRAM, call, ends_its_children, launch_line
from ekfac_dist.demo.configs import is_store_of, is_whole_answer, is_whole_store, write_configs
from ekfac_dist.demo.corpus import read_corpus, split_by_module, write_corpus
from ekfac_dist.demo.directory import DemoPaths, DemoSettings, claim, remove_paths
from ekfac_dist.demo.model import train_model, train_tokenizer
from ekfac_dist.errors import ConfigError
from ekfac_dist.runtime.terminal import show

NUM_STEPS = 8


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
    if workers < 1:
        raise ConfigError(f"workers is {workers}; it must be 1 or more.")
    settings = settings or DemoSettings()
    paths = DemoPaths(Path(directory).expanduser().resolve())
    start = time.monotonic()
    claim(paths, settings)
    make_corpus(paths)
    make_model(paths, settings)
    write_configs(paths, settings, workers)
    with ends_its_children():
        status = (
            fit_demo_factors(paths, settings, workers)
            or inspect_factors(paths)
            or answer_queries(paths, settings, workers)
            or show_answers(paths)
            or make_report(paths)
        )
    if status == 0:
        print(
            f"\nThe demo took {_elapsed(start)}. Everything is in {paths.directory}",
            flush=True,
        )
    return status


def make_corpus(paths: DemoPaths) -> None:
    """Step 1: writes the corpus, unless it exists."""
    if paths.corpus.is_file():
        _print_step(1, "corpus", f"reused: {paths.corpus}")
        return
    start = time.monotonic()
    num_rows = write_corpus(paths.corpus)
    _print_step(
        1,
        "corpus",
        f"{num_rows:,} texts from the sources of Python {platform.python_version()}'s own library "
        f"({_elapsed(start)})",
    )


def make_model(paths: DemoPaths, settings: DemoSettings) -> None:
    """Steps 2 and 3: trains tokenizer and model, unless they exist."""
    if paths.model.is_dir():
        _print_step(2, "tokenizer", f"reused: {paths.model}")
        _print_step(3, "model", f"reused: {paths.model}")
        return
    remove_paths(
        paths.report, paths.scores, paths.factors
    )  # made from a model that no longer exists
    rows, held_out = split_by_module(read_corpus(paths.corpus))
    start = time.monotonic()
    tokenizer = train_tokenizer([row.text for row in rows], settings.vocab_size)
    _print_step(2, "tokenizer", f"byte-level BPE, {len(tokenizer):,} tokens ({_elapsed(start)})")
    budget = (
        f"about {settings.training_seconds:.0f} seconds"
        if settings.training_seconds is not None
        else f"{settings.max_steps} steps"
    )
    shape = settings.shape
    disable_progress_bar()  # Transformers would show one for every file that it writes
    _print_step(
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


def fit_demo_factors(paths: DemoPaths, settings: DemoSettings, workers: int) -> int:
    """Step 4: runs `estimate` on several workers, unless its store exists; returns its status."""
    if is_whole_store(paths, settings):
        _print_step(4, "factors", f"reused: {paths.factors}")
        return 0
    remove_paths(paths.report, paths.scores)
    if not is_store_of(paths, settings):  # else `estimate` resumes it
        remove_paths(paths.factors)
    _print_step(4, "factors", f"fitting on {_num_workers(workers)}")
    return call("estimate", launch_line(paths.accelerate_config, "estimate", paths.estimate_config))


def inspect_factors(paths: DemoPaths) -> int:
    """Step 5: runs `inspect`; returns its exit status."""
    _print_step(5, "inspect", str(paths.factors))
    return call("inspect", [*PROGRAM, "inspect", str(paths.factors)])


def answer_queries(paths: DemoPaths, settings: DemoSettings, workers: int) -> int:
    """Step 6: runs `query` on several workers, unless its results exist; returns its status."""
    if is_whole_answer(paths, settings):
        _print_step(6, "query", f"reused: {paths.scores}")
        return 0
    remove_paths(paths.report, paths.scores)
    _print_step(6, "query", f"answering {len(QUERIES)} queries on {_num_workers(workers)}")
    return call("query", launch_line(paths.accelerate_config, "query", paths.query_config))


def show_answers(paths: DemoPaths) -> int:
    """Step 7: prints each query's top texts and their modules; returns exit status 0."""
    _print_step(7, "answers", "the texts that make each completion most likely, and their modules")
    show(f"\n{answers_with_modules(paths)}\n")
    return 0


def make_report(paths: DemoPaths) -> int:
    """Step 8: runs `report`, unless its page exists or jinja2 is missing; returns its status."""
    if paths.report.is_file():
        _print_step(8, "report", f"reused: {paths.report}")
        return 0
    if importlib.util.find_spec("jinja2") is None:
        _print_step(8, "report", "left out, for it needs jinja2: pip install 'ekfac_dist[report]'")
        return 0
    _print_step(8, "report", "a page to look at the scores in")
    line = [*PROGRAM, "report", str(paths.scores), "--output", str(paths.report)]
    return call("report", line)


def _print_step(step: int, name: str, text: str) -> None:
    print(f"{step}/{NUM_STEPS} {name:<10} {text}", flush=True)


def _num_workers(number: int) -> str:
    return f"{number} worker{'s' * (number != 1)}"


def _elapsed(start: float) -> str:
    return f"{time.monotonic() - start:.0f} s"
