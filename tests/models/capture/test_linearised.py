"""A forward linearised in the weights, against plain autograd on the weights themselves."""

import pytest
import torch
from helpers.dense import relative
from helpers.directions import flat, gauss_newton, label_tangents, runs_of, with_wide_norms
from helpers.families import PLAIN, WITH_EXPERTS, tiny_model
from helpers.networks import KINDS, build, examples, shifted
from helpers.task_models import (
    bart,
    bert,
    classified_examples,
    masked_examples,
    t5,
    translated_examples,
)
from transformers import BertForSequenceClassification

from ekfac_dist import MaskedLM, Seq2SeqLM, SequenceClassification
from ekfac_dist.data.sequences import collate
from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.models.capture import linearised
from ekfac_dist.models.capture.chunked_head import CausalLMInChunks
from ekfac_dist.models.capture.linearised import Linearisation
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.capture.task_examples import few_examples, read_examples
from ekfac_dist.models.capture.tasks import CAUSAL_LM
from ekfac_dist.models.find.discovery import discover

CPU = torch.device("cpu")
EXACT = 1e-12
# Of models that compute norms, or rotary embeddings, in float32.
ROUNDED = 3e-7
COMPUTE_IN_FLOAT32 = {
    *("llama", "llama_bias", "BitNetForCausalLM", "Exaone4ForCausalLM", "GPTJForCausalLM"),
    *("GPTNeoForCausalLM", "Gemma2ForCausalLM", "MptForCausalLM", "OlmoHybridForCausalLM"),
    *("VaultGemmaForCausalLM", "XLMWithLMHeadModel", "MixtralForCausalLM", "Qwen2MoeForCausalLM"),
    *("Qwen3MoeForCausalLM", "OlmoeForCausalLM", "DeepseekV3ForCausalLM"),
}
NO_FORWARD_MODE = {"BloomForCausalLM"}  # its GELU is a function of its own


def made(family):
    return build(family) if family in KINDS else tiny_model(family)


def small(family):
    """A model of one of a few kinds, with all of its operations in float64."""
    if family == "experts":
        sizes = {"hidden_size": 8, "intermediate_size": 5, "num_local_experts": 3, "head_dim": 4}
        return with_wide_norms(tiny_model("GptOssForCausalLM", **sizes))
    return with_wide_norms(build(family))


def tolerance(family):
    return ROUNDED if family in COMPUTE_IN_FLOAT32 else EXACT


def tracked(model):
    return discover(model, None, CPU).modules


def directions(modules, seed=0, leading=()):
    draw = torch.Generator().manual_seed(seed)
    return {
        m.name: torch.randn(
            *leading, m.num_outputs, m.input_size, dtype=torch.float64, generator=draw
        )
        for m in modules
    }


def by_name(modules):
    return {module.name: module for module in modules}


def linearised_sums(model, modules, batches, vectors, task=CAUSAL_LM):
    """Sums over batches of products of the Gauss–Newton matrix with vectors [Q, O, I]."""
    sums = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
    with Linearisation(model, modules, torch.float64, task) as linearisation:
        for batch in batches:
            linearisation.of(batch).add_gauss_newton_products_(vectors, sums)
    return sums


# -- one direction: every family -------------------------------------------------------------------


@pytest.mark.parametrize("family", [*KINDS, *PLAIN, *WITH_EXPERTS])
def test_log_probabilities_change_as_the_weights_themselves_would_have_it(family):
    if family in NO_FORWARD_MODE:
        return
    model, rows = made(family), examples(5, prompts=True)
    padded = collate(list(from_examples(rows)))
    with prepared(model):
        modules = tracked(model)
        vectors = directions(modules)
        with Linearisation(model, modules, torch.float64) as linearisation:
            found = linearisation.of(padded).log_probability_tangents(vectors)
    sequences = [shifted(row) for row in rows]
    expected = label_tangents(model, by_name(modules), sequences, vectors)
    assert found.shape == expected.shape
    assert relative(found, expected) < tolerance(family)


@pytest.mark.parametrize("family", ["llama_bias", "gpt2", "GptOssForCausalLM"])
def test_attention_and_heads_that_are_tracked_too(family):
    model, rows = made(family), examples(5, prompts=True)
    globs = ["*attn*", "*mlp*"] if family == "gpt2" else ["*"]  # its head is tied
    with prepared(model):
        modules = discover(model, globs, CPU).modules
        vectors = directions(modules)
        with Linearisation(model, modules, torch.float64) as linearisation:
            batch = linearisation.of(collate(list(from_examples(rows))))
            found = batch.log_probability_tangents(vectors)
    assert any("attn" in module.name for module in modules)
    expected = label_tangents(model, by_name(modules), [shifted(row) for row in rows], vectors)
    assert relative(found, expected) < ROUNDED


@pytest.mark.parametrize("family", [*KINDS, *PLAIN, *WITH_EXPERTS])
def test_both_products_are_each_others_transpose(family):
    model, batch = made(family), collate(list(from_examples(examples(4, prompts=True))))
    with prepared(model):
        modules = tracked(model)
        vectors = directions(modules)
        with Linearisation(model, modules, torch.float64) as linearisation:
            batch = linearisation.of(batch)
            tangent = batch.tangent(vectors)
            cotangent = torch.randn_like(tangent)
            pulled = sum(
                (vectors[module.name] * (grads_MO.T @ acts_MI)).sum()
                for module, acts_MI, grads_MO in batch.gradients(cotangent)
            )
    size = tangent.norm() * cotangent.norm()
    assert abs((tangent * cotangent).sum() - pulled) < 1e-7 * size


@pytest.mark.parametrize("chunked", [False, True])
def test_the_gradient_of_one_label_is_what_its_derivatives_are_of(chunked):
    model, batch = tiny_model("Gemma2ForCausalLM"), collate(list(from_examples(examples(3))))
    with prepared(model):
        modules = tracked(model)
        vectors = directions(modules)
        task = CausalLMInChunks(model, "model", 3 * 29) if chunked else CAUSAL_LM
        with Linearisation(model, modules, torch.float64, task) as linearisation:
            batch = linearisation.of(batch)
            found = batch.log_probability_tangents(vectors)
            for number in range(batch.num_labels):
                along = sum(
                    (vectors[module.name] * (grads_MO.T @ acts_MI)).sum()
                    for module, acts_MI, grads_MO in batch.log_probability_gradients(number)
                )
                assert abs(found[number] - along) < ROUNDED * found.abs().max()


@pytest.mark.parametrize("positions", [1, 4, 100])
def test_a_chunked_head_changes_nothing(positions):
    """Cohere scales its logits and Gemma caps them."""
    for family in ("CohereForCausalLM", "Gemma2ForCausalLM"):
        model, batch = tiny_model(family), collate(list(from_examples(examples(5, prompts=True))))
        with prepared(model):
            modules = tracked(model)
            vectors = directions(modules, leading=(2,))
            chunked = CausalLMInChunks(model, "model", positions * 29)
            sums, expected = (
                linearised_sums(model, modules, [batch], vectors, task)
                for task in (chunked, CAUSAL_LM)
            )
            assert relative(flat(sums), flat(expected)) < EXACT
            one = {name: vector[0] for name, vector in vectors.items()}
            tangents = []
            for task in (chunked, CAUSAL_LM):
                with Linearisation(model, modules, torch.float64, task) as linearisation:
                    tangents.append(linearisation.of(batch).log_probability_tangents(one))
            assert relative(*tangents) < EXACT


def test_packed_sequences_change_nothing():
    model, data = build("gpt_neox"), from_examples(examples(6, prompts=True))
    with prepared(model):
        modules = tracked(model)
        vectors = directions(modules)
        with Linearisation(model, modules, torch.float64) as linearisation:
            found, expected = (
                linearisation.of(sequences.batch(range(6))).log_probability_tangents(vectors)
                for sequences in (data.packing(), data)
            )
    assert data.packing().batch(range(6)).packed is not None
    assert relative(found, expected) < EXACT


# -- the Gauss–Newton matrix -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "llama_bias", "experts"])
def test_the_gauss_newton_is_the_hessian_of_a_linearised_models_loss(family):
    """Conv1D, biases, gates, experts with biases; prompts and padding."""
    model, rows = small(family), examples(5, prompts=True, longest=7)
    data = from_examples(rows)
    with prepared(model):
        modules = tracked(model)
        vectors = directions(modules, leading=(4,))
        batches = [data.batch([0, 1, 2]), data.batch([3, 4])]
        sums = linearised_sums(model, modules, batches, vectors)
    G = gauss_newton(model, by_name(modules), runs_of(model, [shifted(row) for row in rows]))
    assert relative(flat(sums) / 5, flat(vectors) @ G) < 1e-10


def test_the_gauss_newton_is_symmetric_and_positive_semi_definite():
    model, data = build("gpt2"), from_examples(examples(3, prompts=True, longest=7))
    with prepared(model):
        modules = [module for module in tracked(model) if ".1." in module.name]
        sizes = [module.num_parameters for module in modules]
        units = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1)
        vectors = {
            m.name: part.reshape(-1, m.num_outputs, m.input_size)
            for m, part in zip(modules, units, strict=True)
        }
        G = flat(linearised_sums(model, modules, [data.batch(range(3))], vectors))
    assert (G - G.T).abs().max() < EXACT * G.abs().max()
    values = torch.linalg.eigvalsh(G)
    assert values[0] > -EXACT * values[-1]
    assert (values > EXACT * values[-1]).sum() > 20


CASES = {
    "BERT, masked": (bert, masked_examples, MaskedLM()),
    "BERT, classifier": (
        lambda: bert(BertForSequenceClassification),
        classified_examples,
        SequenceClassification(),
    ),
    "T5": (t5, translated_examples, Seq2SeqLM()),
    "BART": (bart, translated_examples, Seq2SeqLM()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gauss_newton_of_other_tasks(case):
    make, some, task = CASES[case]
    model = make()
    data = read_examples(task, model, some(4), None)
    with prepared(model):
        probe = few_examples(task, model, data)
        modules = discover(model, None, CPU, task, probe).modules
        vectors = directions(modules, leading=(3,))
        sums = linearised_sums(model, modules, [data.batch(range(4))], vectors, task)

    def run(k):
        logits, labels = task.forward(model, data.batch([k]).inputs)
        logits, labels = logits.flatten(0, -2), labels.flatten()
        return logits[labels != -100], labels[labels != -100]

    G = gauss_newton(model, by_name(modules), [lambda k=k: run(k) for k in range(4)])
    rounded = 1e-6 if case == "T5" else 1e-10  # T5's norms are in float32
    assert relative(flat(sums) / 4, flat(vectors) @ G) < rounded


def test_few_right_hand_sides_at_a_time_change_nothing(monkeypatch):
    model, batch = build("gpt2"), collate(list(from_examples(examples(4))))
    with prepared(model):
        modules = tracked(model)
        vectors = directions(modules, leading=(5,))
        together = linearised_sums(model, modules, [batch], vectors)
        monkeypatch.setattr(linearised, "TANGENT_BYTES", 1)
        parted = linearised_sums(model, modules, [batch], vectors)
    assert flat(parted).equal(flat(together))


def test_the_model_is_as_it_was_afterwards():
    model = build("llama")
    hooks = {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    with prepared(model), Linearisation(model, tracked(model), torch.float64) as linearisation:
        linearisation.of(collate(list(from_examples(examples(2)))))
    assert hooks == {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    assert model.config._attn_implementation == attention
    assert all(parameter.grad is None for parameter in model.parameters())
