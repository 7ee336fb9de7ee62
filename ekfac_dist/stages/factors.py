"""A store's factors, ready to solve with: each module is read when it is first used."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ekfac_dist.curvature import kronecker
from ekfac_dist.errors import ConfigError, StoreError
from ekfac_dist.models.discovery import TrackedModule, fingerprint
from ekfac_dist.runtime.store import (
    MemoryStore,
    StoreReader,
    eigenbasis_file,
    spectrum_file,
)
from ekfac_dist.runtime.store_writer import StoreWriter


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
            self._lambdas[name] = self._source.tensor(spectrum_file(name), "lambda", shape)
        return ModuleFactors(
            basis_OO=self._basis(module.output, shape[0]),
            basis_II=self._basis(module.input, shape[1]),
            lambda_OI=self._lambdas[name],
        )

    def solve(self, gradients: Mapping[str, Tensor], damping: float = 0.1) -> dict[str, Tensor]:
        """(E + λ)⁻¹ applied to each module's gradient, λ = damping · mean(Λ) of that module.

        Grosse et al. 2023, eq. 21. Stored factors are never changed.

        Args:
            gradients: By module name, weight-shaped [..., O, I]; I includes the bias, last. A
                Conv1D's weight has to be transposed to O×I.
            damping: λ relative to each module's mean(Λ), 0 or more.

        Returns:
            The same names and shapes, in the wider of the gradient's and the factors' dtype, on
            the gradient's device.

        Raises:
            ConfigError: An unknown module, a wrong shape, a negative damping, or a damping of zero
                where Λ has zeros.
            StoreError: A file is missing or damaged.
        """
        if not damping >= 0:
            raise ConfigError(f"damping is {damping}; it must be 0 or more.")
        solved = {}
        for name, gradient in gradients.items():
            fitted, gradient = self._at(name, gradient)
            absolute = damping * fitted.lambda_OI.mean().item()
            try:
                solved[name] = kronecker.solve(
                    gradient, fitted.basis_OO, fitted.basis_II, fitted.lambda_OI, absolute
                )
            except ConfigError as error:
                raise ConfigError(f"Module {name}: {error}") from error
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

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(gradient.device, dtype)

        fitted = ModuleFactors(
            moved(fitted.basis_OO), moved(fitted.basis_II), moved(fitted.lambda_OI)
        )
        return fitted, gradient.to(dtype)

    def _basis(self, factor: str, size: int) -> Tensor:
        if factor not in self._bases:
            self._bases[factor] = self._source.tensor(
                eigenbasis_file(factor), "eigenvectors", (size, size)
            )
        return self._bases[factor]


def load_factors(path: str | Path, model: nn.Module | None = None) -> Factors:
    """Opens a factor store.

    Args:
        path: The store's directory.
        model: The model that the factors are to be used with; its tracked parameters are compared
            with those that the factors were fitted for.

    Raises:
        StoreError: The store is missing, incomplete, of another format, or of another model.
    """
    factors = Factors(StoreReader(path))
    if model is not None:
        _check_model(str(path), factors, model)
    return factors


def _check_model(path: str, factors: Factors, model: nn.Module) -> None:
    fitted = factors.manifest["model"]
    for name in factors.modules:
        try:
            model.get_submodule(name)
        except AttributeError as error:
            raise StoreError(
                f"{path} holds factors of {fitted.get('name')} ({fitted.get('class')}), whose "
                f"module {name} this {type(model).__name__} lacks."
            ) from error
    found = fingerprint(model, factors.modules.values())
    if found != fitted["fingerprint"]:
        raise StoreError(
            f"{path} holds factors of {fitted.get('name')} ({fitted.get('class')}, "
            f"{fitted.get('dtype')}) with parameter fingerprint {fitted['fingerprint'][:12]}…; the "
            f"given {type(model).__name__} has {found[:12]}…: its weights or dtype differ."
        )


def _tracked_module(name: str, entry: Any) -> TrackedModule:
    try:
        return TrackedModule(
            name=name,
            kind=entry["kind"],
            num_inputs=entry["in_features"],
            num_outputs=entry["out_features"],
            bias=entry["bias"],
            input=entry["input"],
            output=entry["output"],
        )
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"The manifest's entry for module {name} is not whole: {error}."
        ) from error
