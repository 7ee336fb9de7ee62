"""Influence by dense matrices: gᵀ (E + λ)⁻¹ g' with E and every gradient from plain autograd."""

import torch

from helpers.dense import dense_modules
from helpers.networks import shifted


class DenseScores:
    """Everything that scores are compared with, one module at a time.

    Args:
        model: In float64 and evaluation mode.
        names: The tracked modules.
        fitted: Examples that the curvature is of, with the data's own labels.
        damping: λ over mean(Λ), or λ itself where it is not relative.
    """

    def __init__(self, model, names, fitted, damping=0.1, relative=True):
        self.model, self.names = model, list(names)
        self.inverse = {}
        for name, module in self._of(fitted).items():
            lam = module.lam()
            value = damping * lam.mean() if relative else damping
            E = module.E()
            self.inverse[name] = torch.linalg.inv(E + value * torch.eye(len(E), dtype=E.dtype))

    def _of(self, examples):
        return dense_modules(self.model, [shifted(e) for e in examples], self.names)

    def gradients(self, examples):
        """{module: [n, O·I]}."""
        found = self._of(examples)
        return {
            name: torch.stack([G.flatten() for G in module.gradients])
            for name, module in found.items()
        }

    def per_module(self, queries, train):
        """[Q, modules, N]."""
        q, z = self.gradients(queries), self.gradients(train)
        return torch.stack([q[n] @ self.inverse[n] @ z[n].T for n in self.names], 1)

    def scores(self, queries, train):
        """[Q, N]."""
        return self.per_module(queries, train).sum(1)

    def self_influence(self, train):
        """[N]."""
        z = self.gradients(train)
        return sum(((z[n] @ self.inverse[n]) * z[n]).sum(1) for n in self.names)

    def theta_norms(self, train):
        """‖(E + λ)⁻¹ g‖ over all modules [N]."""
        z = self.gradients(train)
        return sum((z[n] @ self.inverse[n]).square().sum(1) for n in self.names).sqrt()

    def per_position(self, query, example):
        """Σ over modules of g_tᵀ P a_t, one position at a time [T]."""
        (q,) = [self.gradients([query])]
        found = self._of([example])
        total = 0
        for name in self.names:
            a, g = found[name].acts[0], found[name].grads[0]
            P = (self.inverse[name] @ q[name][0]).view(g.shape[1], a.shape[1])
            total = total + torch.stack([g[t] @ P @ a[t] for t in range(len(a))])
        return total
