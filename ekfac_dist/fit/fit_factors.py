"""The stages joined: of each group of modules both passes and the decomposition, into a store.

Whatever a stage has come to is in the sink before the next begins, and what an earlier start of the
same run has left there is not done again.
"""

import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ekfac_dist.config import FactorsConfig
from ekfac_dist.curvature.kronecker import kfac_lambda
from ekfac_dist.data.batches import worker_batches
from ekfac_dist.errors import ConfigError
from ekfac_dist.factors.layout import block_keys, covariance_file, eigenbasis_file, spectrum_file
from ekfac_dist.factors.sinks import DiskNeed, FactorSink, MemoryStore
from ekfac_dist.fit.checkpoints import Checkpoints
from ekfac_dist.fit.covariance import CovarianceSums
from ekfac_dist.fit.eigenbasis import Basis, run_eigenbasis
from ekfac_dist.fit.groups import partition
from ekfac_dist.fit.manifest import FitInputs, FitSummary, store_manifest
from ekfac_dist.fit.refit import LambdaSums
from ekfac_dist.fit.resources import (
    LARGE_SUMS,
    Memory,
    WorkerShare,
    fewest_groups,
    memory,
    stage_bytes,
)
from ekfac_dist.models.capture.labels import COVARIANCE_PASS, REFIT_PASS, LabelRule
from ekfac_dist.models.capture.saved_tensors import StepMemory
from ekfac_dist.models.find.faults import NO_GRADIENT, NOT_ROUTED, is_routed
from ekfac_dist.models.load.on_workers import model_fingerprints
from ekfac_dist.models.modules import TrackedModule, factor_sizes
from ekfac_dist.models.sharding import agreeing, gathered_bytes, is_sharded
from ekfac_dist.passes.context import PassContext, measured_step
from ekfac_dist.passes.one_pass import run_pass
from ekfac_dist.passes.state import PassState
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.memory import as_text, available_bytes, peak_bytes
from ekfac_dist.runtime.processes import World


def fit_factors(
    inputs: FitInputs,
    world: World,
    sink: FactorSink,
    checkpoints: Checkpoints,
    *,
    show_progress: bool,
) -> FitSummary:
    """Runs every stage for every group of modules and finishes the store.

    Args:
        inputs: Model (prepared), data and configuration.
        world: The workers.
        sink: Where factors go.
        checkpoints: How passes are saved.
        show_progress: Whether worker 0 shows progress.
    """
    factors = inputs.config.factors
    sequences, discovery = inputs.sequences, inputs.discovery
    own = worker_batches(
        sequences.num_positions,
        inputs.step_tokens,
        world.size,
        world.rank,
        sequences.equal_above,
    )
    dtype = getattr(torch, factors.accumulate)
    work = PassContext(inputs.model, sequences, own, world, dtype, show_progress, task=inputs.task)
    positions = int(sequences.num_positions[[n for numbers in own for n in numbers]].sum())
    shares = world.gather((len(own), sum(map(len, own)), positions))
    share = WorkerShare(*map(max, zip(*shares, strict=True)))
    number = _number_of_groups(inputs, work, share, sink)
    groups = partition(discovery.modules, number)
    summary = FitSummary(sequences, discovery, world.size, len(groups))
    for number, group in enumerate(groups, start=1):
        name = f"{number}" if len(groups) == 1 else f"{number}/{len(groups)}"
        _Group(name, group, work, share, factors, sink, checkpoints, summary).fit()
    peaks = world.gather(peak_bytes(world.device))
    summary.peak_bytes = {place: max(p.get(place, 0) for p in peaks) for place in peaks[0]}
    if summary.discovery is not discovery:
        inputs.fingerprints = model_fingerprints(inputs.model, summary.discovery.modules, world)
    with world.agree(takes_part=world.is_main):
        sink.finish(store_manifest(inputs, summary))
    return summary


def _number_of_groups(
    inputs: FitInputs, work: PassContext, share: WorkerShare, sink: FactorSink
) -> int:
    """How many pairs of passes: as configured, as the run began, or the fewest that fit.

    Raises:
        ConfigError: No number of them fits.
    """
    configured = inputs.config.factors.partitions
    if configured != "auto":
        return int(configured)
    record = sink.stored.records.get("groups")
    world, modules = work.world, inputs.discovery.modules
    if record is not None:
        return int(record["number"])
    places = world.gather((socket.gethostname(), str(world.device)))
    free = available_bytes(world.device) // places.count(places[world.rank])
    hosts = [host for host, _ in places]
    free_host = available_bytes(torch.device("cpu")) // hosts.count(hosts[world.rank])
    factors, on_cpu = inputs.config.factors, world.device.type == "cpu"
    needed = memory(modules, StepMemory.nothing(), 0, share, factors=factors, on_cpu=on_cpu)
    wanted: int | None = 1
    # Groups make sums smaller, and nothing else.
    are_large = needed.sums > LARGE_SUMS * free or needed.host > LARGE_SUMS * free_host
    if any(world.gather(are_large)):
        with agreeing(world, work.model):
            held = measured_step(work, modules)
        gathered = gathered_bytes(work.model) if is_sharded(work.model) else 0
        with world.agree():

            def needs(group: Sequence[TrackedModule]) -> Memory:
                return memory(
                    group,
                    held,
                    inputs.step_tokens,
                    share,
                    factors=factors,
                    on_cpu=on_cpu,
                    weight_bytes=gathered,
                )

            wanted = fewest_groups(modules, needs, free, free_host)
            if wanted is None:
                alone = [
                    needs(one).lack(free, free_host) for one in partition(modules, len(modules))
                ]
                most, left = max(lack for lack in alone if lack is not None)
                raise ConfigError(
                    f"A worker has {as_text(left)} of memory left, and no number of partitions "
                    f"fits: one module alone needs {as_text(most)}. Use smaller batch_tokens or "
                    "data.max_tokens, fewer workers on a host, or set factors.partitions to try "
                    "all the same."
                )
    number = max(world.gather(wanted or 1))
    with world.agree(takes_part=world.is_main):
        sink.record("groups", {"number": number})
    return number


@dataclass
class _Group:
    """Both passes and the decomposition of one group of modules.

    Attributes:
        name: Its number and that of all groups.
        modules: The group; those that turn out to have no factors are taken out.
    """

    name: str
    modules: list[TrackedModule]
    work: PassContext
    share: WorkerShare
    factors: FactorsConfig
    sink: FactorSink
    checkpoints: Checkpoints
    summary: FitSummary

    def fit(self) -> None:
        """Does what is not done of them."""
        record = self._record_of("covariance")
        if record is not None and self._suffices(record):
            self.checkpoints.clear(self._state("covariance"))
            self._leave_out(record["left_out"])
            covariance = None
        else:
            covariance, record = self._run_covariance()
        self._add("covariance", record)
        if not self.modules:
            return
        done = self._record_of("refit")
        results = [spectrum_file(module.name) for module in self.modules]
        results += [eigenbasis_file(factor) for factor in factor_sizes(self.modules)]
        if done is None or not self._has(results):
            if covariance is None:
                covariance = self._stored_covariance(record)
            done = self._decompose_and_refit(covariance)
        for stage in done["stages"]:
            self._add(stage, done["stages"][stage])

    def _decompose_and_refit(self, covariance: CovarianceSums) -> dict[str, Any]:
        self._require_room("eigenbasis")
        bases, seconds = run_eigenbasis(
            self._shown("eigenbasis"),
            covariance,
            self.work.world,
            self.sink,
            sharded=self.factors.eigen == "sharded",
            keep_covariance=self.factors.keep_covariance,
            show_progress=self.work.show_progress,
        )
        stages: dict[str, Any] = {"eigenbasis": {"seconds": seconds}}
        if self.factors.refit == "none":
            self._require_room("refit")
            self._write(self._kfac(bases, covariance.counts))
        else:
            stages["refit"] = self._run_refit(bases)
        record = self._record("refit", {"stages": stages})
        self.checkpoints.clear(self._state("refit"))
        return record

    # -- covariance --------------------------------------------------------------------------------

    def _run_covariance(self) -> tuple[CovarianceSums, dict[str, Any]]:
        """Sums up, and stores, the covariances of all modules that have some."""
        self._require_room("covariance")
        start = time.perf_counter()
        work, sums = self.work, self._no_covariance()
        state = self.checkpoints.begin(self._state("covariance"), work.own_batches, sums)
        self._say_resumed("covariance", state)
        result = run_pass(
            self._shown("covariance"),
            work,
            self.modules,
            sums,
            LabelRule(self.factors.labels, self.factors.seed, COVARIANCE_PASS),
            converted=False,  # their products are as wide as the sums, whatever the rows are
            state=state,
        )
        self._require_each_position_once(sums.counts)
        self._leave_out(left_out := self._without_factors(sums))
        sums.keep(self.modules)
        if self.factors.keep_covariance or not isinstance(self.sink, MemoryStore):
            for factor, blocks in sums.sums.items():
                header = {"count": str(sums.counts[factor])}
                tensors = dict(zip(block_keys("sum", len(blocks)), blocks, strict=True))
                self._put(covariance_file(factor), tensors, header)
        seconds = state.seconds + time.perf_counter() - start
        told = {"counts": sums.counts, "left_out": left_out, **vars(result), "seconds": seconds}
        record = self._record("covariance", told)
        self.checkpoints.clear(self._state("covariance"))
        return sums, record

    def _stored_covariance(self, record: Mapping[str, Any]) -> CovarianceSums:
        """What an earlier start of the run has stored; of factors that are decomposed, no sums."""
        world = self.work.world
        sums = self._no_covariance()
        sums.counts.update(record["counts"])
        for factor, blocks in sums.sums.items():
            if self._has([eigenbasis_file(factor)]):
                continue
            for key, block in zip(block_keys("sum", len(blocks)), blocks, strict=True):
                with world.agree(takes_part=world.is_main):
                    if world.is_main:
                        block.copy_(self.sink.read(covariance_file(factor), key))
                world.broadcast_(block)
        return sums

    def _no_covariance(self) -> CovarianceSums:
        work = self.work
        return CovarianceSums(self.modules, work.dtype, work.world.device, self.factors.blocks)

    def _suffices(self, record: Mapping[str, Any]) -> bool:
        """Whether what is stored of the covariances is all that the run still needs of them."""
        return all(
            self._has([covariance_file(factor)])
            or (not self.factors.keep_covariance and self._has([eigenbasis_file(factor)]))
            for factor in record["counts"]
        )

    def _without_factors(self, sums: CovarianceSums) -> dict[str, list[str]]:
        """Experts that no position, or no label's gradient, reached, by what is said of them."""
        routed = [m for m in self.modules if is_routed(self.work.model, m)]
        reached = [m for m in routed if sums.counts[m.output]]
        return {
            NOT_ROUTED: [m.name for m in routed if not sums.counts[m.output]],
            NO_GRADIENT: [m.name for m in reached if not sums.has_any(m.output)],
        }

    def _leave_out(self, left_out: Mapping[str, list[str]]) -> None:
        for why, names in left_out.items():
            with self.work.world.agree():
                self.summary.discovery = self.summary.discovery.without(names, why)
            self.modules = [module for module in self.modules if module.name not in names]

    def _require_each_position_once(self, counts: Mapping[str, int]) -> None:
        for module in self.modules:
            expected = int(self.work.sequences.positions_of(module.name).sum())
            found = {counts[module.input], counts[module.output]}
            if not is_routed(self.work.model, module) and found != {expected}:
                raise RuntimeError(
                    f"{module.name} sees {expected} counted positions, but its sums hold {found}"
                )

    # -- Λ -----------------------------------------------------------------------------------------

    def _run_refit(self, bases: Mapping[str, Basis]) -> dict[str, Any]:
        self._require_room("refit")
        start = time.perf_counter()
        work, world = self.work, self.work.world
        per_token = self.factors.refit == "per_token"
        sums = LambdaSums(
            self.modules, bases, per_token=per_token, dtype=work.dtype, device=world.device
        )
        # Λ belongs to its basis: sums of another, made again since, are of no use.
        of = world.share(self.sink.content_sha256(map(eigenbasis_file, factor_sizes(self.modules))))
        state = self.checkpoints.begin(self._state("refit"), work.own_batches, sums, of)
        self._say_resumed("refit", state)
        rule = LabelRule(self.factors.labels, self.factors.seed, REFIT_PASS)
        result = run_pass(self._shown("refit"), work, self.modules, sums, rule, state=state)
        self._write({name: s.div_(len(work.sequences)) for name, s in sums.sums.items()})
        return {**vars(result), "seconds": state.seconds + time.perf_counter() - start}

    def _kfac(
        self, bases: Mapping[str, Basis], counts: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        return {
            module.name: kfac_lambda(
                bases[module.output].eigenvalues,
                bases[module.input].eigenvalues,
                counts[module.input],
                len(self.work.sequences),
            ).to(self.work.dtype)
            for module in self.modules
        }

    def _write(self, spectra: Mapping[str, torch.Tensor]) -> None:
        for name, spectrum in spectra.items():
            self._put(spectrum_file(name), {"lambda": spectrum})

    def _require_room(self, stage: str) -> None:
        """Refuses a stage whose results, or states, the disk has no room for.

        Raises:
            OutputError: It has not; the run can go on when it has.
        """
        world = self.work.world
        on_cpu = world.device.type == "cpu"
        needed = stage_bytes(self.modules, self.factors, world.size, self.share, on_cpu=on_cpu)
        results, states = needed[stage]
        states *= self.checkpoints.saves
        files = {
            "covariance": map(covariance_file, factor_sizes(self.modules)),
            "eigenbasis": map(eigenbasis_file, factor_sizes(self.modules)),
            "refit": (spectrum_file(module.name) for module in self.modules),
        }[stage]
        with world.agree(takes_part=world.is_main):
            room = DiskNeed(self._shown(stage), results, files, states, self._state(stage))
            self.sink.require_disk_space(room)

    # -- what is stored, and said ------------------------------------------------------------------

    def _put(
        self,
        file: str,
        tensors: Mapping[str, torch.Tensor],
        header: Mapping[str, str] | None = None,
    ) -> None:
        """Stores a file, which worker 0 writes."""
        world = self.work.world
        with world.agree(takes_part=world.is_main):
            preemption.end_if_requested()
            self.sink.write(file, tensors, header)

    def _has(self, files: Iterable[str]) -> bool:
        return all(file in self.sink.stored.files for file in files)

    def _record(self, stage: str, told: dict[str, Any]) -> dict[str, Any]:
        world = self.work.world
        with world.agree(takes_part=world.is_main):
            self.sink.record(self._state(stage), told)
        return told

    def _record_of(self, stage: str) -> dict[str, Any] | None:
        return self.sink.stored.records.get(self._state(stage))

    def _state(self, stage: str) -> str:
        """The name of a stage of this group in the journal and among states."""
        return f"{stage}-{self.name.replace('/', '-of-')}"

    def _shown(self, stage: str) -> str:
        """The name of a stage of this group for people."""
        return f"{stage} {self.name}" if "/" in self.name else stage

    def _say_resumed(self, stage: str, state: PassState) -> None:
        if state.is_resumed and self.work.show_progress and self.work.world.is_main:
            print(f"{self._shown(stage):<12} goes on", file=sys.stderr, flush=True)

    def _add(self, stage: str, told: Mapping[str, Any]) -> None:
        """Adds what a stage took, and its loss, to the summary."""
        self.summary.seconds[stage] += told["seconds"]
        if "loss" in told:
            self.summary.losses[stage] = told["loss"]
        if stage == "covariance":
            self.summary.num_labels = told["num_labels"]
