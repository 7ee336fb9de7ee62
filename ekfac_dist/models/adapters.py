"""PEFT LoRA adapters: putting one on a model, and telling its matrices from the model's own.

Of a linear map with weight W an adapter makes W + s·B A. A (`lora_A`, r×I) and B (`lora_B`, O×r)
are linear maps of their own beside the first one (`base_layer`).
"""

from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from ekfac_dist.errors import ModelError, first_line

_PARTS = ("lora_A", "lora_B")
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError)


def is_adapters(name: str) -> bool:
    """Whether a module, by its name, is one of an adapter's matrices."""
    return any(part in _PARTS for part in name.split("."))


def with_adapter(model: nn.Module, adapter: str, *, merge: bool) -> nn.Module:
    """A model with an adapter, whose weights must all be there.

    Args:
        model: The model.
        adapter: Hub id or local directory.
        merge: Whether to merge it into the model's weights.

    Raises:
        ModelError: It cannot be found or read, is of another model, or `peft` is not installed.
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
    _require_whole(adapter, path, adapted, peft)
    return adapted.merge_and_unload() if merge else adapted


def _require_whole(adapter: str, path: Path, adapted: Any, peft: Any) -> None:
    """Refuses weights that the adapter's file lacks, or that the model has no place for."""
    if not path.is_dir():
        return
    with safetensors.safe_open(path / "adapter_model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    wanted = set(peft.get_peft_model_state_dict(adapted))
    if stored != wanted:
        name = min(stored ^ wanted)
        where = "the adapter lacks" if name in wanted else "the model has no place for"
        raise ModelError(
            f"Adapter {adapter} is not of this model: {where} {name} (and "
            f"{len(stored ^ wanted) - 1} others)."
        )
