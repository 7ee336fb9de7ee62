import numpy as np
import pytest
import torch
from helpers.dense import relative
from helpers.networks import build, examples, shifted
from helpers.scipy_free import chi_square_p_value

from ekfac_dist.data.sequences import collate
from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.models.capture.labels import (
    COVARIANCE_PASS,
    REFIT_PASS,
    LabelRule,
    inverse_cdf,
    logit_gradient,
    uniforms,
)


def test_uniforms_depend_on_seed_pass_row_and_position_alone():
    base = uniforms(3, COVARIANCE_PASS, 11, 50)
    assert np.array_equal(base[:20], uniforms(3, COVARIANCE_PASS, 11, 20))
    for other in (
        uniforms(4, COVARIANCE_PASS, 11, 50),
        uniforms(3, REFIT_PASS, 11, 50),
        uniforms(3, COVARIANCE_PASS, 12, 50),
    ):
        assert not np.intersect1d(base, other).size


def test_uniforms_are_uniform_and_never_one():
    many = np.concatenate([uniforms(0, REFIT_PASS, index, 100) for index in range(1000)])
    assert many.min() >= 0
    assert many.max() < 1
    counts, _ = np.histogram(many, bins=50, range=(0, 1))
    assert chi_square_p_value(counts, np.full(50, len(many) / 50)) > 1e-3
    # Neighbouring rows and positions are uncorrelated.
    table = many.reshape(1000, 100)
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.01


def test_the_inverse_cdf_takes_the_first_class_that_exceeds():
    p = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    for u, expected in ((0.0, 0), (0.2499, 0), (0.25, 2), (0.7499, 2), (0.75, 3), (1 - 2**-52, 3)):
        assert inverse_cdf(p, torch.tensor([u], dtype=torch.float64)).item() == expected


@pytest.mark.parametrize("num_classes", [1, 63, 64, 65, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_cdf_agrees_with_numpys_cumulated_sum(num_classes, dtype):
    generator = np.random.default_rng(num_classes)
    logits = 3 * torch.from_numpy(generator.standard_normal((500, num_classes)))
    p = torch.softmax(logits.to(dtype), -1)
    p[:, generator.random(num_classes) < 0.3] = 0
    p[:, -1] = 0.1
    u = generator.random(500)
    found = inverse_cdf(p, torch.from_numpy(u)).numpy()
    cdf = np.cumsum(p.double().numpy(), 1)
    expected = [
        np.searchsorted(row, x * row[-1], side="right") for row, x in zip(cdf, u, strict=True)
    ]
    # In float32 a threshold within rounding of a step may fall on its other side.
    assert (found == expected).mean() >= (1 if dtype == torch.float64 else 0.99)
    assert (p[np.arange(500), found] > 0).all()


def test_a_softmax_of_nan_still_gives_a_class():
    p = torch.full((3, 65), torch.nan)
    found = inverse_cdf(p, torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64))
    assert ((found >= 0) & (found < 65)).all()


def test_draws_follow_the_softmax():
    torch.manual_seed(0)
    p = torch.softmax(2 * torch.randn(12), 0).double()
    draws = torch.from_numpy(
        np.concatenate([uniforms(1, COVARIANCE_PASS, index, 50) for index in range(400)])
    )
    counts = torch.bincount(inverse_cdf(p.expand(len(draws), -1), draws), minlength=12)
    assert chi_square_p_value(counts.numpy(), (p * len(draws)).numpy()) > 1e-3
    wrong = torch.softmax(p, 0)
    assert chi_square_p_value(counts.numpy(), (wrong * len(draws)).numpy()) < 1e-6


@pytest.fixture
def model():
    return build("llama")


def labels_by_row(model, data, groups, seed=0, pass_number=COVARIANCE_PASS):
    """Drawn labels of each source row, for a given batching."""
    sequences = from_examples(data)
    rule = LabelRule("sampled", seed, pass_number)
    found = {}
    for group in groups:
        batch = collate([sequences[k] for k in group])
        with torch.no_grad():
            logits = model(
                input_ids=batch.inputs["input_ids"],
                attention_mask=batch.inputs.get("attention_mask"),
            ).logits
        labels = logit_gradient(logits, batch.inputs["labels"], batch, rule).labels
        row_of = batch.labelled.sequences_on_device
        for b, index in enumerate(batch.indices):
            found[index] = labels[row_of == b].tolist()
    return found


def test_labels_do_not_depend_on_batch_padding_or_order(model):
    data = examples(8, prompts=True)
    alone = labels_by_row(model, data, [[k] for k in range(8)])
    assert labels_by_row(model, data, [list(range(8))]) == alone
    assert labels_by_row(model, data, [[7, 0, 3], [2, 1], [6, 5, 4]]) == alone
    assert labels_by_row(model, data, [list(range(8))], seed=1) != alone
    assert labels_by_row(model, data, [list(range(8))], pass_number=REFIT_PASS) != alone


def test_only_labelled_positions_get_a_label_and_a_gradient(model):
    data = examples(6, prompts=True)
    batch = collate(list(from_examples(data)))
    logits = model(
        input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs.get("attention_mask")
    ).logits
    result = logit_gradient(logits, batch.inputs["labels"], batch, LabelRule("sampled", 0, 0))
    touched = result.gradient.abs().sum(-1) > 0
    assert torch.equal(touched, batch.inputs["labels"] != -100)
    assert (
        len(result.labels)
        == len(batch.labelled.flat)
        == sum(int((shifted(e)[1] != -100).sum()) for e in data)
    )


def test_the_gradient_is_that_of_the_summed_cross_entropy(model):
    batch = collate(list(from_examples(examples(6, prompts=True))))
    logits = model(
        input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs.get("attention_mask")
    ).logits.detach()
    logits.requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.inputs["labels"].flatten(), ignore_index=-100, reduction="sum"
    )
    loss.backward()
    result = logit_gradient(logits, batch.inputs["labels"], batch, LabelRule("data", 0, 0))
    assert relative(result.gradient, logits.grad) < 1e-12
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert result.scale == 1


def test_a_label_of_vanishing_probability_has_a_finite_loss():
    batch = collate(list(from_examples([{"input_ids": torch.tensor([1, 2])}])))
    logits = torch.tensor([[[500.0, 0.0, -700.0]]])
    result = logit_gradient(logits, batch.inputs["labels"], batch, LabelRule("data", 0, 0))
    assert result.loss.item() == pytest.approx(1200, rel=1e-6)
    assert result.gradient.tolist() == [[[1, 0, -1]]]


def test_float16_gradients_are_scaled_up_by_a_power_of_two(model):
    batch = collate(list(from_examples(examples(3))))
    logits = model(input_ids=batch.inputs["input_ids"]).logits.half()
    result = logit_gradient(logits, batch.inputs["labels"], batch, LabelRule("data", 0, 0))
    assert result.scale == 1024
    exact = logit_gradient(
        logits.double(), batch.inputs["labels"], batch, LabelRule("data", 0, 0)
    ).gradient
    assert relative(result.gradient.double() / 1024, exact) < 1e-3


def test_the_fisher_of_sampled_labels_approaches_the_exact_expectation():
    """Error of a Monte Carlo Fisher of the logits falls like 1/√m."""
    torch.manual_seed(0)
    p = torch.softmax(torch.randn(5), 0).double()
    exact = torch.diag(p) - torch.outer(p, p)

    def error(m):
        errors = []
        for repeat in range(20):
            draws = torch.from_numpy(uniforms(repeat, 0, m, m))
            labels = inverse_cdf(p.expand(m, -1), draws)
            residuals = p - torch.nn.functional.one_hot(labels, 5)
            errors.append(relative(residuals.T @ residuals / m, exact))
        return float(np.mean(errors))

    few, more, many = error(30), error(300), error(3000)
    assert 2 < few / more < 5
    assert 2 < more / many < 5
