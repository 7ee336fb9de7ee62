"""How many operations a second a worker does of each kind: given, known of a GPU, or measured."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ekfac_dist.config import PlanConfig
from ekfac_dist.curvature.covariance import multiplies_wide
from ekfac_dist.errors import ConfigError

# Operations of one decomposition with eigenvectors, over n³: the usual count for LAPACK's drivers.
DECOMPOSITION_OPERATIONS = 9

# The parts of a data sheet's rate, or of a measured product's, that are reached. Float32: passes on
# 2 CPU cores, see tests/benchmarks/peers; kronfluence's covariance pass of GPT-2 on an A100 reaches
# as much. 16 bits: what large language models commonly reach in training. Decompositions: 8 s for
# the factors of GPT-2 on an A100 (kronfluence), which are small.
FLOAT32_EFFICIENCY = 0.8
SIXTEEN_BIT_EFFICIENCY = 0.4
DECOMPOSITION_EFFICIENCY = 0.1

# Rate of decompositions over that of float32 products where only the latter is known: as on 2 CPU
# cores, and of the GPUs below.
_DECOMPOSITIONS_OVER_FLOAT32 = {"cpu": 0.35, "cuda": 0.05}


@dataclass(frozen=True)
class _DataSheet:
    """NVIDIA's figures for a GPU, in TFLOP/s: 16 bits with tensor cores, without sparsity."""

    float32: float
    sixteen_bits: float
    float64: float


GPUS = {
    "A100": _DataSheet(19.5, 312, 9.7),  # NVIDIA A100 data sheet, 2021
    "H100": _DataSheet(67, 989, 34),  # NVIDIA H100 data sheet (SXM), 2023
    "H200": _DataSheet(67, 989, 34),  # NVIDIA H200 data sheet (SXM), 2024
    "L40S": _DataSheet(91.6, 362, 1.4),  # NVIDIA L40S data sheet, 2023
}


@dataclass(frozen=True)
class Rates:
    """Operations a second that a worker reaches.

    Attributes:
        float32: Of products of float32 matrices.
        model: Of products in the model's own dtype.
        outer_products: Of the sums of the covariance pass.
        decompositions: Of float64 decompositions.
    """

    float32: float
    model: float
    outer_products: float
    decompositions: float


def rates(
    config: PlanConfig, dtype: torch.dtype, here: torch.device, planned: torch.device
) -> Rates | None:
    """The rates of the workers that are planned for; None if they are not known.

    Args:
        config: What is given.
        dtype: The model's dtype.
        here: The device of this process.
        planned: The kind of device that is planned for.

    Raises:
        ConfigError: If the GPU is not known.
    """
    is_narrow = dtype in (torch.bfloat16, torch.float16)
    float32, narrow, decompositions = config.gflops, config.gflops_16bit, config.gflops_eigh
    measured = None
    if config.gpu is not None:
        sheet = _data_sheet(config.gpu)
        float32 = float32 or 1e3 * sheet.float32
        narrow = narrow or 1e3 * sheet.sixteen_bits * SIXTEEN_BIT_EFFICIENCY / FLOAT32_EFFICIENCY
        decompositions = decompositions or 1e3 * sheet.float64 * DECOMPOSITION_EFFICIENCY
    elif not float32 and planned.type == here.type:
        measured = here
        float32 = _measured_product(here, torch.float32)
    if not float32:
        return None
    if is_narrow and not narrow and measured is not None:
        narrow = _measured_product(measured, dtype)
    if not decompositions and measured is not None:
        decompositions = measured_decomposition(measured)
    decompositions = decompositions or float32 * _DECOMPOSITIONS_OVER_FLOAT32[planned.type]
    model = narrow if is_narrow and narrow else float32
    is_wide = planned.type == "cuda" or multiplies_wide(planned, dtype) if is_narrow else False
    reached = 1e9 * FLOAT32_EFFICIENCY
    return Rates(
        float32=reached * float32,
        model=reached * model,
        outer_products=reached * (model if is_wide else float32),
        decompositions=1e9 * decompositions,
    )


def _data_sheet(name: str) -> _DataSheet:
    if name not in GPUS:
        raise ConfigError(
            f"gpu is {name!r}, whose speed is not known here; give {', '.join(GPUS)}, or the "
            "speeds themselves: gflops, gflops_16bit and gflops_eigh."
        )
    return GPUS[name]


def _measured_product(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a product of matrices of a dtype: the best within half a second."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: (a @ b)[0, 0].item()) / 1e9


def measured_decomposition(device: torch.device) -> float:
    """GFLOP/s of a decomposition in float64: the best within half a second."""
    size = 768 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device, dtype=torch.float64)
    a += a.T.clone()
    best = _best_seconds(lambda: torch.linalg.eigh(a)[0][0].item())
    return DECOMPOSITION_OPERATIONS * size**3 / best / 1e9


def _best_seconds(work: Callable[[], object]) -> float:
    best, until = math.inf, time.perf_counter() + 0.5
    while time.perf_counter() < until:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
