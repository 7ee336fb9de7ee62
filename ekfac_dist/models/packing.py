"""Sequences of unequal lengths in one row, without padding: attention sequence by sequence.

`position_ids` begin anew with each sequence, and all but attention computes position by position.
Attention is computed of each sequence alone, so nothing is computed between sequences; it is in
the registry that `transformers` chooses attention from, and chosen for as long as a packed batch
lasts.
Attention that knows by itself where sequences begin (flash attention) is left as it is.

Whether a model computes so is not taken from its name: what it says of sequences in a row that a
pass will really have is compared with what it says of each alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ekfac_dist.data.batches import Batch, plan_batches
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.models.experts import Routed, fused_experts, listening
from ekfac_dist.models.sharding import forget_forward
from ekfac_dist.models.tasks import CAUSAL_LM

IMPLEMENTATION = "ekfac_dist_packed"

# Lengths of a packed batch's sequences, by the identity of the configuration that attention has.
_LENGTHS: dict[int, tuple[int, ...]] = {}

# Positions at either end of a sequence whose logits are compared.
_COMPARED = 32

# What rounding may change logits by, in norm, relative; many families compute parts in float32.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 3e-5}
_ROUNDING_OF_16_BITS = 0.03

_PACKABLE = {"sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4"}


@contextmanager
def attending_within(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Within it, the sequences of a packed batch do not see each other."""
    configs = attention_configs(model) if batch.packed is not None else []
    before = [config._attn_implementation for config in configs]
    if configs:
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _forward)
    try:
        for config in configs:
            if config._attn_implementation == "sdpa":
                config._attn_implementation = IMPLEMENTATION
            _LENGTHS[id(config)] = batch.packed or ()
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
            _LENGTHS.pop(id(config), None)


@torch.no_grad()
def can_pack(
    model: nn.Module, sequences: Sequences, device: torch.device, batch_tokens: int
) -> bool:
    """Whether a model gives the same logits for sequences in one row as for each alone.

    Seen on rows that the passes will have: the one with the longest sequences, which shows windows
    and chunks, and the longest one, which shows what depends on a place in the row. The longest
    sequence is its first, the shortest its last. They may differ as much as padding makes them
    differ, which rounds in other ways too, and not by more than rounding can.

    Args:
        model: A prepared model.
        sequences: The run's sequences.
        device: The model's.
        batch_tokens: Of the passes' batches.
    """
    implementations = {config._attn_implementation for config in attention_configs(model)}
    if len(implementations) != 1 or not implementations <= _PACKABLE:
        return False
    lengths = sequences.num_positions
    mixed = [b for b in plan_batches(lengths, batch_tokens) if lengths[b].min() < lengths[b].max()]
    if not mixed:
        return False  # there is nothing to pad
    longest = max(mixed, key=lambda batch: int(lengths[batch].sum()))
    experts = dict.fromkeys(fused_experts(model).values(), _unchanged)  # as in a pass
    try:
        with listening(experts), torch.compiler.set_stance("force_eager"):
            # All are looked at, for a sharded model's forward is a collective.
            found = [
                _is_same(model, sequences, batch, device)
                for batch in ([longest] if longest == mixed[0] else [mixed[0], longest])
            ]
            return all(found)
    except torch.OutOfMemoryError:
        raise  # a pass would meet it too
    except Exception:  # whatever a model cannot do with such a row: it is not given one
        forget_forward(model)
        return False


def _is_same(
    model: nn.Module, sequences: Sequences, batch: list[int], device: torch.device
) -> bool:
    """Whether the first and the last sequence of a packed batch are as they are alone."""
    two = [batch[0], batch[-1]]
    together = _ends(model, sequences.packing().batch(batch).to(device))
    padded = _ends(model, sequences.batch(two).to(device))
    alone = torch.cat([_ends(model, sequences.batch([n]).to(device), (0,)) for n in two])
    rounding = _ROUNDING.get(next(model.parameters()).dtype, _ROUNDING_OF_16_BITS)
    allowed = 2 * (padded - alone).norm() + _ROUNDING[torch.float64] * alone.norm()
    return bool((together - alone).norm() <= allowed.minimum(rounding * alone.norm()))


def attention_configs(model: nn.Module) -> list[Any]:
    """The configurations that a model's modules choose their attention by."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [c for c in found.values() if getattr(c, "_attn_implementation", None) is not None]


def _ends(model: nn.Module, batch: Batch, wanted: tuple[int, ...] = (0, -1)) -> Tensor:
    """Logits of some sequences' first and last positions, sequence by sequence, float64.

    What a recurrence carries over from another sequence shows first; what a window cuts off, last.
    """
    with attending_within(model, batch):
        logits, _ = CAUSAL_LM.forward(model, batch.inputs)  # as in a pass
    sequences = logits if batch.packed is None else logits[0].split(batch.packed)
    lengths = batch.grid("").lengths
    found = []
    for number in wanted:
        rows = sequences[number][: lengths[number]]
        found += [rows[:_COMPARED], rows[-_COMPARED:]]
    return torch.cat(found).double()


def _unchanged(routed: Routed) -> Tensor:
    return routed.outputs


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [1, M, H, D] of queries, keys and values [1, H, M, D], sequence by sequence."""
    if attention_mask is not None:
        raise ValueError("a packed batch has no mask")
    config: Any = module.config
    lengths = _LENGTHS[id(config)]
    if (kwargs.get("sliding_window") or max(lengths)) < max(lengths):
        raise ValueError("a sequence is longer than its attention's window")
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    outputs = [
        sdpa_attention_forward(module, q, k, v, attention_mask=None, **kwargs)[0]
        for q, k, v in parts
    ]
    return torch.cat(outputs, 1), None
