"""The stages of one group of modules: covariance pass, decomposition, refit pass.

What a stage has computed is in the store before the next one begins; what an earlier start of the
same run has left there is not computed again.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ekfac_dist.config import FactorsConfig
from ekfac_dist.curvature.blocks import block_sizes
from ekfac_dist.curvature.halves import is_even
from ekfac_dist.curvature.kronecker import kfac_lambda
from ekfac_dist.factors.layout import (
    block_keys,
    covariance_file,
    eigenbasis_file,
    spectrum_file,
)
from ekfac_dist.factors.sinks import DiskNeed, FactorSink, MemoryStore
from ekfac_dist.fit.checkpoints import Checkpoints
from ekfac_dist.fit.covariance import CovarianceSums
from ekfac_dist.fit.disk_space import stage_bytes
from ekfac_dist.fit.eigenbasis import Basis, run_eigenbasis
from ekfac_dist.fit.halves import record_of
from ekfac_dist.fit.manifest import FitSummary
from ekfac_dist.fit.refit import LambdaSums, products_lines, split_where_faster_
from ekfac_dist.fit.saved_parts import Sums
from ekfac_dist.fit.sizes import WorkerShare
from ekfac_dist.fit.storing import StoreFile, Storing
from ekfac_dist.models.capture.labels import COVARIANCE_PASS, REFIT_PASS, LabelRule
from ekfac_dist.models.find.faults import NO_GRADIENT, NOT_ROUTED, is_routed
from ekfac_dist.models.modules import TrackedModule, factor_sizes
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.one_pass import run_pass
from ekfac_dist.passes.owners import Owners, Places
from ekfac_dist.passes.state import PassState
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.progress import show_line

T = TypeVar("T")


@dataclass
class GroupFit:
    """The fit of one group of modules.

    Attributes:
        name: The group's number, "1", or with that of all groups, "1/3".
        modules: The group, in model order; experts that turn out to have no factors are removed.
        context: Model, data, task and workers.
        step_tokens: Token budget of a batch.
        owners: Who holds which sums.
        share: The most that any worker has of the data.
        factors: What is fitted.
        sink: Where the factors are written.
        checkpoints: How the states of passes are saved.
        summary: Takes the time, loss and labels of each stage.
    """

    name: str
    modules: list[TrackedModule]
    context: PassContext
    step_tokens: int
    owners: Owners
    share: WorkerShare
    factors: FactorsConfig
    sink: FactorSink
    checkpoints: Checkpoints
    summary: FitSummary
    storing: Storing = field(init=False)

    def __post_init__(self) -> None:
        self.storing = Storing(self.context.world, self.sink)

    def fit(self) -> None:
        """Runs the stages that are not in the store yet."""
        record = self._record_of("covariance")
        if record is not None and self._is_enough(record):
            self.checkpoints.clear(self._state("covariance"))
            self._leave_out(record["left_out"])
            covariance = None
        else:
            covariance, record = self._run_covariance()
        self._add_to_summary("covariance", record)
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
            self._add_to_summary(stage, done["stages"][stage])

    def _decompose_and_refit(self, covariance: CovarianceSums) -> dict[str, Any]:
        self._require_disk_space("eigenbasis")
        bases, seconds = run_eigenbasis(
            self._shown("eigenbasis"),
            covariance,
            self.modules,
            self.context,
            self.storing,
            sharded=self.factors.shares_decompositions(self.owners.shard),
            keep_covariance=self.factors.keep_covariance,
            num_blocks=self.factors.blocks,
        )
        stages: dict[str, Any] = {"eigenbasis": {"seconds": seconds}}
        if self.factors.refit == "none":
            self._require_disk_space("refit")
            self._write(self._kfac(bases, covariance.counts))
        else:
            stages["refit"] = self._run_refit(bases)
        record = self._record("refit", {"stages": stages})
        self.checkpoints.clear(self._state("refit"))
        return record

    # -- covariance --------------------------------------------------------------------------------

    def _run_covariance(self) -> tuple[CovarianceSums, dict[str, Any]]:
        """Runs the covariance pass and stores its sums; these, and the record of the pass."""
        self._require_disk_space("covariance")
        start = time.perf_counter()
        sums = self._empty_covariance(with_halves=True)
        state = self._begun("covariance", sums)
        result = run_pass(
            self._shown("covariance"),
            self.context,
            self.modules,
            sums,
            LabelRule(self.factors.labels, self.factors.seed, COVARIANCE_PASS),
            converted=False,  # the sums convert products, not inputs
            state=state,
        )
        counts = self._of_all_owners(sums.counts)
        self._require_each_position_once(counts)
        self._leave_out(left_out := self._without_factors(sums, counts))
        sums.keep(self.modules)
        if self.factors.keep_covariance or not isinstance(self.sink, MemoryStore):
            self.storing.put(
                StoreFile(
                    covariance_file(factor),
                    self._owner_of(factor),
                    dict(zip(self._sum_keys(size), sums.sums.get(factor, []), strict=False)),
                    {"count": str(counts[factor])},
                )
                for factor, size in factor_sizes(self.modules).items()
            )
        seconds = state.seconds + time.perf_counter() - start
        counts = {factor: counts[factor] for factor in factor_sizes(self.modules)}
        outcome = {
            "counts": counts,
            "left_out": left_out,
            **vars(result),
            "seconds": seconds,
            "halves": self._of_all_owners(sums.relative_differences()),
        }
        sums.beside.clear()
        record = self._record("covariance", outcome)
        self.checkpoints.clear(self._state("covariance"))
        return sums, record

    def _stored_covariance(self, record: Mapping[str, Any]) -> CovarianceSums:
        """The covariances that an earlier start stored; zeros for factors that are decomposed."""
        sums = self._empty_covariance()
        sums.counts.update({factor: record["counts"][factor] for factor in sums.counts})
        sizes = {
            factor: size
            for factor, size in factor_sizes(self.modules).items()
            if not self._has([eigenbasis_file(factor)])
        }
        factors = {covariance_file(factor): factor for factor in sizes}

        def take(file: str, tensors: Mapping[str, torch.Tensor]) -> None:
            factor = factors[file]
            for key, block in zip(self._sum_keys(sizes[factor]), sums.sums[factor], strict=True):
                block.copy_(tensors[key])

        self.storing.read(
            {file: self._sum_keys(sizes[factor]) for file, factor in factors.items()},
            {file: self._owner_of(factor) for file, factor in factors.items()},
            take,
        )
        for factor in sizes:
            for block in sums.sums.get(factor, []):
                self.context.summed_over.broadcast_(block)
        return sums

    def _sum_keys(self, size: int) -> list[str]:
        """Names of the tensors in the file of a factor's sums.

        Args:
            size: n, the size of the factor.
        """
        return block_keys("sum", len(block_sizes(size, self.factors.blocks)))

    def _empty_covariance(self, *, with_halves: bool = False) -> CovarianceSums:
        context = self.context
        return CovarianceSums(
            self._own_modules,
            context.dtype,
            context.world.device,
            self.factors.blocks,
            with_halves=with_halves,
        )

    def _is_enough(self, record: Mapping[str, Any]) -> bool:
        """Whether the stored covariances are all that the rest of the fit needs of them."""
        return all(
            self._has([covariance_file(factor)])
            or (not self.factors.keep_covariance and self._has([eigenbasis_file(factor)]))
            for factor in record["counts"]
        )

    def _without_factors(
        self, sums: CovarianceSums, counts: Mapping[str, int]
    ) -> dict[str, list[str]]:
        """Names of experts that no position, or no gradient, reached, by the reason."""
        routed = [m for m in self.modules if is_routed(self.context.model, m)]
        own = {m.output: sums.has_any(m.output) for m in routed if self.context.owns(m)}
        has_any = self._of_all_owners(own)
        return {
            NOT_ROUTED: [m.name for m in routed if not counts[m.output]],
            NO_GRADIENT: [m.name for m in routed if counts[m.output] and not has_any[m.output]],
        }

    @property
    def _own_modules(self) -> list[TrackedModule]:
        """The modules whose running sums this worker holds."""
        return [module for module in self.modules if self.context.owns(module)]

    def _owner_of(self, factor: str) -> int:
        """The rank of the worker of the first copy that holds a factor."""
        return self.owners.place_of(factor)

    def _of_all_owners(self, own: Mapping[str, T]) -> dict[str, T]:
        """What the owners of one copy know of their factors, together; a collective."""
        by_owner = self.owners.notes.gather(own)
        return {name: value for of_owner in by_owner for name, value in of_owner.items()}

    def _leave_out(self, left_out: Mapping[str, list[str]]) -> None:
        for why, names in left_out.items():
            with self.context.world.agree():
                self.summary.discovery = self.summary.discovery.without(names, why)
            self.modules = [module for module in self.modules if module.name not in names]

    def _require_each_position_once(self, counts: Mapping[str, int]) -> None:
        for module in self.modules:
            expected = int(self.context.sequences.positions_of(module.name).sum())
            summed = {counts[module.input], counts[module.output]}
            if not is_routed(self.context.model, module) and summed != {expected}:
                raise RuntimeError(
                    f"{module.name} sees {expected} counted positions, but its sums hold {summed}"
                )

    # -- Λ -----------------------------------------------------------------------------------------

    def _run_refit(self, bases: dict[str, Basis]) -> dict[str, Any]:
        self._require_disk_space("refit")
        start = time.perf_counter()
        context = self.context
        per_token = self.factors.refit == "per_token"
        places = Places(self.owners.shard, self.owners.places)
        is_split = split_where_faster_(bases, self.modules, context, self.step_tokens, places)
        for line in products_lines(context.world.device, context.dtype, is_split=is_split):
            log_on_main(context.world, line)
        sums = LambdaSums(
            self._own_modules,
            bases,
            per_token=per_token,
            dtype=context.dtype,
            device=context.world.device,
            with_halves=True,
        )
        # Saved sums are of no use if the basis that they belong to was computed again.
        basis_files = map(eigenbasis_file, factor_sizes(self.modules))
        of = context.world.share(self.sink.content_sha256(basis_files))
        state = self._begun("refit", sums, of)
        rule = LabelRule(self.factors.labels, self.factors.seed, REFIT_PASS)
        result = run_pass(
            self._shown("refit"),
            context,
            self.modules,
            sums,
            rule,
            converted=not is_split,  # split bases are for the model's own rows
            state=state,
        )
        for total in sums.sums.values():
            total.div_(len(context.sequences))
        num_even = sum(map(is_even, context.sequences.indices.tolist()))
        differences = self.summary.halves.factors
        halves = record_of(sums.changes(num_even, len(context.sequences), differences))
        self._write(sums.sums)
        seconds = state.seconds + time.perf_counter() - start
        return {**vars(result), "seconds": seconds, "halves": self._of_all_owners(halves)}

    def _kfac(
        self, bases: Mapping[str, Basis], counts: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        """Λ of K-FAC of the modules that this worker owns."""
        return {
            module.name: kfac_lambda(
                bases[module.output].eigenvalues,
                bases[module.input].eigenvalues,
                counts[module.input],
                len(self.context.sequences),
            ).to(self.context.dtype)
            for module in self._own_modules
        }

    def _write(self, spectra: Mapping[str, torch.Tensor]) -> None:
        """Stores Λ of every module, from its owner."""
        self.storing.put(
            StoreFile(
                spectrum_file(module.name),
                self._owner_of(module.input),
                {"lambda": spectra[module.name]} if module.name in spectra else {},
            )
            for module in self.modules
        )

    def _require_disk_space(self, stage: str) -> None:
        """Refuses a stage whose results and saved states do not fit on the disk.

        Raises:
            OutputError: If they do not; the run can be resumed once there is space.
        """
        world = self.context.world
        on_cpu = world.device.type == "cpu"
        needed = stage_bytes(
            self.modules, self.factors, world.size, self.owners.shard, self.share, on_cpu=on_cpu
        )
        results, states = needed[stage]
        states *= self.checkpoints.saves
        files = {
            "covariance": map(covariance_file, factor_sizes(self.modules)),
            "eigenbasis": map(eigenbasis_file, factor_sizes(self.modules)),
            "refit": (spectrum_file(module.name) for module in self.modules),
        }[stage]
        with world.agree(takes_part=world.is_main):
            need = DiskNeed(self._shown(stage), results, files, states, self._state(stage))
            self.sink.require_disk_space(need)

    # -- the store, the journal, the summary -------------------------------------------------------

    def _has(self, files: Iterable[str]) -> bool:
        return all(file in self.sink.stored.files for file in files)

    def _record(self, stage: str, outcome: dict[str, Any]) -> dict[str, Any]:
        world = self.context.world
        with world.agree(takes_part=world.is_main):
            self.sink.record(self._state(stage), outcome)
        return outcome

    def _record_of(self, stage: str) -> dict[str, Any] | None:
        return self.sink.stored.records.get(self._state(stage))

    def _state(self, stage: str) -> str:
        """The name of a stage of this group in the journal and among saved states."""
        return f"{stage}-{self.name.replace('/', '-of-')}"

    def _shown(self, stage: str) -> str:
        """The name of a stage of this group in progress and errors."""
        return f"{stage} {self.name}" if "/" in self.name else stage

    def _begun(self, stage: str, sums: Sums, of: str = "") -> PassState:
        """The state of a pass of this group, with what was saved of it; see `Checkpoints.begin`."""
        name, batches = self._state(stage), self.context.own_batches
        state = self.checkpoints.begin(name, batches, sums, self.owners, self.step_tokens, of)
        if state.is_resumed and self.context.show_progress and self.context.world.is_main:
            show_line(self._shown(stage), "goes on")
        return state

    def _add_to_summary(self, stage: str, outcome: Mapping[str, Any]) -> None:
        """Adds the time, loss and labels of a stage."""
        self.summary.seconds[stage] += outcome["seconds"]
        halves = self.summary.halves
        if stage in ("covariance", "refit"):  # nothing in runs that an earlier version began
            of = halves.factors if stage == "covariance" else halves.lambdas
            of.update(outcome.get("halves", {}))
        if "loss" in outcome:
            self.summary.losses[stage] = outcome["loss"]
        if stage == "covariance":
            self.summary.num_labels = outcome["num_labels"]
