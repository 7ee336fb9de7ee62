"""The memory that a worker needs for a fit, by part, and how many groups of modules fit into it.

Sums and bases are exact. What a step holds is what autograd saves for the backward; the constants
here were measured.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ekfac_dist.config import FactorsConfig
from ekfac_dist.curvature.blocks import block_sizes
from ekfac_dist.curvature.eigenbasis import workspace_bytes
from ekfac_dist.fit.partition import partition
from ekfac_dist.fit.sizes import (
    WorkerShare,
    itemsize,
    lambda_elements,
    second_level_bytes,
    square_elements,
)
from ekfac_dist.models.capture.saved_tensors import StepMemory
from ekfac_dist.models.modules import TrackedModule, factor_sizes

# The part of a step's memory that a CPU's allocator still holds at the next stage's peak: with
# glibc 0.4 to 1.0 after the covariance pass of the three models of test_peak_memory.py.
RETAINED = 0.6

# The part of free memory that is planned for; the rest is for the allocator, and for chance.
USABLE = 0.9

# If eigenvectors and sums take less than this part of free memory, all modules are one group.
LARGE_SUMS = 0.2


@dataclass(frozen=True)
class Memory:
    """Bytes that a worker holds, by part; parts that are held at once are summed in `passes`.

    Attributes:
        process: The program itself.
        weights: The model.
        step: One step: activations, logits and their gradient, inputs that wait for gradients.
        covariance: Running sums of the covariance pass.
        bases: Eigenvectors of all factors of the group, in the refit.
        spectra: Running sums of the refit, and scratch matrices of one sequence's gradient.
        workspace: The largest decomposition.
        retained: Memory of finished steps that the allocator does not give back.
        second_levels: Second levels of the running sums, by pass, in the host's memory.
        on_cpu: Whether all other parts are in the host's memory too.
    """

    process: int
    weights: int
    step: int
    covariance: int
    bases: int
    spectra: int
    workspace: int
    retained: int
    second_levels: Mapping[str, int]
    on_cpu: bool

    @property
    def sums(self) -> int:
        """Eigenvectors and running sums in the refit."""
        return self.bases + self.spectra + self.on_cpu * self.second_levels["refit"]

    @property
    def host(self) -> int:
        """What a worker on a GPU holds in its host's memory, beside the program; 0 on a CPU."""
        return 0 if self.on_cpu else max(self.second_levels.values())

    @property
    def passes(self) -> dict[str, int]:
        """What is held at once in each stage."""
        always = self.process + self.weights
        second_level = self.on_cpu * self.second_levels["covariance"]
        return {
            "covariance": always + self.step + self.covariance + second_level,
            "eigenbasis": always + self.retained + self.covariance + self.workspace,
            "refit": always + self.retained + self.step + self.sums,
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
        for needed, free in ((self.peak, free_bytes), (self.host, free_host_bytes)):
            if needed > USABLE * free:
                return needed, free
        return None


def memory(
    group: Sequence[TrackedModule],
    step: StepMemory,
    step_tokens: int,
    share: WorkerShare,
    *,
    factors: FactorsConfig,
    on_cpu: bool,
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
        process_bytes: The program itself; 0 if it is running already.
        weight_bytes: The model; 0 if it is loaded already.
    """
    bytes_each, sizes = itemsize(factors), factor_sizes(group)
    squares = bytes_each * sum(square_elements(group, factors))
    input_sizes = {module.input: module.input_size for module in group}
    # Inputs wait in the eigenbasis for their gradients; and the backward of the widest layer.
    waiting = step_tokens * sum(input_sizes.values()) * bytes_each
    matrices = lambda_elements(group)
    widest = max(sizes.values(), default=0)
    backward = step_tokens * 4 * widest * step.itemsize
    step_bytes = step.activation_bytes + 2 * step.logit_bytes + waiting + backward
    return Memory(
        process=process_bytes,
        weights=weight_bytes,
        step=step_bytes,
        covariance=squares,
        bases=squares,
        spectra=bytes_each * (sum(matrices) + 3 * max(matrices, default=0)),
        workspace=workspace_bytes(max(block_sizes(widest, factors.blocks), default=0)),
        retained=int(RETAINED * step_bytes) if on_cpu else 0,
        second_levels=second_level_bytes(group, factors, share, on_cpu=on_cpu),
        on_cpu=on_cpu,
    )


def fewest_groups(
    modules: Sequence[TrackedModule],
    needed: Callable[[Sequence[TrackedModule]], Memory],
    free_bytes: float,
    free_host_bytes: float = math.inf,
) -> int | None:
    """The smallest number of groups that each fit into a worker's memory; None if none does.

    Args:
        modules: All modules.
        needed: The memory that a worker needs for a group.
        free_bytes: As for `Memory.lack`.
        free_host_bytes: As for `Memory.lack`.
    """
    families = len({module.input for module in modules})
    # Every number up to 64, then steps of a sixteenth, and at last a group for each shared input.
    numbers = [n for n in range(1, 65) if n < families]
    while numbers and numbers[-1] >= 64 and numbers[-1] * 17 // 16 < families:
        numbers.append(numbers[-1] * 17 // 16)
    for number in (*numbers, families):
        groups = partition(modules, number)
        if all(needed(group).lack(free_bytes, free_host_bytes) is None for group in groups):
            return len(groups)
    return None
