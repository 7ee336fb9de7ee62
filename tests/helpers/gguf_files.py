"""GGUF files of tiny Llamas, written with the package `gguf` as llama.cpp's own converter does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers.workshop import save_tiny, tiny_llama_config, tiny_tokenizer

Q8_0, Q4_1, F16, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_1", "F16", "F32"))
CONFIG = tiny_llama_config(hidden_size=32, intermediate_size=64, num_attention_heads=2)

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def tensor_names(num_layers: int = CONFIG.num_hidden_layers) -> dict[str, str]:
    """The name in a model of each tensor of a GGUF file."""
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for layer in range(num_layers):
        for name, own in _LAYER_NAMES.items():
            names[f"blk.{layer}.{name}.weight"] = f"model.layers.{layer}.{own}.weight"
    return names


def save_tiny_gguf(directory: str | Path, kind: Any = Q8_0, *, without: str = "") -> Path:
    """A directory with tiny.gguf alone: a random Llama's weights, quantised, and a tokenizer.

    Args:
        directory: Where to; it is made.
        kind: The type of the matrices; norms are float32.
        without: Name of a tensor that is left out.

    Returns:
        The file.
    """
    plain = save_tiny(Path(directory).with_name(f"{Path(directory).name}-plain"), CONFIG)
    weights = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).state_dict()
    Path(directory).mkdir(parents=True)
    path = Path(directory, "tiny.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    _add_settings(writer)
    _add_tokenizer(writer, tiny_tokenizer())
    for name, own in tensor_names().items():
        if name != without:
            array = as_llama_cpp_orders(name, weights[own].numpy())
            own_kind = kind if array.ndim == 2 else F32
            writer.add_tensor(name, gguf.quants.quantize(array, own_kind), raw_dtype=own_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantised(path: Path) -> Mapping[str, np.ndarray]:
    """The weights of a file as the package `gguf` dequantises them, by their names in a model."""
    names = tensor_names()
    return {
        names[tensor.name]: as_llama_cpp_orders(
            tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type), back=True
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def as_llama_cpp_orders(name: str, array: np.ndarray, *, back: bool = False) -> np.ndarray:
    """Query and key weights with each head's rotated pairs adjacent, as llama.cpp has them.

    A model of `transformers` has the first halves of all pairs of a head before the second ones.
    """
    if "attn_q" not in name and "attn_k" not in name:
        return array
    heads, half = CONFIG.num_attention_heads, CONFIG.head_dim // 2
    order = np.arange(len(array)).reshape(heads, 2, half).swapaxes(1, 2).reshape(-1)
    return array[np.argsort(order) if back else order]


def _add_settings(writer: Any) -> None:
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(CONFIG.vocab_size)


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [tokenizer.convert_ids_to_tokens(k) for k in range(len(tokenizer))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
