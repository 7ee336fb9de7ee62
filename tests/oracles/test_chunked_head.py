"""A chunked head gives the losses and gradient of whole logits: by autograd, in float64."""

import pytest
import torch
from helpers.dense import relative
from helpers.families import PLAIN, VOCABULARY, WITH_EXPERTS, tiny_model
from torch.nn.functional import cross_entropy

from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.sequences import Sequence, collate
from ekfac_dist.models.capture.chunked_head import CausalLMInChunks
from ekfac_dist.models.capture.chunked_head_checks import in_chunks
from ekfac_dist.models.capture.labels import LabelRule
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.capture.tasks import CAUSAL_LM
from ekfac_dist.models.find.discovery import discover

DATA = LabelRule("data", 0, 0)
CHUNKS = (1, 3, 100)  # positions whose logits are held at a time


def batch_of(*lengths: int, unlabelled: int = 0):
    """Sequences of some lengths, whose first positions have no label."""
    generator = torch.Generator().manual_seed(len(lengths))
    sequences = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (length + 1,), generator=generator).numpy()
        targets = ids[1:].copy()
        targets[: min(unlabelled, length - 1)] = NO_LABEL
        sequences.append(Sequence(index, ids[:-1], targets))
    return collate(sequences)


def whole_gradient(model, body, batch):
    """−log p of each sequence, and its sum's gradient at the hidden states, from whole logits."""
    hidden = []

    def keep(module, args, output):
        output[0].requires_grad_()
        hidden.append(output[0])

    handle = model.get_submodule(body).register_forward_hook(keep)
    inputs = {name: field for name, field in batch.inputs.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    handle.remove()
    losses = cross_entropy(logits.mT, batch.inputs["labels"], reduction="none").sum(1)
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    return losses.detach(), gradient


def tracked(model):
    return discover(model, None, torch.device("cpu")).modules


@pytest.mark.parametrize("family", [*PLAIN, *WITH_EXPERTS])
def test_losses_and_gradient_are_those_of_whole_logits(family):
    model, batch = tiny_model(family), batch_of(9, 4, 6, unlabelled=2)
    model.set_experts_implementation("eager")  # the grouped product knows no float64
    with prepared(model):
        body = in_chunks(model, tracked(model), batch).body
        losses, expected = whole_gradient(model, body, batch)
        for positions in CHUNKS:
            chunked = CausalLMInChunks(model, body, positions * VOCABULARY)
            _, result = chunked.loss_gradient(model, batch, DATA)
            assert relative(result.gradient, expected) < 1e-12
            assert relative(result.losses, losses) < 1e-12
            assert result.logit_bytes <= 8 * positions * VOCABULARY


def test_labels_are_drawn_alike_whatever_the_chunk():
    model, batch = tiny_model("Gemma2ForCausalLM"), batch_of(9, 5)
    rule = LabelRule("sampled", 3, 1)
    with prepared(model):
        _, whole = CAUSAL_LM.loss_gradient(model, batch, rule)
        body = in_chunks(model, tracked(model), batch).body
        for positions in CHUNKS:
            chunked = CausalLMInChunks(model, body, positions * VOCABULARY)
            _, result = chunked.loss_gradient(model, batch, rule)
            assert result.labels.equal(whole.labels)


def test_the_model_is_as_it_was_afterwards():
    model, batch = tiny_model("LlamaForCausalLM"), batch_of(7)
    body, hooks = model.model, dict(model.model._forward_hooks)
    with prepared(model):
        in_chunks(model, tracked(model), batch).loss_gradient(model, batch, DATA)
    assert model.model is body
    assert dict(body._forward_hooks) == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


# -- where logits are whole ------------------------------------------------------------------------


def test_no_chunks_where_the_head_itself_is_tracked():
    model, batch = tiny_model("LlamaForCausalLM"), batch_of(7)
    modules = discover(model, ["lm_head", "*.up_proj"], torch.device("cpu")).modules
    assert in_chunks(model, modules, batch) is None


def scaled(model):
    """A hook of the caller's on the whole model."""

    def hook(module, args, output):
        output.logits = output.logits * 1.1

    model.register_forward_hook(hook)


def by_position(model):
    """Logits that depend on where a position is in its sequence."""

    def hook(module, args, output):
        return output * torch.arange(1, output.shape[1] + 1)[:, None]

    model.lm_head.register_forward_hook(hook)


def across_positions(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output.cumsum(1))


def fails_at_one_position(model):
    def hook(module, args):
        if args[0].shape[1] == 1:
            raise RuntimeError("one position")

    model.lm_head.register_forward_pre_hook(hook)


@pytest.mark.parametrize("change", [scaled, by_position, across_positions, fails_at_one_position])
def test_no_chunks_where_they_would_not_be_the_same(change):
    model, batch = tiny_model("LlamaForCausalLM"), batch_of(7, 5)
    change(model)
    with prepared(model):
        assert in_chunks(model, tracked(model), batch) is None
