"""Whether a model gives a sequence in a batch what it gives it alone: tried, before any pass.

What is tried depends on the model, the longest sequence and the token budget alone, never on the
batches of one plan: passes over parts of the data, resumed or scored again, cut others.

A row of a packed batch is right, whichever sequences it holds, if

* attention has no window, chunk or mask of its own: the longest sequence that can be packed, alone
  in a packed row, has the very numbers of an ordinary batch. What cuts nothing off from it cuts
  nothing off from a shorter one. The two are one computation, so not even rounding may differ;
* nothing else mixes sequences, or depends on a place in the row: the first and the last sequence of
  the longest row that can be have the numbers of each alone, but for rounding.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from ekfac_dist.data.batches import Batch
from ekfac_dist.data.sequences import Sequences, collate, pack
from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.experts import Routed, fused_experts, listening
from ekfac_dist.models.capture.packing import attending_within, is_packable
from ekfac_dist.models.capture.prepare import start_graph
from ekfac_dist.models.capture.rotary import changing_embeddings, reset_frequencies
from ekfac_dist.models.capture.tasks import CAUSAL_LM
from ekfac_dist.models.modules import is_quantised, linear_modules
from ekfac_dist.models.sharding import class_of, forget_forward

# Positions at either end of a sequence whose logits are compared.
_COMPARED = 32

# What rounding may change logits by, in norm, relative; many families compute parts in float32.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 3e-5}
_ROUNDING_OF_16_BITS = 0.03

# A relative difference that no rounding explains, even where it chooses other experts.
_OTHER_NUMBERS = {torch.float64: 1e-3, torch.float32: 1e-2}
_OTHER_NUMBERS_IN_16_BITS = 0.5


class BatchChecks:
    """A model and the sequences that are passed over, all or any of them.

    Args:
        model: A prepared model.
        sequences: The sequences.
        device: The model's.
        batch_tokens: Token budget of a batch.
    """

    def __init__(
        self, model: nn.Module, sequences: Sequences, device: torch.device, batch_tokens: int
    ) -> None:
        self._model, self._sequences, self._device = model, sequences, device
        self._batch_tokens = batch_tokens
        lengths = sequences.num_positions
        self._shortest, self._longest = int(lengths.argmin()), int(lengths.argmax())
        self._beside = _longest_beside_others(sequences, batch_tokens)
        self._dtype = next(model.parameters()).dtype
        self._rotary = changing_embeddings(model)
        self._experts = dict.fromkeys(fused_experts(model).values(), _unchanged)
        self._known: dict[int, Tensor] = {}

    def require_exact(self) -> None:
        """Refuses a model whose logits of a sequence depend on others, before or beside it.

        Raises:
            ModelError: The logits of the shortest sequence are others after the longest, or beside
                the longest that can share its batch.
        """
        lengths, name = self._sequences.num_positions, class_of(self._model).__name__
        if lengths[self._shortest] == lengths[self._longest]:
            return
        before = self._alone(self._shortest)
        self._alone(self._longest)
        by_order = _difference(self._ends(self._collated([self._shortest])), before)
        # All are computed, whatever comes of them, for a sharded model's forward is a collective.
        by_batch = self._by_padding if self._beside is not None else 0.0
        allowed = _OTHER_NUMBERS.get(self._dtype, _OTHER_NUMBERS_IN_16_BITS)
        if by_order > allowed:
            raise ModelError(
                f"{name} gives a sequence other logits after a longer one than before it (relative "
                f"difference {by_order:.2g}): it remembers something of what it has computed, so "
                "its scores would depend on the order of the data. Such a model cannot be used."
            )
        if by_batch > allowed:
            raise ModelError(
                f"{name} gives a sequence other logits beside a longer one than alone (relative "
                f"difference {by_batch:.2g}), so its scores would depend on the batch. Set "
                "batch_tokens: 1, which gives each sequence a batch of its own."
            )

    def can_pack(self) -> bool:
        """Whether the model gives the same logits for sequences in one row as for each alone."""
        longest, shortest = self._beside, self._shortest
        if longest is None or not is_packable(self._model):
            return False
        length = int(self._sequences.num_positions[longest])
        row = [longest] * (self._batch_tokens // length - 1) + [shortest]
        try:
            alone = self._alone(longest)
            # 0, but for kernels whose sums are in no fixed order
            repeated = _difference(self._ends(self._collated([longest])), alone)
            no_window = _difference(self._ends(self._packed([longest])), alone)
            by_padding = self._by_padding
            in_a_row = _difference(
                self._ends(self._packed(row), (0, -1)), torch.cat([alone, self._alone(shortest)])
            )
        except torch.OutOfMemoryError:
            raise  # a pass would meet it too
        except Exception:  # whatever a model cannot do with such a row: it is not given one
            forget_forward(self._model)
            return False
        rounding = _ROUNDING.get(self._dtype, _ROUNDING_OF_16_BITS)
        rounding = min(2 * by_padding + _ROUNDING[torch.float64], rounding)
        return no_window <= 2 * repeated and in_a_row <= rounding

    @cached_property
    def _by_padding(self) -> float:
        """How far two sequences in a padded batch are from each alone."""
        assert self._beside is not None
        two = [self._beside, self._shortest]
        alone = torch.cat([self._alone(number) for number in two])
        return _difference(self._ends(self._collated(two), (0, -1)), alone)

    def _alone(self, number: int) -> Tensor:
        """Logits of one sequence in a batch of its own."""
        if number not in self._known:
            self._known[number] = self._ends(self._collated([number]))
        return self._known[number]

    def _collated(self, numbers: Iterable[int]) -> Batch:
        return collate([self._sequences[number] for number in numbers])

    def _packed(self, numbers: Iterable[int]) -> Batch:
        return pack([self._sequences[number] for number in numbers])

    def _ends(self, batch: Batch, wanted: Iterable[int] = (0,)) -> Tensor:
        """Logits [positions, V] at both ends of some of a batch's sequences, float64.

        What a recurrence carries over from another sequence shows first; what a window cuts off,
        last.
        """
        batch = batch.to(self._device)
        reset_frequencies(self._rotary)
        with (
            self._graph(),
            listening(self._experts),
            torch.compiler.set_stance("force_eager"),
            attending_within(self._model, batch),
        ):
            logits, _ = CAUSAL_LM.forward(self._model, batch.inputs)  # as in a pass
        logits = logits.detach()
        sequences = logits if batch.packed is None else logits[0].split(batch.packed)
        lengths = batch.grid("").lengths
        found = []
        for number in wanted:
            rows = sequences[number][: lengths[number]]
            found += [rows[:_COMPARED], rows[-_COMPARED:]]
        return torch.cat(found).double()

    @contextmanager
    def _graph(self) -> Iterator[None]:
        """No graph, unless weights are quantised: a forward without one may pack them for good."""
        with ExitStack() as stack:
            if not any(map(is_quantised, linear_modules(self._model).values())):
                stack.enter_context(torch.no_grad())
            else:
                stack.enter_context(torch.enable_grad())
                for module in self._model.modules():
                    if isinstance(module, nn.Embedding):
                        stack.callback(module.register_forward_hook(start_graph).remove)
            yield


def _longest_beside_others(sequences: Sequences, batch_tokens: int) -> int | None:
    """The longest sequence that may share a batch with a shorter one; None: there is none."""
    lengths = sequences.num_positions
    limit = batch_tokens // 2
    if sequences.equal_above is not None:
        limit = min(limit, sequences.equal_above)
    beside = np.flatnonzero((lengths <= limit) & (lengths > lengths.min()))
    return int(beside[lengths[beside].argmax()]) if beside.size else None


def _difference(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; 0 where that is NaN: a pass will say where NaN comes from.

    Args:
        found: Logits [positions, V].
        expected: Others of the same shape.
    """
    difference = ((found - expected).norm() / expected.norm()).item()
    return 0.0 if np.isnan(difference) else difference


def _unchanged(routed: Routed) -> Tensor:
    return routed.outputs
