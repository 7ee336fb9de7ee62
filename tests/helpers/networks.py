"""Tiny causal language models of several families, and tiny token data, in float64."""

import torch
import transformers

VOCAB = 29


def _common(**settings):
    return {"vocab_size": VOCAB, "max_position_embeddings": 32, **settings}


def _rope(hidden=12, ffn=14, layers=2, heads=2):
    return _common(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_rope()),
    "llama_bias": lambda: transformers.LlamaConfig(**_rope(), mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**_rope()),
    "qwen2": lambda: transformers.Qwen2Config(**_rope()),
    "qwen3": lambda: transformers.Qwen3Config(**_rope(), head_dim=6),
    "gemma2": lambda: transformers.Gemma2Config(**_rope(), head_dim=6),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_rope(), head_dim=6),
    "olmo2": lambda: transformers.Olmo2Config(**_rope()),
    "phi3": lambda: transformers.Phi3Config(**_rope()),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=12, n_layer=2, n_head=2, n_inner=14
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **_common(hidden_size=12, intermediate_size=14, num_hidden_layers=2, num_attention_heads=1)
    ),
    "opt": lambda: transformers.OPTConfig(
        **_common(
            hidden_size=12,
            ffn_dim=14,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=12,
            pad_token_id=1,
        )
    ),
}

# Kinds of MLP: gated without and with biases, Conv1D with biases, plain with biases.
KINDS = ("llama", "llama_bias", "gpt2", "gpt_neox", "opt")


def build(family, seed=0):
    """A random model with visible structure: larger weights than its initialisation's."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def examples(number=12, seed=0, longest=9, prompts=False):
    """Token sequences of ragged lengths, anisotropic; some with a prompt that has no label."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.linspace(1, 8, VOCAB) ** 2
    found = []
    for _ in range(number):
        length = int(torch.randint(2, longest + 1, (1,), generator=generator))
        ids = torch.multinomial(weights, length, True, generator=generator)
        labels = ids.clone()
        if prompts:
            labels[: int(torch.randint(0, length - 1, (1,), generator=generator))] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def shifted(example):
    """(inputs, targets) of an example, by the definition of a counted position."""
    ids, labels = example["input_ids"], example["labels"]
    last = max(t for t in range(1, len(ids)) if labels[t] != -100)
    return ids[:last], labels[1 : last + 1]
