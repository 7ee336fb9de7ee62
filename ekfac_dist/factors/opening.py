"""Opening a factor store, and checking it against the model in hand, before anything is used."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ekfac_dist.config import leaves
from ekfac_dist.errors import StoreError
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.layout import MANIFEST, REMEDY, eigenbasis_file, spectrum_file
from ekfac_dist.factors.reader import StoreReader
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

# What is read of the manifest's entries, and what each has to be.
_ENTRIES: dict[str, dict[str, type]] = {
    "model": {"fingerprint": str},
    "data": {"fingerprint": str, "num_sequences": int},
    "fisher": {"labels": str, "seed": int, "refit": str},
    "config": {"model": dict, "data": dict},
}
# What a store of an earlier version may lack.
_LATER_ENTRIES: dict[str, dict[str, type]] = {
    "model": {"whole": str, "untracked": dict, "configuration": dict},
}


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
        """Warns the caller of the function that calls this of everything here."""
        for sentence in (*self.differs, *self.not_compared):
            warnings.warn(sentence, stacklevel=3)


def load_factors(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    verify: bool = True,
    allow_changes: bool = False,
) -> Factors:
    """Opens a factor store.

    A module's files are read, memory-mapped, when the module is first used. The store is the same
    whatever number of workers fitted it, and for whatever device or dtype it is used with.

    Args:
        path: The store's directory.
        model: The model that the factors are to be used with, which is compared with the one that
            they were fitted for: tracked modules, all other weights, and its configuration. It may
            hold the same weights in another dtype, wider or narrower. What could not be compared,
            in stores of earlier versions and of quantised weights, is warned of.
        verify: Check each file's SHA-256 before it is first read.
        allow_changes: Take a model that differs outside the tracked modules, and warn of it.

    Raises:
        StoreError: The store is missing, incomplete, of another format, or of another model; or a
            file of it is missing or of another size. One that has changed is told when it is read.
    """
    reader = StoreReader(path, verify=verify)
    _check_entries(reader)
    factors = Factors(reader)
    for module in factors.modules.values():
        for file in (
            eigenbasis_file(module.input),
            eigenbasis_file(module.output),
            spectrum_file(module.name),
        ):
            reader.check(file)
    if model is not None:
        check_model(str(path), factors, model, allow_changes=allow_changes).warn()
    return factors


def check_model(
    path: str, factors: Factors, model: nn.Module, *, allow_changes: bool = False
) -> Comparison:
    """Compares a model with the one that factors were fitted for.

    Args:
        path: What to call the factors in an error.
        factors: The factors.
        model: The model.
        allow_changes: Whether it may differ outside the tracked modules.

    Raises:
        StoreError: It lacks a module, or has one of another shape or of other weights; or it
            differs elsewhere, and may not.
    """
    fitted = factors.manifest["model"]
    told = f"{path} holds factors of {fitted.get('name')} ({fitted.get('class')}"
    candidates, names = candidates_of(model), {name for name, _ in model.named_modules()}
    for module in factors.modules.values():
        found = candidates.get(module.name)
        if found is None and module.name not in names:
            raise StoreError(
                f"{told}), whose module {module.name} this {type(model).__name__} lacks; {_ADVICE}."
            )
        if found is None or _shape(found) != _shape(module):
            raise StoreError(
                f"{told}), whose module {module.name} is {_in_words(module)}; in this "
                f"{type(model).__name__} it is {_in_words(found)}; {_ADVICE}."
            )
    modules = tuple(factors.modules.values())
    stored: Digests = fitted.get("untracked", {})
    own = fingerprints(model, modules, partial(_comparable_dtypes, stored))
    if not _same_tracked(fitted, own, model, modules):
        held = str(next(model.parameters()).dtype).removeprefix("torch.")
        raise StoreError(
            f"{told}, {fitted.get('dtype')}) with parameter fingerprint "
            f"{fitted['fingerprint'][:12]}…; the given {type(model).__name__} ({held}) has "
            f"{own.tracked[:12]}…: its weights differ; {_ADVICE}."
        )
    if "whole" not in fitted:
        sentence = (
            f"{path} is of an earlier version, which kept the tracked modules' weights alone: the "
            "model's other weights and its configuration were not compared with the fitted ones."
        )
        return Comparison(own, (), (sentence,))
    differs, not_compared = _configuration_differences(factors.manifest, model)
    differs = [*_weight_differences(stored, own), *differs]
    if own.quantised:
        not_compared.append(
            f"{len(own.quantised)} quantised weights outside the tracked modules "
            f"({own.quantised[0]} first) were not compared with the fitted ones: what they hold "
            "depends on the library and the device that quantised them."
        )
    if differs and not allow_changes:
        raise StoreError(
            f"{told}); the given {type(model).__name__} differs from it outside the tracked "
            f"modules. {' '.join(differs)} {_ADVICE[0].upper()}{_ADVICE[1:]}; or, if the change is "
            "meant, set model.allow_changes (allow_changes=True from Python), and every result "
            "will tell of it."
        )
    return Comparison(own, tuple(differs), tuple(not_compared))


def _same_tracked(
    fitted: Mapping[str, Any],
    own: Fingerprints,
    model: nn.Module,
    modules: tuple[TrackedModule, ...],
) -> bool:
    """Whether the tracked parameters are the fitted ones, in whichever dtype."""
    if own.tracked in (fitted["fingerprint"], *fitted.get("narrower_fingerprints", {}).values()):
        return True
    dtype = getattr(torch, str(fitted.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        return False
    return tracked_fingerprint(model, modules, dtype) == fitted["fingerprint"]


def _comparable_dtypes(stored: Digests, name: str, tensor: Tensor) -> Iterator[torch.dtype]:
    """The dtype that a weight has to be rounded to, to be compared with a stored digest of it."""
    digests = stored.get(name, {})
    if str(tensor.dtype).removeprefix("torch.") not in digests:
        held = getattr(torch, next(iter(digests), ""), None)
        if isinstance(held, torch.dtype) and held.is_floating_point:
            yield held


def _weight_differences(stored: Digests, own: Fingerprints) -> Iterator[str]:
    """What differs between the fitted model's weights and another's, in sentences."""
    kept = {name for name in stored if name not in own.quantised}
    both = [name for name in own.untracked if name in kept]
    others = [name for name in both if not stored[name].items() & own.untracked[name].items()]
    if others:
        yield (
            f"{len(others)} of {len(both)} weights outside the tracked modules have other numbers "
            f"than the factors were fitted with: {_some(others)}."
        )
    missing, more = sorted(kept - set(own.untracked)), sorted(set(own.untracked) - kept)
    if missing:
        yield f"It lacks {len(missing)} weights of the fitted model: {_some(missing)}."
    if more:
        yield f"It has {len(more)} weights that the fitted model has not: {_some(more)}."


def _configuration_differences(
    manifest: Mapping[str, Any], model: nn.Module
) -> tuple[list[str], list[str]]:
    """What differs in class and configuration, and what could not be compared, in sentences."""
    fitted, kind = manifest["model"], class_of(model).__name__
    before, now = leaves(fitted.get("configuration", {})), leaves(configuration(model))
    differs, absent = [], []
    if fitted.get("class") != kind:
        differs.append(f"Its class is {kind}; the factors were fitted with {fitted.get('class')}.")
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
        # Fields come and go with versions.
        return differs, [
            f"The factors were fitted with transformers {version}, whose configurations have other "
            f"fields, which were not compared: {_some(absent)}."
        ]
    for name in absent:
        values = [repr(one[name]) if name in one else "absent" for one in (now, before)]
        differs.append(
            f"{name} in its configuration is {values[0]}; the factors were fitted with it "
            f"{values[1]}."
        )
    return differs, []


def _some(names: Sequence[str]) -> str:
    """The first few names."""
    return f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}"


def require_fitted_task(path: str, factors: Factors, task: Task) -> None:
    """Refuses a task that factors were not fitted with: their curvature is of another loss.

    Args:
        path: What to call the factors in an error.
        factors: The factors.
        task: The task.

    Raises:
        StoreError: They were fitted with another.
    """
    fitted = str(factors.manifest["fisher"].get("task", CAUSAL_LM.name))
    if fitted != task.name:
        raise StoreError(
            f"{path} holds factors fitted with the task {fitted}, not {task.name}; from Python, "
            "give influence_scores(…, task=…) the same one. The command line answers causal "
            "language models alone."
        )
    if "task_fingerprint" not in factors.manifest["fisher"]:
        return  # a store of an earlier version knows the name alone
    before, now = factors.manifest["fisher"]["task_fingerprint"], task_fingerprint(task)
    if before != now:
        prints = [each[:12] + "…" if each else "none, a built-in task" for each in (before, now)]
        raise StoreError(
            f"{path} holds factors fitted with the task {fitted}, whose code or attributes were "
            f"others: fingerprint {prints[0]}, now {prints[1]}. Give the same one, or fit factors "
            "for this one."
        )


_ADVICE = "give the model that they were fitted for, or fit factors for this one"


def _check_entries(reader: StoreReader) -> None:
    manifest = reader.manifest
    for name, fields in _ENTRIES.items():
        entry = manifest[name]
        wrong = [field for field, kind in fields.items() if type(entry.get(field)) is not kind]
        for field, kind in _LATER_ENTRIES.get(name, {}).items():
            if "whole" in entry and type(entry.get(field)) is not kind:
                wrong.append(field)
        if wrong:
            raise StoreError(
                f"{reader.path / MANIFEST} is damaged: its {name} has no whole {', '.join(wrong)}. "
                f"{REMEDY}"
            )
    if not manifest["modules"]:
        raise StoreError(f"{reader.path / MANIFEST} is damaged: it has no modules. {REMEDY}")


def _shape(module: TrackedModule) -> tuple[str, int, int, bool]:
    return module.kind, module.num_inputs, module.num_outputs, module.bias


def _in_words(module: TrackedModule | None) -> str:
    if module is None:
        return "no linear map"
    kind, num_inputs, num_outputs, bias = _shape(module)
    return f"{kind} {num_inputs}→{num_outputs}{' with a bias' if bias else ''}"
