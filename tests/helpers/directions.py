"""Directional derivatives of a network's logits along its weights, by plain forward-mode autograd.

Nothing here uses the package's mathematics: the weights themselves are perturbed, one sequence at a
time, without padding, and experts are computed by the model's own code. Attention is by torch's
plain kernel: that of `transformers` takes its softmax in float32.
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from ekfac_dist.models.modules import EXPERT


@contextmanager
def eagerly(model):
    """While it lasts, experts and attention are computed by operations with all derivatives."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [getattr(config, "_experts_implementation", None) for config in configs]
    for config in configs:
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    with sdpa_kernel([SDPBackend.MATH]):
        yield
    for config, value in zip(configs, before, strict=True):
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = value


def with_wide_norms(model):
    """The model with norms computed in its own dtype, where its class takes float32 for them."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)
    return model


def _rms_norm(module, x):
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * (x * scale)


def parameter_tangents(model, modules, vectors):
    """{parameter's name: tangent} of directions {module's name: V [O, I]}.

    Args:
        model: The network.
        modules: The tracked modules by name.
        vectors: A direction in each.
    """
    parameters, tangents = dict(model.named_parameters()), {}
    for name, module in modules.items():
        vector = vectors[name]
        weight, bias = vector[:, : module.num_inputs], vector[:, module.num_inputs :]
        if module.kind == EXPERT:
            collection, expert, matrix = module.fused
            tensor = parameters[f"{collection}.{matrix}"]
            weight = weight.T if tuple(tensor.shape[1:]) != tuple(weight.shape) else weight
            if model.get_submodule(collection).is_transposed:
                weight = vector[:, : module.num_inputs].T
            tangent = tangents.setdefault(f"{collection}.{matrix}", torch.zeros_like(tensor))
            tangent[expert] = weight
            if module.bias:
                key = f"{collection}.{matrix}_bias"
                tangents.setdefault(key, torch.zeros_like(parameters[key]))[expert] = bias[:, 0]
            continue
        conv = isinstance(model.get_submodule(name), Conv1D)
        tangents[f"{name}.weight"] = weight.T if conv else weight
        if module.bias:
            tangents[f"{name}.bias"] = bias[:, 0]
    return tangents


def logits_and_tangents(model, run, tangents):
    """(logits, their directional derivative) of a function that runs the model.

    Args:
        model: The network.
        run: Takes a function like the model, which it calls; returns its logits.
        tangents: {parameter's name: tangent}.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with eagerly(model), torch.no_grad(), forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(p, tangents[name].contiguous()) if name in tangents else p
            for name, p in parameters.items()
        }
        logits = run(lambda **inputs: functional_call(model, duals, (), inputs, tie_weights=False))
        primal, tangent = forward_ad.unpack_dual(logits)
        return primal.clone(), torch.zeros_like(primal) if tangent is None else tangent.clone()


def label_tangents(model, modules, sequences, vectors):
    """Directional derivative of log p(label) at every labelled position, sequence after sequence.

    Args:
        model: A causal language model in float64.
        modules: The tracked modules by name.
        sequences: (ids [T], targets [T]) of each sequence.
        vectors: A direction in each module.
    """
    tangents, found = parameter_tangents(model, modules, vectors), []
    for ids, targets in sequences:
        logits, pushed = logits_and_tangents(
            model, lambda call, ids=ids: call(input_ids=ids[None], use_cache=False).logits, tangents
        )
        p = torch.softmax(logits[0], -1)
        for t in range(len(ids)):
            if targets[t] != -100:
                found.append(pushed[0, t, targets[t]] - p[t] @ pushed[0, t])
    return torch.stack(found)


def module_matrices(model, modules, gradients):
    """{module's name: [..., O, I]} of {parameter's name: gradient [..., its shape]}."""
    found = {}
    for name, module in modules.items():
        if module.kind == EXPERT:
            collection, expert, matrix = module.fused
            weight = gradients[f"{collection}.{matrix}"][..., expert, :, :]
            if model.get_submodule(collection).is_transposed:
                weight = weight.mT
            bias = f"{collection}.{matrix}_bias"
            column = gradients[bias][..., expert, :, None] if module.bias else weight[..., :0]
        else:
            weight = gradients[f"{name}.weight"]
            if isinstance(model.get_submodule(name), Conv1D):
                weight = weight.mT
            column = gradients[f"{name}.bias"][..., None] if module.bias else weight[..., :0]
        found[name] = torch.cat([weight, column], -1)
    return found


def flat(matrices):
    """All modules' matrices [..., O, I] as one vector [..., parameters]."""
    return torch.cat([matrix.flatten(-2) for matrix in matrices.values()], -1)


def gauss_newton(model, modules, runs):
    """The Hessian of the loss of a linearised model, a mean over sequences [P, P].

    The loss of a sequence is that of logits z + J v, J by plain autograd on the weights; its
    Hessian with respect to z is autograd's too.

    Args:
        model: A network in float64.
        modules: The tracked modules by name.
        runs: For each sequence a function that runs the model alone and returns the logits [n, V]
            at its labelled positions, and the labels [n].
    """
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    total = 0
    for run in runs:
        with eagerly(model):
            logits, labels = run()
            units = torch.eye(logits.numel(), dtype=logits.dtype).view(-1, *logits.shape)
            rows = torch.autograd.grad(
                logits, list(parameters.values()), units, is_grads_batched=True, allow_unused=True
            )
        gradients = {
            name: torch.zeros(len(units), *p.shape, dtype=p.dtype) if row is None else row
            for (name, p), row in zip(parameters.items(), rows, strict=True)
        }
        J = flat(module_matrices(model, modules, gradients)).detach()
        loss = partial(_loss, labels)
        H = torch.func.hessian(loss)(logits.detach()).view(len(units), len(units))
        total = total + J.T @ H @ J
    return total / len(runs)


def _loss(labels, logits):
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def runs_of(model, sequences):
    """The function that runs each sequence (ids [T], targets [T]) of a causal language model."""

    def run(ids, targets):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        keep = targets != -100
        return logits[keep], targets[keep]

    return [lambda ids=ids, targets=targets: run(ids, targets) for ids, targets in sequences]
