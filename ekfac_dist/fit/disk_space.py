"""The space on the disk that a fit needs: results, and saved states of unfinished passes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ekfac_dist.config import FactorsConfig
from ekfac_dist.fit.sizes import (
    WorkerShare,
    halves_bytes,
    itemsize,
    lambda_elements,
    second_level_bytes,
    square_elements,
    summed_elements,
)
from ekfac_dist.models.modules import TrackedModule, factor_sizes

# What SIGTERM's grace period is planned with: the speed of a disk that all workers write to, and
# the time of the steps that end before.
STATE_BYTES_PER_SECOND = 10**9
STEP_SECONDS = 20

# Bytes of a safetensors file's header, and of a manifest's entry of a file and of a module.
_HEADER = 256
_MANIFEST_FILE, _MANIFEST_MODULE = 190, 435


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk.

    Attributes:
        store: The finished store.
        states: The workers' saved states at their most, while a pass is under way.
        sums: Raw sums that do not stay in the store.
    """

    store: int
    states: int
    sums: int

    @property
    def peak(self) -> int:
        """The most that is there at once."""
        return self.store + self.states + self.sums

    @property
    def state(self) -> int:
        """What all workers write when SIGTERM comes: a new state each, beside the one before."""
        return self.states // 2

    @property
    def grace_seconds(self) -> int:
        """The time from SIGTERM to the end of all workers, at `STATE_BYTES_PER_SECOND`."""
        return STEP_SECONDS + math.ceil(self.state / STATE_BYTES_PER_SECOND)


def disk(
    groups: Sequence[Sequence[TrackedModule]],
    factors: FactorsConfig,
    workers: int,
    shard: int,
    share: WorkerShare,
    *,
    on_cpu: bool,
    saves: bool = True,
) -> Disk:
    """The space that a fit needs.

    Args:
        groups: Groups of modules, one pair of passes each.
        factors: What is fitted.
        workers: W.
        shard: D, the number of workers that share one copy of the factors.
        share: Each worker's share of the data.
        on_cpu: Whether the workers compute on the CPU.
        saves: Whether states of passes are saved.
    """
    modules = [module for group in groups for module in group]
    stages = [stage_bytes(group, factors, workers, shard, share, on_cpu=on_cpu) for group in groups]
    sizes = factor_sizes(modules)
    squares, bases, spectra = _file_bytes(modules, factors)
    num_files = len(sizes) * (1 + factors.keep_covariance) + len(modules)
    manifest = _MANIFEST_FILE * num_files + _MANIFEST_MODULE * len(modules) + 4096
    return Disk(
        store=bases + spectra + manifest + (squares if factors.keep_covariance else 0),
        states=saves * max(states for stage in stages for _, states in stage.values()),
        sums=0 if factors.keep_covariance else max(stage["covariance"][0] for stage in stages),
    )


def stage_bytes(
    group: Sequence[TrackedModule],
    factors: FactorsConfig,
    workers: int,
    shard: int,
    share: WorkerShare,
    *,
    on_cpu: bool,
) -> dict[str, tuple[int, int]]:
    """Bytes that each stage of a group writes: (results, the workers' saved states at their most).

    Args:
        group: The modules.
        factors: What is fitted.
        workers: W.
        shard: D, the number of workers that share one copy of the factors.
        share: Each worker's share of the data.
        on_cpu: Whether the workers compute on the CPU.
    """
    squares, bases, spectra = _file_bytes(group, factors)
    # A new state is complete before the one before it is removed.
    copies = 2 * workers // shard
    sizes = factor_sizes(group).values()
    sums = itemsize(factors) * sum(summed_elements(n, factors.blocks) for n in sizes)
    second = second_level_bytes(group, factors, share.of(shard), on_cpu=on_cpu)
    halves = halves_bytes(group, factors)
    refit_states = copies * (spectra + second["refit"] + halves["refit"])
    return {
        "covariance": (squares, copies * (sums + second["covariance"] + halves["covariance"])),
        "eigenbasis": (bases, 0),
        "refit": (spectra, refit_states if factors.refit != "none" else 0),
    }


def _file_bytes(group: Sequence[TrackedModule], factors: FactorsConfig) -> tuple[int, int, int]:
    """Bytes of the files of covariances, of eigenbases and of Λ."""
    bytes_each, sizes = itemsize(factors), factor_sizes(group)
    squares = sum(bytes_each * n + _HEADER for n in square_elements(group, factors))
    spectra = sum(bytes_each * n + _HEADER for n in lambda_elements(group))
    return squares, squares + sum(8 * n for n in sizes.values()), spectra
