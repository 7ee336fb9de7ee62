"""Whether a model in hand, or a task, is the one that factors were fitted for.

    tracked modules             names, kinds, shapes and weights: must be the fitted ones
    other weights, class,       must be the fitted ones too, unless changes are allowed;
    configuration               each difference is a sentence of the `Comparison`
    what cannot be compared     weights that the store does not have: a sentence too

Knows fingerprints and configurations; does not read factors.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ekfac_dist.config import dotted
from ekfac_dist.errors import StoreError
from ekfac_dist.factors.factors import Factors
from ekfac_dist.models.capture.task_fingerprint import task_fingerprint
from ekfac_dist.models.capture.tasks import CAUSAL_LM, Task
from ekfac_dist.models.find.discovery import candidates_of
from ekfac_dist.models.load.configuration import configuration
from ekfac_dist.models.load.fingerprints import (
    Digests,
    Fingerprints,
    fingerprints,
    tracked_fingerprint,
)
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import class_of
from ekfac_dist.runtime.software import software

_ADVICE = "give the model that they were fitted for, or fit factors for this one"


@dataclass(frozen=True)
class Comparison:
    """How a model in hand compares with the one that factors were fitted for.

    Attributes:
        fingerprints: Of the model in hand.
        differs: A sentence for each difference outside the tracked modules.
        not_compared: A sentence for each part of it that could not be compared.
    """

    fingerprints: Fingerprints
    differs: tuple[str, ...]
    not_compared: tuple[str, ...]

    def warn(self) -> None:
        """Issues every sentence as a warning at the line that called this method's caller."""
        for sentence in (*self.differs, *self.not_compared):
            warnings.warn(sentence, stacklevel=3)


def check_model(
    path: str, factors: Factors, model: nn.Module, *, allow_changes: bool = False
) -> Comparison:
    """Compares a model with the one that factors were fitted for.

    Args:
        path: The factors' name in errors.
        factors: The factors.
        model: The model.
        allow_changes: Whether it may differ outside the tracked modules.

    Raises:
        StoreError: If the model lacks a tracked module, or has one of another shape or with other
            weights; or if it differs elsewhere, unless `allow_changes`.
    """
    fitted = factors.manifest["model"]
    # The parenthesis is closed by the errors, which may add to it.
    class_name = class_of(model).__name__
    fitted_for = f"{path} holds factors of {fitted.get('name')} ({fitted.get('class')}"
    _require_same_modules(fitted_for, factors, model)
    modules = tuple(factors.modules.values())
    stored: Digests = fitted.get("untracked", {})
    in_hand = fingerprints(model, modules, partial(_comparable_dtypes, stored))
    if not _same_tracked(fitted, in_hand, model, modules):
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        raise StoreError(
            f"{fitted_for}, {fitted.get('dtype')}) with parameter fingerprint "
            f"{fitted['fingerprint'][:12]}…; the given {class_name} ({dtype}) has "
            f"{in_hand.tracked[:12]}…: its weights differ; {_ADVICE}."
        )
    if "whole" not in fitted:
        sentence = (
            f"{path} is of an earlier version, which kept the tracked modules' weights alone: the "
            "model's other weights and its configuration were not compared with the fitted ones."
        )
        return Comparison(in_hand, (), (sentence,))
    differs, not_compared = _configuration_differences(factors.manifest, model)
    differs = [*_weight_differences(stored, in_hand), *differs]
    if in_hand.quantised:
        not_compared.append(
            f"{len(in_hand.quantised)} quantised weights outside the tracked modules "
            f"({in_hand.quantised[0]} first) were not compared with the fitted ones: what they "
            "hold depends on the library and the device that quantised them."
        )
    if differs and not allow_changes:
        raise StoreError(
            f"{fitted_for}); the given {class_name} differs from it outside the tracked "
            f"modules. {' '.join(differs)} {_ADVICE[0].upper()}{_ADVICE[1:]}; or, if the change is "
            "meant, set model.allow_changes (allow_changes=True from Python), and every result "
            "will tell of it."
        )
    return Comparison(in_hand, tuple(differs), tuple(not_compared))


def _require_same_modules(fitted_for: str, factors: Factors, model: nn.Module) -> None:
    """Checks that a model has every tracked module, of the same kind and shape."""
    candidates, names = candidates_of(model), {name for name, _ in model.named_modules()}
    class_name = class_of(model).__name__
    for module in factors.modules.values():
        candidate = candidates.get(module.name)
        if candidate is None and module.name not in names:
            raise StoreError(
                f"{fitted_for}), whose module {module.name} this {class_name} lacks; {_ADVICE}."
            )
        if candidate is None or _shape(candidate) != _shape(module):
            raise StoreError(
                f"{fitted_for}), whose module {module.name} is {_module_in_words(module)}; in this "
                f"{class_name} it is {_module_in_words(candidate)}; {_ADVICE}."
            )


def _shape(module: TrackedModule) -> tuple[str, int, int, bool]:
    return module.kind, module.num_inputs, module.num_outputs, module.bias


def _module_in_words(module: TrackedModule | None) -> str:
    if module is None:
        return "no linear map"
    kind, num_inputs, num_outputs, bias = _shape(module)
    return f"{kind} {num_inputs}→{num_outputs}{' with a bias' if bias else ''}"


def _same_tracked(
    fitted: Mapping[str, Any],
    in_hand: Fingerprints,
    model: nn.Module,
    modules: tuple[TrackedModule, ...],
) -> bool:
    """Whether the tracked parameters are the fitted ones, possibly in a wider or narrower dtype."""
    narrower = fitted.get("narrower_fingerprints", {}).values()
    if in_hand.tracked in (fitted["fingerprint"], *narrower):
        return True
    dtype = getattr(torch, str(fitted.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        return False
    return tracked_fingerprint(model, modules, dtype) == fitted["fingerprint"]


def _comparable_dtypes(stored: Digests, name: str, tensor: Tensor) -> Iterator[torch.dtype]:
    """The stored dtype of a weight that is held in another; its digest is compared in that one."""
    digests = stored.get(name, {})
    if str(tensor.dtype).removeprefix("torch.") not in digests:
        fitted_dtype = getattr(torch, next(iter(digests), ""), None)
        if isinstance(fitted_dtype, torch.dtype) and fitted_dtype.is_floating_point:
            yield fitted_dtype


def _weight_differences(stored: Digests, in_hand: Fingerprints) -> Iterator[str]:
    """A sentence for each kind of difference between the untracked weights of two models.

    Args:
        stored: Digests of the fitted model's weights.
        in_hand: Fingerprints of the model in hand.
    """
    comparable = {name for name in stored if name not in in_hand.quantised}
    common = [name for name in in_hand.untracked if name in comparable]
    changed = [
        name for name in common if not stored[name].items() & in_hand.untracked[name].items()
    ]
    if changed:
        yield (
            f"{len(changed)} of {len(common)} weights outside the tracked modules have other "
            f"numbers than the factors were fitted with: {_first_names(changed)}."
        )
    missing = sorted(comparable - set(in_hand.untracked))
    added = sorted(set(in_hand.untracked) - comparable)
    if missing:
        yield f"It lacks {len(missing)} weights of the fitted model: {_first_names(missing)}."
    if added:
        yield f"It has {len(added)} weights that the fitted model has not: {_first_names(added)}."


def _configuration_differences(
    manifest: Mapping[str, Any], model: nn.Module
) -> tuple[list[str], list[str]]:
    """(what differs in class and configuration, what could not be compared), as sentences."""
    fitted, class_name = manifest["model"], class_of(model).__name__
    before, now = dotted(fitted.get("configuration", {})), dotted(configuration(model))
    differs, absent = [], []
    if fitted.get("class") != class_name:
        differs.append(
            f"Its class is {class_name}; the factors were fitted with {fitted.get('class')}."
        )
    for name in {**before, **now}:
        if name in before and name in now:
            if before[name] != now[name]:
                differs.append(
                    f"{name} in its configuration is {now[name]!r}; the factors were fitted with "
                    f"{before[name]!r}."
                )
        else:
            absent.append(name)
    version = manifest["software"].get("transformers")
    if absent and version != software()["transformers"]:
        # A configuration's fields come and go with the library's versions.
        return differs, [
            f"The factors were fitted with transformers {version}, whose configurations have other "
            f"fields, which were not compared: {_first_names(absent)}."
        ]
    for name in absent:
        value_now, value_before = (
            repr(fields[name]) if name in fields else "absent" for fields in (now, before)
        )
        differs.append(
            f"{name} in its configuration is {value_now}; the factors were fitted with it "
            f"{value_before}."
        )
    return differs, []


def _first_names(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}"


def require_fitted_task(path: str, factors: Factors, task: Task) -> None:
    """Checks that factors were fitted with a task: under another loss the curvature is another.

    Args:
        path: The factors' name in errors.
        factors: The factors.
        task: The task.

    Raises:
        StoreError: If they were fitted with a task of another name, code or attributes.
    """
    fitted = str(factors.manifest["fisher"].get("task", CAUSAL_LM.name))
    if fitted != task.name:
        raise StoreError(
            f"{path} holds factors fitted with the task {fitted}, not {task.name}; from Python, "
            "give influence_scores(…, task=…) the same one. The command line answers causal "
            "language models alone."
        )
    if "task_fingerprint" not in factors.manifest["fisher"]:
        return  # stores of earlier versions have the task's name only
    before, now = factors.manifest["fisher"]["task_fingerprint"], task_fingerprint(task)
    if before != now:
        shown = [each[:12] + "…" if each else "none, a built-in task" for each in (before, now)]
        raise StoreError(
            f"{path} holds factors fitted with the task {fitted}, whose code or attributes were "
            f"others: fingerprint {shown[0]}, now {shown[1]}. Give the same one, or fit factors "
            "for this one."
        )
