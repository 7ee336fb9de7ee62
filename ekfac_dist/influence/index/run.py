"""`index`, the command: makes a gradient index, or adds new sequences to one."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ekfac_dist.config import IndexConfig
from ekfac_dist.errors import StoreError
from ekfac_dist.factors.comparison import check_model
from ekfac_dist.influence.index import layout
from ekfac_dist.influence.index.inputs import IndexInputs, read_inputs
from ekfac_dist.influence.index.layout import DTYPES
from ekfac_dist.influence.index.making import opened_for_making
from ekfac_dist.influence.index.norms import DAMPINGS, mean_of
from ekfac_dist.influence.index.writer import check_index_output, end_what_is_finished
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.load.configuration import configuration
from ekfac_dist.models.load.on_workers import load, require_same_model
from ekfac_dist.models.sharding import agreeing
from ekfac_dist.passes.sequences import check_sequences
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.memory import as_text
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import clock
from ekfac_dist.runtime.software import software


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
    inputs = read_inputs(config, world, adds=adds)
    train, before = inputs.train, inputs.before
    if before is not None and train.fingerprint == before.manifest["data"]["fingerprint"]:
        world.on_main(lambda: end_what_is_finished(output, train.fingerprint))
        count = len(before.shards), before.num_bytes
        return IndexSummary(len(before), 0, *count, time.perf_counter() - start)
    modules = list(inputs.factors.modules.values())
    kept = inputs.kept
    each = layout.bytes_per_sequence(modules, kept.rank, DTYPES[kept.dtype])
    num_shards = 0 if before is None else len(before.shards)
    shards = layout.plan_shards(
        train.num_positions, inputs.num_before, num_shards, each, config.batch_tokens
    )
    num_new = len(train) - inputs.num_before
    log_on_main(
        world,
        f"index         {num_new} sequences{' to add' if adds else ''}, "
        f"{int(train.num_positions[inputs.num_before :].sum())} positions; {as_text(each)} each at "
        f"rank {kept.rank} in {kept.dtype}, {as_text(each * num_new)} in {len(shards)} shards",
    )
    model = load(inputs.model, world)
    with prepared(model):
        whole = _checked(config, inputs, model, world)
        begins = {
            "factors": inputs.factors.fingerprint,
            "model": whole,
            "configuration of the model": configuration(model),
            "data": train.fingerprint,
            "index before": None if before is None else before.fingerprint,
            "software": software(),
        }
        with opened_for_making(config, begins, world, adds=adds) as making, preemption.deferred():
            entries = making.make(shards, inputs, model, each)
            manifest = _manifest(config, inputs, model, whole, entries, world)
            making.finish(manifest)
    num_bytes = sum(entry["bytes"] for entry in manifest["shards"])
    seconds = time.perf_counter() - start
    return IndexSummary(len(train), num_new, len(manifest["shards"]), num_bytes, seconds)


def _checked(config: IndexConfig, inputs: IndexInputs, model: nn.Module, world: World) -> str:
    """Compares the model with the factors, the index before and the data; a collective.

    Returns:
        SHA-256 of all weights of the model.
    """
    factors, allows = inputs.factors, config.model.allow_changes
    with agreeing(world, model, StoreError):
        comparison = check_model(str(config.factors), factors, model, allow_changes=allows)
    whole = comparison.fingerprints.whole
    with world.agree():
        check_sequences(model, inputs.train, "set data.max_tokens to {context} or less")
        if inputs.before is not None:
            inputs.before.require_model(whole)
    world.require_same("data, by fingerprint,", inputs.train.fingerprint)
    world.require_same("factors, by fingerprint,", factors.fingerprint)
    require_same_model(model, comparison.fingerprints, world)
    for sentence in (*comparison.differs, *comparison.not_compared):
        log_on_main(world, f"model         {sentence}")
    return whole


def _manifest(
    config: IndexConfig,
    inputs: IndexInputs,
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
