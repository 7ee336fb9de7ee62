"""What of a model's configuration its numbers depend on."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ekfac_dist.models.sharding import class_of

# Fields that change no number, and why. All others count, those of nested configurations too.
_CHANGE_NOTHING = {
    # where the model is from, and with what it was saved
    "_name_or_path",
    "_commit_hash",
    "architectures",
    "auto_map",
    "transformers_version",
    # how its weights are held; they are compared themselves
    "dtype",
    "torch_dtype",
    "quantization_config",
    # what a forward gives beside the logits, and what it keeps for the next one
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    # the same products by another kernel, in another order; the first is kept beside these fields
    "_attn_implementation",
    "_experts_implementation",
    "chunk_size_feed_forward",
    "pretraining_tp",
    # names for people, and settings of text that is generated or trained on
    "id2label",
    "label2id",
    "problem_type",
    "task_specific_params",
    "tokenizer_class",
    "generation_config",
    "router_aux_loss_coef",
    "gradient_checkpointing",
}
# Dropout is off in every pass, and weights are not drawn but loaded.
_OF_TRAINING = re.compile(r"dropout|pdrop|layerdrop|^init|initializer")
# A causal language model is given its tokens, and is not asked to end. Others read these: a
# classifier looks for the last token, an encoder-decoder shifts labels.
_SPECIAL_TOKENS = {"bos_token_id", "eos_token_id", "sep_token_id", "pad_token_id"}


def configuration(model: nn.Module) -> dict[str, Any]:
    """The fields of a model's configuration that its numbers depend on, as JSON has them.

    Args:
        model: A Hugging Face model; of any other there are none.
    """
    settings: Any = getattr(model, "config", None)
    if not hasattr(settings, "to_dict"):
        return {}
    left_out = _CHANGE_NOTHING
    base: Any = getattr(model, "get_base_model", lambda: model)()
    if class_of(base).__name__ in _CAUSAL_LMS and not _counts_from_padding(base):
        left_out = left_out | _SPECIAL_TOKENS
    return _counting(settings.to_dict(), left_out)


def attention_implementation(model: nn.Module) -> str | None:
    """How a Hugging Face model computes its attention, such as "sdpa"; None of any other."""
    found = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return None if found is None else str(found)


_CAUSAL_LMS = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def _counts_from_padding(model: nn.Module) -> bool:
    """Whether positions begin after the padding token's number, as RoBERTa's do."""
    return any(
        isinstance(module, nn.Embedding)
        and "position_embeddings" in name
        and module.padding_idx is not None
        for name, module in model.named_modules()
    )


def _counting(fields: Mapping[Any, Any], left_out: set[str]) -> dict[str, Any]:
    return {
        str(name): _plain(value, left_out)
        for name, value in fields.items()
        if str(name) not in left_out and not _OF_TRAINING.search(str(name))
    }


def _plain(value: Any, left_out: set[str]) -> Any:
    """A value as JSON has it; what JSON lacks, by its name."""
    if isinstance(value, Mapping):
        return _counting(value, left_out)
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [_plain(part, left_out) for part in parts]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value) if type(value).__module__ == "torch" else type(value).__name__
