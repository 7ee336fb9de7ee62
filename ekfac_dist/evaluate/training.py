"""Training by a stated recipe, on all sequences or on some, and the losses of queries after it.

Two runs of the same recipe differ in nothing but the sequences that are left out: initial weights,
the order of all sequences in each epoch, and dropout come from the seed. Knows no curvature, no
scores and no files.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import get_scheduler

from ekfac_dist.config.evaluate import TrainingConfig
from ekfac_dist.data.batch_plan import plan_batches
from ekfac_dist.data.batches import NO_LABEL, Batch
from ekfac_dist.data.sequences import Sequence as TokenSequence
from ekfac_dist.data.sequences import Sequences, collate
from ekfac_dist.errors import ConfigError, DataError

_SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
_EPOCHS_APART = 1_000_003  # seeds of epochs' orders: of no other run's epochs


@dataclass(frozen=True)
class Trained:
    """What a training run did.

    Attributes:
        steps: Number of optimiser steps.
        first_loss: Mean loss per label of the first epoch, in nats.
        last_loss: Mean loss per label of the last epoch.
    """

    steps: int
    first_loss: float
    last_loss: float


def epoch_order(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    """The order of all sequences in one epoch [N]."""
    return np.random.default_rng([seed, _EPOCHS_APART + epoch]).permutation(num_sequences)


def batches_of(kept: np.ndarray, recipe: TrainingConfig, seed: int) -> Iterator[list[np.ndarray]]:
    """The batches of each epoch, as indices of sequences; some may be empty, with gaps.

    Args:
        kept: Whether each sequence is trained on, bool [N].
        recipe: The recipe.
        seed: Seed of the order.
    """
    size = recipe.batch_size
    for epoch in range(recipe.epochs):
        order = epoch_order(len(kept), seed, epoch)
        if recipe.batches == "refilled":
            order = order[kept[order]]
        cuts = [order[start : start + size] for start in range(0, len(order), size)]
        yield [batch[kept[batch]] for batch in cuts]


def num_steps(num_sequences: int, num_kept: int, recipe: TrainingConfig) -> int:
    """Number of batches of a whole run, gaps included."""
    rows = num_kept if recipe.batches == "refilled" else num_sequences
    return recipe.epochs * math.ceil(rows / recipe.batch_size)


def train(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    kept: np.ndarray,
    recipe: TrainingConfig,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Trained:
    """Trains a model in place; it is in evaluation mode afterwards.

    Args:
        model: The model, with the initial weights, on its device.
        sequences: All training sequences [N].
        kept: Whether each is trained on, bool [N].
        recipe: The recipe.
        seed: Seed of the order and of dropout.
        on_step: Called before each step.

    Raises:
        DataError: If no sequence is kept.
        ConfigError: If the loss becomes NaN or infinite.
    """
    if not kept.any():
        raise DataError("A subset keeps no sequence, so there is nothing to train on; keep more.")
    device = next(model.parameters()).device
    parameters = [p.requires_grad_(True) for p in model.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    total = num_steps(len(sequences), int(kept.sum()), recipe)
    schedule = get_scheduler(
        _SCHEDULERS[recipe.schedule],
        optimizer,
        num_warmup_steps=recipe.warmup_steps,
        num_training_steps=total,
    )
    losses_by_epoch: list[float] = []
    step = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.train()
        for batches in batches_of(kept, recipe, seed):
            loss_sum, label_sum = 0.0, 0
            for indices in batches:
                on_step()
                step += 1
                if len(indices):
                    batch = collate([sequences[k] for k in indices]).to(device)
                    num_labels = _num_labels(batch)
                    loss = sequence_losses(model, batch).sum() / num_labels
                    value = loss.item()
                    if not math.isfinite(value):
                        before = [*losses_by_epoch, _mean(loss_sum, label_sum)]
                        raise ConfigError(_diverged(value, step, total, before))
                    loss.backward()
                    if recipe.clip_norm is not None:
                        nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
                    loss_sum += value * num_labels
                    label_sum += num_labels
                optimizer.step()  # changes nothing where there is no gradient
                optimizer.zero_grad()
                schedule.step()
            losses_by_epoch.append(_mean(loss_sum, label_sum))
    model.eval()
    return Trained(step, losses_by_epoch[0], losses_by_epoch[-1])


def _num_labels(batch: Batch) -> int:
    assert batch.labelled is not None
    return len(batch.labelled.flat)


def _mean(loss_sum: float, label_sum: int) -> float:
    return loss_sum / label_sum if label_sum else math.nan


def _diverged(value: float, step: int, total: int, losses_by_epoch: Sequence[float]) -> str:
    known = [loss for loss in losses_by_epoch if math.isfinite(loss)]
    was = f"; until then it was {known[-1]:.3g} on average" if known else ""
    return (
        f"Training diverges: the loss of step {step} of {total} is {value}{was}. Lower "
        "training.learning_rate, raise training.warmup_steps, or set training.clip_norm."
    )


def sequence_losses(model: nn.Module, batch: Batch) -> Tensor:
    """−log p of the labels of each sequence, summed [B], in nats.

    Args:
        model: A causal language model.
        batch: Padded sequences on the model's device, whose `labels` are the tokens to predict at
            each position.
    """
    inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "labels"}
    logits_BTV = model(**inputs, use_cache=False).logits
    labels_BT = batch.inputs["labels"]
    losses = F.cross_entropy(
        logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=NO_LABEL, reduction="none"
    )
    return losses.view_as(labels_BT).sum(1)


@torch.no_grad()
def query_losses(model: nn.Module, queries: Sequences, batch_tokens: int) -> np.ndarray:
    """−log p of each query [queries], float64, in nats.

    Args:
        model: A causal language model in evaluation mode.
        queries: The queries.
        batch_tokens: Token budget of a batch.
    """
    device = next(model.parameters()).device
    losses = np.zeros(len(queries))
    for selection in plan_batches(queries.num_positions, batch_tokens):
        batch = collate([queries[k] for k in selection]).to(device)
        losses[selection] = sequence_losses(model, batch).double().cpu().numpy()
    return losses
