"""Pass 2: Λ, the second moment of the sequences' gradients in the eigenbasis."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ekfac_dist.curvature import long_sums
from ekfac_dist.curvature.blocks import Blocks, rotate_rows
from ekfac_dist.curvature.costs import rotates_inputs, rotates_output_gradients
from ekfac_dist.curvature.refit import add_position_squares_, add_sequence_squares_
from ekfac_dist.data.batches import Positions
from ekfac_dist.fit.eigenbasis import Basis
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.runtime.processes import World


class LambdaSums(long_sums.LongSums):
    """The running sums of squares of a group of modules; a term is that of a sequence.

    Args:
        modules: The group, in model order.
        bases: Eigenbasis of each of its factors.
        per_token: Square each position's outer product, instead of the sequence's sum.
        dtype: float32 or float64.
        device: Where the sums are held.

    Attributes:
        sums: Σ (Q_Sᵀ G_n Q_A)∘² [O, I] of each module.
        counts: Nothing: what is summed is a mean over all sequences.
    """

    def __init__(
        self,
        modules: Sequence[TrackedModule],
        bases: Mapping[str, Basis],
        *,
        per_token: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sums: dict[str, Tensor] = {
            m.name: torch.zeros(m.num_outputs, m.input_size, dtype=dtype, device=device)
            for m in modules
        }
        self.counts: dict[str, int] = {}
        self._bases = bases
        self._per_token = per_token
        self._readers: dict[str, list[TrackedModule]] = {}
        for module in modules:
            self._readers.setdefault(module.input, []).append(module)
        self._acts: dict[str, Tensor] = {}
        self._readers_left: dict[str, int] = {}
        super().__init__(self.sums, dtype)

    def on_input(self, module: TrackedModule, rows_Mi: Tensor, batch: Positions) -> None:
        """Keeps a batch's inputs, rotated already if that is cheaper, until the gradients come."""
        if self._rotates_input(module.input, batch):
            vectors = self._bases[module.input].eigenvectors
            acts = rotate_rows(rows_Mi, vectors, bias=module.bias)
        else:
            acts = (
                rows_Mi if batch.real is not None else rows_Mi.clone()
            )  # the model may write there
        self._acts[module.input] = acts
        self._readers_left[module.input] = len(self._readers[module.input])

    def on_gradient(self, module: TrackedModule, rows_MO: Tensor, batch: Positions) -> None:
        """Adds a batch's squares to the module's sum."""
        acts = self._acts[module.input]
        vectors_OO = self._bases[module.output].eigenvectors
        vectors_II = self._bases[module.input].eigenvectors
        rotates_output = self._per_token or rotates_output_gradients(
            batch.num_positions, len(batch.lengths), module.input_size
        )
        if rotates_output:
            rows_MO = rotate_rows(rows_MO, vectors_OO, bias=False)
        if self._per_token:
            self._add_positions(module, acts, rows_MO)
        else:
            self._add_sequences(
                module,
                acts,
                rows_MO,
                batch.lengths,
                basis_II=None if self._rotates_input(module.input, batch) else vectors_II,
                basis_OO=None if rotates_output else vectors_OO,
            )
        self._readers_left[module.input] -= 1
        if not self._readers_left[module.input]:
            del self._acts[module.input]

    def _add_positions(self, module: TrackedModule, acts_MI: Tensor, rows_MO: Tensor) -> None:
        lambda_OI = self.sums[module.name]
        per_term = long_sums.positions_per_term(min(lambda_OI.shape), lambda_OI.device)
        for rows in self.chunks(module.name, len(rows_MO), per_term):
            add_position_squares_(lambda_OI, acts_MI[rows], rows_MO[rows])

    def _add_sequences(
        self,
        module: TrackedModule,
        acts_MI: Tensor,
        rows_MO: Tensor,
        lengths: Sequence[int],
        **bases: Blocks | None,
    ) -> None:
        ends = list(itertools.accumulate(lengths, initial=0))
        for some in self.chunks(module.name, len(lengths)):
            rows = slice(ends[some.start], ends[some.stop])
            add_sequence_squares_(
                self.sums[module.name],
                acts_MI[rows],
                rows_MO[rows],
                lengths[some],
                bias=module.bias,
                **bases,
            )

    def _rotates_input(self, factor: str, batch: Positions) -> bool:
        sizes = [module.num_outputs for module in self._readers[factor]]
        return self._per_token or rotates_inputs(batch.num_positions, len(batch.lengths), sizes)

    def _parts(self, name: str) -> list[Tensor]:
        return [self.sums[name]]

    def health(self) -> Tensor:
        """Σ of all sums: every square is in it."""
        return torch.stack([s.sum(dtype=torch.float64) for s in self.sums.values()]).sum()

    def reduce(self, world: World) -> None:
        """Adds up the sums of all workers."""
        self.fold()
        world.all_reduce_(list(self.sums.values()))
