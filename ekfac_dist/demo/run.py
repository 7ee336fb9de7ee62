"""The whole job in one command: text, model, factors on several workers, queries, a report.

Everything lies in one directory, whose contents `directory` lists; what is there and whole is used
again, and whatever was made from a part that is made anew goes with the old one. The steps from the
factors on are other commands, started as a person would start them.
"""

import importlib.util
import platform
import time
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from ekfac_dist.demo.answers import QUERIES, answers_with_modules
from ekfac_dist.demo.commands import PROGRAM, call, ends_its_children, launched
from ekfac_dist.demo.configs import is_store_of, is_whole_answer, is_whole_store, write_configs
from ekfac_dist.demo.corpus import read_corpus, split_by_module, write_corpus
from ekfac_dist.demo.directory import DemoPaths, DemoSettings, claim, remove
from ekfac_dist.demo.model import train_model, train_tokenizer
from ekfac_dist.errors import ConfigError
from ekfac_dist.runtime.terminal import show

NUM_STEPS = 8


def run_demo(directory: str | Path, workers: int = 2, settings: DemoSettings | None = None) -> int:
    """Makes text, tokenizer, model and factors, inspects these, and answers queries from them.

    Args:
        directory: Where to; new, empty, or of an earlier demo, whose whole parts are used again.
        workers: Number of workers that fit the factors and answer the queries.
        settings: What to make; None: the defaults.

    Returns:
        The exit status: 0, or that of the step that failed.

    Raises:
        ConfigError: `workers` is below 1.
        OutputError: The directory holds something else, or cannot be written.
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
            fit_factors(paths, settings, workers)
            or inspect_factors(paths)
            or answer_queries(paths, settings, workers)
            or show_answers(paths)
            or make_report(paths)
        )
    if status == 0:
        print(f"\nThe demo took {_clock(start)}. Everything is in {paths.directory}", flush=True)
    return status


def make_corpus(paths: DemoPaths) -> None:
    """Step 1: writes the text, unless it is there."""
    if paths.corpus.is_file():
        _say(1, "corpus", f"reused: {paths.corpus}")
        return
    start = time.monotonic()
    num_rows = write_corpus(paths.corpus)
    _say(
        1,
        "corpus",
        f"{num_rows:,} texts from the sources of Python {platform.python_version()}'s own library "
        f"({_clock(start)})",
    )


def make_model(paths: DemoPaths, settings: DemoSettings) -> None:
    """Steps 2 and 3: trains tokenizer and model, unless they are there."""
    if paths.model.is_dir():
        _say(2, "tokenizer", f"reused: {paths.model}")
        _say(3, "model", f"reused: {paths.model}")
        return
    remove(paths.report, paths.scores, paths.factors)  # they are of a model that is gone
    rows, held_out = split_by_module(read_corpus(paths.corpus))
    start = time.monotonic()
    tokenizer = train_tokenizer([row.text for row in rows], settings.vocab_size)
    _say(2, "tokenizer", f"byte-level BPE, {len(tokenizer):,} tokens ({_clock(start)})")
    budget = (
        f"about {settings.training_seconds:.0f} seconds"
        if settings.training_seconds is not None
        else f"{settings.max_steps} steps"
    )
    shape = settings.shape
    disable_progress_bar()  # of Transformers, which has one for every file that it writes
    _say(
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


def fit_factors(paths: DemoPaths, settings: DemoSettings, workers: int) -> int:
    """Step 4: `estimate` on several workers, unless its store is there; the exit status."""
    if is_whole_store(paths, settings):
        _say(4, "factors", f"reused: {paths.factors}")
        return 0
    remove(paths.report, paths.scores)
    if not is_store_of(paths, settings):  # else `estimate` goes on with it
        remove(paths.factors)
    _say(4, "factors", f"fitting on {_workers(workers)}")
    return call("estimate", launched(paths.accelerate_config, "estimate", paths.estimate_config))


def inspect_factors(paths: DemoPaths) -> int:
    """Step 5: `inspect`; the exit status."""
    _say(5, "inspect", str(paths.factors))
    return call("inspect", [*PROGRAM, "inspect", str(paths.factors)])


def answer_queries(paths: DemoPaths, settings: DemoSettings, workers: int) -> int:
    """Step 6: `query` on several workers, unless its results are there; the exit status."""
    if is_whole_answer(paths, settings):
        _say(6, "query", f"reused: {paths.scores}")
        return 0
    remove(paths.report, paths.scores)
    _say(6, "query", f"answering {len(QUERIES)} queries on {_workers(workers)}")
    return call("query", launched(paths.accelerate_config, "query", paths.query_config))


def show_answers(paths: DemoPaths) -> int:
    """Step 7: prints each query's top texts and the modules they come from; the exit status."""
    _say(7, "answers", "the texts that make each completion most likely, and their modules")
    show(f"\n{answers_with_modules(paths)}\n")
    return 0


def make_report(paths: DemoPaths) -> int:
    """Step 8: `report`, unless its page is there; the exit status."""
    if paths.report.is_file():
        _say(8, "report", f"reused: {paths.report}")
        return 0
    if importlib.util.find_spec("jinja2") is None:
        _say(8, "report", "left out, for it needs jinja2: pip install 'ekfac_dist[report]'")
        return 0
    _say(8, "report", "a page to look at the scores in")
    line = [*PROGRAM, "report", str(paths.scores), "--output", str(paths.report)]
    return call("report", line)


def _say(step: int, name: str, text: str) -> None:
    print(f"{step}/{NUM_STEPS} {name:<10} {text}", flush=True)


def _workers(number: int) -> str:
    return f"{number} worker{'s' * (number != 1)}"


def _clock(start: float) -> str:
    return f"{time.monotonic() - start:.0f} s"
