"""One store's factors with another Λ: K-FAC's, or none. What baselines are compared on.

Each method's scores come from the same code, gradients and eigenbases; only Λ differs.
"""

from typing import Any

import torch
from torch import Tensor

from ekfac_dist.curvature.kronecker import kfac_lambda
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.layout import eigenbasis_file, spectrum_file
from ekfac_dist.factors.reader import StoreReader


def kfac(reader: StoreReader) -> Factors:
    """The factors with Λ of K-FAC, M/N · λ_S λ_Aᵀ, from the stored eigenvalues."""
    return Factors(_OtherLambda(reader, _kfac_lambda))


def identity(reader: StoreReader) -> Factors:
    """The factors with Λ of zeros: with an absolute damping of 1, (F + λ)⁻¹ is the identity."""
    return Factors(_OtherLambda(reader, _zeros))


def _kfac_lambda(reader: StoreReader, factors: Factors, name: str) -> Tensor:
    module = factors.modules[name]
    values_O = factors.eigenvalues(module.output, module.num_outputs)
    values_I = factors.eigenvalues(module.input, module.input_size)
    count = int(reader.header(eigenbasis_file(module.input))["count"])
    num_sequences = reader.manifest["data"]["num_sequences"]
    lambda_OI = kfac_lambda(values_O.double(), values_I.double(), count, num_sequences)
    return lambda_OI.to(values_O.dtype)


def _zeros(reader: StoreReader, factors: Factors, name: str) -> Tensor:
    module = factors.modules[name]
    return torch.zeros(module.num_outputs, module.input_size)


class _OtherLambda:
    """A source of factors like a store, with another Λ.

    Args:
        reader: The store.
        rule: Gives Λ [O, I] of a module, by its name.
    """

    def __init__(self, reader: StoreReader, rule: Any) -> None:
        self.manifest = reader.manifest
        self._reader, self._rule = reader, rule
        self._factors = Factors(reader)
        self._names = {spectrum_file(name): name for name in self._factors.modules}

    def tensor(self, file: str, key: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor of one file; see `StoreReader.tensor`."""
        if file in self._names:
            return self._rule(self._reader, self._factors, self._names[file])
        return self._reader.tensor(file, key, shape)
