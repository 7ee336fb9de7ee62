"""Independent dense computations that the package is compared with.

Nothing here uses the package's mathematics: plain autograd, one sequence at a time, dense matrices.
vec is row-major, so (S ⊗ A) vec V = vec(S V Aᵀ) for a weight V of shape O×I.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D


@dataclass
class DenseModule:
    """One module's raw material, sequence by sequence."""

    gradients: list  # G_n [O, I], by autograd on the weight (and bias)
    acts: list  # a [T, I], with the bias coordinate
    grads: list  # g [T, O]

    @property
    def N(self):
        return len(self.gradients)

    @property
    def M(self):
        return sum(len(a) for a in self.acts)

    @property
    def A(self):
        return sum(a.T @ a for a in self.acts) / self.M

    @property
    def S(self):
        return sum(g.T @ g for g in self.grads) / self.M

    @property
    def F(self):
        vectors = torch.stack([G.flatten() for G in self.gradients])
        return vectors.T @ vectors / self.N

    def lam(self, per_token=False):
        return dense_lambda(self.A, self.S, self.squares(per_token), self.N)

    def squares(self, per_token=False):
        """The matrices whose rotated squares are summed."""
        if not per_token:
            return self.gradients
        return [
            torch.outer(g, a)
            for gs, xs in zip(self.grads, self.acts, strict=True)
            for g, a in zip(gs, xs, strict=True)
        ]

    @property
    def Q(self):
        return torch.kron(
            torch.linalg.eigh(self.S).eigenvectors, torch.linalg.eigh(self.A).eigenvectors
        )

    def E(self, per_token=False):
        Q = self.Q
        return Q @ torch.diag(self.lam(per_token).flatten()) @ Q.T

    @property
    def K(self):
        return self.M / self.N * torch.kron(self.S, self.A)


def dense_lambda(A, S, gradients, N):
    QA, QS = torch.linalg.eigh(A).eigenvectors, torch.linalg.eigh(S).eigenvectors
    total = sum((QS.T @ G @ QA) ** 2 for G in gradients)
    return total / N


def sequence_loss(model, ids, targets):
    """Sum of −log p(target) over labelled positions, one sequence, no padding."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    log_p = torch.log_softmax(logits.double(), -1)
    keep = targets != -100
    return -log_p[torch.arange(len(ids))[keep], targets[keep]].sum()


def dense_modules(model, sequences, names):
    """`DenseModule` of each named module of a causal language model.

    Args:
        model: The model, in float64 and evaluation mode.
        sequences: (ids [L], targets [L]) of each sequence; every position is a counted one.
        names: Module names.
    """
    losses = [partial(sequence_loss, model, ids, targets) for ids, targets in sequences]
    return dense_of_losses(model, losses, names)


def dense_of_losses(model, losses, names):
    """`DenseModule` of each named module of any network.

    Args:
        model: The network, in float64.
        losses: For each sequence a function that runs it alone and returns its loss.
        names: Module names.
    """
    found = {name: DenseModule([], [], []) for name in names}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for loss in losses:
        seen = {}
        handles = [
            model.get_submodule(name).register_forward_hook(partial(_remember, seen, name))
            for name in names
        ]
        model.zero_grad()
        loss().backward()
        for handle in handles:
            handle.remove()
        for name, dense in found.items():
            module = model.get_submodule(name)
            G = weight_gradient(module)
            a, output = seen[name]
            a = a.reshape(-1, a.shape[-1])
            if module.bias is not None:
                a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
            dense.gradients.append(G)
            dense.acts.append(a)
            dense.grads.append(output.grad.reshape(-1, output.shape[-1]).clone())
    model.zero_grad()
    return found


def dense_experts(model, losses, fused):
    """`DenseModule` of each expert's part of fused parameters [E, ·, ·], by plain autograd.

    The model has to compute expert by expert (`experts_implementation="eager"`): each product with
    a slice of a parameter is looked at.

    Args:
        model: The network, in float64.
        losses: For each sequence a function that runs it alone and returns its loss.
        fused: Of each parameter's name, whether it is stored inputs × outputs, and its bias's name.

    Returns:
        By (parameter's name, expert).
    """
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    found = {}
    for loss in losses:
        model.zero_grad()
        with _Products({name: parameters[name] for name in fused}) as products:
            value = loss()
        value.backward()
        for name, (transposed, bias) in fused.items():
            weight = parameters[name]
            for expert in range(len(weight)):
                dense = found.setdefault((name, expert), DenseModule([], [], []))
                G = torch.zeros_like(weight[expert]) if weight.grad is None else weight.grad[expert]
                G = G.T if transposed else G
                a, output = products.seen.get((name, expert), (None, None))
                if bias is not None:
                    column = parameters[bias].grad
                    column = torch.zeros(len(G)) if column is None else column[expert]
                    G = torch.cat([G, column[:, None].to(G)], 1)
                if a is None:
                    a, g = G.new_zeros(0, G.shape[1]), G.new_zeros(0, G.shape[0])
                else:
                    g = output.grad
                    a = torch.cat([a, a.new_ones(len(a), 1)], 1) if bias is not None else a
                dense.gradients.append(G.clone())
                dense.acts.append(a)
                dense.grads.append(g.clone())
    model.zero_grad()
    return found


class _Products(TorchFunctionMode):
    """Remembers input and output of every product with a slice of some parameters."""

    def __init__(self, parameters):
        super().__init__()
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.seen = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if len(args) > 1 and getattr(args[1], "_base", None) is not None:
            weight = args[1]
            name = self.names.get(id(weight._base))
            if name is not None and isinstance(output, torch.Tensor) and output.ndim == 2:
                output.retain_grad()
                expert = weight.storage_offset() // weight.numel()
                assert (name, expert) not in self.seen
                self.seen[name, expert] = (args[0].detach().clone(), output)
        return output


def _remember(seen, name, module, args, output):
    output.retain_grad()
    seen[name] = (args[0].detach().clone(), output)


def weight_gradient(module: nn.Module):
    """The module's weight gradient as O×I, the bias gradient as its last column."""
    G = module.weight.grad.T if isinstance(module, Conv1D) else module.weight.grad
    if module.bias is not None:
        G = torch.cat([G, module.bias.grad[:, None]], 1)
    return G.clone()


def drawn_targets(model, ids, has_label, uniform):
    """Labels drawn one position at a time, by the definition of the inverse CDF."""
    with torch.no_grad():
        p = torch.softmax(model(input_ids=ids[None], use_cache=False).logits[0].double(), -1)
    targets = torch.full((len(ids),), -100)
    for t in range(len(ids)):
        if has_label[t]:
            cumulated = 0.0
            for label in range(p.shape[1]):
                cumulated += p[t, label].item()
                if cumulated > uniform[t]:
                    break
            targets[t] = label
    return targets


def counts_in(factors, folder, module):
    """How many positions a module's input and output factor are of, by a folder of the store."""
    files = (f"{folder}/{factor}.safetensors" for factor in (module.input, module.output))
    return [int(factors._source.header(file)["count"]) for file in files]


def dense_E(factors, name):
    """The package's E of one module as a matrix, by applying it to unit matrices."""
    module = factors.modules[name]
    size = module.num_outputs * module.input_size
    basis = torch.eye(size, dtype=torch.float64).view(size, module.num_outputs, module.input_size)
    return factors.apply({name: basis})[name].reshape(size, size).T


def dense_influence(train, queries, damping=0.1):
    """Scores [Q, N] of dense gradients, summed over modules; λ = damping · mean(Λ) of each.

    Args:
        train: `DenseModule` of each module, of what the curvature is of and what is scored.
        queries: The same of the queries.
    """
    total = 0
    for name, module in train.items():
        E = module.E()
        damped = E + damping * module.lam().mean() * torch.eye(len(E), dtype=E.dtype)
        G, Q = (
            torch.stack([g.flatten() for g in dense.gradients]) for dense in (module, queries[name])
        )
        total = total + Q @ torch.linalg.solve(damped, G.T)
    return total


def relative(found, expected):
    """‖found − expected‖ / ‖expected‖."""
    return ((found - expected).norm() / expected.norm()).item()
