"""Checks that positions that are not counted do not change a task's losses.

That is padding, and what an example's own `attention_mask` leaves out. Done once before any pass.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ekfac_dist.data.examples import TaskExamples
from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.labels import LabelRule
from ekfac_dist.models.capture.tasks import Task

# Tolerance |loss − loss'| / (1 + |loss|) for the losses of one example, by the model's dtype.
_LOSS_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}


def require_unpadded_losses(
    task: Task, model: nn.Module, examples: TaskExamples, device: torch.device
) -> None:
    """Refuses a loss that depends on padding, or on positions whose `attention_mask` is 0.

    Compares the losses of the shortest examples, alone and in a batch with the longest.

    Args:
        task: The task.
        model: The model.
        examples: The examples.
        device: The model's device.

    Raises:
        ModelError: If losses differ by more than rounding.
    """
    _require_gaps_unread(task, model, examples, device)
    order = np.argsort(examples.num_positions, kind="stable")
    shortest = order[: min(3, len(order) - 1)].tolist()
    if not shortest or examples.num_positions[shortest[0]] == examples.num_positions[order[-1]]:
        return
    rule = LabelRule("data", 0, 0)
    tolerance = _LOSS_TOLERANCES.get(next(model.parameters()).dtype, 0.1)
    with torch.no_grad():
        padded_batch = examples.batch([*shortest, int(order[-1])]).to(device)
        _, together = task.loss_gradient(model, padded_batch, rule)
        for k, selected in enumerate(shortest):
            _, alone = task.loss_gradient(model, examples.batch([selected]).to(device), rule)
            loss, padded_loss = float(alone.losses[0]), float(together.losses[k])
            if abs(loss - padded_loss) > tolerance * (1 + abs(loss)):
                raise ModelError(
                    f"The loss of example {int(examples.indices[selected])} is {loss:.6g} alone "
                    f"and {padded_loss:.6g} in a batch with a longer one, so padding reaches it; "
                    "give a task whose collate or forward keeps it out, or batch_tokens=1."
                )


def _require_gaps_unread(
    task: Task, model: nn.Module, examples: TaskExamples, device: torch.device
) -> None:
    """Refuses a loss that depends on tokens inside an example whose `attention_mask` is 0."""
    selected = examples.first_with_a_gap
    if selected is None:
        return
    batch = examples.batch([selected]).to(device)
    ids, mask = batch.inputs.get("input_ids"), batch.inputs.get("attention_mask")
    if ids is None or mask is None or ids.shape != mask.shape:
        return
    other_ids = torch.where(mask == 0, ids.max(), ids)
    with torch.no_grad():
        loss, other_loss = (
            float(task.loss_gradient(model, variant, LabelRule("data", 0, 0))[1].losses[0])
            for variant in (batch, replace(batch, inputs={**batch.inputs, "input_ids": other_ids}))
        )
    tolerance = _LOSS_TOLERANCES.get(next(model.parameters()).dtype, 0.1)
    if abs(loss - other_loss) > tolerance * (1 + abs(loss)):
        raise ModelError(
            f"The attention_mask of example {int(examples.indices[selected])} is 0 inside it, but "
            f"its loss depends on the tokens there ({loss:.6g}, and {other_loss:.6g} with others); "
            "give a task whose forward keeps them out, or leave them out of the example."
        )
