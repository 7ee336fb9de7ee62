"""Tasks: how a model is called on a batch, and what its loss is.

The curvature is that of a loss, so a task defines everything that passes need to know of a model
besides its modules: its logits and labels, or its losses; which positions are counted; how examples
make a batch. Causal language modelling is the default, and the only task of the command line.

Knows neither hooks nor passes. How examples are read is in `task_examples`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ekfac_dist.data.batches import NO_LABEL, Batch
from ekfac_dist.errors import ConfigError, DataError, ModelError, first_line
from ekfac_dist.models.capture.labelled_logits import LabelledLogits, WholeLogits
from ekfac_dist.models.capture.labels import (
    GRADIENT_SCALES,
    Draws,
    LabelRule,
    LossGradient,
    logit_gradient,
)

# Fields with one entry per position of `input_ids`.
_TOKEN_FIELDS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


class Task:
    """Logits and labels: a sequence's loss is the sum of −log p(label) over its labels.

    Override `forward` for a model that is called in another way. Override `masks` if counted
    positions are not given by an `attention_mask`, and `collate` if examples are no mappings of
    arrays.

    Attributes:
        id_fields: Fields that hold token ids, which must be in the model's vocabulary.
        aligned: Fields that, if as long as `input_ids`, have one entry per position; entries of
            padding (`attention_mask` 0, at either end of an example) are removed from them.
    """

    id_fields: tuple[str, ...] = ("input_ids", "decoder_input_ids")
    aligned: tuple[str, ...] = (*_TOKEN_FIELDS, "labels")

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Runs a model.

        Args:
            model: The model; its parameters are frozen and its dropout is off.
            batch: The tensors from `collate`, on the model's device.

        Returns:
            Logits [B, T, V] and labels [B, T]; or [B, V] and [B]. Labels are int64, −100 where
            there is none, and every sequence has at least one. When labels are sampled, only the
            places of these labels are used, not their values.
        """
        inputs = _without_labels(batch)
        labels = labels_of(batch)
        return model(**inputs).logits, labels

    def masks(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which positions are counted: those that a loss term of their sequence depends on.

        Args:
            model: The model.
            batch: The tensors from `collate`.

        Returns:
            {prefix of modules' names: mask [B, T], nonzero at counted positions}; the prefix "" for
            all other modules. By default all positions except padding.
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
        """Makes a batch's tensors from examples.

        Args:
            examples: One or more, with the same fields: numbers, or arrays. Padding that an example
                came with has been removed.

        Returns:
            {field: [B, ...]}. One-dimensional arrays are padded on the right to the longest,
            `labels` with −100 and others with 0. If there are `input_ids`, there is an
            `attention_mask`; where it is 0, they are later replaced by the model's padding token.
        """
        batch = {
            name: _stacked(name, [example[name] for example in examples]) for name in examples[0]
        }
        lengths = [len(example["input_ids"]) for example in examples if "input_ids" in example]
        if "attention_mask" not in batch and lengths:
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            batch["attention_mask"] = mask.long()
        return batch

    def loss_gradient(
        self, model: nn.Module, batch: Batch, rule: LabelRule
    ) -> tuple[Tensor, LossGradient]:
        """Runs a batch.

        Returns:
            The tensor at which the backward starts, and the gradient with respect to it.

        Raises:
            ModelError: If `forward` does not return logits and labels.
        """
        logits, labels = self._logits_and_labels(model, batch)
        return logits, logit_gradient(logits, labels, batch, rule)

    def labelled_logits(self, model: nn.Module, batch: Batch) -> LabelledLogits:
        """Runs a batch's forward, whose logits can then be differentiated in both directions.

        Raises:
            ModelError: If `forward` does not return logits and labels, or the task has none.
        """
        logits, labels = self._logits_and_labels(model, batch)
        return WholeLogits(logits, labels, batch)

    def _logits_and_labels(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """What `forward` gives, checked."""
        data_labels = batch.inputs.get("labels")
        version = None if data_labels is None else data_labels._version
        result = self.forward(model, batch.inputs)
        is_pair = isinstance(result, tuple) and len(result) == 2
        if not (is_pair and all(isinstance(part, Tensor) for part in result)):
            raise ModelError(
                f"{self.name}.forward gave {type(result).__name__}; it must give two tensors: "
                "logits, labels."
            )
        logits, labels = result
        if labels is data_labels and labels._version != version:
            labels = labels.clone()  # so that where they are is looked up again
        return logits, labels

    @property
    def name(self) -> str:
        """Its name in a store: that of its class. Settings of a task should be part of it."""
        return type(self).__name__


class LossTask(Task, ABC):
    """A custom loss, −log p of labels of any kind, with its own sampling of labels.

    For the true Fisher (labels="sampled"), labels have to be drawn from the model's own
    distribution, which only the task knows. `losses` replaces `forward`.
    """

    aligned = _TOKEN_FIELDS  # labels may be of any kind

    @abstractmethod
    def losses(self, model: nn.Module, batch: Mapping[str, Tensor], draws: Draws | None) -> Tensor:
        """Runs a model.

        Args:
            model: The model; its parameters are frozen and its dropout is off.
            batch: The tensors from `collate`, on the model's device.
            draws: Random numbers for sampling each sequence's labels; None: use the data's labels.
                Sampled labels must be constants (`detach`): the gradient is that of −log p(label)
                for a given label.

        Returns:
            Each sequence's loss in nats [B], of that sequence alone, summed over its labels.
        """

    def loss_gradient(
        self, model: nn.Module, batch: Batch, rule: LabelRule
    ) -> tuple[Tensor, LossGradient]:
        """Runs a batch.

        Returns:
            The losses [B], at which the backward starts, and the gradient with respect to them.

        Raises:
            ModelError: If `losses` does not return one loss per sequence.
        """
        device = next(iter(batch.inputs.values())).device
        draws = Draws(rule, batch.indices, device) if rule.labels == "sampled" else None
        losses = self.losses(model, batch.inputs, draws)
        count = len(batch.indices)
        if not isinstance(losses, Tensor) or losses.shape != (count,):
            actual = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ModelError(
                f"{self.name}.losses gave {actual} for {count} sequences; it must give a tensor "
                f"of shape [{count}], one loss for each."
            )
        scale = GRADIENT_SCALES.get(next(model.parameters()).dtype, 1.0)
        gradient = torch.full_like(losses, scale).detach()
        return losses, LossGradient(gradient, scale, losses.detach().double(), count)

    def labelled_logits(self, model: nn.Module, batch: Batch) -> LabelledLogits:
        """Raises a `ModelError`: its losses are of no logits that are known."""
        raise ModelError(
            f"The task {self.name} has losses of its own and no logits, so the Hessian of its loss "
            "is not known; derive it from Task instead, with logits and labels."
        )


class CausalLM(Task):
    """Each token predicts the next one: the task of the command line.

    In its batches, labels are shifted already. Its examples are text alone, `input_ids` and
    `labels`; derive a class from `Task` for models that need other inputs.
    """

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits at every position, and the token that follows each."""
        inputs = _without_labels(batch)
        output: Any = model(**inputs, use_cache=False)
        return output.logits, batch["labels"]

    def logits_at(self, model: nn.Module, batch: Batch, places: Tensor) -> Tensor:
        """Logits [n, V] at some positions of a batch.

        Args:
            model: The model.
            batch: The batch, on the model's device.
            places: Flat indices of the positions [n].
        """
        logits, _ = self.forward(model, batch.inputs)
        return logits.detach().flatten(0, -2)[places]


class MaskedLM(Task):
    """BERT's task: `labels` [T] holds the masked tokens, and −100 at all other positions.

    `input_ids` are masked in the data, so the same positions are masked in every pass.
    """


class SequenceClassification(Task):
    """One label per sequence: `labels` is the index of a class."""

    aligned = _TOKEN_FIELDS

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of the classes, and the classes."""
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
    """An encoder-decoder's task: predict `labels` [U] from `input_ids` [T] and the labels before.

    Modules of the encoder see the encoder's positions; all others see the decoder's, up to the last
    label. The decoder's inputs are the labels shifted to the right, as the model does it, unless
    there are `decoder_input_ids`.
    """

    id_fields = ("input_ids", "decoder_input_ids", "labels")
    aligned = _TOKEN_FIELDS  # labels belong to the decoder's positions

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
        name = next(
            (module_name for module_name, module in model.named_modules() if module is encoder), ""
        )
        if not name or not getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(f"{type(model).__name__} has no encoder; give another task.")
        labelled = labels_of(batch) != NO_LABEL
        up_to_last = labelled.flip(1).cumsum(1).flip(1) > 0
        decoder_mask = batch.get("decoder_attention_mask")
        if decoder_mask is not None:
            if decoder_mask.shape != labelled.shape or (labelled & (decoder_mask == 0)).any():
                raise DataError(
                    "An example has a label where its decoder_attention_mask is 0, or the two have "
                    f"different lengths; give {NO_LABEL} there, or a mask of 1."
                )
            up_to_last &= decoder_mask != 0
        return {name: super().masks(model, batch)[""], "": up_to_last}


CAUSAL_LM = CausalLM()


def require_task(task: Any) -> Task:
    """The given task; causal language modelling if it is None.

    Raises:
        ConfigError: If it is no instance of `Task`.
    """
    if task is None:
        return CAUSAL_LM
    if not isinstance(task, Task):
        description = (
            f"the class {task.__name__}" if isinstance(task, type) else type(task).__name__
        )
        raise ConfigError(f"task is {description}; give an instance of a Task, such as MaskedLM().")
    return task


def labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The labels of a batch.

    Raises:
        DataError: If the batch has no labels.
    """
    if "labels" not in batch:
        raise DataError(
            f"The examples have {', '.join(batch)}, but no labels; give them under the name labels."
        )
    return batch["labels"]


def _without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _stacked(name: str, values: Sequence[np.ndarray]) -> Tensor:
    """One field of all examples as a tensor [B, ...], padded if it is one-dimensional."""
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
    padded = [np.pad(value, (0, longest - len(value)), constant_values=fill) for value in values]
    return torch.from_numpy(np.stack(padded))
