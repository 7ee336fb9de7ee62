"""The eigendecomposition of one factor, checked, with a ladder of retries.

The ladder: finite check, symmetrise, trivial cases, scale, decompose in float64, check the result;
on failure decompose the same matrix with its rows and columns reversed (the same problem by another
path), then on another device; then `DecompositionError`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac_dist.errors import DecompositionError, NonFiniteError, first_line

# LAPACK's 32-bit workspace size overflows here: measured, torch 2.13 CPU crashes the process.
MAX_CPU_SIZE = 32_766
TOLERANCE = 1e-9

# Rows of a decomposition's two products that are checked at a time.
_CHECKED_ROWS = 512


@dataclass(frozen=True)
class Eigenbasis:
    """One factor's eigendecomposition and how good it is.

    Attributes:
        eigenvectors: [n, n] float64, in columns.
        eigenvalues: [n] float64, ascending, none negative.
        residual: ‖A − QΛQᵀ‖ / ‖A‖, Frobenius; for an orthogonal Q it is ‖AQ − QΛ‖ / ‖A‖.
        orthogonality: largest entry of |QᵀQ − I|.
        trace_error: |Σλ − tr A| / tr A.
        attempts: How many decompositions it took; 0 for a trivial case.
    """

    eigenvectors: Tensor
    eigenvalues: Tensor
    residual: float
    orthogonality: float
    trace_error: float
    attempts: int

    @property
    def checks(self) -> dict[str, float]:
        """How good it is, by name."""
        names = ("residual", "orthogonality", "trace_error", "attempts")
        return {name: getattr(self, name) for name in names}


def header_of(checks: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """The worst of some decompositions' checks as strings, for a file's header."""
    worst = {name: max(each[name] for each in checks) for name in checks[0]}
    attempts = str(int(worst.pop("attempts")))
    return {name: f"{value:.3e}" for name, value in worst.items()} | {"attempts": attempts}


def workspace_bytes(size: int) -> int:
    """Memory that one decomposition takes at its peak, beside the sum itself.

    A float64 copy, its eigenvectors, LAPACK's workspace of 2n² and more, the check's products.
    """
    return 6 * 8 * size**2


def check_size(name: str, size: int, device: torch.device) -> None:
    """Refuses a factor too large for the device's decomposition.

    Raises:
        DecompositionError: n ≥ 32 767 on a CPU, where LAPACK would crash the process.
    """
    if device.type == "cpu" and size > MAX_CPU_SIZE:
        raise DecompositionError(
            f"The factor {name} has n = {size}, and a CPU cannot decompose n ≥ {MAX_CPU_SIZE + 1}; "
            "run worker 0 on a GPU, or leave this module out with model.modules."
        )


def decompose(name: str, sum_nn: Tensor, count: int, device: torch.device) -> Eigenbasis:
    """Decomposes sum / count.

    Args:
        name: The factor's name, for errors.
        sum_nn: Raw sum [n, n], whole (both triangles), any float dtype, on any device.
        count: Number of summed outer products, 1 or more.
        device: Where to decompose first.

    Returns:
        Its eigenbasis, on the CPU.

    Raises:
        NonFiniteError: The sum holds NaN or infinity.
        DecompositionError: Every attempt failed, or n is too large.
    """
    size = sum_nn.shape[0]
    check_size(name, size, device)
    # The host's copy is kept: a failed call on a GPU can take the GPU's memory with it.
    matrix = sum_nn.detach().to("cpu", torch.float64, copy=True)
    if not torch.isfinite(matrix).all():
        raise NonFiniteError(
            f"The factor {name} holds NaN or infinity in its covariance sum; look for overflow in "
            "the model's activations or gradients, or use a wider dtype."
        )
    matrix = (matrix + matrix.T).div_(2 * count)
    scale = matrix.abs().max().item()
    if scale == 0.0:
        zeros = torch.zeros(size, dtype=torch.float64)
        return Eigenbasis(torch.eye(size, dtype=torch.float64), zeros, 0.0, 0.0, 0.0, 0)
    if size == 1:
        one = torch.ones(1, 1, dtype=torch.float64)
        return Eigenbasis(one, matrix[0].clamp(min=0), 0.0, 0.0, 0.0, 0)
    matrix.div_(scale)

    other = torch.device("cpu")
    if device.type == "cpu" and torch.cuda.is_available():
        other = torch.device("cuda")
    failures: list[str] = []
    for attempt, (where, backwards) in enumerate(
        ((device, False), (device, True), (other, False)), start=1
    ):
        try:
            check_size(name, size, where)
            values, vectors = _eigh(matrix, where, backwards)
        except (RuntimeError, DecompositionError) as error:
            failures.append(f"on {where}: {first_line(error)}")
            continue
        checks = _check(matrix, values, vectors)
        if max(checks) <= TOLERANCE:
            return Eigenbasis(vectors.cpu(), values.cpu().clamp(min=0) * scale, *checks, attempt)
        failures.append(
            f"on {where}: residual {checks[0]:.1e}, orthogonality {checks[1]:.1e}, trace error "
            f"{checks[2]:.1e}, over {TOLERANCE:.0e}"
        )
    raise DecompositionError(
        f"The factor {name} (n = {size}) could not be decomposed: {'; '.join(failures)}. More data "
        "or another device may help; the module can be left out with model.modules."
    )


def _eigh(matrix: Tensor, device: torch.device, backwards: bool) -> tuple[Tensor, Tensor]:
    on_device = matrix.to(device)
    if not backwards:
        values, vectors = torch.linalg.eigh(on_device)
        return values, vectors
    values, vectors = torch.linalg.eigh(on_device.flip((0, 1)))
    return values, vectors.flip(0)


def _check(matrix: Tensor, values: Tensor, vectors: Tensor) -> tuple[float, float, float]:
    """Residual, orthogonality and trace error of a decomposition; NaN counts as infinite.

    A − QΛQᵀ and QᵀQ − I are symmetric, so of each the lower half is computed, in block rows, which
    need no matrix of the whole size.
    """
    matrix = matrix.to(vectors.device)
    size = len(values)
    squares, off = values.new_zeros(()), values.new_zeros(())
    for start in range(0, size, _CHECKED_ROWS):
        end = min(start + _CHECKED_ROWS, size)
        product = (vectors[start:end] * values) @ vectors[:end].T
        square = product.sub_(matrix[start:end, :end]).square_()
        squares += 2 * square.sum() - square[:, start:].sum()
        gram = vectors[:, start:end].T @ vectors[:, :end]
        gram[:, start:].diagonal().sub_(1)
        off = torch.maximum(off, gram.abs_().max())
    trace = matrix.trace()
    trace_error = (values.sum() - trace).abs() / trace.abs().clamp(
        min=torch.finfo(trace.dtype).tiny
    )
    checks = torch.stack([squares.sqrt() / matrix.norm(), off, trace_error])
    first, second, third = checks.nan_to_num(nan=torch.inf).tolist()
    return first, second, third
