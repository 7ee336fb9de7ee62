"""The configuration of `plan`."""

import math
import re
from dataclasses import dataclass, field

from ekfac_dist.config.checks import require_given, require_positive
from ekfac_dist.config.estimate import EstimateConfig
from ekfac_dist.config.index import KeptConfig
from ekfac_dist.errors import ConfigError


@dataclass(kw_only=True)
class PlanConfig(EstimateConfig):
    """What `plan` looks into: a run of `estimate`, and the machines that it would have.

    Args:
        workers: Number of workers; null: one for each GPU of this machine, or one.
        device_memory: Memory of each worker's GPU, such as 80GiB; null: plan for this
            machine's own GPU, or CPU, and what is free there.
        fsdp: Plan for weights that are sharded over the workers, as with
            launch/accelerate/fsdp.yaml.
        sequences: Number of sequences in the data; null: data.max_sequences, or 1000.
        gpu: The GPU whose speeds are planned with, of A100, H100, H200 and L40S; null: those given
            below.
        gflops: Speed of each worker at products of float32 matrices, in GFLOP/s; null: that of
            `gpu`, or measured on this machine.
        gflops_16bit: The same for products of 16-bit matrices, for a model of such a dtype.
        gflops_eigh: The same for decompositions in float64, of 9 n³ operations each.
        index: How a gradient index of the data would keep gradients.
    """

    workers: int | None = None
    device_memory: str | None = None
    fsdp: bool = False
    sequences: int | None = None
    gpu: str | None = None
    gflops: float | None = None
    gflops_16bit: float | None = None
    gflops_eigh: float | None = None
    index: KeptConfig = field(default_factory=KeptConfig)

    def __post_init__(self) -> None:
        self._check()
        require_given({"model.name": self.model.name})
        for name in ("workers", "sequences"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        for name in ("gflops", "gflops_16bit", "gflops_eigh"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value!r}; it must be a finite number above 0.")
        self.memory_bytes  # noqa: B018 - raises if device_memory is wrong
        if self.gpu is not None and self.device_memory is None:
            raise ConfigError(
                f"gpu is {self.gpu!r}, but not its memory; give device_memory too, such as 80GiB."
            )

    @property
    def memory_bytes(self) -> int | None:
        """`device_memory` as a number of bytes; None if it is not set.

        Raises:
            ConfigError: If it is no number with a unit.
        """
        if self.device_memory is None:
            return None
        size = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?) *([kMGT]?)(i?)B?", self.device_memory.strip())
        if not size or not float(size[1]):
            raise ConfigError(
                f"device_memory is {self.device_memory!r}; give a number above 0 and its unit, "
                "such as 80GiB or 24GB."
            )
        number, unit, binary = size.groups()
        return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(unit or " "))
