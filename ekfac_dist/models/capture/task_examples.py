"""Examples of a task: reading a user's data, and a small batch of it to trace the model with.

Combines `data.examples`, which knows no model, with a task and the model that it is for.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ekfac_dist.data.batches import Batch, Grid
from ekfac_dist.data.examples import TaskExamples
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.errors import ConfigError
from ekfac_dist.models.capture.tasks import CausalLM, Task


def read_examples(
    task: Task, model: nn.Module, data: Iterable[Any], max_tokens: int | None
) -> Sequences | TaskExamples:
    """A user's examples as a task and a model read them.

    Args:
        task: The task.
        model: The model.
        data: Iterable of examples or batches.
        max_tokens: Longer sequences are cut to this many tokens; None leaves them whole.

    Raises:
        DataError: As `from_examples` and `TaskExamples`.
        ModelError: If the model lacks a part that the task needs, such as an encoder.
        ConfigError: If `max_tokens` is given for a task other than causal language modelling.
    """
    if isinstance(task, CausalLM):
        return from_examples(data, max_tokens, inspect.signature(model.forward).parameters)
    if max_tokens is not None:
        raise ConfigError(
            f"max_tokens cuts text; cut the examples of the task {task.name} before, labels too."
        )
    config: Any = getattr(model, "config", None)
    padding_id = getattr(config, "pad_token_id", None) or 0
    return TaskExamples(
        data,
        partial(_collate_with_padding_token, task, padding_id),
        partial(task.masks, model),
        task.aligned,
        id_fields=task.id_fields,
    )


def few_examples(task: Task, model: nn.Module, examples: TaskExamples) -> Batch:
    """A small batch to trace a model with.

    Its number of sequences differs from its numbers of positions, and encoder and decoder have
    different numbers of positions, so that a tensor's shape shows which is which. If no two or
    three short examples give such a batch, one padding position is added.
    """
    short = np.argsort(examples.num_positions, kind="stable")[:16].tolist()
    for longest in short[::-1]:
        for count in (2, 3):
            batch = examples.batch([longest, *[short[0]] * (count - 1)])
            widths = [grid.shape[1] for grid in batch.grids.values()]
            if len({count, *widths}) == 1 + len(widths):
                return batch
    padded = {
        name: torch.nn.functional.pad(tensor, (0, 1))
        if tensor.ndim == 2 and name in task.aligned
        else tensor
        for name, tensor in batch.inputs.items()
    }
    if "attention_mask" not in padded:
        padded["attention_mask"] = torch.nn.functional.pad(
            torch.ones_like(batch.inputs["input_ids"]), (0, 1)
        )
    masks = task.masks(model, padded)
    grids = {key: Grid.of(batch.indices, mask.numpy()) for key, mask in masks.items()}
    return Batch.of(batch.indices, padded, grids)


def _collate_with_padding_token(
    task: Task, padding_id: int, examples: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Tensor]:
    """The task's batch of some examples, with the model's padding token where the mask is 0."""
    batch = dict(task.collate(examples))
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is not None and mask is not None and ids.shape == mask.shape:
        batch["input_ids"] = torch.where(mask == 0, padding_id, ids)
    return batch
