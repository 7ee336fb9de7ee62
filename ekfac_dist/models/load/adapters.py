"""PEFT LoRA adapters: loading one, and distinguishing its matrices from the model's own.

An adapter turns a linear map's weight W into W + s·B A. Its matrices A (`lora_A`, r×I) and B
(`lora_B`, O×r) are linear maps of their own; they and the original one (`base_layer`) are children
of one wrapper module.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor, nn
from transformers.utils import cached_file

from ekfac_dist.errors import ModelError, first_line

_PARTS = ("lora_A", "lora_B")
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError)


def is_adapters(name: str) -> bool:
    """Whether a module, by name, was trained with an adapter: LoRA matrices, or full copies."""
    return any(part in (*_PARTS, "modules_to_save") for part in name.split("."))


def is_trained_bias(model: Any, name: str) -> bool:
    """Whether a parameter is one of the model's own biases that was trained with the adapter."""
    bias_settings = {
        getattr(settings, "bias", "none") for settings in getattr(model, "peft_config", {}).values()
    }
    if not name.endswith("bias") or ".original_module." in name:
        return False
    return "all" in bias_settings or ("lora_only" in bias_settings and ".base_layer." in name)


def base_layer(name: str, linears: Mapping[str, nn.Module]) -> str:
    """The linear map that an adapter's matrix belongs to; any other module's own name."""
    parts = name.split(".")
    depth = next((k for k, part in enumerate(parts) if part in _PARTS), None)
    base = ".".join([*parts[:depth], "base_layer"])
    return name if depth is None or base not in linears else base


def adapted_weights(model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """The weight and bias that an adapter's `lora_A` is added to, named with the adapter's scale s.

    Nothing for any other module.
    """
    parts = name.split(".")
    depth = next((k for k, part in enumerate(parts) if part == "lora_A"), None)
    if depth is None:
        return
    wrapper: Any = model.get_submodule(".".join(parts[:depth]))
    scale = wrapper.scaling.get(parts[-1], 1.0)
    for kind, parameter in wrapper.base_layer.named_parameters(recurse=False):
        yield f"base_layer_{kind} × {scale!r}", parameter.detach()


def adapter_scales(model: nn.Module) -> Iterator[tuple[str, str]]:
    """What else determines an adapter's contribution to each linear map, as (name, text) pairs.

    That is the scales, which adapters are active, and whether they are disabled.
    """
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if hasattr(module, "base_layer") and isinstance(scaling, dict):
            active: Any = getattr(module, "active_adapters", None)
            disabled = getattr(module, "disable_adapters", False)
            yield f"{name}.scaling", f"{sorted(scaling.items())} {active} {disabled}"


def with_adapter(model: nn.Module, adapter: str, *, merge: bool) -> nn.Module:
    """A model with an adapter loaded, all of whose weights must be in its file.

    Args:
        model: The model.
        adapter: Hub id or local directory.
        merge: Whether to merge it into the model's weights.

    Raises:
        ModelError: If the adapter cannot be found, read or merged, is no LoRA adapter, or belongs
            to another model; or if `peft` is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            "model.adapter needs the package peft; install it: pip install 'ekfac_dist[peft]'."
        ) from error
    path = Path(adapter)
    if path.is_dir() and not (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{adapter} is a directory without an adapter_config.json; give the directory of a "
            "saved PEFT adapter."
        )
    if path.is_dir() and not (path / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"Adapter {adapter} has no adapter_model.safetensors; save it again with "
            "save_pretrained(directory), which writes safetensors."
        )
    base: Any = model
    try:
        adapted: Any = peft.PeftModel.from_pretrained(base, adapter, use_safetensors=True)
    except safetensors.SafetensorError as error:
        raise ModelError(f"Adapter {adapter} is damaged: {first_line(error)}.") from error
    except _LOAD_ERRORS as error:
        raise ModelError(
            f"Adapter {adapter} could not be put on {type(model).__name__}: {first_line(error)}."
        ) from error
    settings = adapted.peft_config["default"]
    if settings.peft_type != peft.PeftType.LORA:
        raise ModelError(
            f"Adapter {adapter} is of type {settings.peft_type.value}; only LORA is supported."
        )
    _require_all_weights(adapter, adapted, peft)
    if not merge:
        return adapted
    try:
        return adapted.merge_and_unload()
    except _LOAD_ERRORS as error:
        raise ModelError(
            f"Adapter {adapter} cannot be merged: {first_line(error)}. Leave model.merge_adapter "
            "off, for factors of its own matrices."
        ) from error


def _require_all_weights(adapter: str, adapted: Any, peft: Any) -> None:
    """Refuses an adapter whose file lacks weights, or has some that the model has no place for."""
    file_name = cached_file(adapter, "adapter_model.safetensors")
    with safetensors.safe_open(file_name, framework="pt") as file:
        stored = set(file.keys())
    expected = set(peft.get_peft_model_state_dict(adapted))
    stored -= set(adapted.state_dict()) - expected  # embeddings may be saved with the adapter
    if stored != expected:
        name = min(stored ^ expected)
        fault = "the adapter lacks" if name in expected else "the model has no place for"
        raise ModelError(
            f"Adapter {adapter} is not of this model: {fault} {name} (and "
            f"{len(stored ^ expected) - 1} others)."
        )
