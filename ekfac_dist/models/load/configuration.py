"""The fields of a model's configuration that its outputs depend on.

Two models of one class with equal fields and equal weights compute the same, up to rounding.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ekfac_dist.models.sharding import class_of

# Fields that outputs do not depend on, and why. All others count, in nested configurations too.
_IRRELEVANT = {
    # origin of the model, and the software that saved it
    "_name_or_path",
    "_model_name_or_path",
    "_commit_hash",
    "architectures",
    "auto_map",
    "transformers_version",
    # storage of its weights; the weights themselves are compared
    "dtype",
    "torch_dtype",
    "quantization_config",
    # outputs besides the logits, and caches for the next forward
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    # kernels that differ in rounding only; see `attention_implementation` for the first
    "_attn_implementation",
    "_experts_implementation",
    "chunk_size_feed_forward",
    "pretraining_tp",
    # labels for people, and settings of generation and training
    "id2label",
    "label2id",
    "problem_type",
    "task_specific_params",
    "tokenizer_class",
    "generation_config",
    "router_aux_loss_coef",
    "gradient_checkpointing",
}
# Settings of training: dropout is off in every pass, and weights are loaded, not initialised.
_TRAINING_SETTINGS = re.compile(r"dropout|pdrop|layerdrop|^init|initializer")
# A causal language model ignores these in a forward. Others use them: a classifier searches for the
# last token before the padding, an encoder-decoder shifts labels.
_SPECIAL_TOKENS = {"bos_token_id", "eos_token_id", "sep_token_id", "pad_token_id"}


def configuration(model: nn.Module) -> dict[str, Any]:
    """The fields of a model's configuration that its outputs depend on, as JSON values by name.

    Args:
        model: Any model; {} unless it is a Hugging Face model.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    ignored = _IRRELEVANT
    base: Any = getattr(model, "get_base_model", lambda: model)()
    if class_of(base).__name__ in _CAUSAL_LMS and not _positions_follow_padding_id(base):
        ignored = ignored | _SPECIAL_TOKENS
    return _relevant_fields(config.to_dict(), ignored)


def attention_implementation(model: nn.Module) -> str | None:
    """The attention kernel of a Hugging Face model, such as "sdpa"; None for other models."""
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return None if implementation is None else str(implementation)


_CAUSAL_LMS = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def _positions_follow_padding_id(model: nn.Module) -> bool:
    """Whether position ids begin after the padding token's id, as RoBERTa's do."""
    return any(
        isinstance(module, nn.Embedding)
        and "position_embeddings" in name
        and module.padding_idx is not None
        for name, module in model.named_modules()
    )


def _relevant_fields(fields: Mapping[Any, Any], ignored: set[str]) -> dict[str, Any]:
    """The fields that count, as JSON values, without the ignored and those of training."""
    return {
        str(name): _json_value(value, ignored)
        for name, value in fields.items()
        if str(name) not in ignored and not _TRAINING_SETTINGS.search(str(name))
    }


def _json_value(value: Any, ignored: set[str]) -> Any:
    """A value as JSON has it; the name of its type where JSON has no such value."""
    if isinstance(value, Mapping):
        return _relevant_fields(value, ignored)
    if isinstance(value, (list, tuple, set, frozenset)):
        elements = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [_json_value(element, ignored) for element in elements]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value) if type(value).__module__ == "torch" else type(value).__name__
