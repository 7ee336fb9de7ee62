"""`evaluate`, the command: from text to a table of how good each method's scores are.

    EVALUATION/
      results.json    all measured values, with the configuration; see `results`
      seed-0/ …       of each seed the model, its factors, scores and bank; see `seed_run`
      evaluation.html, lds.svg    the page and the plot of them, made by `report`

Everything is stored as soon as it is known; the same run again goes on, and a run with other
methods, dampings or protocols uses what is there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ekfac_dist.config import EvaluateConfig
from ekfac_dist.errors import ConfigError, LaunchError, OutputError
from ekfac_dist.evaluate import measures
from ekfac_dist.evaluate.inputs import Inputs, read_inputs
from ekfac_dist.evaluate.methods import Row, rows_of
from ekfac_dist.evaluate.protocols import (
    Lds,
    chosen_rows,
    lds_results,
    most_positive,
    recall_result,
    removal_result,
)
from ekfac_dist.evaluate.results import FORMAT, PAGE, PLOT, RESULTS, SEED, write_results
from ekfac_dist.evaluate.seed_run import SeedRun
from ekfac_dist.evaluate.subsets import lds_subsets, num_removed, random_removals, without
from ekfac_dist.factors.directory import make_folders
from ekfac_dist.fit.directories import workers_that_write
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.lock import DirectoryLock
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.platforms import processor_name
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.software import software

# What an evaluation's directory may hold when one begins, beside seeds' directories.
_OWN = (RESULTS, PAGE, PLOT)


def run_evaluation(config: EvaluateConfig, world: World) -> dict[str, Any]:
    """Trains, fits, scores, retrains and compares, or goes on with what is there; a collective.

    Args:
        config: The evaluation.
        world: The workers.

    Returns:
        The results, as they are written into `results.json`; on every worker.

    Raises:
        UserError: If the user can correct the cause; on every worker alike.
    """
    with world.agree():
        if world.fsdp:
            raise LaunchError(
                "The launcher's configuration shards the model over the workers, each of which "
                "trains models of its own; use launch/accelerate/multi_gpu.yaml, or cpu.yaml."
            )
    output = Path(str(config.output))
    world.on_main(lambda: _check_output(output))
    inputs = read_inputs(config, world)
    with world.agree():
        plan = _Plan(config, inputs)
    _log_inputs(world, inputs)
    with _locked_output(output, world):
        with preemption.deferred():
            seeds = [SeedRun(config, inputs, world, seed) for seed in config.seeds]
            for seed in seeds:
                seed.train_explained()
                _log_training(world, seed)
        for seed in seeds:
            seed.fit()
        rows = rows_of(config)
        by_seed = [seed.score(rows) for seed in seeds]
        scores = {row.key: [each[row.key] for each in by_seed] for row in rows}
        with preemption.deferred():
            results = plan.measured(seeds, rows, scores)
        world.on_main(lambda: write_results(output, results))
    return results


class _Plan:
    """What is measured, checked against the data before anything is trained.

    Args:
        config: The evaluation.
        inputs: Data and queries.

    Raises:
        ConfigError: If subsets would hold nothing, or no query is left to choose dampings by.
    """

    def __init__(self, config: EvaluateConfig, inputs: Inputs) -> None:
        self.config, self.inputs = config, inputs
        self.num_sequences = len(inputs.sequences)
        # Of each seed that removals were made for, whether each sequence is kept [removals, N].
        self.removals_of: dict[int, np.ndarray] = {}
        num_queries = len(inputs.queries.members)
        protocols = config.protocols
        if "lds" in protocols:
            lds = config.lds
            self.subsets_SN = lds_subsets(self.num_sequences, lds.subsets, lds.keep, lds.seed)
        if "removal" in protocols:
            self.removed = num_removed(self.num_sequences, config.removal.share)
            if config.removal.queries >= num_queries:
                raise ConfigError(
                    f"removal.queries is {config.removal.queries} of {num_queries}, which leaves "
                    "none by which dampings could be chosen; give fewer."
                )
        if "tail_patch" in protocols:
            config.tail_patch.top = min(config.tail_patch.top, self.num_sequences)

    def measured(
        self, seeds: Sequence[SeedRun], rows: Sequence[Row], scores: dict[str, list[np.ndarray]]
    ) -> dict[str, Any]:
        """All results."""
        config = self.config
        of_rows: dict[str, dict[str, Any]] = {row.key: {} for row in rows}
        results: dict[str, Any] = {"format": FORMAT, "config": config.as_dict()}
        chosen = list(rows)
        if "lds" in config.protocols:
            lds = self._lds(seeds, rows, scores)
            measured, results["plain"] = lds_results(lds, rows)
            ceiling = lds.ceiling()
            results["ceiling"] = None if ceiling is None else ceiling.as_dict()
            for key, values in measured.items():
                of_rows[key] |= values
            left_out = config.removal.queries if "removal" in config.protocols else 0
            chosen = chosen_rows(lds, rows, left_out)
        if "removal" in config.protocols:
            for key, values in self._removal(seeds, chosen, scores).items():
                of_rows[key]["removal"] = values
        if "tail_patch" in config.protocols:
            for key, values in self._tail_patch(seeds, chosen, scores).items():
                of_rows[key]["tail_patch"] = values
        if "recall" in config.protocols:
            for row in rows:
                of_rows[row.key]["recall"] = recall_result(
                    scores[row.key], self.inputs.gold, config.bootstrap
                )
        results["rows"] = [
            {
                "key": row.key,
                "method": row.method,
                "name": row.name,
                "damping": row.damping,
                "tracked": row.tracked,
                "seconds": [seed.seconds_of(row) for seed in seeds],
                **of_rows[row.key],
            }
            for row in rows
        ]
        results["seeds"] = [self._seed_result(seed) for seed in seeds]
        results["data"] = {
            "num_sequences": self.num_sequences,
            "num_positions": int(self.inputs.sequences.num_positions.sum()),
            "num_queries": len(self.inputs.queries.members),
        }
        results["model"] = seeds[0].model_facts()
        results["queries"] = self.inputs.query_texts()
        results["workers"] = seeds[0].world.size
        results["processor"] = processor_name()
        results["software"] = software()
        return results

    def _seed_result(self, seed: SeedRun) -> dict[str, Any]:
        trained = vars(seed.trained) if seed.is_trained else {}
        result = {"seed": seed.seed, **trained, "fit_seconds": seed.fit_seconds()}
        if "lds" in self.config.protocols:
            result["models"] = len(self.subsets_SN)
            result["bank_seconds"] = seed.bank.seconds(self.subsets_SN)
        removals = self.removals_of.get(seed.seed)
        if removals is not None:
            result["removal_models"] = len(removals)
            result["removal_seconds"] = seed.bank.seconds(removals)
        return result

    def _lds(
        self, seeds: Sequence[SeedRun], rows: Sequence[Row], scores: dict[str, list[np.ndarray]]
    ) -> Lds:
        for seed in seeds:
            seed.fill(self.subsets_SN, f"bank {seed.seed}")
        losses = [seed.group_losses(self.subsets_SN) for seed in seeds]
        lds = Lds(self.subsets_SN, losses, self.config.bootstrap)
        for row in rows:
            lds.add(row, scores[row.key])
        return lds

    def _removal(
        self, seeds: Sequence[SeedRun], rows: Sequence[Row], scores: dict[str, list[np.ndarray]]
    ) -> dict[str, Any]:
        number, of = self.config.removal.queries, self.num_sequences
        randoms = random_removals(
            of, self.removed, self.config.removal.random, self.config.lds.seed
        )
        after = {row.key: np.zeros((number, len(seeds))) for row in rows}
        after_random = np.zeros((number, len(seeds), len(randoms)))
        for k, seed in enumerate(seeds):
            subsets = {
                row.key: np.stack(
                    [
                        without(of, most_positive(scores[row.key][k], query, self.removed))
                        for query in range(number)
                    ]
                )
                for row in rows
            }
            removals = np.unique(np.concatenate([randoms, *subsets.values()]), axis=0)
            self.removals_of[seed.seed] = removals
            seed.fill(removals, f"removal {seed.seed}")
            after_random[:, k] = seed.group_losses(randoms)[:, :number].T
            for key, kept in subsets.items():
                after[key][:, k] = np.diagonal(seed.group_losses(kept)[:, :number])
        return {
            row.key: removal_result(after[row.key], after_random, self.config.bootstrap)
            for row in rows
        }

    def _tail_patch(
        self, seeds: Sequence[SeedRun], rows: Sequence[Row], scores: dict[str, list[np.ndarray]]
    ) -> dict[str, Any]:
        top = self.config.tail_patch.top
        rate = self.config.tail_patch.learning_rate or self.config.training.learning_rate
        queries = range(len(self.inputs.queries.members))
        gains: dict[str, list[np.ndarray]] = {row.key: [] for row in rows}
        for k, seed in enumerate(seeds):
            lists = {
                row.key: np.stack([most_positive(scores[row.key][k], q, top) for q in queries])
                for row in rows
            }
            columns = np.unique(np.concatenate([each.ravel() for each in lists.values()]))
            before = seed.losses_before()
            after = seed.tail_patch(columns, rate)
            for key, listed in lists.items():
                found = np.searchsorted(columns, listed)
                gains[key].append(before[:, None] - after[found, np.arange(len(before))[:, None]])
        return {
            key: measures.mean_of_queries(
                np.mean(of_seeds, axis=0).mean(1), self.config.bootstrap, 0
            ).as_dict()
            for key, of_seeds in gains.items()
        }


@contextmanager
def _locked_output(output: Path, world: World) -> Iterator[None]:
    """Context in which the output directory is this run's alone.

    Raises:
        OutputError: If it cannot be written, or is another run's; or if a worker sees another disk.
    """
    lock: DirectoryLock | None = world.on_main(lambda: _opened(output))
    try:
        writers = workers_that_write(output, world, saves=False)
        with world.agree():
            if len(writers) < world.size:
                raise OutputError(
                    f"output {output} is not the same directory on all workers, which share its "
                    "bank; give one that all see."
                )
        yield
    finally:
        if lock is not None:
            lock.release()


def _opened(output: Path) -> DirectoryLock:
    make_folders(output)
    return DirectoryLock(output)


def _check_output(output: Path) -> None:
    """Refuses a directory that holds something else than an evaluation.

    Raises:
        OutputError: If it does, is a file, or cannot be read.
    """
    try:
        entries = [entry.name for entry in output.iterdir()]
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(
            f"output {output} is no directory that can be read ({error.strerror or error}); give "
            "one that is new or empty."
        ) from error
    others = [
        name for name in entries if name not in _OWN and not name.startswith((SEED, ".", "state"))
    ]
    if others:
        raise OutputError(
            f"output {output} exists and is no evaluation (it holds {others[0]}); give a directory "
            "that is new or empty."
        )


def _log_inputs(world: World, inputs: Inputs) -> None:
    positions = int(inputs.sequences.num_positions.sum())
    log_on_main(
        world,
        f"data          {len(inputs.sequences)} sequences, {positions} positions; "
        f"{len(inputs.queries.members)} queries",
    )


def _log_training(world: World, seed: SeedRun) -> None:
    if world.is_main and seed.is_trained:
        trained = seed.trained
        log_on_main(
            world,
            f"trained       seed {seed.seed}: {trained.steps} steps, mean loss per token "
            f"{trained.first_loss:.3f} in the first epoch, {trained.last_loss:.3f} in the last",
        )
