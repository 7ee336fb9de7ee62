"""Sequences of unequal lengths in one row, without padding: attention sequence by sequence.

`position_ids` begin anew with each sequence, and all but attention computes position by position.
Attention is computed of each sequence alone, so nothing is computed between sequences; it is put
into the registry that `transformers` chooses attention from, for as long as a packed batch lasts.
Attention that knows by itself where sequences begin (flash attention) is left as it is.

Whether a model computes so is not taken from its name: what it says of two sequences in one row is
compared with what it says of each alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ekfac_dist.data.batches import Batch
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.models.experts import Routed, fused_experts, listening

IMPLEMENTATION = "ekfac_dist_packed"

# Lengths of a packed batch's sequences, by the identity of the configuration that attention has.
_LENGTHS: dict[int, tuple[int, ...]] = {}

# Positions at either end of a sequence whose logits are compared.
_COMPARED = 32

_PACKABLE = {"sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4"}


@contextmanager
def attending_within(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Within it, the sequences of a packed batch do not see each other."""
    configs = _attention_configs(model) if batch.packed is not None else []
    before = [config._attn_implementation for config in configs]
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
def can_pack(model: nn.Module, sequences: Sequences, device: torch.device) -> bool:
    """Whether a model gives the same logits for sequences in one row as for each alone.

    Seen on the longest sequence, after the shortest: attention that is cut to a window or a chunk
    shows by the longest, if it does at all.

    Args:
        model: A prepared model.
        sequences: The run's sequences.
        device: The model's.
    """
    configs = _attention_configs(model)
    implementations = {config._attn_implementation for config in configs}
    if len(implementations) != 1 or not implementations <= _PACKABLE:
        return False
    order = sequences.num_positions.argsort(kind="stable")
    numbers = [int(order[0]), int(order[-1])]
    if sequences.num_positions[numbers[0]] == sequences.num_positions[numbers[1]]:
        return False  # there is nothing to pad
    experts = dict.fromkeys(fused_experts(model).values(), _unchanged)  # as in a pass
    with listening(experts):
        try:
            together = _ends(model, sequences.packing().batch(numbers).to(device))
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
            return False  # it takes no position_ids, or its attention is no plain one
        padded = _ends(model, sequences.batch(numbers).to(device))
        alone = torch.cat([_ends(model, sequences.batch([n]).to(device)) for n in numbers])
    if together.shape != alone.shape:
        return False
    # As near as a padded batch is, which rounds differently too: no tolerance by dtype is needed.
    rounding = torch.finfo(torch.float32).eps * alone.norm()
    return bool((together - alone).norm() <= 2 * (padded - alone).norm() + 8 * rounding)


def _attention_configs(model: nn.Module) -> list[Any]:
    """The configurations that a model's modules choose their attention by."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [c for c in found.values() if getattr(c, "_attn_implementation", None) is not None]


def _ends(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of each sequence's first and last positions, sequence by sequence, float64.

    What a recurrence carries over from another sequence shows first; what a window cuts off, last.
    """
    inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "labels"}
    with attending_within(model, batch):
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
    grid, width = batch.grid(""), batch.inputs["input_ids"].shape[1]
    starts = range(0, grid.size, width) if batch.packed is None else [0, *accumulate(batch.packed)]
    found = []
    for start, length in zip(starts, grid.lengths, strict=False):
        rows = logits[start : start + length]
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
