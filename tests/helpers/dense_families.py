"""Every tracked module of a model of any family by plain autograd, experts' matrices too."""

from functools import partial

from ekfac_dist.models.capture.experts import fused_experts
from ekfac_dist.models.modules import EXPERT
from helpers.dense import dense_experts, dense_modules, sequence_loss
from helpers.networks import shifted


def dense_of(model, factors, data):
    """`DenseModule` of each tracked module, experts' by name too."""
    fused = {}
    for name, experts in fused_experts(model).items():
        for matrix in ("gate_up_proj", "down_proj"):
            bias = f"{name}.{matrix}_bias" if experts.has_bias else None
            fused[f"{name}.{matrix}"] = (experts.is_transposed, bias)
    before = model.config._experts_implementation
    model.set_experts_implementation("eager")
    sequences = [shifted(example) for example in data]
    plain = [name for name, m in factors.modules.items() if m.kind != EXPERT]
    dense = dense_modules(model, sequences, plain)
    losses = [partial(sequence_loss, model, *sequence) for sequence in sequences]
    found = dense_experts(model, losses, fused)
    model.set_experts_implementation(before)
    for (parameter, expert), module in found.items():
        collection, _, matrix = parameter.rpartition(".")
        dense[f"{collection}.{expert}.{matrix}"] = module
    return dense
