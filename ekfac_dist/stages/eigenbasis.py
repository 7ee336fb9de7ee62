"""Worker 0 decomposes every factor; every worker gets the eigenvectors."""

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ekfac_dist.curvature.eigenbasis import decompose
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress
from ekfac_dist.runtime.store import FactorSink, covariance_file, eigenbasis_file
from ekfac_dist.stages.covariance import CovarianceSums


@dataclass(frozen=True)
class Basis:
    """A factor's eigenbasis as a worker uses it.

    Attributes:
        eigenvectors: [n, n] on the worker's device, in the run's precision, in columns.
        eigenvalues: [n] float64 on the CPU, ascending.
    """

    eigenvectors: Tensor
    eigenvalues: Tensor


def run_eigenbasis(
    name: str,
    covariance: CovarianceSums,
    world: World,
    sink: FactorSink,
    *,
    keep_covariance: bool,
    show_progress: bool,
) -> tuple[dict[str, Basis], float]:
    """Decomposes the factors one after another, stores them, and sends them to every worker.

    The sums are given up as they are used.

    Args:
        name: What the stage is called in progress.
        covariance: The reduced sums; emptied.
        world: The workers.
        sink: Where the factors go.
        keep_covariance: Whether the raw sums are stored as well.
        show_progress: Whether worker 0 shows progress.

    Returns:
        The basis of each factor, and the seconds that all of it took.

    Raises:
        DecompositionError, NonFiniteError: On every worker, naming the factor.
        OutputError: On every worker, where worker 0 could not write.
    """
    start = time.perf_counter()
    bases: dict[str, Basis] = {}
    progress = Progress(
        name,
        total=sum(s.shape[0] ** 3 for s in covariance.sums.values()),
        unit="n³",
        enabled=show_progress and world.is_main,
        show_rate=False,
    )
    with progress:
        for factor in list(covariance.sums):
            vectors, count = covariance.sums.pop(factor), covariance.counts[factor]
            header = {"count": str(count)}
            if keep_covariance:
                with world.agree(takes_part=world.is_main):
                    sink.write(covariance_file(factor), {"sum": vectors}, header)
            basis = world.on_main(partial(decompose, factor, vectors, count, world.device))
            values = torch.empty(vectors.shape[0], dtype=torch.float64, device=world.device)
            if basis is not None:
                vectors.copy_(basis.eigenvectors)  # the sum's memory takes the eigenvectors
                values.copy_(basis.eigenvalues)
                header |= basis.header()
            del basis  # in float64, it need not live through the next decomposition
            header = world.share(header)
            world.broadcast_(vectors)
            world.broadcast_(values)
            bases[factor] = Basis(vectors, values.cpu())
            with world.agree(takes_part=world.is_main):
                tensors = {"eigenvectors": vectors, "eigenvalues": values}
                sink.write(eigenbasis_file(factor), tensors, header)
            progress.update(vectors.shape[0] ** 3)
    return bases, time.perf_counter() - start
