"""Rotary position embeddings whose frequencies depend on the longest sequence of a batch.

With longrope (Phi-3), a batch with a sequence longer than the model was first trained on gets other
frequencies. With dynamic NTK, a longer batch changes the frequencies, which then stay for the next
batch. A sequence's result must be that of the sequence alone in a fresh model: so sequences longer
than that share a batch only with others of their length, and frequencies are reset before each
forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_FREQUENCIES = "inv_freq"
_CACHED = "max_seq_len_cached"
_LONGROPE, _DYNAMIC = "longrope", "dynamic"


def equal_lengths_above(model: nn.Module) -> int | None:
    """The longest sequence, in positions, that may share a batch with sequences of other lengths.

    None if the model's frequencies are fixed, so that there is no such limit.
    """
    limits = []
    for module in changing_embeddings(model):
        for layer_type, kind in _frequency_kinds(module).items():
            if _DYNAMIC in kind:
                limits.append(int(module.original_max_seq_len))
            elif kind == _LONGROPE:
                settings = module.config.rope_parameters
                settings = settings[layer_type] if layer_type else settings
                limits.append(int(settings["original_max_position_embeddings"]))
    return min(limits, default=None)


def changing_embeddings(model: nn.Module) -> list[Any]:
    """The rotary embeddings of a model whose frequencies a forward may change."""
    return [m for m in model.modules() if any(map(_may_change, _frequency_kinds(m).values()))]


def reset_frequencies(embeddings: list[Any]) -> None:
    """Gives rotary embeddings the frequencies of a fresh model."""
    for module in embeddings:
        for layer_type, kind in _frequency_kinds(module).items():
            if not _may_change(kind):
                continue
            prefix = f"{layer_type}_" if layer_type else ""
            frequencies: Tensor = getattr(module, prefix + _FREQUENCIES)
            original: Tensor = getattr(module, f"{prefix}original_{_FREQUENCIES}")
            setattr(module, prefix + _FREQUENCIES, original.to(frequencies.device, copy=True))
            setattr(module, prefix + _CACHED, module.original_max_seq_len)


@contextmanager
def frequencies_kept(model: nn.Module) -> Iterator[None]:
    """Restores a model's frequencies on the way out."""
    before = [
        (module, name, value.clone() if isinstance(value, Tensor) else value)
        for module in changing_embeddings(model)
        for name, value in {**vars(module), **dict(module.named_buffers(recurse=False))}.items()
        if name.endswith((_FREQUENCIES, _CACHED))
    ]
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _frequency_kinds(module: nn.Module) -> dict[str, str]:
    """{type of layer: kind of frequencies} of a rotary embedding; "" if all layers share one."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        return {"": kinds}
    if not isinstance(kinds, dict):
        return {}
    return {layer_type: kind for layer_type, kind in kinds.items() if isinstance(kind, str)}


def _may_change(kind: str) -> bool:
    """Whether frequencies of a kind may change in a forward."""
    return _DYNAMIC in kind or kind == _LONGROPE
