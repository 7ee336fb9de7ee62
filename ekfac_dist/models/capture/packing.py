"""Packed batches: sequences of unequal lengths concatenated without padding.

`position_ids` begin at 0 for each sequence, and everything except attention is computed position by
position. Attention is computed for each sequence separately, so sequences do not see each other.
This attention is registered where `transformers` looks attention up, and selected while a packed
batch is computed. Attention that recognises where sequences begin (flash attention) is left as it
is.

Whether a model computes so is not decided by its name: `batch_checks` tries it.
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

# Lengths of a packed batch's sequences, by the `id` of the configuration that attention uses.
_LENGTHS: dict[int, tuple[int, ...]] = {}

# Attention kernels that a packed batch can use.
_PACKABLE = {"sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4"}


@contextmanager
def attending_within(model: nn.Module, batch: Batch) -> Iterator[None]:
    """While it lasts, the sequences of a packed batch do not attend to each other."""
    configs = attention_configs(model) if batch.packed is not None else []
    before = [config._attn_implementation for config in configs]
    if configs:
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend_within_sequences)
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
    """Whether all of a model's attention uses the same kernel, one that packed batches can use."""
    implementations = {config._attn_implementation for config in attention_configs(model)}
    return len(implementations) == 1 and implementations <= _PACKABLE


def attention_configs(model: nn.Module) -> list[Any]:
    """The configurations from which a model's modules look their attention up."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [c for c in configs.values() if getattr(c, "_attn_implementation", None) is not None]


def _attend_within_sequences(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention, sequence by sequence.

    Args:
        module: The attention module.
        query: [1, H, M, D].
        key: [1, H, M, D].
        value: [1, H, M, D].
        attention_mask: None.
        **kwargs: What `transformers` passes to its own kernels.

    Returns:
        [1, M, H, D], and no weights.
    """
    if attention_mask is not None:
        raise ValueError("a packed batch has no mask")
    config: Any = module.config
    lengths = _LENGTHS[id(config)]
    if (kwargs.get("sliding_window") or max(lengths)) < max(lengths):
        raise ValueError("a sequence is longer than its attention's window")
    by_sequence = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True)
    outputs = [
        sdpa_attention_forward(module, q, k, v, attention_mask=None, **kwargs)[0]
        for q, k, v in by_sequence
    ]
    return torch.cat(outputs, 1), None
