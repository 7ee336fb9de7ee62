"""Tiny random models of any causal-LM family of this `transformers`, from configurations alone.

One table of small sizes serves every family, by the names that their configurations use; a family
that needs something else of its own has it in `OWN`.
"""

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY = 29
_SIZES = {
    29: "vocab_size vocab_size_per_layer_input",
    16: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim",
    12: """intermediate_size ffn_dim d_ff n_inner d_inner ffn_hidden_size decoder_ffn_dim
        encoder_ffn_dim feed_forward_size intermediate_size_mlp""",
    10: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size",
    8: """head_dim d_kv q_lora_rank kv_lora_rank v_head_dim index_head_dim
        hidden_size_per_layer_input""",
    4: """num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim
        qk_nope_head_dim index_topk rotary_dim""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        num_attention_heads n_head n_heads num_heads decoder_attention_heads
        encoder_attention_heads num_key_value_heads num_experts_per_tok moe_topk top_k moe_k
        index_n_heads eos_token_id""",
    32: "max_position_embeddings n_positions n_ctx max_seq_len",
    1: "n_group topk_group first_k_dense_replace bos_token_id",
    0: "pad_token_id num_kv_shared_layers",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
OWN = {
    "DeepseekV3Config": {"head_dim": 4},
    "AXK1Config": {"head_dim": 4},
    "LongcatFlashConfig": {"head_dim": 4},
    "YoutuConfig": {"head_dim": 4},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "XGLMConfig": {"attention_heads": 2, "scale_embedding": False},
    "XmodConfig": {"default_language": "en_XX"},
    "XLMConfig": {"causal": True},
    "MptConfig": {"expansion_ratio": 1},
    "BloomConfig": {"n_head": 2},
    "CTRLConfig": {"dff": 12},
    "MiMoV2FlashConfig": {"partial_rotary_factor": 1.0, "num_key_value_heads": 1},
    "BambaConfig": {"mamba_n_heads": 4, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "FalconH1Config": {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_ssm": 16},
    "GraniteMoeHybridConfig": {
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "CodeGenConfig": {"num_attention_heads": 4},
    "Dots1Config": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba2Config": {"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "RoCBertConfig": {
        "pronunciation_vocab_size": 29,
        "pronunciation_embed_dim": 4,
        "shape_vocab_size": 29,
        "shape_embed_dim": 4,
    },
    "ZayaConfig": {"num_experts_per_tok": 1, "router_hidden_size": 8},
    "ZambaConfig": {"layers_block_type": ["hybrid", "hybrid"]},
    "CohereCompassTextConfig": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            }
        }
    },
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8},
    "Dots3NoteTextConfig": {"layer_types": ["indexed_attention"] * 2, "head_dim": 8},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "BltConfig": {"encoder_hash_byte_group_vocab": 50},
    "BltLocalEncoderConfig": {"hidden_size_global": 16},
    "BltLocalDecoderConfig": {"hidden_size_global": 16},
    "Phi4MultimodalAudioConfig": {
        "nemo_conv_channels": 8,
        "ext_pw_out_channel": 16,
        "num_blocks": 2,
    },
    "Gemma4TextConfig": {"global_head_dim": 8},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 8},
    "MusicgenDecoderConfig": {"num_codebooks": 1},
    "MusicgenMelodyDecoderConfig": {"num_codebooks": 1},
}


def tiny_config(config_class, **changes):
    """A family's configuration with small sizes."""
    plain = config_class()
    plain.allow_global_per_layer_attribute_access = True  # a size that differs between layers
    names = set(plain.to_dict()) | set(getattr(config_class, "attribute_map", {}))
    settings = {
        name: size
        for name, size in _SMALL.items()
        if name in names and not isinstance(getattr(plain, name, None), (list, dict))
    }
    if "is_decoder" in names:
        settings["is_decoder"] = True  # of a model that may be an encoder too
    for name in ("layer_types", "mlp_layer_types"):
        name = config_class.attribute_map.get(name, name)
        kinds = getattr(plain, name, None)
        if isinstance(kinds, list) and kinds and not _is_computed(config_class, name):
            distinct = list(dict.fromkeys(kinds))[:2]
            settings[name] = distinct if len(distinct) == 2 else distinct * 2
    for name in config_class.sub_configs:  # of an encoder of images, say
        part = getattr(plain, name, None)
        if isinstance(part, transformers.PreTrainedConfig):
            settings[name] = tiny_config(type(part))
    return config_class(**(settings | OWN.get(config_class.__name__, {}) | changes))


def _is_computed(config_class, name):
    found = getattr(config_class, name, None)
    return isinstance(found, property) and found.fset is None


def tiny_model(name, seed=0, **changes):
    """A random model, in float64, with larger weights than at initialisation.

    Args:
        name: Name of the model's class.
    """
    torch.manual_seed(seed)
    config_class = config_classes()[name]
    model = getattr(transformers, name)(tiny_config(config_class, **changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def config_classes():
    """Every causal-LM class's configuration, by the class's name."""
    models = MODEL_FOR_CAUSAL_LM_MAPPING.values()
    models = (model[0] if isinstance(model, tuple) else model for model in models)
    return {model.__name__: model.config_class for model in models}


# Compared with dense autograd in tests/oracles: plain MLPs, and mixtures of experts.
PLAIN = [
    *("ApertusForCausalLM", "ArceeForCausalLM", "BartForCausalLM", "BertLMHeadModel"),
    *("BioGptForCausalLM", "BitNetForCausalLM", "BloomForCausalLM", "CTRLLMHeadModel"),
    *("CohereForCausalLM", "DiffLlamaForCausalLM", "Exaone4ForCausalLM", "FalconForCausalLM"),
    *("GPTBigCodeForCausalLM", "GPTJForCausalLM", "GPTNeoForCausalLM", "Gemma2ForCausalLM"),
    *("Glm4ForCausalLM", "GraniteForCausalLM", "ModernBertDecoderForCausalLM", "MptForCausalLM"),
    *("NemotronForCausalLM", "OlmoHybridForCausalLM", "OpenAIGPTLMHeadModel"),
    *("PersimmonForCausalLM", "PhiForCausalLM", "RwkvForCausalLM", "StableLmForCausalLM"),
    *("Starcoder2ForCausalLM", "VaultGemmaForCausalLM", "WhisperForCausalLM"),
    "XLMWithLMHeadModel",
]
WITH_EXPERTS = [
    *("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"),
    *("GptOssForCausalLM", "DeepseekV3ForCausalLM"),
]
