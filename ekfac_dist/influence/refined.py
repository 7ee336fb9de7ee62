"""How a run refined its query gradients, and in words how well that went. Only data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac_dist.config import RefineConfig

METHOD_NAMES = {"cg": "conjugate gradients", "astra": "ASTRA"}


@dataclass(frozen=True)
class Refined:
    """The refinement of all query groups.

    Attributes:
        settings: How query gradients were refined.
        num_sequences: Of how many sequences each product with G is the mean.
        num_training: From how many they were drawn.
        residuals: ‖∇ − (G + D) x‖ / ‖∇‖ of each query group, of the start and after each step
            [Q, steps + 1] float64; NaN after a group's last one. With astra, each is of the step's
            own sequences.
    """

    settings: RefineConfig
    num_sequences: int
    num_training: int
    residuals: Tensor

    @property
    def num_steps(self) -> Tensor:
        """The steps of each query group [Q]."""
        return self.residuals.isfinite().sum(1) - 1

    @property
    def last(self) -> Tensor:
        """The last residual of each query group [Q]."""
        return self.residuals.gather(1, self.num_steps[:, None]).squeeze(1)

    @property
    def num_converged(self) -> int | None:
        """How many groups' residual is at most the tolerance; None with astra, which has none."""
        if self.settings.method != "cg":
            return None
        return int((self.last <= self.settings.effective_tolerance).sum())

    @property
    def in_words(self) -> str:
        """What was solved, in one line."""
        return (
            f"{METHOD_NAMES[self.settings.method]} from the factors' solution, G of "
            f"{self.num_sequences:,} of {self.num_training:,} training sequences"
            f"{'' if self.settings.method == 'cg' else ' in each step'} (seed "
            f"{self.settings.seed})"
        )

    @property
    def convergence_in_words(self) -> str:
        """Whether the solves converged, in one sentence."""
        number, steps, tolerance = len(self.last), self.num_steps, self.settings.effective_tolerance
        began, ended = _median(self.residuals[:, 0]), _median(self.last)
        if self.settings.method != "cg":
            return (
                f"residual, over ‖∇‖, each of a step's own sequences: {began} in the median at the "
                f"start, {ended} after {int(steps.max())} steps"
            )
        if self.num_converged == number:
            least, most = int(steps.min()), int(steps.max())
            after = f"{most}" if least == most else f"{least} to {most}"
            return f"converged: the residual is at most {tolerance:g} of ‖∇‖ after {after} steps"
        return (
            f"not converged for {number - int(self.num_converged or 0)} of {number} rows of "
            f"scores: the residual, over ‖∇‖, is {began} in the median at the start, {ended} after "
            f"up to {int(steps.max())} steps and {float(self.last.max()):.3g} at most, above the "
            f"tolerance {tolerance:g}; a larger refine.iterations or damping.value would help"
        )


def _median(values: Tensor) -> str:
    return f"{float(torch.quantile(values, 0.5)):.3g}"
