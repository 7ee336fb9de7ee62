"""Loading a causal language model and its tokenizer from a local directory or the hub."""

import hashlib
import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils.quantization_config import Mxfp4Config

from ekfac_dist.config import ModelConfig
from ekfac_dist.errors import ModelError, first_line
from ekfac_dist.models.load.adapters import with_adapter
from ekfac_dist.models.load.gguf_file import (
    dequantising,
    forget_quantisation,
    gguf_path,
    has_tokenizer,
    settings_in,
    without_progress_bar,
)

_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError)


def load_model(config: ModelConfig, device: torch.device) -> nn.Module:
    """Loads a model in the configured dtype on `device`, in evaluation mode.

    Only safetensors weights, or those of a GGUF file, are read, and every parameter must come from
    them. Those of a GGUF file are dequantised; nothing in the model tells that they were quantised.

    Raises:
        ModelError: If the model cannot be found or read, is no causal language model, has only
            pickled weights, or lacks some of its weights.
    """
    name, settings = load_settings(config)
    dtype: Any = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    if config.gguf is not None and dtype == "auto":
        dtype = torch.float32
    placement = _placement(config, settings, dtype, device)
    try:
        with without_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=config.gguf is None,
                ignore_mismatched_sizes=True,  # refused below, with their names
                output_loading_info=True,
                **_origin(config),
                **placement,
            )
    except safetensors.SafetensorError as error:
        raise ModelError(
            f"The weights of model {name} are damaged: {_brief(error)}. Copy or save them again."
        ) from error
    except _LOAD_ERRORS as error:
        raise ModelError(f"Model {name} could not be loaded: {_brief(error)}.") from error
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(str(k[0]) for k in report["mismatched_keys"])
    if missing:
        raise ModelError(
            f"The weights of model {name} lack {len(missing)} of its parameters, or hold them in "
            f"another shape, {missing[0]} among them; they would be random. Give the directory of "
            "a whole causal language model."
        )
    _keep_weights(model)
    if _is_mxfp4(settings) and config.dtype != "auto":
        model = model.to(dtype)  # weights that were packed come out as bfloat16
    if config.gguf is not None:
        forget_quantisation(model)
    if config.adapter is not None:
        model = with_adapter(model, config.adapter, merge=config.merge_adapter)
    return model.eval() if "device_map" in placement else model.to(device).eval()


def _placement(
    config: ModelConfig, settings: Any, dtype: Any, device: torch.device
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say where weights go, and whether they are quantised."""
    placement: dict[str, Any] = {}
    quantised = config.quantization or getattr(settings, "quantization_config", None)
    # On a GPU, so that no worker holds all weights in its host's memory first.
    if quantised or (device.type == "cuda" and config.gguf is None and config.adapter is None):
        placement["device_map"] = {"": str(device)}
    if config.device_map is not None:
        placement["device_map"] = config.device_map
    if config.quantization is not None:
        placement["quantization_config"] = _quantization(config, dtype)
    elif _is_mxfp4(settings):
        # As it stands on a CPU: the kernels that multiply by MXFP4 have no backward.
        placement["quantization_config"] = Mxfp4Config(dequantize=True)
    elif config.gguf is not None:
        placement |= dequantising(settings)
    return placement


def _keep_weights(model: Any) -> None:
    """Keeps RWKV from halving its own weights when it runs; its outputs are the same."""
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0


def loads_quantised(config: ModelConfig, *, with_weights: bool) -> bool:
    """Whether a model will be quantised when loaded, or was saved so and stays so.

    Args:
        config: The model's configuration.
        with_weights: Whether a local model without safetensors weights is refused.

    Raises:
        ModelError: If there is no such causal language model.
    """
    _, settings = load_settings(config, with_weights=with_weights)
    if config.quantization is None and _is_mxfp4(settings):
        return False
    return bool(config.quantization or getattr(settings, "quantization_config", None))


def _is_mxfp4(settings: Any) -> bool:
    """Whether a model's weights are packed as MXFP4, as gpt-oss is published."""
    packed = getattr(settings, "quantization_config", None) or {}
    if not isinstance(packed, dict):
        packed = packed.to_dict()
    return packed.get("quant_method") == "mxfp4"


def without_weights(config: ModelConfig) -> nn.Module:
    """The model built from its configuration on the meta device; no weights are read.

    Raises:
        ModelError: If there is no such causal language model, or it cannot be built so.
    """
    name, settings = load_settings(config, with_weights=False)
    dtype: Any = getattr(settings, "dtype", None) or torch.float32
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                settings, dtype=dtype, trust_remote_code=config.trust_remote_code
            )
    except Exception as error:
        raise ModelError(
            f"Model {name} cannot be built from its configuration alone: {first_line(error)}."
        ) from error
    _keep_weights(model)
    return model.requires_grad_(False).eval()


def random_model(config: ModelConfig, device: torch.device, seed: int) -> nn.Module:
    """The model built from its configuration, with random weights, in evaluation mode.

    Args:
        config: The model's configuration.
        device: Where it is.
        seed: Seed of the weights, which are drawn on the CPU.

    Raises:
        ModelError: If there is no such causal language model, or it cannot be built so.
    """
    name, settings = load_settings(config, with_weights=False)
    dtype: Any = "float32" if config.dtype == "auto" else config.dtype
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                settings,
                dtype=getattr(torch, dtype),
                trust_remote_code=config.trust_remote_code,
            )
    except Exception as error:
        raise ModelError(
            f"Model {name} cannot be built from its configuration alone: {first_line(error)}."
        ) from error
    _keep_weights(model)
    return model.to(device).eval()


def _quantization(config: ModelConfig, dtype: Any) -> Any:
    """The quantisation settings for `transformers`.

    Raises:
        ModelError: If bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization {config.quantization} needs the package bitsandbytes; install it: "
            "pip install 'ekfac_dist[quantized]'."
        )
    return BitsAndBytesConfig(
        load_in_8bit=config.quantization == "8bit",
        load_in_4bit=config.quantization == "4bit",
        bnb_4bit_compute_dtype=None if dtype == "auto" else dtype,
    )


def load_tokenizer(config: ModelConfig, *, with_weights: bool = True) -> tuple[Any, str]:
    """The model's tokenizer, and a SHA-256 over its class, vocabulary and settings.

    Args:
        config: The model's configuration.
        with_weights: Whether a local model without safetensors weights is refused.

    Raises:
        ModelError: If there is no such causal language model, or its tokenizer cannot be loaded.
    """
    # Fails before a long text is tokenised in vain.
    name, _ = load_settings(config, with_weights=with_weights)
    origin = _origin(config)
    if config.gguf is not None and has_tokenizer(Path(name)):
        del origin["gguf_file"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **origin)
    except _LOAD_ERRORS as error:
        raise ModelError(
            f"The tokenizer of model {name} could not be loaded: {_brief(error)}. Put the "
            "tokenizer's files beside the model's."
        ) from error
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    if getattr(tokenizer, "is_fast", False):
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    else:
        digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(repr(tokenizer).encode())
    return tokenizer, digest.hexdigest()


def context_length(model: nn.Module) -> int | None:
    """Longest input in tokens that the model's configuration allows; None if it sets no limit."""
    settings = getattr(model, "config", None)
    names = ["max_position_embeddings", "n_positions"]
    if getattr(settings, "is_encoder_decoder", False):
        names = names[:1]  # T5's n_positions sets no limit: its positions are relative
    values = [getattr(settings, name, None) for name in names]
    limits = [limit for limit in values if isinstance(limit, int) and limit > 0][:1]
    for name, module in model.named_modules():
        is_positions = isinstance(module, nn.Embedding) and "position_embeddings" in name
        if is_positions and module.padding_idx is not None:  # RoBERTa's positions begin after it
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits, default=None)


def _origin(config: ModelConfig) -> dict[str, Any]:
    """Keyword arguments common to all `from_pretrained` calls."""
    if config.gguf is not None:  # brings no code
        return {"gguf_file": str(gguf_path(config))}
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def load_settings(config: ModelConfig, *, with_weights: bool = True) -> tuple[str, Any]:
    """Reads a model's configuration; refuses what is no causal language model.

    Args:
        config: The model's configuration in the run.
        with_weights: Whether a directory without safetensors weights is refused, too.

    Returns:
        Where `transformers` finds the model, by name or directory, and its configuration there.

    Raises:
        ModelError: If the model is refused, or not found.
    """
    assert config.name is not None
    name = config.name
    _hush_transformers()
    _check_directory(config, with_weights)
    try:
        if config.gguf is None:
            settings = AutoConfig.from_pretrained(name, **_origin(config))
        else:
            path = gguf_path(config)
            name = str(path.parent)
            settings = settings_in(path)
    except _LOAD_ERRORS as error:
        raise ModelError(f"Model {name} could not be loaded: {_brief(error)}.") from error
    brings_code = "AutoModelForCausalLM" in (getattr(settings, "auto_map", None) or {})
    if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING and not brings_code:
        raise ModelError(
            f"Model {name} is of type {settings.model_type!r}, which is no causal language "
            "model that transformers knows; give one that is."
        )
    return name, settings


def _check_directory(config: ModelConfig, with_weights: bool) -> None:
    name = str(config.name)
    path = Path(name)
    if path.is_file():
        also = f", and model.gguf: {path.name}" if path.suffix.lower() == ".gguf" else ""
        raise ModelError(f"model.name is the file {name}; give the directory that it is in{also}.")
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(
                f"There is no model directory {name}; model.name is a directory that exists, or a "
                "hub id."
            )
        return
    if config.gguf is not None:
        return  # the file holds all
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        also = f", or set model.gguf to {files[0].name}" if files else ""
        raise ModelError(
            f"{name} is a directory without a config.json; give the directory of a saved Hugging "
            f"Face model{also}."
        )
    if with_weights and not any(path.glob("*.safetensors")):
        pickled = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
        if pickled:
            raise ModelError(
                f"Model {name} has only pickled weights ({pickled[0].name}), which can run code "
                "when they are read; save it again with safetensors: "
                "model.save_pretrained(directory)."
            )
        raise ModelError(
            f"Model {name} has no safetensors weights; save it with "
            "model.save_pretrained(directory)."
        )


def _hush_transformers() -> None:
    """Turns off the libraries' progress bars, load reports and warnings; errors are raised here."""
    transformers.utils.logging.disable_progress_bar()
    for library in ("transformers", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="MatMul8bitLt")  # warned at every product


def _brief(error: BaseException) -> str:
    """The first two lines of an error's text, in one line; else the error's class."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(" .,:;!") or type(error).__name__
