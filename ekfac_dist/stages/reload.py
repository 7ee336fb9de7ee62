"""Opening a factor store, and checking it against the model in hand, before anything is used."""

from pathlib import Path

import torch
from torch import nn

from ekfac_dist.errors import StoreError
from ekfac_dist.models.discovery import candidates_of
from ekfac_dist.models.fingerprint import fingerprint
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.tasks import CAUSAL_LM, Task
from ekfac_dist.runtime.store import MANIFEST, MEND, StoreReader, eigenbasis_file, spectrum_file
from ekfac_dist.stages.factors import Factors

# What is read of the manifest's entries, and what each has to be.
_ENTRIES: dict[str, dict[str, type]] = {
    "model": {"fingerprint": str},
    "data": {"fingerprint": str, "num_sequences": int},
    "fisher": {"labels": str, "seed": int, "refit": str},
    "config": {"model": dict, "data": dict},
}


def load_factors(
    path: str | Path, model: nn.Module | None = None, *, verify: bool = True
) -> Factors:
    """Opens a factor store.

    A module's files are read, memory-mapped, when the module is first used. The store is the same
    whatever number of workers fitted it, and for whatever device or dtype it is used with.

    Args:
        path: The store's directory.
        model: The model that the factors are to be used with; its tracked modules are compared with
            those that the factors were fitted for. It may hold the same weights in another dtype,
            wider or narrower.
        verify: Check each file's SHA-256 before it is first read.

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
        check_model(str(path), factors, model)
    return factors


def check_model(path: str, factors: Factors, model: nn.Module) -> None:
    """Refuses a model that factors were not fitted for.

    Args:
        path: What to call the factors in an error.
        factors: The factors.
        model: The model.

    Raises:
        StoreError: It lacks a module, or has one of another shape, or other weights.
    """
    fitted = factors.manifest["model"]
    said = f"{path} holds factors of {fitted.get('name')} ({fitted.get('class')}"
    candidates, names = candidates_of(model), {name for name, _ in model.named_modules()}
    for module in factors.modules.values():
        found = candidates.get(module.name)
        if found is None and module.name not in names:
            raise StoreError(
                f"{said}), whose module {module.name} this {type(model).__name__} lacks; {_ADVICE}."
            )
        if found is None or _shape(found) != _shape(module):
            raise StoreError(
                f"{said}), whose module {module.name} is {_in_words(module)}; in this "
                f"{type(model).__name__} it is {_in_words(found)}; {_ADVICE}."
            )
    modules = tuple(factors.modules.values())
    found_print = fingerprint(model, modules)
    if found_print in (fitted["fingerprint"], *fitted.get("narrower_fingerprints", {}).values()):
        return
    dtype = getattr(torch, str(fitted.get("dtype")), None)
    if dtype is not None and fingerprint(model, modules, dtype) == fitted["fingerprint"]:
        return  # the same weights, held in a wider dtype
    held = str(next(model.parameters()).dtype).removeprefix("torch.")
    raise StoreError(
        f"{said}, {fitted.get('dtype')}) with parameter fingerprint "
        f"{fitted['fingerprint'][:12]}…; the given {type(model).__name__} ({held}) has "
        f"{found_print[:12]}…: its weights differ; {_ADVICE}."
    )


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


_ADVICE = "give the model that they were fitted for, or fit factors for this one"


def _check_entries(reader: StoreReader) -> None:
    manifest = reader.manifest
    for name, fields in _ENTRIES.items():
        entry = manifest[name]
        wrong = [field for field, kind in fields.items() if type(entry.get(field)) is not kind]
        if wrong:
            raise StoreError(
                f"{reader.path / MANIFEST} is damaged: its {name} has no whole {', '.join(wrong)}. "
                f"{MEND}"
            )
    if not manifest["modules"]:
        raise StoreError(f"{reader.path / MANIFEST} is damaged: it has no modules. {MEND}")


def _shape(module: TrackedModule) -> tuple[str, int, int, bool]:
    return module.kind, module.num_inputs, module.num_outputs, module.bias


def _in_words(module: TrackedModule | None) -> str:
    if module is None:
        return "no linear map"
    kind, num_inputs, num_outputs, bias = _shape(module)
    return f"{kind} {num_inputs}→{num_outputs}{' with a bias' if bias else ''}"
