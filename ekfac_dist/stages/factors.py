"""A store's factors, ready to solve with: each module is read when it is first used."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ekfac_dist.curvature import kronecker
from ekfac_dist.curvature.damping import DEFAULT, Damping
from ekfac_dist.errors import ConfigError, StoreError
from ekfac_dist.models.discovery import CONV1D, LINEAR, TrackedModule, describe, fingerprint
from ekfac_dist.runtime.store import (
    MANIFEST,
    MEND,
    MemoryStore,
    StoreReader,
    eigenbasis_file,
    spectrum_file,
)
from ekfac_dist.runtime.store_writer import StoreWriter

# What is read of the manifest's entries, and of a module's, and what each has to be.
_ENTRIES: dict[str, dict[str, type]] = {
    "model": {"fingerprint": str},
    "data": {"fingerprint": str, "num_sequences": int},
    "fisher": {"labels": str, "seed": int, "refit": str},
    "config": {"model": dict, "data": dict},
}
_MODULE_ENTRY: dict[str, type] = {
    "kind": str,
    "in_features": int,
    "out_features": int,
    "bias": bool,
    "input": str,
    "output": str,
}


class FactorSource(Protocol):
    """What factors are read from: a store on disk or in memory."""

    manifest: dict[str, Any]

    def tensor(self, file: str, key: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor of one file."""


@dataclass(frozen=True)
class ModuleFactors:
    """One module's approximate Fisher, (Q_S ⊗ Q_A) diag(vec Λ) (Q_S ⊗ Q_A)ᵀ.

    Attributes:
        basis_OO: Q_S, in columns.
        basis_II: Q_A, in columns.
        lambda_OI: Λ.
    """

    basis_OO: Tensor
    basis_II: Tensor
    lambda_OI: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "ModuleFactors":
        """The same factors on a device and in a dtype; copies only what is not there already."""
        return ModuleFactors(
            self.basis_OO.to(device, dtype),
            self.basis_II.to(device, dtype),
            self.lambda_OI.to(device, dtype),
        )


class Factors:
    """Fitted factors, by module.

    Args:
        source: What they are read from.

    Attributes:
        manifest: The store's manifest.
        modules: The tracked modules, by name, in model order.
    """

    def __init__(self, source: FactorSource) -> None:
        self._source = source
        self._bases: dict[str, Tensor] = {}
        self._lambdas: dict[str, Tensor] = {}
        self.manifest = source.manifest
        self.modules = {
            name: _tracked_module(name, entry) for name, entry in self.manifest["modules"].items()
        }

    def module(self, name: str) -> ModuleFactors:
        """One module's factors, read from the store on first use, on the CPU.

        Raises:
            ConfigError: The store has no such module.
            StoreError: Its files are missing or damaged.
        """
        if name not in self.modules:
            raise ConfigError(
                f"There are no factors for module {name!r}; there are for "
                f"{', '.join(list(self.modules)[:4])}{', …' if len(self.modules) > 4 else ''}."
            )
        module = self.modules[name]
        shape = (module.num_outputs, module.input_size)
        if name not in self._lambdas:
            self._lambdas[name] = self._lambda(name, shape)
        return ModuleFactors(
            basis_OO=self._basis(module.output, shape[0]),
            basis_II=self._basis(module.input, shape[1]),
            lambda_OI=self._lambdas[name],
        )

    def damping_of(self, name: str, damping: Damping) -> float:
        """λ of one module; errors as for `damped`."""
        self.damped(name, damping)
        return damping.absolute(name, self.module(name).lambda_OI)

    def damped(self, name: str, damping: Damping, factors: ModuleFactors | None = None) -> Tensor:
        """Λ + λ of one module, [O, I].

        Args:
            name: The module.
            damping: How λ is chosen.
            factors: The module's factors, if they have been moved elsewhere.

        Raises:
            ConfigError: No damping for the module, or one of zero where Λ has zeros.
        """
        stored_OI = self.module(name).lambda_OI
        lambda_OI = stored_OI if factors is None else factors.lambda_OI
        try:
            return kronecker.damped(lambda_OI, damping.absolute(name, stored_OI))
        except ConfigError as error:
            if damping.relative and not stored_OI.any():
                raise ConfigError(
                    f"Module {name}: Λ is zero everywhere, and so is every multiple of its mean; "
                    "give an absolute damping above 0 (relative: false)."
                ) from error
            raise ConfigError(f"Module {name}: {error}") from error

    def solve(
        self,
        gradients: Mapping[str, Tensor],
        damping: float | Mapping[str, float] | Damping = DEFAULT,
        *,
        relative: bool = True,
    ) -> dict[str, Tensor]:
        """(E + λ)⁻¹ applied to each module's gradient; by default λ = 0.1 · mean(Λ) of the module.

        Grosse et al. 2023, eq. 21. Stored factors are never changed.

        Args:
            gradients: By module name, weight-shaped [..., O, I]; I includes the bias, last. A
                Conv1D's weight has to be transposed to O×I.
            damping: λ of every module, 0 or more; or of each, by name or glob.
            relative: Whether `damping` is a multiple of the module's mean(Λ), or λ itself.

        Returns:
            The same names and shapes, in the wider of the gradient's and the factors' dtype, on
            the gradient's device.

        Raises:
            ConfigError: An unknown module, a wrong shape, a negative damping, or a damping of zero
                where Λ has zeros.
            StoreError: A file is missing or damaged.
        """
        chosen = Damping.of(damping, relative)
        chosen.require_used(self.modules)
        solved = {}
        for name, gradient in gradients.items():
            fitted, gradient = self._at(name, gradient)
            damped_OI = self.damped(name, chosen, fitted)
            solved[name] = kronecker.solve(gradient, fitted.basis_OO, fitted.basis_II, damped_OI)
        return solved

    def apply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """E applied to each module's gradient; arguments and errors as for `solve`."""
        applied = {}
        for name, gradient in gradients.items():
            fitted, gradient = self._at(name, gradient)
            applied[name] = kronecker.apply(
                gradient, fitted.basis_OO, fitted.basis_II, fitted.lambda_OI
            )
        return applied

    def save(self, path: str | Path) -> None:
        """Writes factors that are held in memory to a new store.

        Raises:
            OutputError: The directory cannot be written or holds something else.
            StoreError: The factors are on disk already.
        """
        if not isinstance(self._source, MemoryStore):
            raise StoreError("These factors are on disk already; copy their directory instead.")
        self._source.copy_to(StoreWriter(path, self.manifest["config"]))

    def _at(self, name: str, gradient: Tensor) -> tuple[ModuleFactors, Tensor]:
        """A module's factors and a gradient, in one dtype on the gradient's device."""
        fitted = self.module(name)
        if gradient.shape[-2:] != fitted.lambda_OI.shape:
            raise ConfigError(
                f"The gradient of module {name} has shape {list(gradient.shape)}; its last two "
                f"sizes must be {list(fitted.lambda_OI.shape)}: outputs, then inputs"
                f"{' and the bias' if self.modules[name].bias else ''}."
            )
        dtype = torch.promote_types(gradient.dtype, fitted.lambda_OI.dtype)

        return fitted.to(gradient.device, dtype), gradient.to(dtype)

    def _lambda(self, name: str, shape: tuple[int, ...]) -> Tensor:
        lambda_OI = self._source.tensor(spectrum_file(name), "lambda", shape)
        if not bool((torch.isfinite(lambda_OI) & (lambda_OI >= 0)).all()):
            raise StoreError(
                f"Module {name}: Λ holds negative numbers, NaN or infinity; it is a mean of "
                "squares. Fit the factors again."
            )
        return lambda_OI

    def _basis(self, factor: str, size: int) -> Tensor:
        if factor not in self._bases:
            self._bases[factor] = self._source.tensor(
                eigenbasis_file(factor), "eigenvectors", (size, size)
            )
        return self._bases[factor]


def load_factors(
    path: str | Path, model: nn.Module | None = None, *, verify: bool = True
) -> Factors:
    """Opens a factor store.

    A module's files are read, memory-mapped, when the module is first used. The store is the same
    whatever number of workers fitted it, and for whatever device or dtype it is used with.

    Args:
        path: The store's directory.
        model: The model that the factors are to be used with; its tracked modules are compared with
            those that the factors were fitted for. It may hold the same weights in another dtype.
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
    for module in factors.modules.values():
        try:
            found = describe(model.get_submodule(module.name))
        except AttributeError as error:
            raise StoreError(
                f"{said}), whose module {module.name} this {type(model).__name__} lacks; {_ADVICE}."
            ) from error
        wanted = (module.kind, module.num_inputs, module.num_outputs, module.bias)
        if found != wanted:
            raise StoreError(
                f"{said}), whose module {module.name} is {_in_words(wanted)}; in this "
                f"{type(model).__name__} it is {_in_words(found)}; {_ADVICE}."
            )
    found_print = fingerprint(model, factors.modules.values())
    if found_print == fitted["fingerprint"]:
        return
    dtype = getattr(torch, str(fitted.get("dtype")), None)
    if (
        dtype is not None
        and fingerprint(model, factors.modules.values(), dtype) == (fitted["fingerprint"])
    ):
        return  # the same weights, held in another dtype
    held = str(next(model.parameters()).dtype).removeprefix("torch.")
    raise StoreError(
        f"{said}, {fitted.get('dtype')}) with parameter fingerprint "
        f"{fitted['fingerprint'][:12]}…; the given {type(model).__name__} ({held}) has "
        f"{found_print[:12]}…: its weights differ; {_ADVICE}."
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


def _in_words(described: tuple[str, int, int, bool] | None) -> str:
    if described is None:
        return "no linear map"
    kind, num_inputs, num_outputs, bias = described
    return f"{kind} {num_inputs}→{num_outputs}{' with a bias' if bias else ''}"


def _tracked_module(name: str, entry: Any) -> TrackedModule:
    if not _is_module(entry):
        raise StoreError(f"The manifest's entry for module {name} is not whole: {entry!r}. {MEND}")
    return TrackedModule(
        name=name,
        kind=entry["kind"],
        num_inputs=entry["in_features"],
        num_outputs=entry["out_features"],
        bias=entry["bias"],
        input=entry["input"],
        output=entry["output"],
    )


def _is_module(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(type(entry.get(field)) is kind for field, kind in _MODULE_ENTRY.items())
        and entry["kind"] in (LINEAR, CONV1D)
        and min(entry["in_features"], entry["out_features"]) > 0
    )
