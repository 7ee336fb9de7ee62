"""Pass 2: running sums of Λ, the second moment of the sequences' gradients in the eigenbasis."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ekfac_dist.curvature import long_sums
from ekfac_dist.curvature.blocks import Blocks, rotate_rows
from ekfac_dist.curvature.costs import rotates_inputs, rotates_output_gradients
from ekfac_dist.curvature.refit import (
    EvenSquares,
    add_position_squares_,
    add_sequence_squares_,
    squares_kernel,
)
from ekfac_dist.curvature.score_change import HalfOfLambda, SampledRows, Turning, half_of_lambda
from ekfac_dist.curvature.split_matrices import SPLIT_BYTES, RowBasis, splits, whole
from ekfac_dist.data.batches import Positions
from ekfac_dist.fit.eigenbasis import Basis
from ekfac_dist.fit.even import are_even
from ekfac_dist.models.capture.observers import PairObserver, owned
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.owners import Places
from ekfac_dist.passes.step_memory import room_beside_steps
from ekfac_dist.runtime.processes import World


def split_where_faster_(
    bases: dict[str, Basis],
    modules: Sequence[TrackedModule],
    context: PassContext,
    step_tokens: int,
    places: Places,
) -> bool:
    """Splits bases in place if rows are rotated faster so, and memory is left; a collective.

    A fit is planned without split bases: for them alone it would take more passes.

    Args:
        bases: The bases on this worker's device, by factor.
        modules: The group.
        context: Model, data and workers.
        step_tokens: Positions of a step.
        places: Who owns which modules.

    Returns:
        Whether they are split, which is the same on all workers.
    """
    rows, world = next(context.model.parameters()).dtype, context.world
    if rows != torch.bfloat16 or context.dtype != torch.float32:
        return False
    if not all(world.gather(splits(world.device, rows, context.dtype))):
        return False
    blocks = [block for basis in bases.values() for block in whole(basis.eigenvectors)]
    most = max((block.numel() for block in blocks), default=0)
    # While one is split, it is there as a whole, in parts, and as what is left of it.
    wanted = (SPLIT_BYTES - context.dtype.itemsize) * sum(map(Tensor.numel, blocks)) + 12 * most
    lambdas = [m.num_outputs * m.input_size for m in modules if context.owns(m)]
    held = context.dtype.itemsize * (sum(lambdas) + 3 * max(lambdas, default=0))
    del blocks
    room = room_beside_steps(context, modules, step_tokens, held, wanted, places)
    if not all(world.gather(room >= wanted)):
        return False
    for factor in bases:
        bases[factor] = bases[factor].split()  # one after the other, which frees the whole one
    return True


def products_lines(device: torch.device, dtype: torch.dtype, *, is_split: bool) -> list[str]:
    """How a GPU makes the refit's products, a line each; none for a CPU.

    Args:
        device: The worker's device.
        dtype: Dtype of the sums.
        is_split: Whether the bases are split.
    """
    if device.type == "cpu" or dtype != torch.float32:
        return []
    kernel = squares_kernel(device)
    how = "without a kernel: " + kernel if isinstance(kernel, str) else kernel.description
    rotations = "three bfloat16 products each" if is_split else "float32 products"
    return [f"refit rotations by {rotations}", f"refit squares {how}"]


class LambdaSums(PairObserver[Positions], long_sums.LongSums):
    """Running sums Σ_n (Q_Sᵀ G_n Q_A)∘² of a group of modules; each sequence is one term.

    Rows that are shown may have a narrower dtype than the sums if the bases are split.

    Args:
        modules: The group, in model order.
        bases: The eigenbasis of each of its factors, by the factor's name.
        per_token: Square each position's outer product, instead of the sequence's sum.
        dtype: float32 or float64.
        device: Where the sums are held.
        with_halves: Whether to sum what `score_changes` needs, over the even sequences: positions
            that are shown know their sequences' indices.

    Attributes:
        sums: The running sum [O, I] of each module.
        counts: Empty: Λ is a mean over all sequences, whose number is known.
    """

    def __init__(
        self,
        modules: Sequence[TrackedModule],
        bases: Mapping[str, Basis],
        *,
        per_token: bool,
        dtype: torch.dtype,
        device: torch.device,
        with_halves: bool = False,
    ) -> None:
        self.sums: dict[str, Tensor] = {
            m.name: torch.zeros(m.num_outputs, m.input_size, dtype=dtype, device=device)
            for m in modules
        }
        self.counts: dict[str, int] = {}
        self._dtype = dtype
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._bases = bases
        self._modules = modules
        self._per_token = per_token
        self._output_sizes: dict[str, list[int]] = {}  # of the modules that read each input
        for module in modules:
            self._output_sizes.setdefault(module.input, []).append(module.num_outputs)
        PairObserver.__init__(self, modules)
        long_sums.LongSums.__init__(self, self.sums, dtype)
        self._sampled: dict[str, SampledRows] = {}
        for module in modules if with_halves else ():
            rows = SampledRows.of(bases[module.output].eigenvalues).to(device)
            self._sampled[module.name] = rows
            shape = len(rows.indices_k), module.input_size
            self.beside[module.name] = torch.zeros(shape, dtype=torch.float64, device=device)

    def prepare_input(self, module: TrackedModule, acts_Mi: Tensor, positions: Positions) -> Tensor:
        """The input in the eigenbasis [M, I], or as captured where rotating G_n costs less."""
        if self._rotates_input(module.input, positions):
            vectors = self._bases[module.input].eigenvectors
            return rotate_rows(acts_Mi, vectors, bias=module.bias)
        if acts_Mi.dtype != self._dtype:
            return acts_Mi.to(self._dtype)
        return owned(acts_Mi, positions)

    def on_pair(
        self, module: TrackedModule, acts: Tensor, grads_MO: Tensor, positions: Positions
    ) -> None:
        """Adds a batch's squares to the module's sum."""
        vectors_OO = self._bases[module.output].eigenvectors
        vectors_II = self._bases[module.input].eigenvectors
        rotates_output = self._per_token or rotates_output_gradients(
            positions.num_positions, len(positions.lengths), module.input_size
        )
        if rotates_output:
            grads_MO = rotate_rows(grads_MO, vectors_OO, bias=False)
        else:
            grads_MO = grads_MO.to(self._dtype)
        if self._per_token:
            self._add_positions(module, acts, grads_MO, positions)
        else:
            self._add_sequences(
                module,
                acts,
                grads_MO,
                positions,
                basis_II=None if self._rotates_input(module.input, positions) else vectors_II,
                basis_OO=None if rotates_output else vectors_OO,
            )

    def _add_positions(
        self, module: TrackedModule, acts_MI: Tensor, grads_MO: Tensor, positions: Positions
    ) -> None:
        lambda_OI = self.sums[module.name]
        per_term = long_sums.positions_per_term(min(lambda_OI.shape), lambda_OI.device)
        for share in self.chunks(module.name, len(grads_MO), per_term):
            add_position_squares_(lambda_OI, acts_MI[share], grads_MO[share])
        even = self._even_squares(module, positions)
        if even is not None:
            even.add_positions(acts_MI, grads_MO, positions.lengths)

    def _add_sequences(
        self,
        module: TrackedModule,
        acts: Tensor,
        grads_MO: Tensor,
        positions: Positions,
        basis_II: RowBasis | None,
        basis_OO: RowBasis | None,
    ) -> None:
        bases: dict[str, Blocks | None] = {
            "basis_II": None if basis_II is None else whole(basis_II),
            "basis_OO": None if basis_OO is None else whole(basis_OO),
        }
        lengths = positions.lengths
        starts = list(itertools.accumulate(lengths, initial=0))
        for share in self.chunks(module.name, len(lengths)):
            rows = slice(starts[share.start], starts[share.stop])
            add_sequence_squares_(
                self.sums[module.name],
                acts[rows],
                grads_MO[rows],
                lengths[share],
                bias=module.bias,
                even=self._even_squares(module, positions, share),
                **bases,
            )

    def _even_squares(
        self, module: TrackedModule, positions: Positions, share: slice = slice(None)
    ) -> EvenSquares | None:
        """Where squares of the even ones among some sequences are summed; None: nowhere."""
        if module.name not in self._sampled:
            return None
        indices_k = self._sampled[module.name].indices_k
        return EvenSquares(self.beside[module.name], indices_k, are_even(positions)[share])

    def _rotates_input(self, factor: str, positions: Positions) -> bool:
        return self._per_token or rotates_inputs(
            positions.num_positions, len(positions.lengths), self._output_sizes[factor]
        )

    def _parts(self, name: str) -> list[Tensor]:
        return [self.sums[name]]

    def health(self) -> Tensor:
        """Σ of all sums, a float64 scalar: finite exactly as long as every sum is."""
        sums = [total.sum(dtype=torch.float64) for total in self.sums.values()]
        return torch.stack([self._zero, *sums]).sum()

    def reduce(self, world: World) -> None:
        """Replaces the sums by those over all workers."""
        self.fold()
        world.all_reduce_([*self.sums.values(), *self.beside.values()])

    def changes(
        self, num_even: int, number: int, differences: Mapping[str, float | None]
    ) -> dict[str, HalfOfLambda | None]:
        """What half of the sequences changes, by module, of the means over all.

        Args:
            num_even: Number of even sequences.
            number: N, of all.
            differences: What each covariance of half of the data is off, by factor; see
                `CovarianceSums.relative_differences`.

        Returns:
            None where it is not known. See `score_change.half_of_lambda`.
        """
        changes: dict[str, HalfOfLambda | None] = {}
        for module in self._modules:
            changes[module.name] = None
            mean_OI, basis = self.sums[module.name], self._bases[module.input]
            if module.input in differences:
                difference = differences[module.input]
                if difference is None:  # an expert that only one half has reached
                    difference = 1.0
                sizes = [len(block) for block in basis.eigenvectors]
                turning = Turning.of(basis.eigenvalues, sizes, difference, mean_OI.device)
                even_kI, rows = self.beside[module.name], self._sampled[module.name]
                changes[module.name] = half_of_lambda(
                    mean_OI, even_kI, rows, num_even, number, turning
                )
        return changes
