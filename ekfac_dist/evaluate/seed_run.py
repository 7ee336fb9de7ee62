"""One seed of an evaluation: its trained model, factors, scores and bank, each stored when done.

In its own part of the evaluation's directory:

seed-0/model/                    the model that is explained, and its tokenizer
seed-0/factors/                  its factors; factors-<name>/ of another choice of modules
seed-0/scores/<row>.safetensors  scores [query groups, sequences] float32
seed-0/bank/                     losses of the queries after retraining; see `bank`
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ekfac_dist.config import EstimateConfig, EvaluateConfig, ModelConfig
from ekfac_dist.errors import ConfigError, OutputError
from ekfac_dist.evaluate.bank import Bank, BankKey, fill
from ekfac_dist.evaluate.factor_stores import is_complete, require_same_factors
from ekfac_dist.evaluate.inputs import Inputs
from ekfac_dist.evaluate.methods import Explained, Row, refinement_of, scores_of
from ekfac_dist.evaluate.score_files import seconds_in, store_scores, stored_scores
from ekfac_dist.evaluate.training import (
    Trained,
    num_steps,
    query_losses,
    train,
)
from ekfac_dist.factors.layout import MANIFEST
from ekfac_dist.factors.reader import StoreReader
from ekfac_dist.fit.estimate import run_estimate
from ekfac_dist.models.load.fingerprints import fingerprints
from ekfac_dist.models.load.pretrained import load_model, random_model
from ekfac_dist.passes.sequences import check_sequences
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress

_MODEL, _FACTORS, _SCORES, _BANK = "model", "factors", "scores", "bank"


class SeedRun:
    """The models, factors and scores of one seed.

    Args:
        config: The evaluation.
        inputs: Data and queries.
        world: The workers.
        seed: The seed.

    Raises:
        StoreError: If its bank is of another recipe, start, data or queries.
        DataError: If the model cannot read a sequence or a query.
    """

    def __init__(self, config: EvaluateConfig, inputs: Inputs, world: World, seed: int) -> None:
        self.config, self.inputs, self.world, self.seed = config, inputs, world, seed
        self.path = Path(str(config.output)) / f"seed-{seed}"
        self._start_model = world.main_first(self._load_start)
        with world.agree():
            check_sequences(
                self._start_model, inputs.sequences, "set data.max_tokens to {context} or less"
            )
            check_sequences(self._start_model, inputs.query_sequences, "shorten the query")
        self._start = _weights_of(self._start_model)
        whole = fingerprints(self._start_model, ()).whole
        world.require_same("initial weights, by fingerprint,", whole)
        key = BankKey(
            asdict(config.training),
            seed,
            whole,
            inputs.sequences.fingerprint,
            inputs.query_sequences.fingerprint,
        )
        world.on_main(lambda: Bank(self.path / _BANK, key))
        with world.agree():
            self.bank = Bank(self.path / _BANK, key)

    def _load_start(self) -> nn.Module:
        if self.config.training.start == "random":
            return random_model(self.config.model, self.world.device, self.seed)
        return load_model(self.config.model, self.world.device)

    def model_facts(self) -> dict[str, Any]:
        """Class and number of parameters of the model, as they are written into results."""
        model = self._start_model
        number = sum(parameter.numel() for parameter in model.parameters())
        return {"class": type(model).__name__, "num_parameters": number}

    # -- the model that is explained ---------------------------------------------------------------

    @property
    def everything(self) -> np.ndarray:
        """All sequences are kept: bool [N]."""
        return np.ones(len(self.inputs.sequences), dtype=bool)

    def train_explained(self) -> None:
        """Trains the model that is explained, on worker 0, unless it is there; a collective."""
        if self.is_trained:
            self.world.on_main(self._train_explained)

    @property
    def is_trained(self) -> bool:
        """Whether the model that is explained is trained first, or is the given one as it is."""
        return self.config.training.epochs > 0

    def _train_explained(self) -> None:
        directory = self.path / _MODEL
        if directory.is_dir() and self.bank.has(self.everything):
            return
        start = time.perf_counter()
        total = num_steps(len(self.everything), len(self.everything), self.config.training)
        with Progress(f"train {self.seed}", total=total, unit="steps") as progress:

            def on_step() -> None:
                if preemption.requested():
                    raise preemption.ended("no model is trained yet")
                progress.update(1)

            losses, trained = self.retrain(self.everything, on_step)
        if trained.last_loss > trained.first_loss:
            raise ConfigError(
                f"Training diverges: the mean loss per token rose from {trained.first_loss:.3g} in "
                f"the first epoch to {trained.last_loss:.3g} in the last. Lower "
                "training.learning_rate, or raise training.warmup_steps."
            )
        partial = directory.with_name(f".{_MODEL}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(directory, ignore_errors=True)
            model: Any = self._start_model
            model.save_pretrained(partial)
            self.inputs.tokenizer.save_pretrained(partial)
            partial.rename(directory)
        except OSError as error:
            raise OutputError(
                f"{directory} cannot be written: {error.strerror or error}. Give an output "
                "directory that can be written and has room."
            ) from error
        self.bank.put(self.everything, losses, trained, time.perf_counter() - start)

    @property
    def trained(self) -> Trained:
        """What training on all sequences did."""
        return self.bank.trained(self.everything)

    def retrain(self, kept: np.ndarray, on_step: Callable[[], None]) -> tuple[np.ndarray, Trained]:
        """Trains on some sequences, from the start, and returns the queries' losses."""
        model = self._start_model
        model.load_state_dict(self._start)
        recipe = self.config.training
        trained = train(model, self.inputs.in_memory, kept, recipe, self.seed, on_step)
        queries = self.inputs.query_sequences
        return query_losses(model, queries, self.config.batch_tokens), trained

    def fill(self, subsets: np.ndarray, name: str) -> None:
        """Trains on those of some subsets that the bank lacks; a collective."""
        total, recipe = len(self.everything), self.config.training
        fill(
            self.bank,
            subsets,
            self.world,
            self.retrain,
            lambda kept: num_steps(total, int(kept.sum()), recipe),
            name,
        )

    def group_losses(self, subsets: np.ndarray) -> np.ndarray:
        """Losses of query groups after training on each subset, from the bank [S, Q]."""
        return self.inputs.group_losses(self.bank.losses(subsets))

    # -- factors and scores ------------------------------------------------------------------------

    def fit(self) -> None:
        """Fits the factors of each choice of modules, unless they are there; a collective."""
        for name in ("", *self.config.tracked):
            store = self._store(name)
            is_there = self.world.share(is_complete(store) if self.world.is_main else None)
            config = self._estimate_config(name, store)
            if is_there:
                with self.world.agree():
                    require_same_factors(store, config, self.inputs.sequences.fingerprint)
                continue
            log_on_main(self.world, f"fit           seed {self.seed}{f', {name}' * bool(name)}")
            run_estimate(config, self.world)

    def _store(self, name: str) -> Path:
        return self.path / (f"{_FACTORS}-{name.replace('/', '_')}" if name else _FACTORS)

    @property
    def _explained_config(self) -> ModelConfig:
        model = self.config.model
        if not self.is_trained:
            return replace(model)
        # A GGUF file's model is saved as any other.
        return replace(model, name=str(self.path / _MODEL), gguf=None, revision=None)

    def _estimate_config(self, name: str, store: Path) -> EstimateConfig:
        model = self._explained_config
        if name:
            model = replace(model, modules=list(self.config.tracked[name]))
        return EstimateConfig(
            model=model,
            data=replace(self.config.data),
            factors=replace(self.config.factors),
            batch_tokens=self.config.batch_tokens,
            output=str(store),
        )

    def score(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """The scores of each row by its key, computed unless they are stored; a collective.

        Raises:
            UserError: As `scores_of`.
        """
        explained: Explained | None = None
        scores = {}
        for row in rows:
            file = self._scores_file(row)
            of = self._scores_print(row)
            stored = self.world.share(stored_scores(file, of) if self.world.is_main else None)
            if stored is None:
                if explained is None:
                    explained = self._explained()
                start = time.perf_counter()
                with preemption.deferred():
                    stored = scores_of(row, explained)
                seconds = time.perf_counter() - start
                self.world.on_main(lambda: store_scores(file, stored, of, seconds))  # noqa: B023
                preemption.end_if_requested()
            scores[row.key] = stored
        return scores

    def _scores_file(self, row: Row) -> Path:
        return self.path / _SCORES / f"{row.key}.safetensors"

    def _scores_print(self, row: Row) -> str:
        """What a row's scores were computed from, as a digest."""
        store, queries = self._store(row.tracked) / MANIFEST, self.inputs.queries
        parts = [
            store.read_bytes() if store.is_file() else b"",
            self.inputs.sequences.fingerprint.encode(),
            self.inputs.query_sequences.fingerprint.encode(),
            repr((row.method, row.damping, row.scale, row.tracked, self.config.rank)).encode(),
            repr((queries.members, queries.against, refinement_of(row, self.config))).encode(),
        ]
        if row.method == "scores":
            with suppress(OSError):
                parts.append(row.path(self.seed).read_bytes())
        return hashlib.sha256(b"|".join(parts)).hexdigest()

    def _explained(self) -> Explained:
        model = self.world.main_first(lambda: load_model(self._explained_config, self.world.device))
        return Explained(
            model=model,
            config=self.config,
            inputs=self.inputs,
            stores={name: self._store(name) for name in ("", *self.config.tracked)},
            seed=self.seed,
            world=self.world,
        )

    def seconds_of(self, row: Row) -> float | None:
        """How long the scores of a row took to compute."""
        return seconds_in(self._scores_file(row))

    def fit_seconds(self) -> float:
        """How long the passes and the decomposition of the fit took."""
        passes = StoreReader(self._store("")).manifest["passes"]
        return sum(float(stage["seconds"]) for stage in passes.values())

    def losses_before(self) -> np.ndarray:
        """Losses of query groups of the model that is explained [Q]."""
        if self.is_trained:
            return self.group_losses(self.everything[None])[0]
        self._start_model.load_state_dict(self._start)
        losses = query_losses(
            self._start_model, self.inputs.query_sequences, self.config.batch_tokens
        )
        return self.inputs.group_losses(losses)

    # -- one step on one sequence ------------------------------------------------------------------

    def tail_patch(self, columns: np.ndarray, learning_rate: float) -> np.ndarray:
        """Losses of query groups after one step on each of some sequences; a collective.

        The step is AdamW's first, of the recipe's weight decay, from the trained model.

        Args:
            columns: The sequences [n].
            learning_rate: The step's.

        Returns:
            −log p, float64 [n, Q].
        """
        world, recipe = self.world, self.config.training
        step = replace(
            recipe,
            epochs=1,
            batch_size=1,
            learning_rate=learning_rate,
            schedule="constant",
            warmup_steps=0,
        )
        own = range(world.rank, len(columns), world.size)
        losses = torch.zeros(len(columns), len(self.inputs.queries.members), dtype=torch.float64)
        with world.agree():
            model = load_model(self._explained_config, world.device)
            trained = _weights_of(model)
            shown = world.is_main and bool(own)
            with Progress(
                f"tail {self.seed}", total=len(own), unit="steps", enabled=shown
            ) as progress:
                for k in own:
                    world.check_peers()
                    model.load_state_dict(trained)
                    sequence = [self.inputs.in_memory[columns[k]]]
                    train(model, sequence, np.ones(1, dtype=bool), step, self.seed)
                    after = query_losses(
                        model, self.inputs.query_sequences, self.config.batch_tokens
                    )
                    losses[k] = torch.from_numpy(self.inputs.group_losses(after))
                    progress.update(1)
        world.all_reduce_([losses])
        return losses.numpy()


def _weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's parameters and buffers, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
