"""`index`, the command: makes a gradient index, or adds new sequences to one."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ekfac_dist.config import DataConfig, IndexConfig, Kept, ModelConfig, ScoresConfig
from ekfac_dist.curvature.costs import step_tokens
from ekfac_dist.data.examples import Examples
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.errors import DataError, StoreError
from ekfac_dist.factors.comparison import check_model, require_fitted_task
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.opening import load_factors
from ekfac_dist.influence.context import DATA_LABELS, ScoringContext
from ekfac_dist.influence.held import computes_again, factors_on_device
from ekfac_dist.influence.index import layout
from ekfac_dist.influence.index.build import IndexShards, batches_of, own_shards
from ekfac_dist.influence.index.layout import DTYPES, Shard
from ekfac_dist.influence.index.norms import DAMPINGS, mean_of
from ekfac_dist.influence.index.reader import GradientIndex
from ekfac_dist.influence.index.writer import (
    IndexDirectory,
    ShardWriter,
    check_index_output,
    require_seen_by_all,
)
from ekfac_dist.influence.names import named_by
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.capture.tasks import CAUSAL_LM
from ekfac_dist.models.load.configuration import configuration
from ekfac_dist.models.load.on_workers import load, require_same_model
from ekfac_dist.models.load.pretrained import load_tokenizer
from ekfac_dist.models.sharding import agreeing
from ekfac_dist.passes.one_pass import run_pass
from ekfac_dist.passes.sequences import (
    check_sequences,
    exactly_batched,
    load_with_examples,
    with_chunked_head,
)
from ekfac_dist.passes.state import PassState
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.memory import as_text
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress, clock
from ekfac_dist.runtime.software import software

_STORED = "shards that are whole are stored"


@dataclass(frozen=True)
class IndexSummary:
    """What a run of `index` has done.

    Attributes:
        num_sequences: Sequences of the index.
        num_added: Those that this run added, or made.
        num_shards: Shards of the index.
        num_bytes: Their size.
        seconds: Duration of the run.
    """

    num_sequences: int
    num_added: int
    num_shards: int
    num_bytes: int
    seconds: float

    def in_words(self, output: str) -> str:
        """One line about it."""
        added = "nothing new: " if not self.num_added else ""
        return (
            f"{added}{self.num_sequences} sequences in {self.num_shards} shards, "
            f"{as_text(self.num_bytes)} ({as_text(self.num_bytes / self.num_sequences)} each), "
            f"{clock(self.seconds)}; the index is in {output}"
        )


@dataclass(frozen=True)
class _Inputs:
    """What a run reads before the model.

    Attributes:
        factors: The factors.
        kept: How gradients are kept.
        model: Source of the model.
        data: Source of the sequences.
        train: All sequences, those of the index before included.
        before: The index that sequences are added to; None: a new one is made.
    """

    factors: Factors
    kept: Kept
    model: ModelConfig
    data: DataConfig
    train: Sequences
    before: GradientIndex | None

    @property
    def num_before(self) -> int:
        """Sequences of the index before."""
        return 0 if self.before is None else len(self.before)


def run_index(config: IndexConfig, world: World, *, adds: bool = False) -> IndexSummary:
    """Makes an index, or adds new sequences to one; an unfinished run goes on.

    Args:
        config: The run's configuration.
        world: The workers.
        adds: Whether to add the sequences that the data has beyond the index's.

    Raises:
        UserError: If the user can correct the cause; on every worker alike.
    """
    start = time.perf_counter()
    output = Path(str(config.output))
    world.on_main(lambda: check_index_output(output, config.as_dict(), adds=adds))
    inputs = _read(config, world, adds=adds)
    train, before = inputs.train, inputs.before
    if before is not None and len(train) == len(before):
        count = len(before.shards), before.num_bytes
        return IndexSummary(len(before), 0, *count, time.perf_counter() - start)
    modules = list(inputs.factors.modules.values())
    kept = inputs.kept
    each = layout.bytes_per_sequence(modules, kept.rank, DTYPES[kept.dtype])
    num_shards = 0 if before is None else len(before.shards)
    shards = layout.plan_shards(inputs.num_before, len(train), num_shards, each)
    num_new = len(train) - inputs.num_before
    log_on_main(
        world,
        f"index         {num_new} sequences{' to add' if adds else ''}, "
        f"{int(train.num_positions[inputs.num_before :].sum())} positions; {as_text(each)} each at "
        f"rank {kept.rank} in {kept.dtype}, {as_text(each * num_new)} in {len(shards)} shards",
    )
    model = load(inputs.model, world)
    with prepared(model):
        with agreeing(world, model, StoreError):
            comparison = check_model(
                str(config.factors),
                inputs.factors,
                model,
                allow_changes=config.model.allow_changes,
            )
        with world.agree():
            check_sequences(model, train, "set data.max_tokens to {context} or less")
        world.require_same("data, by fingerprint,", train.fingerprint)
        world.require_same("factors, by fingerprint,", inputs.factors.fingerprint)
        require_same_model(model, comparison.fingerprints, world)
        for sentence in (*comparison.differs, *comparison.not_compared):
            log_on_main(world, f"model         {sentence}")
        whole = comparison.fingerprints.whole
        if before is not None and before.manifest["model"]["whole"] != whole:
            raise StoreError(
                f"The index {output} was made with another model "
                f"({before.manifest['model']['whole'][:12]}…) than this one ({whole[:12]}…); "
                "sequences are added with the same."
            )
        begins = {
            "factors": inputs.factors.fingerprint,
            "model": whole,
            "configuration of the model": configuration(model),
            "data": train.fingerprint,
            "index before": None if before is None else before.fingerprint,
            "software": software(),
        }
        with _opened(config, begins, world, adds=adds) as making, preemption.deferred():
            entries = making.make(shards, inputs, model, each)
            manifest = _manifest(config, inputs, model, whole, entries, world)
            making.finish(manifest)
    return IndexSummary(
        len(train),
        num_new,
        len(manifest["shards"]),
        sum(entry["bytes"] for entry in manifest["shards"]),
        time.perf_counter() - start,
    )


def _read(config: IndexConfig, world: World, *, adds: bool) -> _Inputs:
    """Reads factors and data."""
    store = str(config.factors)
    with world.agree():
        factors = load_factors(store)
        require_fitted_task(store, factors, CAUSAL_LM)
        fitted = factors.manifest["config"]
        before, data = None, fitted["data"]
        if adds:
            before = GradientIndex(str(config.output), factors)
            data = before.manifest["data"]["config"]
        kept = config.index.over(None if before is None else before.manifest["index"])
        model_config = config.model.over(fitted["model"])
        data_config = config.data.over(data)
    with named_by(store, "model.name", model_config.name, config.model.name):
        tokenizer, tokenizer_print = world.main_first(lambda: load_tokenizer(model_config))
    with named_by(store, "data.source", data_config.source, config.data.source):
        train, _ = load_with_examples(data_config, tokenizer, tokenizer_print, world)
    if before is not None:
        with world.agree():
            _require_beginning(before, train)
    return _Inputs(factors, kept, model_config, data_config, train, before)


def _require_beginning(before: GradientIndex, train: Sequences) -> None:
    """Refuses data that do not begin with the index's.

    Raises:
        DataError: If they do not.
    """
    entry = before.manifest["data"]
    num_rows = entry["num_rows"]
    same = train.counts.rows >= num_rows
    if not same or train.fingerprint_of_first(num_rows) != entry["fingerprint"]:
        raise DataError(
            f"The data ({train.counts.rows} rows) do not begin with the {num_rows} rows that the "
            f"index {before.path} was made of; sequences are added at the end. Give data that go "
            "on from those, or make another index."
        )


def _manifest(
    config: IndexConfig,
    inputs: _Inputs,
    model: nn.Module,
    whole: str,
    entries: list[dict[str, Any]],
    world: World,
) -> dict[str, Any]:
    """All entries of the manifest but format, complete and checksum."""
    train, before = inputs.train, inputs.before
    modules = inputs.factors.modules
    earlier = [] if before is None else before.manifest["shards"]
    return {
        "factors": {"path": config.factors, "fingerprint": inputs.factors.fingerprint},
        "model": {
            "name": inputs.model.name,
            "whole": whole,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        },
        "data": {
            "fingerprint": train.fingerprint,
            "num_rows": train.counts.rows,
            "num_sequences": len(train),
            "num_positions": int(train.num_positions.sum()),
            "config": vars(inputs.data),
        },
        "index": dict(vars(inputs.kept)),
        "norms": {
            "dampings": list(DAMPINGS),
            "mean_lambda": {
                name: mean_of(inputs.factors.module(name).lambda_OI) for name in modules
            },
        },
        "shards": [*earlier, *entries],
        "workers": world.size,
        "software": software(),
        "config": config.as_dict(),
    }


@contextmanager
def _opened(
    config: IndexConfig, begins: Mapping[str, Any], world: World, *, adds: bool
) -> Iterator["_Making"]:
    """The directory of a run, on every worker; worker 0 holds its lock.

    Args:
        config: The run's configuration.
        begins: What else must be the same for a run to go on.
        world: The workers.
        adds: Whether sequences are added to an index.
    """
    output = Path(str(config.output))

    def opened() -> IndexDirectory:
        directory = IndexDirectory(output, config.as_dict(), begins, adds=adds)
        progress = Progress("verifying", total=directory.num_bytes, unit="bytes", enabled=True)
        with progress:
            lost = directory.drop_damaged(progress.update)
        for file in lost:
            log_on_main(
                world, f"damaged       {file} has changed since it was written; it is made again"
            )
        return directory

    directory = world.on_main(opened)
    try:
        yield _Making(config, output, directory, world)
    finally:
        if directory is not None:
            directory.close()


@dataclass(frozen=True)
class _Making:
    """The making of shards; every method is a collective.

    Attributes:
        config: The run's configuration.
        output: The directory.
        directory: The same with its lock, on worker 0; None on the others.
        world: The workers.
    """

    config: IndexConfig
    output: Path
    directory: IndexDirectory | None
    world: World

    def make(
        self, shards: list[Shard], inputs: _Inputs, model: nn.Module, bytes_each: int
    ) -> list[dict[str, Any]]:
        """Makes the shards that are not in place.

        Args:
            shards: All shards of the run.
            inputs: What was read before.
            model: The model.
            bytes_each: What is kept of a sequence.

        Returns:
            The manifest's entries of all of them.
        """
        world, directory = self.world, self.directory
        in_place = world.share({} if directory is None else directory.entries)
        left = [shard for shard in shards if shard.file not in in_place]
        if len(left) < len(shards):
            log_on_main(world, f"goes on       {len(in_place)} of {len(shards)} shards are there")
        num_left = sum(shard.length for shard in left)

        def require_space() -> None:
            if directory is not None:
                directory.require_disk_space(num_left * bytes_each)

        world.on_main(require_space)
        with world.agree():
            writer = ShardWriter(self.output, world.rank)
        world.on_main(lambda: require_seen_by_all(self.output, world.size))
        if left:
            self._pass(left, inputs, model, writer)
        made = {entry["file"]: entry for own in world.gather(writer.entries) for entry in own}
        return [{**in_place, **made}[shard.file] for shard in shards]

    def _pass(
        self, shards: list[Shard], inputs: _Inputs, model: nn.Module, writer: ShardWriter
    ) -> None:
        """Runs the shards' sequences through the model."""
        config = self.config
        context, train = _context(config, inputs, model, self.world)
        own = own_shards(shards, train, self.world)
        batches = [batches_of(shard, train, context.batch_tokens) for shard in own]
        kept = inputs.kept
        observer = IndexShards(
            context, train, own, batches, kept.rank, DTYPES[kept.dtype], writer.write
        )
        flat = [batch for of_shard in batches for batch in of_shard]
        run_pass(
            "index",
            replace(context.over(train), own_batches=flat),
            context.modules,
            observer,
            DATA_LABELS,
            on_step=observer.on_step,
            state=PassState(flat, _STORED),
        )

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest on worker 0."""

        def finish() -> None:
            if self.directory is not None:
                self.directory.finish(manifest)

        self.world.on_main(finish)


def _context(
    config: IndexConfig, inputs: _Inputs, model: nn.Module, world: World
) -> tuple[ScoringContext, Examples]:
    """What the pass computes with, and the sequences as it batches them; a collective."""
    double = next(model.parameters()).dtype == torch.float64
    factors, scores = inputs.factors, ScoresConfig()
    with world.agree():
        for (
            name
        ) in factors.modules:  # in a pass a worker that finds a damaged file would fail alone
            factors.module(name)
    context = ScoringContext(
        model=model,
        factors=factors,
        damping={},  # an index is for any
        dtype=torch.float64 if double else torch.float32,
        world=world,
        batch_tokens=world.share(step_tokens(config.batch_tokens, world.device)),
        show_progress=True,
        in_eigenbasis=True,
    )
    task = with_chunked_head(model, context.modules, inputs.train, context.task, world)
    context = replace(context, task=task)
    train = exactly_batched(model, inputs.train, task, world, context.batch_tokens)
    checkpoints = computes_again(context, train, 0, scores, inputs.model.gradient_checkpointing)
    context = replace(context, checkpoints=checkpoints)
    return replace(context, on_device=factors_on_device(context, train, 0, scores)), train
