"""The factors of a store, and what is computed with them: products with F and (F + λ)⁻¹.

    F ≈ (Q_S ⊗ Q_A) diag(Λ) (Q_S ⊗ Q_A)ᵀ        one block per module
    (F + λ)⁻¹ V = Q_S [(Q_Sᵀ V Q_A) ⊘ (Λ + λ)] Q_Aᵀ        Grosse et al. 2023, eq. 21

A module's factors are read when they are first used. This module knows what a store holds, not how
a directory is laid out on the disk beyond the files' names.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ekfac_dist.curvature import kronecker
from ekfac_dist.curvature.blocks import Blocks, block_sizes, dense, on
from ekfac_dist.curvature.damping import DEFAULT, Damping
from ekfac_dist.errors import ConfigError, StoreError
from ekfac_dist.factors.layout import (
    CHECKSUM,
    REMEDY,
    block_keys,
    eigenbasis_file,
    manifest_checksum,
    spectrum_file,
)
from ekfac_dist.factors.sinks import MemoryStore
from ekfac_dist.factors.writer import StoreWriter
from ekfac_dist.models.modules import CONV1D, EXPERT, LINEAR, TrackedModule

# Fields of a module's entry in the manifest, and their types.
_MODULE_ENTRY: dict[str, type] = {
    "kind": str,
    "in_features": int,
    "out_features": int,
    "bias": bool,
    "input": str,
    "output": str,
}


class FactorSource(Protocol):
    """A store on disk or in memory that factors are read from."""

    manifest: dict[str, Any]

    def tensor(self, file: str, key: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor of one file; see `StoreReader.tensor`."""


@dataclass(frozen=True)
class ModuleFactors:
    """One module's approximate Fisher, (Q_S ⊗ Q_A) diag(vec Λ) (Q_S ⊗ Q_A)ᵀ.

    Attributes:
        blocks_OO: The diagonal blocks of Q_S, eigenvectors in columns; one block by default.
        blocks_II: The diagonal blocks of Q_A.
        lambda_OI: Λ, the corrected eigenvalues.
    """

    blocks_OO: Blocks
    blocks_II: Blocks
    lambda_OI: Tensor

    @property
    def basis_OO(self) -> Tensor:
        """Q_S as one matrix, zero between its blocks."""
        return dense(self.blocks_OO)

    @property
    def basis_II(self) -> Tensor:
        """Q_A as one matrix, zero between its blocks."""
        return dense(self.blocks_II)

    def to(self, device: torch.device, dtype: torch.dtype) -> "ModuleFactors":
        """The same factors on a device and in a dtype; copied only where that differs."""
        return ModuleFactors(
            on(self.blocks_OO, device, dtype),
            on(self.blocks_II, device, dtype),
            self.lambda_OI.to(device, dtype),
        )


class Factors:
    """The fitted factors of all tracked modules.

    Args:
        source: The store that they are read from.

    Attributes:
        manifest: The store's manifest.
        modules: The tracked modules, by name, in model order.
        num_blocks: B, the number of diagonal blocks of each factor.

    Raises:
        StoreError: If the manifest's entries of modules or blocks are damaged.
    """

    def __init__(self, source: FactorSource) -> None:
        self._source = source
        self._bases: dict[str, Blocks] = {}
        self._lambdas: dict[str, Tensor] = {}
        self.manifest = source.manifest
        self.modules = {
            name: _tracked_module(name, entry) for name, entry in self.manifest["modules"].items()
        }
        fitted = self.manifest["config"].get("factors")
        self.num_blocks = fitted.get("blocks", 1) if isinstance(fitted, dict) else 1
        if type(self.num_blocks) is not int or self.num_blocks < 1:
            raise StoreError(
                f"The manifest says that factors have {self.num_blocks!r} blocks. {REMEDY}"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the manifest, and so over each file's SHA-256.

        Factors in memory have no files; then it is over all entries but the passes, whose times
        differ between workers, and the halves, which are measurements.
        """
        if CHECKSUM in self.manifest:
            return str(self.manifest[CHECKSUM])
        return manifest_checksum(
            {k: v for k, v in self.manifest.items() if k not in ("passes", "halves")}
        )

    def module(self, name: str) -> ModuleFactors:
        """One module's factors on the CPU, read from the store on first use.

        Raises:
            ConfigError: If the store has no such module.
            StoreError: If a file of the module is missing or damaged.
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
            blocks_OO=self._basis(module.output, shape[0]),
            blocks_II=self._basis(module.input, shape[1]),
            lambda_OI=self._lambdas[name],
        )

    def chosen_damping(
        self, damping: Damping, names: Iterable[str] | None = None
    ) -> dict[str, float]:
        """The absolute λ of some modules, by name.

        Args:
            damping: How λ is chosen, for all modules.
            names: The modules, whose Λ are read; None: all.

        Raises:
            ConfigError: If a value belongs to no module, or a module has no value; or if λ is zero
                where Λ has zeros.
        """
        damping.require_used(self.modules)
        for name in self.modules:
            damping.value_of(name)
        names = list(self.modules if names is None else names)
        for name in names:
            self.damped(name, damping)
        return {name: damping.absolute(name, self.module(name).lambda_OI) for name in names}

    def damped(self, name: str, damping: Damping, factors: ModuleFactors | None = None) -> Tensor:
        """Λ + λ of one module, [O, I].

        Args:
            name: The module's name.
            damping: How λ is chosen.
            factors: The module's factors on the device and in the dtype wanted; None: as stored.

        Raises:
            ConfigError: If there is no damping for the module, or it is zero where Λ has zeros.
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
        """(F + λ)⁻¹ applied to each module's gradient; by default λ = 0.1 · mean(Λ) of the module.

        Grosse et al. 2023, eq. 21. Stored factors are never changed.

        Args:
            gradients: By module name, shaped as the weight, [..., O, I]; I includes the bias as its
                last coordinate. A Conv1D's weight has to be transposed to O×I.
            damping: λ of every module, 0 or more; or of each module, by its name or a glob.
            relative: Whether `damping` is a multiple of the module's mean(Λ); else it is λ itself.

        Returns:
            The same names and shapes, in the wider of the gradient's and the factors' dtype, on
            the gradient's device.

        Raises:
            ConfigError: If a module is unknown, a shape wrong, or a damping negative, or zero where
                Λ has zeros.
            StoreError: If a file is missing or damaged.
        """
        chosen = Damping.of(damping, relative)
        chosen.require_used(self.modules)
        solved = {}
        for name, gradient in gradients.items():
            fitted, gradient = self._at(name, gradient)
            damped_OI = self.damped(name, chosen, fitted)
            solved[name] = kronecker.solve(gradient, fitted.blocks_OO, fitted.blocks_II, damped_OI)
        return solved

    def apply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F applied to each module's gradient; arguments and errors as of `solve`."""
        applied = {}
        for name, gradient in gradients.items():
            fitted, gradient = self._at(name, gradient)
            applied[name] = kronecker.apply(
                gradient, fitted.blocks_OO, fitted.blocks_II, fitted.lambda_OI
            )
        return applied

    def save(self, path: str | Path) -> None:
        """Writes factors that are in memory to a new store.

        Raises:
            OutputError: If the directory cannot be written, or holds something else.
            StoreError: If the factors are on disk already.
        """
        if not isinstance(self._source, MemoryStore):
            raise StoreError("These factors are on disk already; copy their directory instead.")
        writer = StoreWriter(path, self.manifest["config"])
        try:
            self._source.copy_to(writer)
        finally:
            writer.close()

    def _at(self, name: str, gradient: Tensor) -> tuple[ModuleFactors, Tensor]:
        """A module's factors and a gradient, in the wider dtype, on the gradient's device."""
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

    def _basis(self, factor: str, size: int) -> Blocks:
        if factor not in self._bases:
            self._bases[factor] = self._blocks(factor, "eigenvectors", size, square=True)
        return self._bases[factor]

    def eigenvalues(self, factor: str, size: int) -> Tensor:
        """The eigenvalues of a factor's covariance [n], ascending within each block.

        Args:
            factor: The factor's name.
            size: n.

        Raises:
            StoreError: If its file is missing or damaged.
        """
        return torch.cat(self._blocks(factor, "eigenvalues", size, square=False))

    def _blocks(self, factor: str, key: str, size: int, *, square: bool) -> list[Tensor]:
        sizes = block_sizes(size, self.num_blocks)
        file = eigenbasis_file(factor)
        return [
            self._source.tensor(file, name, (n, n) if square else (n,))
            for name, n in zip(block_keys(key, len(sizes)), sizes, strict=True)
        ]


def _tracked_module(name: str, entry: Any) -> TrackedModule:
    if not _is_module(entry):
        raise StoreError(
            f"The manifest's entry for module {name} is not whole: {entry!r}. {REMEDY}"
        )
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
    """Whether a module's entry in the manifest has all fields, with values that can be."""
    return (
        isinstance(entry, dict)
        and all(type(entry.get(field)) is kind for field, kind in _MODULE_ENTRY.items())
        and entry["kind"] in (LINEAR, CONV1D, EXPERT)
        and min(entry["in_features"], entry["out_features"]) > 0
    )
