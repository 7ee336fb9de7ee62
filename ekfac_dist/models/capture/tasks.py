"""Tasks: what a model is asked of a batch, and what its loss is.

The curvature is of the loss, so a task says all that the passes have to know of a model beside its
modules: its logits and labels, or its losses; which positions are counted; how examples make a
batch. Causal language modelling is the default, and the command line's only one.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ekfac_dist.data.batches import NO_LABEL, Batch, Grid
from ekfac_dist.data.examples import TaskExamples
from ekfac_dist.data.sequences import Sequences, from_examples
from ekfac_dist.errors import ConfigError, DataError, ModelError, first_line
from ekfac_dist.models.capture.labels import (
    GRADIENT_SCALES,
    Draws,
    LabelRule,
    LossGradient,
    logit_gradient,
)

# What has an entry for each position of a text.
_TOKEN_FIELDS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
# How far the losses of one example may be apart, over the loss, by the model's dtype.
_LOSS_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}


class Task:
    """Logits and labels: a sequence's loss is the sum of −log p(label) over its labels.

    Override `forward` for a model that is called in another way; and `masks` and `collate`, if
    positions are not told by an `attention_mask`, or examples are no mappings of arrays.

    Attributes:
        id_fields: Fields that hold token ids, which the model has to know.
        aligned: Fields that, if as long as `input_ids`, have an entry for each of its positions;
            entries of padding (`attention_mask` 0, at either end of an example) are taken off.
    """

    id_fields: tuple[str, ...] = ("input_ids", "decoder_input_ids")
    aligned: tuple[str, ...] = (*_TOKEN_FIELDS, "labels")

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Runs a model.

        Args:
            model: The model; its parameters are frozen and its dropout is off.
            batch: What `collate` made, on the model's device.

        Returns:
            Logits [B, T, V] and labels [B, T]; or [B, V] and [B]. Labels are int64, −100 where
            there is none, and every sequence has one at least. Where factors are fitted with
            sampled labels, which places have one is all that is read of them.
        """
        inputs = _without_labels(batch)
        labels = labels_of(batch)
        return model(**inputs).logits, labels

    def masks(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which positions are counted: those that a loss of their sequence depends on.

        Args:
            model: The model.
            batch: What `collate` made.

        Returns:
            By the beginning of modules' names a mask [B, T], not zero at counted positions; "" for
            all other modules. By default every position that is no padding.
        """
        if "attention_mask" in batch:
            return {"": batch["attention_mask"]}
        if "input_ids" not in batch:
            raise DataError(
                f"The examples have {', '.join(batch)}, but no input_ids, so their positions are "
                "not known; give a task with masks of its own."
            )
        return {"": torch.ones_like(batch["input_ids"])}

    def collate(self, examples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
        """Makes a batch of examples.

        Args:
            examples: One or more, each with the same fields: numbers, or arrays. An example's own
                padding has been taken off.

        Returns:
            Each field [B, ...]; arrays of one dimension are padded on the right to the longest,
            `labels` with −100 and all others with 0. With `input_ids` there always is an
            `attention_mask`; where it is 0 they are the model's padding token in the end.
        """
        batch = {name: _stacked(name, [e[name] for e in examples]) for name in examples[0]}
        lengths = [len(example["input_ids"]) for example in examples if "input_ids" in example]
        if "attention_mask" not in batch and lengths:
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            batch["attention_mask"] = mask.long()
        return batch

    def loss_gradient(
        self, model: nn.Module, batch: Batch, rule: LabelRule
    ) -> tuple[Tensor, LossGradient]:
        """Runs a batch: where the backward starts, and with what gradient."""
        given = batch.inputs.get("labels")
        version = None if given is None else given._version
        result = self.forward(model, batch.inputs)
        is_pair = isinstance(result, tuple) and len(result) == 2
        if not (is_pair and all(isinstance(part, Tensor) for part in result)):
            raise ModelError(
                f"{self.name}.forward gave {type(result).__name__}; it must give two tensors: "
                "logits, labels."
            )
        logits, labels = result
        if labels is given and labels._version != version:
            labels = labels.clone()  # what was known of them is so no more
        return logits, logit_gradient(logits, labels, batch, rule)

    @property
    def name(self) -> str:
        """What a store calls it: its class's name. One with settings should name them too."""
        return type(self).__name__


class LossTask(Task, ABC):
    """A loss of one's own, −log p of a label of any kind, with its own sampling of labels.

    For the true Fisher (labels="sampled") labels have to be drawn from the model's own
    distribution, which only the task knows. `losses` takes the place of `forward`.
    """

    aligned = _TOKEN_FIELDS  # labels may be anything

    @abstractmethod
    def losses(self, model: nn.Module, batch: Mapping[str, Tensor], draws: Draws | None) -> Tensor:
        """Runs a model.

        Args:
            model: The model; its parameters are frozen and its dropout is off.
            batch: What `collate` made, on the model's device.
            draws: Random numbers to sample each sequence's labels with; None: the data's labels
                are wanted. Sampled labels have to be constants (`detach`): the gradient is of
                −log p(label) for a label that is given.

        Returns:
            Each sequence's loss [B], in nats, of that sequence alone and summed over its labels.
        """

    def loss_gradient(
        self, model: nn.Module, batch: Batch, rule: LabelRule
    ) -> tuple[Tensor, LossGradient]:
        """Runs a batch: where the backward starts, and with what gradient."""
        device = next(iter(batch.inputs.values())).device
        draws = Draws(rule, batch.indices, device) if rule.labels == "sampled" else None
        losses = self.losses(model, batch.inputs, draws)
        count = len(batch.indices)
        if not isinstance(losses, Tensor) or losses.shape != (count,):
            given = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ModelError(
                f"{self.name}.losses gave {given} for {count} sequences; it must give a tensor "
                f"of shape [{count}], one loss for each."
            )
        scale = GRADIENT_SCALES.get(next(model.parameters()).dtype, 1.0)
        gradient = torch.full_like(losses, scale).detach()
        return losses, LossGradient(gradient, scale, losses.detach().double(), count)


class CausalLM(Task):
    """Each token predicts the next: what the command line fits. Its batches are shifted already.

    Its examples are text alone, `input_ids` and `labels`; a class made of it that needs more should
    be made of `Task`.
    """

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits at every position, and the token that follows it."""
        inputs = _without_labels(batch)
        output: Any = model(**inputs, use_cache=False)
        return output.logits, batch["labels"]


class MaskedLM(Task):
    """BERT's task: `labels` [T] holds the masked tokens, −100 at all others.

    `input_ids` are masked already: the same positions in every pass.
    """


class SequenceClassification(Task):
    """One label for each sequence, a class's number: `labels` is a number."""

    aligned = _TOKEN_FIELDS

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of the classes, and the class."""
        try:
            logits, labels = super().forward(model, batch)
        except ValueError as error:
            if "padding token" not in str(error):
                raise
            raise ModelError(
                f"{type(model).__name__} needs to know its padding token, to find where a sequence "
                "ends; set pad_token_id in its configuration."
            ) from error
        if logits.shape[-1] < 2:
            raise ModelError(
                "A classifier with one output is a regression; give a LossTask of your own."
            )
        return logits, labels


class Seq2SeqLM(Task):
    """An encoder–decoder's: `labels` [U] are predicted from `input_ids` [T] and what is before.

    Encoder modules see the encoder's positions, all others the decoder's: those up to the last
    label. The decoder's input is the labels shifted to the right, as the model does it, unless
    there are `decoder_input_ids`.
    """

    id_fields = ("input_ids", "decoder_input_ids", "labels")
    aligned = _TOKEN_FIELDS  # labels are the decoder's

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits at every position of the decoder, and the labels."""
        inputs = _without_labels(batch)
        if "decoder_input_ids" not in inputs:
            shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
            if shift is None:
                raise ModelError(
                    f"{type(model).__name__} does not say how it shifts labels "
                    "(prepare_decoder_input_ids_from_labels); give decoder_input_ids with the "
                    "examples, or a Task with a forward of your own."
                )
            try:
                inputs["decoder_input_ids"] = shift(labels_of(batch))
            except (AttributeError, TypeError, ValueError) as error:
                raise ModelError(
                    f"{type(model).__name__} could not shift labels ({first_line(error)}); set "
                    "decoder_start_token_id and pad_token_id in its configuration, or give "
                    "decoder_input_ids."
                ) from error
        return model(**inputs, use_cache=False).logits, batch["labels"]

    def masks(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's real positions, and the decoder's up to the last label."""
        encoder: Any = getattr(model, "get_encoder", lambda: None)()
        name = next((n for n, module in model.named_modules() if module is encoder), "")
        if not name or not getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(f"{type(model).__name__} has no encoder; give another task.")
        labelled = labels_of(batch) != NO_LABEL
        up_to_last = labelled.flip(1).cumsum(1).flip(1) > 0
        read = batch.get("decoder_attention_mask")
        if read is not None:
            if read.shape != labelled.shape or (labelled & (read == 0)).any():
                raise DataError(
                    "An example has a label where its decoder_attention_mask is 0, or the two have "
                    f"different lengths; give {NO_LABEL} there, or a mask of 1."
                )
            up_to_last &= read != 0
        return {name: super().masks(model, batch)[""], "": up_to_last}


CAUSAL_LM = CausalLM()


def require_task(task: Any) -> Task:
    """A task, the default if none is given.

    Raises:
        ConfigError: It is something else.
    """
    if task is None:
        return CAUSAL_LM
    if not isinstance(task, Task):
        what = f"the class {task.__name__}" if isinstance(task, type) else type(task).__name__
        raise ConfigError(f"task is {what}; give an instance of a Task, such as MaskedLM().")
    return task


def read_examples(
    task: Task, model: nn.Module, data: Iterable[Any], max_tokens: int | None
) -> Sequences | TaskExamples:
    """Examples as a task and a model read them.

    Raises:
        DataError: As `from_examples` and `TaskExamples`.
        ModelError: The model has not the parts that the task asks for.
        ConfigError: Examples were to be cut to `max_tokens`, and are not text alone.
    """
    if isinstance(task, CausalLM):
        return from_examples(data, max_tokens, inspect.signature(model.forward).parameters)
    if max_tokens is not None:
        raise ConfigError(
            f"max_tokens cuts text; cut the examples of the task {task.name} before, labels too."
        )
    settings: Any = getattr(model, "config", None)
    pad = getattr(settings, "pad_token_id", None) or 0
    return TaskExamples(
        data,
        partial(_collated, task, pad),
        partial(task.masks, model),
        task.aligned,
        id_fields=task.id_fields,
    )


def labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The labels of a batch.

    Raises:
        DataError: It has none.
    """
    if "labels" not in batch:
        raise DataError(
            f"The examples have {', '.join(batch)}, but no labels; give them under the name labels."
        )
    return batch["labels"]


def require_unpadded_losses(
    task: Task, model: nn.Module, examples: TaskExamples, device: torch.device
) -> None:
    """Refuses a loss that depends on padding: that of a short example, alone and with a long one.

    And one that depends on what an example's own `attention_mask` leaves out.

    Raises:
        ModelError: They differ.
    """
    _require_gaps_unread(task, model, examples, device)
    order = np.argsort(examples.num_positions, kind="stable")
    short = order[: min(3, len(order) - 1)].tolist()
    if not short or examples.num_positions[short[0]] == examples.num_positions[order[-1]]:
        return
    rule = LabelRule("data", 0, 0)
    with torch.no_grad():
        _, together = task.loss_gradient(
            model, examples.batch([*short, int(order[-1])]).to(device), rule
        )
        for k, number in enumerate(short):
            _, alone = task.loss_gradient(model, examples.batch([number]).to(device), rule)
            one, other = float(alone.losses[0]), float(together.losses[k])
            tolerance = _LOSS_TOLERANCES.get(next(model.parameters()).dtype, 0.1)
            if abs(one - other) > tolerance * (1 + abs(one)):
                raise ModelError(
                    f"The loss of example {int(examples.indices[number])} is {one:.6g} alone and "
                    f"{other:.6g} in a batch with a longer one, so padding reaches it; give a task "
                    "whose collate or forward keeps it out, or batch_tokens=1."
                )


def _require_gaps_unread(
    task: Task, model: nn.Module, examples: TaskExamples, device: torch.device
) -> None:
    """Refuses a loss that depends on tokens inside an example whose `attention_mask` is 0."""
    number = examples.first_with_a_gap
    if number is None:
        return
    batch = examples.batch([number]).to(device)
    ids, mask = batch.inputs.get("input_ids"), batch.inputs.get("attention_mask")
    if ids is None or mask is None or ids.shape != mask.shape:
        return
    others = torch.where(mask == 0, ids.max(), ids)
    with torch.no_grad():
        one, other = (
            float(task.loss_gradient(model, given, LabelRule("data", 0, 0))[1].losses[0])
            for given in (batch, replace(batch, inputs={**batch.inputs, "input_ids": others}))
        )
    tolerance = _LOSS_TOLERANCES.get(next(model.parameters()).dtype, 0.1)
    if abs(one - other) > tolerance * (1 + abs(one)):
        raise ModelError(
            f"The attention_mask of example {int(examples.indices[number])} is 0 inside it, but "
            f"its loss depends on the tokens there ({one:.6g}, and {other:.6g} with others); give "
            "a task whose forward keeps them out, or leave them out of the example."
        )


def _collated(
    task: Task, pad: int, examples: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Tensor]:
    """What a task makes of some examples, its padding with the model's own token for it."""
    batch = dict(task.collate(examples))
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is not None and mask is not None and ids.shape == mask.shape:
        batch["input_ids"] = torch.where(mask == 0, pad, ids)
    return batch


def _without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def few_examples(task: Task, model: nn.Module, examples: TaskExamples) -> Batch:
    """A small batch whose shape tells sequences from positions, and modules' positions apart."""
    shortest = np.argsort(examples.num_positions, kind="stable")[:16].tolist()
    for longer in shortest[::-1]:
        for count in (2, 3):
            batch = examples.batch([longer, *[shortest[0]] * (count - 1)])
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


def _stacked(name: str, values: Sequence[np.ndarray]) -> Tensor:
    """One field of all examples, padded if it is of one dimension."""
    shapes = {value.shape for value in values}
    if len(shapes) == 1:
        return torch.from_numpy(np.stack(values))
    if {len(shape) for shape in shapes} != {1}:
        raise DataError(
            f"The examples' {name} have shapes {sorted(shapes)[0]} and {sorted(shapes)[-1]}; "
            "arrays of several dimensions must be of one shape, or the task's collate has to pad."
        )
    longest = max(len(value) for value in values)
    fill = NO_LABEL if name == "labels" else 0
    padded = [np.pad(v, (0, longest - len(v)), constant_values=fill) for v in values]
    return torch.from_numpy(np.stack(padded))
