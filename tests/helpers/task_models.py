"""Tiny models of tasks beside causal language modelling, in float64, and examples for them."""

import numpy as np
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 23


def tiny(model_class, config):
    """A random model, its norms and biases random too."""
    torch.manual_seed(0)
    model = model_class(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def bert(model_class=BertForMaskedLM, **changes):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    return tiny(
        model_class,
        BertConfig(
            **{
                **sizes,
                "vocab_size": VOCAB,
                "num_attention_heads": 2,
                "max_position_embeddings": 24,
                "num_labels": 4,
                **changes,
            }
        ),
    )


def t5(**changes):
    return tiny(
        T5ForConditionalGeneration,
        T5Config(
            **{
                "vocab_size": VOCAB,
                "d_model": 8,
                "d_kv": 4,
                "d_ff": 12,
                "num_layers": 2,
                "num_heads": 2,
                "feed_forward_proj": "gated-gelu",
                "decoder_start_token_id": 0,
                **changes,
            }
        ),
    )


def bart():
    sizes = {"d_model": 8, "encoder_ffn_dim": 12, "decoder_ffn_dim": 10, "vocab_size": VOCAB}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "max_position_embeddings": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return tiny(BartForConditionalGeneration, BartConfig(**sizes, **layers, **heads))


def masked_examples(number, seed=0):
    """Sentences with some masked tokens (token 1), and their own tokens as labels there."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        ids = draw.integers(2, VOCAB, draw.integers(3, 9))
        masked = draw.random(len(ids)) < 0.4
        masked[draw.integers(len(ids))] = True
        rows.append(
            {
                "input_ids": np.where(masked, 1, ids),
                "labels": np.where(masked, ids, -100),
                "token_type_ids": (np.arange(len(ids)) > 2).astype(np.int64),
            }
        )
    return rows


def classified_examples(number, seed=0):
    draw = np.random.default_rng(seed)
    return [
        {"input_ids": draw.integers(1, VOCAB, draw.integers(2, 9)), "labels": draw.integers(4)}
        for _ in range(number)
    ]


def translated_examples(number, seed=0):
    draw = np.random.default_rng(seed)
    return [
        {
            "input_ids": draw.integers(1, VOCAB, draw.integers(2, 9)),
            "labels": draw.integers(1, VOCAB, draw.integers(1, 7)),
        }
        for _ in range(number)
    ]
