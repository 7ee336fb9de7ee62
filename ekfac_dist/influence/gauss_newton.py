"""Products with G + D: the Gauss–Newton matrix of a sample of training sequences, and the damping.

    each product    this worker's batches: a forward, shared by all right-hand sides, and J and Jᵀ
                    for each of them → one sum over workers → / number of sequences, + λ v

Every worker has all vectors and the same results.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from ekfac_dist.curvature.iterative import Vectors
from ekfac_dist.influence.asking import ScanStopped
from ekfac_dist.influence.context import STORED, ScoringContext
from ekfac_dist.influence.refinement_sample import RefinementSample
from ekfac_dist.models.capture.linearised import Linearisation
from ekfac_dist.runtime import preemption
from ekfac_dist.runtime.prefetch import prefetch


class GaussNewton:
    """Products of one solve; each is a collective.

    Args:
        context: Model, damping, workers.
        sample: The sequences of each product.
        linearisation: The model's linearisation, entered.
        on_batch: Called after each batch of this worker with its positions and sequences.
        go_on: A collective that is called before each product; false on all workers if nobody wants
            the solution any more.
    """

    def __init__(
        self,
        context: ScoringContext,
        sample: RefinementSample,
        linearisation: Linearisation,
        on_batch: Callable[[int, int], object],
        go_on: Callable[[], bool] | None = None,
    ) -> None:
        self._context, self._sample = context, sample
        self._linearisation, self._on_batch = linearisation, on_batch
        self._go_on = go_on
        self._num_products = 0

    def __call__(self, of: Vectors, into: Vectors, numbers: Sequence[int]) -> None:
        """Overwrites a block with products; see `iterative.Product`.

        Raises:
            ModelError: If the model's backward cannot be differentiated.
            Preempted: If SIGTERM has come.
            ScanStopped: If `go_on` is false.
        """
        if self._go_on is not None and not self._go_on():
            raise ScanStopped
        context, world = self._context, self._context.world
        number, self._num_products = self._num_products, self._num_products + 1
        sums: list[Tensor] = list(into.values())
        for values in sums:
            values.zero_()
        with world.agree():
            self._add_own_(of, into, numbers, number)
        world.all_reduce_(sums)
        num_sequences = len(self._sample.of_product(number))
        for name, values in into.items():
            values.div_(num_sequences).add_(of[name], alpha=context.damping[name])

    def _add_own_(
        self, of: Vectors, into: Vectors, numbers: Sequence[int], product_number: int
    ) -> None:
        """Adds the sums over this worker's sequences of a product."""
        world, sequences = self._context.world, self._sample.sequences
        batches = self._sample.own_batches(world, product_number)
        for indices, batch in zip(batches, prefetch(sequences.batch, batches), strict=True):
            linearised = self._linearisation.of(batch.to(world.device))
            linearised.add_gauss_newton_products_(of, into, numbers)
            del linearised  # its graph, before the next one is made
            self._on_batch(int(sequences.num_positions[indices].sum()), len(indices))
            world.check_peers()
            if preemption.requested():
                raise preemption.ended(STORED)
