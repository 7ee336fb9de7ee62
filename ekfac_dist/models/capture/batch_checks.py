"""Checks before a pass that a model computes a sequence in a batch as it does alone.

The checks depend on the model, the longest sequence and the token budget only, never on the batches
of one plan: passes over parts of the data, or resumed ones, are cut into other batches.

A packed batch is right, whichever sequences it holds, if

* attention has no window, chunk or mask of its own. So the longest sequence that can be packed,
  alone in a packed batch, must have exactly the logits of an ordinary batch. What cuts nothing off
  this sequence cuts nothing off a shorter one. The two are the same computation, so not even
  rounding may differ;
* nothing else mixes sequences, or depends on a position in the packed batch. So the first and the
  last sequence of the longest packed batch must have the logits of each alone, up to rounding.
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
from ekfac_dist.models.capture.tasks import CAUSAL_LM, CausalLM
from ekfac_dist.models.modules import is_quantised, linear_modules
from ekfac_dist.models.sharding import class_of, forget_forward

# Number of positions at either end of a sequence whose logits are compared.
_END_POSITIONS = 32

# Relative change of the logits' norm that rounding explains; many models compute parts in float32.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 3e-5}
_ROUNDING_IN_16_BITS = 0.03

# Relative change that rounding does not explain, not even where it selects other experts.
_NOT_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-2}
_NOT_ROUNDING_IN_16_BITS = 0.5


class BatchChecks:
    """Compares a model's logits of the same sequence in different batches.

    Args:
        model: A prepared model.
        sequences: All sequences of the data.
        device: The model's device.
        batch_tokens: Token budget of a batch.
        task: How the passes compute logits.
    """

    def __init__(
        self,
        model: nn.Module,
        sequences: Sequences,
        device: torch.device,
        batch_tokens: int,
        task: CausalLM = CAUSAL_LM,
    ) -> None:
        self._model, self._sequences, self._device = model, sequences, device
        self._batch_tokens, self._task = batch_tokens, task
        lengths = sequences.num_positions
        self._shortest, self._longest = int(lengths.argmin()), int(lengths.argmax())
        self._longest_beside = _longest_beside_others(sequences, batch_tokens)
        self._dtype = next(model.parameters()).dtype
        self._rotary = changing_embeddings(model)
        self._experts = dict.fromkeys(fused_experts(model).values(), _pass_through)
        self._logits_alone: dict[int, Tensor] = {}

    def require_exact(self) -> None:
        """Refuses a model whose logits of a sequence depend on other sequences.

        Raises:
            ModelError: If the logits of the shortest sequence change after the longest one was
                computed, or beside the longest that can share its batch.
        """
        lengths, name = self._sequences.num_positions, class_of(self._model).__name__
        if lengths[self._shortest] == lengths[self._longest]:
            return
        first_logits = self._alone(self._shortest)
        self._alone(self._longest)
        order_difference = _relative_difference(
            self._ends(self._collated([self._shortest])), first_logits
        )
        # Always computed: a sharded model's forward is a collective, so no worker may leave it out.
        batch_difference = self._padding_difference if self._longest_beside is not None else 0.0
        tolerance = _NOT_ROUNDING.get(self._dtype, _NOT_ROUNDING_IN_16_BITS)
        if order_difference > tolerance:
            raise ModelError(
                f"{name} gives a sequence other logits after a longer one than before it (relative "
                f"difference {order_difference:.2g}): it remembers something of what it has "
                "computed, so its scores would depend on the order of the data. Such a model "
                "cannot be used."
            )
        if batch_difference > tolerance:
            raise ModelError(
                f"{name} gives a sequence other logits beside a longer one than alone (relative "
                f"difference {batch_difference:.2g}), so its scores would depend on the batch. Set "
                "batch_tokens: 1, which gives each sequence a batch of its own."
            )

    def can_pack(self) -> bool:
        """Whether the logits of packed sequences are those of each sequence alone."""
        longest, shortest = self._longest_beside, self._shortest
        if longest is None or not is_packable(self._model):
            return False
        length = int(self._sequences.num_positions[longest])
        packed = [longest] * (self._batch_tokens // length - 1) + [shortest]
        try:
            alone = self._alone(longest)
            # 0, except for kernels that sum in no fixed order
            repeat_difference = _relative_difference(self._ends(self._collated([longest])), alone)
            window_difference = _relative_difference(self._ends(self._packed([longest])), alone)
            padding_difference = self._padding_difference
            packing_difference = _relative_difference(
                self._ends(self._packed(packed), (0, -1)), torch.cat([alone, self._alone(shortest)])
            )
        except torch.OutOfMemoryError:
            raise  # a pass would run out of memory, too
        except Exception:  # a model that fails with a packed batch is not given any
            forget_forward(self._model)
            return False
        rounding = _ROUNDING.get(self._dtype, _ROUNDING_IN_16_BITS)
        rounding = min(2 * padding_difference + _ROUNDING[torch.float64], rounding)
        return window_difference <= 2 * repeat_difference and packing_difference <= rounding

    @cached_property
    def _padding_difference(self) -> float:
        """Relative difference of two sequences' logits in a padded batch from those alone."""
        assert self._longest_beside is not None
        pair = [self._longest_beside, self._shortest]
        alone = torch.cat([self._alone(k) for k in pair])
        return _relative_difference(self._ends(self._collated(pair), (0, -1)), alone)

    def _alone(self, k: int) -> Tensor:
        """Logits [positions, V] of one sequence in a batch of its own, float64."""
        if k not in self._logits_alone:
            self._logits_alone[k] = self._ends(self._collated([k]))
        return self._logits_alone[k]

    def _collated(self, selection: Iterable[int]) -> Batch:
        return collate([self._sequences[k] for k in selection])

    def _packed(self, selection: Iterable[int]) -> Batch:
        return pack([self._sequences[k] for k in selection])

    def _ends(self, batch: Batch, which: Iterable[int] = (0,)) -> Tensor:
        """Logits [positions, V] at both ends of some of a batch's sequences, float64.

        The first positions show what a recurrence carries over from another sequence, the last ones
        what a window cuts off.

        Args:
            batch: The batch.
            which: Indices of the sequences in the batch.
        """
        lengths, (_, width) = batch.grid("").lengths, batch.grid("").shape
        spans = batch.packed or [width] * len(lengths)
        starts = np.cumsum(spans) - spans
        places = torch.cat([starts[k] + _end_positions(lengths[k]) for k in which])
        batch = batch.to(self._device)
        reset_frequencies(self._rotary)
        with (
            self._safe_grad_mode(),
            listening(self._experts),
            torch.compiler.set_stance("force_eager"),
            attending_within(self._model, batch),
        ):
            logits = self._task.logits_at(self._model, batch, places.to(self._device))
        return logits.detach().double()

    @contextmanager
    def _safe_grad_mode(self) -> Iterator[None]:
        """Turns autograd off; for quantised weights, starts the graph at the embeddings instead.

        A forward without a graph may pack quantised weights permanently.
        """
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
    """The longest sequence that may share a batch with a shorter one; None if there is none."""
    lengths = sequences.num_positions
    limit = batch_tokens // 2
    if sequences.equal_above is not None:
        limit = min(limit, sequences.equal_above)
    candidates = np.flatnonzero((lengths <= limit) & (lengths > lengths.min()))
    return int(candidates[lengths[candidates].argmax()]) if candidates.size else None


def _end_positions(length: int) -> Tensor:
    """The first and the last positions of a sequence, of which a short one has some twice."""
    few = min(_END_POSITIONS, length)
    return torch.cat([torch.arange(few), torch.arange(length - few, length)])


def _relative_difference(logits: Tensor, expected: Tensor) -> float:
    """‖logits − expected‖ / ‖expected‖.

    0 where that is NaN: a pass will report where NaN comes from.

    Args:
        logits: Logits [positions, V].
        expected: Logits of the same shape to compare with.
    """
    difference = ((logits - expected).norm() / expected.norm()).item()
    return 0.0 if np.isnan(difference) else difference


def _pass_through(routed: Routed) -> Tensor:
    """A listener that changes nothing."""
    return routed.outputs
