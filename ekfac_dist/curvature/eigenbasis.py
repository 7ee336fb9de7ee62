"""The eigendecomposition of one factor in float64, checked, and tried again if it fails.

    finite? ── zero or 1×1? ── to the device, symmetrised and scaled there ── decompose ── check
                                                                                │ failed
                                      rows and columns reversed <───────────────┤
                                      on another device         <───────────────┤
                                      `DecompositionError`      <───────────────┘

The sum stays on the host: a failed call can leave a GPU's memory unusable. Reversing rows and
columns gives the same eigenproblem, solved by other arithmetic.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac_dist.errors import DecompositionError, NonFiniteError, first_line

# Above this n LAPACK's 32-bit workspace size overflows: torch 2.13 was seen to crash the process.
MAX_CPU_SIZE = 32_766
# From an n between this and 25,000 on cuSOLVER's 32-bit workspace size overflows, in CUDA before
# 13: decompositions fail.
CUDA_12_LIMIT = 23_000
# Largest residual, orthogonality and trace error of an accepted decomposition; see `Eigenbasis`.
TOLERANCE = 1e-9

# Random vectors of signs with which a decomposition is checked. For each, the chance that an error
# of a size is seen as less than a tenth of it is about 8 %; that it is for all eight, 2e-9.
PROBES = 8


@dataclass(frozen=True)
class Eigenbasis:
    """Eigendecomposition A = QΛQᵀ of one factor, with its accuracy.

    Attributes:
        eigenvectors: Q [n, n] float64, on the CPU, eigenvectors in columns.
        eigenvalues: Diagonal of Λ [n] float64, ascending, none negative.
        residual: Largest ‖(A − QΛQᵀ)z‖ / ‖A‖ of `PROBES` random vectors of signs z; ‖A‖ is the
            Frobenius norm. Its mean square over all z is (‖A − QΛQᵀ‖ / ‖A‖)².
        orthogonality: Largest entry of |(QᵀQ − I)z| for the same z. An entry's mean square over all
            z is the sum of the squares of a row of QᵀQ − I.
        trace_error: |Σλ − tr A| / tr A.
        attempts: Number of decompositions that were tried; 0 for a zero or 1×1 factor.
        device: Where the last of them ran.
    """

    eigenvectors: Tensor
    eigenvalues: Tensor
    residual: float
    orthogonality: float
    trace_error: float
    attempts: int
    device: torch.device

    @property
    def checks(self) -> dict[str, float]:
        """The accuracy figures and the number of attempts, by name."""
        names = ("residual", "orthogonality", "trace_error", "attempts")
        return {name: getattr(self, name) for name in names}


def header_of(checks: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """The largest value of each check, as strings for the header of a file.

    Args:
        checks: `Eigenbasis.checks` of each block of a factor.
    """
    worst = {name: max(block[name] for block in checks) for name in checks[0]}
    counts = {"attempts": str(int(worst.pop("attempts"))), "probes": str(PROBES)}
    return {name: f"{value:.3e}" for name, value in worst.items()} | counts


def workspace_bytes(size: int) -> int:
    """Peak memory of one decomposition in bytes, without the sum that is decomposed.

    It holds a float64 copy of the sum, the eigenvectors, and LAPACK's workspace of 2n² elements
    and more.

    Args:
        size: n, the size of the factor.
    """
    return 6 * 8 * size**2


def cuda_limit(cuda: str | None) -> float:
    """The n from which on a GPU's library fails; infinite if it is not known to fail.

    Args:
        cuda: Version of CUDA, such as "12.8"; None if it is not known.
    """
    is_old = cuda is not None and int(cuda.partition(".")[0]) < 13
    return CUDA_12_LIMIT if is_old else math.inf


def can_decompose(device: torch.device, size: int, cuda: str | None = torch.version.cuda) -> bool:
    """Whether a device's library can decompose factors of a size, given the memory.

    Args:
        device: The device.
        size: n, the size of the factor.
        cuda: As for `cuda_limit`.
    """
    return size <= MAX_CPU_SIZE if device.type == "cpu" else size < cuda_limit(cuda)


def decomposing_device(
    size: int, device: torch.device, free_bytes: float, cuda: str | None = torch.version.cuda
) -> torch.device:
    """Where a worker decomposes a factor first: on its device, or on the CPU.

    Args:
        size: n, the size of the factor.
        device: The worker's device.
        free_bytes: Free memory of that device, with sums and weights out of the way.
        cuda: As for `can_decompose`.
    """
    cpu = torch.device("cpu")
    has_room = workspace_bytes(size) <= free_bytes
    if (has_room and can_decompose(device, size, cuda)) or not can_decompose(cpu, size):
        return device
    return cpu


def check_size(
    name: str,
    size: int,
    device: torch.device,
    *,
    cuda: str | None = torch.version.cuda,
    device_bytes: float = math.inf,
) -> None:
    """Checks that a factor is not too large for the device, nor for the CPU in its place.

    Args:
        name: The factor's name, for the error.
        size: n, the size of the factor.
        device: Where it is to be decomposed.
        cuda: As for `cuda_limit`.
        device_bytes: Memory of the device, all of it.

    Raises:
        DecompositionError: If n ≥ 32 767 on a CPU, where LAPACK would crash the process, or on a
            GPU with CUDA before 13 or with too little memory.
    """
    if size <= MAX_CPU_SIZE:
        return
    fault, instead = "", "run worker 0 on a GPU"
    if device.type != "cpu":
        if not can_decompose(device, size, cuda):
            fault = f", nor can CUDA {cuda} n ≥ {CUDA_12_LIMIT}"
            instead = "run worker 0 with a torch for CUDA 13 or later"
        elif workspace_bytes(size) > device_bytes:
            fault = (
                f", and the GPU has {device_bytes / 1e9:.1f} GB of the "
                f"{workspace_bytes(size) / 1e9:.1f} GB that it takes"
            )
            instead = "run worker 0 on a larger GPU"
        else:
            return
    raise DecompositionError(
        f"The factor {name} has n = {size}, and a CPU cannot decompose n ≥ {MAX_CPU_SIZE + 1}"
        f"{fault}; {instead}, give factors.blocks, or leave this module out with model.modules."
    )


def decompose(name: str, sum_nn: Tensor, count: int, device: torch.device) -> Eigenbasis:
    """Decomposes the covariance sum / count in float64.

    Args:
        name: The factor's name, for errors.
        sum_nn: Raw sum [n, n] with both triangles filled, of any float dtype, on any device.
        count: Number of summed outer products, 1 or more.
        device: Where to decompose first; the last attempt uses another device where there is one.

    Returns:
        The eigenbasis, on the CPU.

    Raises:
        NonFiniteError: If the sum holds NaN or infinity.
        DecompositionError: If no attempt reaches `TOLERANCE`, or n is too large for the device.
    """
    size = sum_nn.shape[0]
    check_size(name, size, device)
    host_nn = sum_nn.detach().to("cpu")
    largest = host_nn.abs().max().item() if size else 0.0
    if not math.isfinite(largest):
        raise NonFiniteError(
            f"The factor {name} holds NaN or infinity in its covariance sum; look for overflow in "
            "the model's activations or gradients, or use a wider dtype."
        )
    if largest == 0.0:
        zeros = torch.zeros(size, dtype=torch.float64)
        return Eigenbasis(torch.eye(size, dtype=torch.float64), zeros, 0.0, 0.0, 0.0, 0, device)
    if size == 1:
        identity = torch.ones(1, 1, dtype=torch.float64)
        value = host_nn[0].double().clamp(min=0) / count
        return Eigenbasis(identity, value, 0.0, 0.0, 0.0, 0, device)

    other_device = torch.device("cpu")
    if device.type == "cpu" and torch.cuda.is_available():
        other_device = torch.device("cuda")
    failures: list[str] = []
    for attempt, (tried_device, is_reversed) in enumerate(
        ((device, False), (device, True), (other_device, False)), start=1
    ):
        try:
            check_size(name, size, tried_device)
            values, vectors, checks = _attempt(host_nn, largest, tried_device, is_reversed)
        except (RuntimeError, DecompositionError) as error:
            failures.append(f"on {tried_device}: {first_line(error)}")
            continue
        if max(checks) <= TOLERANCE:
            values = values.cpu().clamp(min=0) * (largest / count)
            return Eigenbasis(vectors.cpu(), values, *checks, attempt, tried_device)
        failures.append(
            f"on {tried_device}: residual {checks[0]:.1e}, orthogonality {checks[1]:.1e}, "
            f"trace error {checks[2]:.1e}, over {TOLERANCE:.0e}"
        )
    raise DecompositionError(
        f"The factor {name} (n = {size}) could not be decomposed: {'; '.join(failures)}. More data "
        "or another device may help; the module can be left out with model.modules."
    )


def _attempt(
    sum_nn: Tensor, scale: float, device: torch.device, is_reversed: bool
) -> tuple[Tensor, Tensor, tuple[float, float, float]]:
    """Eigenvalues and eigenvectors of a sum on a device, symmetrised and scaled, and their checks.

    Args:
        sum_nn: The sum, on the host.
        scale: What it is divided by, so that its largest entry is 1.
        device: The device.
        is_reversed: Whether rows and columns are reversed for the decomposition.
    """
    matrix = sum_nn.to(device).double()
    matrix = (matrix + matrix.T).div_(2 * scale)
    if is_reversed:
        values, vectors = torch.linalg.eigh(matrix.flip((0, 1)))
        vectors = vectors.flip(0)
    else:
        values, vectors = torch.linalg.eigh(matrix)
    return values, vectors, _check(matrix, values, vectors)


def _check(matrix: Tensor, values: Tensor, vectors: Tensor) -> tuple[float, float, float]:
    """Residual, orthogonality and trace error of a decomposition; NaN counts as infinite.

    The first two are probed with random signs, as Freivalds checks a product: no product of two
    matrices is computed, which would take as long as a quarter of the decomposition.
    """
    generator = torch.Generator().manual_seed(PROBES)  # not the caller's random numbers
    signs = torch.randint(0, 2, (len(values), PROBES), generator=generator)
    probes_nk = signs.mul_(2).sub_(1).to(values)
    rebuilt_nk = vectors @ (values[:, None] * (vectors.T @ probes_nk))
    residual = (matrix @ probes_nk - rebuilt_nk).norm(dim=0).max() / matrix.norm()
    deviation = (vectors.T @ (vectors @ probes_nk) - probes_nk).abs().max()
    trace = matrix.trace()
    trace_error = (values.sum() - trace).abs() / trace.abs().clamp(
        min=torch.finfo(trace.dtype).tiny
    )
    checks = torch.stack([residual, deviation, trace_error])
    first, second, third = checks.nan_to_num(nan=torch.inf).tolist()
    return first, second, third
