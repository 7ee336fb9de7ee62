"""Sequences of unequal lengths in one row, without padding: attention sequence by sequence.

`position_ids` begin anew with each sequence, and all but attention computes position by position.
Attention is computed of each sequence alone, so nothing is computed between sequences; it is in
the registry that `transformers` chooses attention from, and chosen for as long as a packed batch
lasts.
Attention that knows by itself where sequences begin (flash attention) is left as it is.

Whether a model computes so is not taken from its name: `batch_checks` tries it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ekfac_dist.data.batches import Batch

IMPLEMENTATION = "ekfac_dist_packed"

# Lengths of a packed batch's sequences, by the identity of the configuration that attention has.
_LENGTHS: dict[int, tuple[int, ...]] = {}


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


def is_packable(model: nn.Module) -> bool:
    """Whether a model has one kind of attention, of those that a packed batch can have."""
    implementations = {config._attn_implementation for config in attention_configs(model)}
    return len(implementations) == 1 and implementations <= _PACKABLE


def attention_configs(model: nn.Module) -> list[Any]:
    """The configurations that a model's modules choose their attention by."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [c for c in found.values() if getattr(c, "_attn_implementation", None) is not None]


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
