"""Makes the shards of a run of `index` that are not in place yet, on all workers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ekfac_dist.config import IndexConfig, ScoresConfig
from ekfac_dist.curvature.costs import step_tokens
from ekfac_dist.data.examples import Examples
from ekfac_dist.influence.context import DATA_LABELS, ScoringContext
from ekfac_dist.influence.held import computes_again, factors_on_device
from ekfac_dist.influence.index.build import IndexShards, batches_of, own_shards
from ekfac_dist.influence.index.inputs import IndexInputs
from ekfac_dist.influence.index.layout import DTYPES, Shard
from ekfac_dist.influence.index.writer import (
    IndexDirectory,
    ShardWriter,
    require_seen_by_all,
)
from ekfac_dist.passes.one_pass import run_pass
from ekfac_dist.passes.sequences import (
    exactly_batched,
    with_chunked_head,
)
from ekfac_dist.passes.state import PassState
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress

_STORED = "shards that are whole are stored"


@contextmanager
def opened_for_making(
    config: IndexConfig, begins: Mapping[str, Any], world: World, *, adds: bool
) -> Iterator["Making"]:
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
        yield Making(config, output, directory, world)
    finally:
        if directory is not None:
            directory.close()


@dataclass(frozen=True)
class Making:
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
        self, shards: list[Shard], inputs: IndexInputs, model: nn.Module, bytes_each: int
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
        self, shards: list[Shard], inputs: IndexInputs, model: nn.Module, writer: ShardWriter
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
            converted=context.converts_rows,
            state=PassState(flat, _STORED),
        )

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest on worker 0."""

        def finish() -> None:
            if self.directory is not None:
                self.directory.finish(manifest)

        self.world.on_main(finish)


def _context(
    config: IndexConfig, inputs: IndexInputs, model: nn.Module, world: World
) -> tuple[ScoringContext, Examples]:
    """What the pass computes with, and the sequences as it batches them; a collective."""
    double = next(model.parameters()).dtype == torch.float64
    factors, scores = inputs.factors, ScoresConfig()
    with world.agree():
        # In a pass a worker that finds a damaged file would fail alone.
        for name in factors.modules:
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
