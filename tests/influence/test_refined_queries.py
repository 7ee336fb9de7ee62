"""Refined queries as people run them: what is said, written, refused; how they end and go on."""

import json
import os
import re
import signal

import pytest
import torch
from helpers.dense import relative
from helpers.networks import build, examples
from helpers.task_models import bert, classified_examples
from helpers.workshop import logged, run_here, save_tiny_llama, texts, write_jsonl
from safetensors.torch import load_file
from torch import nn
from transformers import BertForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ekfac_dist import LossTask, estimate_factors, influence_scores
from ekfac_dist.config import RefineConfig
from ekfac_dist.errors import ConfigError, DataError, ModelError, UserError
from ekfac_dist.influence import gauss_newton
from ekfac_dist.influence import refinement_trial as trial
from ekfac_dist.influence.refinement_start import require_refinable_model
from ekfac_dist.models.capture.linearised import Linearisation
from ekfac_dist.models.capture.tasks import CAUSAL_LM
from ekfac_dist.runtime import preemption

TWO_STEPS = {"method": "cg", "iterations": 2}
QUERIES = [{"text": text} for text in texts(3, seed=2, words=(2, 5))]
CG = ("--refine.method", "cg", "--refine.sequences", "4", "--refine.iterations", "2")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, text, queries, factors, and a plain and a refined answer."""
    root = tmp_path_factory.mktemp("refined")
    save_tiny_llama(root / "model")
    write_jsonl(root / "text.jsonl", [{"text": text} for text in texts(11, words=(2, 12))])
    write_jsonl(root / "queries.jsonl", QUERIES)
    fit = ["estimate", "--model.name", root / "model", "--data.source", root / "text.jsonl"]
    assert run_here([*fit, "--output", root / "store"]).returncode == 0
    return root


def ask(root, output, *options):
    command = ["query", "--factors", root / "store", "--queries", root / "queries.jsonl"]
    return run_here([*command, "--scores.top_k", "3", "--output", output, *options])


@pytest.fixture(scope="module")
def refined(root):
    done = ask(root, root / "refined", *CG)
    assert done.returncode == 0, done.stderr
    return done


def manifest_of(results):
    return json.loads((results / "manifest.json").read_text())


# -- what is said and written ----------------------------------------------------------------------


def test_what_it_will_take_is_said_before_and_how_it_went_after(refined):
    said = refined.stdout
    before, after = (
        said.index("refine        conjugate gradients"),
        said.index("refined       not c"),
    )
    assert before < said.index("4 vectors of each row of scores: ") < after
    assert "G of 4 of 11 sequences" in said
    assert "at most 2 steps" in said
    assert ", 3 rows at a time: " in said
    assert before < said.index("at most about 0:00:0") < after
    assert re.search(r"steps of \d+ positions: \S+ [kM]B more", said)
    assert "refine       " in refined.stderr  # progress, with its rate
    assert "tokens/s" in refined.stderr.partition("refine       ")[2].partition("\n")[0]


def test_the_results_tell_the_residual_after_each_step(root, refined):
    manifest = manifest_of(root / "refined")
    entry = manifest["refine"]
    assert [len(row) for row in entry["residuals"]] == [3, 3, 3]
    assert all(row[2] < row[0] for row in entry["residuals"])
    assert (entry["method"], entry["num_sequences"], entry["num_training"]) == ("cg", 4, 11)
    assert entry["num_converged"] == 0
    assert entry["convergence"].startswith("not converged for 3 of 3 rows of scores")
    assert "∇log p(q)ᵀ (G+λ)⁻¹ ∇log p(z)" in manifest["scores"]["scale"]
    assert manifest["config"]["refine"]["sequences"] == 4
    for line in (entry["solved"], entry["convergence"]):
        assert line in refined.stdout


def test_the_page_says_that_it_did_not_converge(root, refined):
    done = run_here(["report", root / "refined", "--output", root / "refined.html"])
    assert done.returncode == 0, done.stderr
    page = (root / "refined.html").read_text()
    assert "by refined EK-FAC influence" in page
    assert "Refined query gradients: not converged for 3 of 3 rows of scores" in page
    assert "conjugate gradients from the factors&#39; solution, G of 4 of 11" in page


def test_a_plain_answer_has_no_refinement(root):
    done = ask(root, root / "plain")
    assert done.returncode == 0, done.stderr
    manifest = manifest_of(root / "plain")
    assert manifest["refine"] is None
    assert "(F+λ)⁻¹" in manifest["scores"]["scale"]
    assert not [line for line in done.stdout.splitlines() if line.startswith("refine")]
    run_here(["report", root / "plain", "--output", root / "plain.html"])
    assert "Refined" not in (root / "plain.html").read_text()


def test_refined_scores_are_others(root, refined):
    found = load_file(root / "refined" / "scores.safetensors")["scores"]
    again = ask(root, root / "again", *CG)
    assert again.returncode == 0
    assert load_file(root / "again" / "scores.safetensors")["scores"].equal(found)
    ask(root, root / "unrefined")
    assert relative(load_file(root / "unrefined" / "scores.safetensors")["scores"], found) > 0.05


# -- how it ends and goes on -----------------------------------------------------------------------


def test_sigterm_ends_a_solve_and_it_goes_on(root, refined, monkeypatch, capfd):
    batches = []

    class Ending(gauss_newton.GaussNewton):
        def _add_own_(self, *arguments):
            batches.append(arguments)
            if len(batches) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            super()._add_own_(*arguments)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(preemption, "_is_requested", False)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("ekfac_dist.influence.refinement.GaussNewton", Ending)
            done = ask(root, root / "ended", *CG)
    finally:
        signal.signal(signal.SIGTERM, handler)
    monkeypatch.setattr(preemption, "_is_requested", False)
    assert done.returncode == 143
    assert len(batches) == 2
    assert "Ended by SIGTERM; blocks of queries that are finished are stored" in done.stderr
    assert ask(root, root / "ended", *CG).returncode == 0
    found, wanted = (load_file(root / n / "scores.safetensors") for n in ("ended", "refined"))
    assert found["scores"].equal(wanted["scores"])


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    model, train = build("gpt_neox"), examples(6, seed=1)
    return model, estimate_factors(model, train, labels="data", batch_tokens=30), train


def scores(small, **options):
    model, factors, train = small
    return influence_scores(model, factors, train[:2], train, top_k=2, **{"refine": "cg"} | options)


@pytest.mark.parametrize(
    ("refine", "says"),
    [
        (3, "refine is 3; give none, cg or astra"),
        ({"methods": "cg"}, "refine has 'methods'; its fields are method, sequences"),
        ("newton", "refine.method is 'newton'; it must be one of none, cg, astra"),
        ({"method": "cg", "sequences": 7}, "refine.sequences is 7, .* has 6 sequences; give 6 or"),
        ({"method": "cg", "iterations": 1.5}, "refine.iterations is 1.5"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(small, refine, says):
    with pytest.raises(ConfigError, match=says):
        scores(small, refine=refine)


def test_fewer_sequences_than_the_default_are_all_taken(small):
    found = scores(small, refine={"method": "cg", "iterations": 1})
    assert found.refined.num_sequences == found.refined.num_training == 6


class OwnLoss(LossTask):
    """A loss of no logits."""

    def losses(self, model, batch, draws):
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        return model(**inputs).logits.square().flatten(1).sum(1)


def test_a_task_without_logits_is_refused():
    model, task = bert(BertForSequenceClassification), OwnLoss()
    train = classified_examples(5)
    factors = estimate_factors(model, train, labels="data", task=task)
    with pytest.raises(ModelError, match=r"the task OwnLoss has losses of its own and no logits"):
        influence_scores(model, factors, train[:1], train, task=task, refine="cg", top_k=1)


def test_quantised_and_narrow_weights_are_refused():
    model, settings = build("llama"), RefineConfig(method="cg")
    require_refinable_model(model, CAUSAL_LM, settings)
    with pytest.raises(ModelError, match=r"weights are float16, .* model\.dtype: float32"):
        require_refinable_model(build("llama").half(), CAUSAL_LM, settings)
    weight = torch.zeros(12, 14, dtype=torch.int8)
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj has quantised weights"):
        require_refinable_model(model, CAUSAL_LM, settings)
    require_refinable_model(model, CAUSAL_LM, RefineConfig())


class DoublesOnce(torch.autograd.Function):
    """2x, with a backward that autograd refuses to differentiate."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


class DoublesUnseen(DoublesOnce):
    """2x, with a backward by a kernel that autograd sees nothing of."""

    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(2 * gradient.detach().numpy())


@pytest.mark.parametrize("function", [DoublesOnce, DoublesUnseen])
def test_an_operation_without_second_derivative_is_refused(small, function):
    model = small[0]
    handles = [
        layer.attention.register_forward_hook(lambda m, a, out: (function.apply(out[0]), *out[1:]))
        for layer in model.gpt_neox.layers
    ]
    try:
        with pytest.raises(ModelError, match=r"The model's backward cannot be differentiated"):
            scores(small)
        plain = scores(small, refine="none")
    finally:
        for handle in handles:
            handle.remove()
    assert torch.isfinite(plain.scores).all()


def test_attention_that_cannot_be_differentiated_twice_is_replaced_for_the_solve(small):
    model, _, _ = small
    used = []

    def fused(module, query, *arguments, **options):
        used.append(torch.is_grad_enabled())
        output, weights = sdpa_attention_forward(module, query, *arguments, **options)
        return DoublesOnce.apply(output / 2), weights

    expected, before = scores(small), model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("fused", fused)
    try:
        model.config._attn_implementation = "fused"
        found = scores(small)
        assert model.config._attn_implementation == "fused"
    finally:
        model.config._attn_implementation = before
    assert used
    assert relative(found.scores, expected.scores) < 1e-6  # batches, and so rounding, differ


def test_steps_are_cut_to_fit_the_memory(small, monkeypatch):
    """Each worker has room for two of the longest sequences, or for none."""
    whole, steps = scores(small, refine=TWO_STEPS), []
    of = Linearisation.of

    def noted(self, batch):
        steps.append(batch.num_positions)
        return of(self, batch)

    monkeypatch.setattr(Linearisation, "of", noted)
    for factor, most in ((2.5, 2), (0.1, 1)):
        with monkeypatch.context() as patch:
            measured = trial._try_step

            def limited(refinement, index, factor=factor, measured=measured, patch=patch):
                found = measured(refinement, index)
                free = factor * found.num_bytes + 2 * trial._bytes_per_row(refinement.context)
                patch.setattr(trial, "free_bytes", lambda world: (free / trial.USABLE, 0))
                return found

            patch.setattr(trial, "_try_step", limited)
            steps.clear()
            found = scores(small, refine=TWO_STEPS, batch_tokens=100)
        assert relative(found.scores, whole.scores) < 1e-10
        longest = max(len(row["input_ids"]) - 1 for row in small[2])
        assert (most - 1) * longest < max(steps) <= most * longest


def test_layers_that_are_computed_again_are_not_for_the_solve():
    model, train = build("llama"), examples(6, seed=1)
    small = model, estimate_factors(model, train, labels="data"), train
    plain = scores(small, refine=TWO_STEPS)
    again = scores(small, refine=TWO_STEPS, gradient_checkpointing=True)
    assert relative(again.scores, plain.scores) < 1e-6
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    by_itself = scores(small, refine=TWO_STEPS, batch_tokens=5)
    assert relative(by_itself.scores, plain.scores) < 1e-6
    assert model.training
    assert model.model.layers[0].training


def test_a_training_sequence_that_the_model_cannot_read_is_refused(small):
    model, factors, train = small
    longer = [*train, {"input_ids": torch.ones(40, dtype=torch.int64)}]
    options = {"top_k": 1, "candidates": [0, 1]}
    influence_scores(model, factors, train[:1], longer, **options)
    with pytest.raises(DataError, match=r"longest sequence has 39 positions, .* reads 32 at most"):
        influence_scores(model, factors, train[:1], longer, refine="cg", **options)


def test_a_diverging_solve_is_refused(small):
    steps = {"method": "astra", "step_size": 1e9, "iterations": 60}
    with pytest.raises(UserError, match=r"diverged: .* a smaller refine\.step_size"):
        scores(small, refine=steps)


def test_nothing_is_logged_of_a_refinement_where_there_is_none(small):
    with logged() as lines:
        scores(small, refine="none")
    assert not [line for line in lines if "refine" in line]
