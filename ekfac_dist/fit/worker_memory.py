"""The memory that a worker needs for a fit, by part.

Sums and bases are exact: those of the worker that owns most. What a step holds is what autograd
saves for the backward; the constants here were measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ekfac_dist.config import FactorsConfig
from ekfac_dist.curvature.blocks import block_sizes
from ekfac_dist.curvature.eigenbasis import workspace_bytes
from ekfac_dist.fit.sizes import (
    WorkerShare,
    halves_bytes,
    itemsize,
    lambda_elements,
    second_level_bytes,
    square_elements,
)
from ekfac_dist.models.capture.saved_tensors import StepMemory
from ekfac_dist.models.modules import TrackedModule, factor_sizes
from ekfac_dist.passes.owners import NOT_SHARED, Places
from ekfac_dist.passes.row_memory import exchange_bytes, input_elements
from ekfac_dist.passes.step_memory import USABLE

# The part of a step's memory that a CPU's allocator still holds at the next stage's peak: with
# glibc 0.4 to 1.0 after the covariance pass of the three models of test_peak_memory.py.
RETAINED = 0.6


@dataclass(frozen=True)
class Memory:
    """Bytes that a worker holds, by part; parts that are held at once are summed in `passes`.

    Attributes:
        process: The program itself.
        weights: The model.
        step: One step: activations, logits and their gradient, inputs that wait for gradients.
        exchange: Rows that are collected for their owners, and those on their way.
        covariance: Running sums of the covariance pass.
        bases: Eigenvectors of all factors of the group, in the refit.
        spectra: Running sums of the refit, and scratch matrices of one sequence's gradient.
        workspace: The largest decomposition.
        retained: Memory of finished steps that the allocator does not give back.
        second_levels: Second levels of the running sums, by pass, in the host's memory.
        halves: What is summed over half of the sequences, by pass.
        on_cpu: Whether all other parts are in the host's memory too.
    """

    process: int
    weights: int
    step: int
    exchange: int
    covariance: int
    bases: int
    spectra: int
    workspace: int
    retained: int
    second_levels: Mapping[str, int]
    halves: Mapping[str, int]
    on_cpu: bool

    @property
    def sums(self) -> int:
        """Eigenvectors and running sums in the refit."""
        second_level = self.on_cpu * self.second_levels["refit"]
        return self.bases + self.spectra + second_level + self.halves["refit"]

    @property
    def waiting(self) -> int:
        """What a worker on a GPU holds in its host's memory while factors are decomposed.

        Sums and weights wait there, and so does one float64 matrix with its eigenvectors.
        """
        return 0 if self.on_cpu else self.covariance + self.weights + self.workspace // 3

    @property
    def host(self) -> int:
        """What a worker on a GPU holds in its host's memory, beside the program; 0 on a CPU."""
        return 0 if self.on_cpu else max(*self.second_levels.values(), self.waiting)

    @property
    def passes(self) -> dict[str, int]:
        """What is held at once in each stage.

        While factors are decomposed, sums and weights of a worker on a GPU are in its host's
        memory; and a factor for whose workspace the GPU has no room is decomposed there.
        """
        always = self.process + self.weights
        covariance = self.covariance + self.on_cpu * self.second_levels["covariance"]
        covariance += self.halves["covariance"]
        eigenbasis = self.process
        if self.on_cpu:
            eigenbasis = always + self.retained + self.covariance + self.workspace
        return {
            "covariance": always + self.step + self.exchange + covariance,
            "eigenbasis": eigenbasis,
            "refit": always + self.retained + self.step + self.exchange + self.sums,
        }

    @property
    def peak(self) -> int:
        """The largest of all stages."""
        return max(self.passes.values())

    def lack(
        self, free_bytes: float, free_host_bytes: float = math.inf
    ) -> tuple[int, float] | None:
        """(needed, free) bytes of the memory that is too small; None if all is enough.

        Args:
            free_bytes: Free memory of the worker's device.
            free_host_bytes: Free memory of the host of a worker on a GPU.
        """
        second_level = 0 if self.on_cpu else max(self.second_levels.values())
        for needed, free in ((self.peak, free_bytes), (second_level, free_host_bytes)):
            if needed > USABLE * free:
                return needed, free
        # Where the host has no room for what waits, all of it stays on the device.
        on_device = self.process + self.weights + self.covariance + self.workspace
        if self.waiting > USABLE * free_host_bytes and on_device > USABLE * free_bytes:
            return self.waiting, free_host_bytes
        return None


def memory(
    group: Sequence[TrackedModule],
    step: StepMemory,
    step_tokens: int,
    share: WorkerShare,
    *,
    factors: FactorsConfig,
    on_cpu: bool,
    places: Places = NOT_SHARED,
    process_bytes: int = 0,
    weight_bytes: int = 0,
) -> Memory:
    """The memory that a worker holds while it fits a group of modules.

    Args:
        group: The modules.
        step: Memory of one step's forward and backward.
        step_tokens: Positions of a step.
        share: The worker's share of the data.
        factors: What is fitted.
        on_cpu: Whether it computes on the CPU, in the host's memory.
        places: Who owns what.
        process_bytes: The program itself; 0 if it is running already.
        weight_bytes: The model; 0 if it is loaded already.
    """
    shard = places.shard
    parts = [part for part in places.parts(group) if part]
    bytes_each, sizes = itemsize(factors), factor_sizes(group)
    squares = max((bytes_each * sum(square_elements(part, factors)) for part in parts), default=0)
    widest = max(sizes.values(), default=0)
    exchange, rounds = exchange_bytes(group, places, step, step_tokens)
    # Inputs wait, as float numbers, for their gradients: those of all workers, at their owner; of
    # layers that are repeated, only those of one window, and of the senders of one round.
    waiting_parts = parts
    senders = shard
    if step.checkpoints:
        windows = places.windows(group)
        waiting_parts = [part for window in windows for part in places.parts(window)]
        senders = -(-shard // rounds)
    waiting_inputs = max((input_elements(part, step.routed) for part in waiting_parts), default=0)
    waiting = int(senders * step_tokens * bytes_each * waiting_inputs)
    backward = step_tokens * 4 * widest * step.itemsize  # of the widest layer
    step_bytes = step.activation_bytes + 2 * step.logit_bytes + waiting + backward
    matrices = [lambda_elements(part) for part in parts]
    spectra = max((sum(own) + 3 * max(own) for own in matrices), default=0)
    halves = [halves_bytes(part, factors) for part in parts]
    levels = [second_level_bytes(part, factors, share.of(shard), on_cpu=on_cpu) for part in parts]
    return Memory(
        process=process_bytes,
        weights=weight_bytes,
        step=step_bytes,
        exchange=exchange,
        covariance=squares,
        bases=squares,
        spectra=bytes_each * spectra,
        workspace=workspace_bytes(max(block_sizes(widest, factors.blocks), default=0)),
        retained=int(RETAINED * step_bytes) if on_cpu else 0,
        second_levels={
            stage: max((level[stage] for level in levels), default=0)
            for stage in ("covariance", "refit")
        },
        halves={
            stage: max((each[stage] for each in halves), default=0)
            for stage in ("covariance", "refit")
        },
        on_cpu=on_cpu,
    )
