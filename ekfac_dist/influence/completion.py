"""Lets the model go on from a prompt: what a question can be about."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from ekfac_dist.data.chats import asking, messages_of, require_template
from ekfac_dist.errors import DataError, ModelError, NonFiniteError
from ekfac_dist.models.load.pretrained import context_length
from ekfac_dist.models.modules import device_of
from ekfac_dist.models.sharding import is_sharded


def prompt_ids(tokenizer: Any, prompt: str, messages: list[dict[str, Any]] | None) -> list[int]:
    """The tokens of a prompt, or of a chat that waits for an answer.

    Raises:
        DataError: If there are none, or the chat cannot be rendered.
    """
    special = True
    if messages is not None:
        require_template(tokenizer, "messages")
        asked = [*messages, {"role": "assistant", "content": "-"}]
        prompt = asking(messages_of(asked, "messages")[:-1], tokenizer, "The prompt")
        special = False
    ids: list[int] = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    if not ids:
        raise DataError("The prompt has no token; write something for the model to go on from.")
    return ids


def complete(
    model: nn.Module,
    tokenizer: Any,
    ids: list[int],
    max_tokens: int,
    temperature: float,
    seed: int,
) -> tuple[list[int], bool]:
    """Lets a model go on from a prompt.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        ids: The prompt's tokens.
        max_tokens: Most tokens that follow.
        temperature: Of sampling; 0: the most likely token each time.
        seed: Seed of sampling.

    Returns:
        The tokens that follow, and whether the model ended there itself.

    Raises:
        DataError: If the model cannot read so many tokens.
        ModelError: If it is sharded over workers.
        NonFiniteError: If NaN appears in its logits.
    """
    if is_sharded(model):
        raise ModelError(
            "The model is sharded over the workers by FSDP, so it does not go on from prompts "
            "here; start the service without FSDP, or write the completion."
        )
    longest = context_length(model)
    if longest is not None and len(ids) + max_tokens > longest:
        raise DataError(
            f"The prompt has {len(ids)} tokens, and {max_tokens} more are asked for, but the "
            f"model reads {longest} at most; shorten the prompt, or ask for fewer."
        )
    inputs = torch.tensor([ids], device=device_of(model))
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    finite = LogitsProcessorList([_require_numbers])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_tokens,
            pad_token_id=_padding(tokenizer),
            logits_processor=finite,
            **sampling,
        )
    new = output[0, len(ids) :].tolist()
    ends = bool(new) and new[-1] in _end_tokens(model, tokenizer)
    return (new[:-1] if ends else new), ends


def _require_numbers(ids: Tensor, scores: Tensor) -> Tensor:
    """The logits of the next token, as they are; infinite ones forbid or demand a token.

    Raises:
        NonFiniteError: If one is NaN.
    """
    if bool(scores.isnan().any()):
        raise NonFiniteError(
            f"NaN in the model's logits after {ids.shape[1]} tokens, so it does not go on from "
            "this prompt; shorten it, or load the model in a wider dtype."
        )
    return scores


def _padding(tokenizer: Any) -> int:
    """A token id to pad with, which `generate` wants to have."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens with which the model ends."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}
