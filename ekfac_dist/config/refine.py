"""How query gradients are refined beyond the solution of the fitted factors."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ekfac_dist.config.checks import require_choice, require_count, require_positive
from ekfac_dist.errors import ConfigError

RefineMethod = Literal["none", "cg", "astra"]

DEFAULT_SEQUENCES = 256
DEFAULT_TOLERANCE = 1e-3
DEFAULT_ITERATIONS = {"cg": 20, "astra": 300}
DEFAULT_BATCH, DEFAULT_STEP_SIZE, DEFAULT_MOMENTUM = 16, 0.1, 0.9

# The fields of one method alone; with another they are refused.
_FIELDS_OF = {"cg": ("sequences", "tolerance"), "astra": ("batch", "step_size", "momentum")}


@dataclass(kw_only=True)
class RefineConfig:
    """Solves (G + λ) x = ∇log p(q), G the loss's Gauss–Newton matrix, of all modules together.

    Args:
        method: none: x is the solution of the factors; cg: conjugate gradients from there; astra:
            gradient steps from there, each with other sequences.
        sequences: Of how many training sequences G is the mean, with cg; the same for all queries.
            null: 256, or all if there are fewer.
        iterations: Most steps; null: 20 with cg, 300 with astra.
        tolerance: With cg, the residual, as a share of the query gradient's norm, at which a query
            is finished; null: 0.001.
        seed: Seed of the sequences that are drawn.
        batch: With astra, training sequences of a step; null: 16.
        step_size: With astra, the length of a step, which falls by a tenth every 100 steps; null:
            0.1.
        momentum: With astra, what remains of a step in the next one; null: 0.9.
    """

    method: RefineMethod = "none"
    sequences: int | None = None
    iterations: int | None = None
    tolerance: float | None = None
    seed: int = 0
    batch: int | None = None
    step_size: float | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        require_choice("refine.method", self.method, get_args(RefineMethod))
        for name in ("sequences", "iterations", "batch"):
            if (number := getattr(self, name)) is not None:
                require_positive(f"refine.{name}", number)
        require_count("refine.seed", self.seed)
        if self.seed >= 2**63:
            raise ConfigError(f"refine.seed is {self.seed}; it must be below 2^63.")
        _require_within("tolerance", self.tolerance, math.inf)
        _require_within("step_size", self.step_size, 1e30)
        _require_within("momentum", self.momentum, 1.0)
        for method, names in _FIELDS_OF.items():
            given = [name for name in names if getattr(self, name) is not None]
            if given and method != self.method:
                raise ConfigError(
                    f"refine.{given[0]} is {getattr(self, given[0])!r}, but refine.method is "
                    f"{self.method}; it belongs to {method}: leave it out, or set refine.method: "
                    f"{method}."
                )

    @property
    def is_on(self) -> bool:
        """Whether query gradients are refined."""
        return self.method != "none"

    @property
    def num_iterations(self) -> int:
        """Most steps of the method."""
        return self.iterations or DEFAULT_ITERATIONS[self.method]

    @property
    def drawn(self) -> tuple[str, int | None]:
        """The field that says how many sequences are drawn for a product, and its value."""
        return ("sequences", self.sequences) if self.method == "cg" else ("batch", self.batch)

    @property
    def default_drawn(self) -> int:
        """How many sequences are drawn for a product if nothing is given, and there are so many."""
        return DEFAULT_SEQUENCES if self.method == "cg" else DEFAULT_BATCH

    @property
    def effective_step_size(self) -> float:
        """The length of a step of astra."""
        return DEFAULT_STEP_SIZE if self.step_size is None else self.step_size

    @property
    def effective_momentum(self) -> float:
        """What remains of a step of astra in the next one."""
        return DEFAULT_MOMENTUM if self.momentum is None else self.momentum

    @property
    def effective_tolerance(self) -> float:
        """The residual at which a query is finished, and below which a solve has converged."""
        return DEFAULT_TOLERANCE if self.tolerance is None else self.tolerance


def _require_within(name: str, value: object, end: float) -> None:
    """Refuses a value that is not from 0 to below an end; None is accepted."""
    if value is None:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= float(str(value)) < end:
        limit = "a finite number of 0 or more" if end == math.inf else f"from 0 to below {end:g}"
        raise ConfigError(f"refine.{name} is {value!r}; it must be {limit}.")
