"""The interface's own demonstration, as it was proposed, and what else may be meant by it."""

import pytest
import torch
from torch import nn

from ekfac_dist.errors import ConfigError, ModelError, NonFiniteError
from ekfac_dist.functional import (
    KEY,
    MLPCache,
    cache_linears,
    flatten_func,
    flatten_params,
    ihvp_at_x_ekfac,
    manual,
)


class MLPMnist(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 12)
        self.fc2 = nn.Linear(12, 8)
        self.fc3 = nn.Linear(8, 10)
        self.dropout1 = nn.Dropout(0.8)
        self.dropout2 = nn.Dropout(0.8)

    def forward(self, hidden_states):
        hidden_states = hidden_states.view(-1, 28 * 28)
        hidden_states = self.dropout1(torch.relu(self.fc1(hidden_states)))
        return self.fc3(self.dropout2(torch.relu(self.fc2(hidden_states))))


@manual
def custom_forward_method(self, hidden_states):
    if not hasattr(self, KEY):
        hidden_states = hidden_states.view(-1, 28 * 28)
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.dropout1(torch.relu(hidden_states))
        hidden_states = self.fc2(hidden_states)
        hidden_states = self.dropout2(torch.relu(hidden_states))
        hidden_states = self.fc3(hidden_states)
        return hidden_states
    cache = getattr(self, KEY)
    x1 = hidden_states.view(-1, 28 * 28)
    y1 = self.fc1(x1)
    cache.input_hidden_pairs.append((x1, y1))
    x2 = self.dropout1(torch.relu(y1))
    y2 = self.fc2(x2)
    cache.input_hidden_pairs.append((x2, y2))
    outputs = self.fc3(self.dropout2(torch.relu(y2)))
    return outputs


IMAGES, LABELS = torch.rand(20, 1, 28, 28), torch.arange(20) % 10


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(MLPMnist, "forward", custom_forward_method)
    torch.manual_seed(0)
    return MLPMnist()  # in training mode, as it comes


def losses_of(model):
    @flatten_func(model, param_num=0)
    def f(params, images=IMAGES, labels=LABELS):
        out = torch.func.functional_call(model, params, (images,))
        return nn.functional.cross_entropy(out, labels, reduction="none")

    return f


@pytest.mark.filterwarnings("ignore:No cache records")
def test_the_demonstration_as_it_was_proposed(model):
    """The cache by position behind x, and the data within f: nothing is cut."""
    cache = MLPCache()
    setattr(model, KEY, cache)
    f = losses_of(model)
    model_params = dict(model.named_parameters())
    with pytest.warns(UserWarning, match="20 losses where batch_size is 1"):
        ihvp = ihvp_at_x_ekfac(f, flatten_params(model_params), cache)
    v = torch.randn(flatten_params(model_params).numel())
    with pytest.raises(ConfigError, match=r"Module fc\d: damping is 0 and Λ has zeros"):
        ihvp(v)
    # As it can be meant: with the number of examples, and a damping.
    ihvp = ihvp_at_x_ekfac(f, flatten_params(model_params), cache, batch_size=20, damping=0.1)
    cut = ihvp_at_x_ekfac(
        f,
        flatten_params(model_params),
        IMAGES,
        LABELS,
        in_dims=(None, 0, 0),
        batch_size=8,
        mlp_cache=[cache],
        damping=0.1,
    )
    assert torch.allclose(cut(v), ihvp(v), rtol=1e-3, atol=1e-4)
    assert model.training


@pytest.mark.parametrize("behind", [lambda c: (c,), lambda c: ([c],), lambda c: ((c,),)])
def test_a_cache_or_a_list_may_stand_behind_x(model, behind):
    cache = MLPCache()
    setattr(model, KEY, cache)
    f = losses_of(model)
    ihvp_at_x_ekfac(f, flatten_params(model), *behind(cache), batch_size=20)


def call(model, *x, func=None, **options):
    options = {"mlp_cache": cache_linears(model), "damping": 0.1, "batch_size": 6, **options}
    if func is None:

        def func(images, labels):
            return nn.functional.cross_entropy(model(images), labels, reduction="none")

    return ihvp_at_x_ekfac(func, *(x or (IMAGES, LABELS)), **options)


def shapes(*given):
    """A func whose calls return losses of these shapes, of the model's outputs."""
    calls = iter(given)

    def of(model):
        def func(images, labels):
            shape, each = next(calls), model(images).sum(-1)
            if len(shape) == 1 and shape[0] % len(each) == 0:
                return each.repeat_interleave(shape[0] // len(each))
            return each.sum() * torch.ones(shape)

        return func

    return of


@pytest.mark.parametrize(
    ("func", "says"),
    [
        (shapes((6, 10)), r"shape \[6, 10\] in call 1; for a batch of 6 .* be \[6 · t\]"),
        (shapes(()), r"shape \[\] in call 1; for a batch of 6.*reduction='none'"),
        (shapes((7,)), r"shape \[7\] in call 1; for a batch of 6 .*\[6\], \[12\]"),
        (shapes((0,)), r"shape \[0\] in call 1"),
        (
            shapes((6,), (12,)),
            r"shape \[12\] for 6 examples in call 2, t = 2 .* t = 1 in the first",
        ),
        (shapes((12,), (12,), (12,), (2,)), "t = 1 for each, and t = 2 in the first call"),
        (lambda model: lambda *x: None, "func returned NoneType"),
        (lambda model: lambda *x: torch.ones(6, dtype=torch.long), "func returned torch.int64"),
    ],
)
def test_what_func_returns_is_refused_in_a_sentence(model, func, says):
    with pytest.raises(ConfigError, match=says):
        call(model, func=func(model))


@pytest.mark.parametrize(
    ("x", "options", "says"),
    [
        ((IMAGES, LABELS[:9]), {}, r"x\[0\] of shape \[20.* has 20; x\[1\] of shape \[9\].* has 9"),
        ((IMAGES[:0], LABELS[:0]), {}, "x has no examples"),
        ((IMAGES, 3), {}, r"x\[1\] is a int; only tensors can be cut.*as_tensor"),
        (((IMAGES, LABELS),), {}, r"x is one tuple of 2; give func's arguments one by one"),
        ((IMAGES, LABELS), {"in_dims": (0, 1)}, r"x\[1\] has shape \[20\] and no dimension 1"),
        ((IMAGES, LABELS), {"in_dims": (0,)}, "in_dims has 1 entries and x has 2"),
        ((IMAGES, LABELS), {"in_dims": (0, "0")}, "in_dims is"),
        ((IMAGES, LABELS), {"batch_size": 0}, "batch_size is 0"),
        ((IMAGES, LABELS), {"batch_size": 2.0}, r"batch_size is 2\.0"),
        ((IMAGES, LABELS), {"batch_size": None}, "batch_size is None"),
        ((IMAGES, LABELS), {"max_iter": 0}, "max_iter is 0"),
        ((IMAGES, LABELS), {"max_iter": True}, "max_iter is True"),
        ((IMAGES, LABELS), {"damping": -0.1}, r"damping is -0\.1"),
        ((IMAGES, LABELS), {"damping": float("nan")}, "damping is nan"),
        ((IMAGES, LABELS), {"mlp_cache": None}, "mlp_cache is nothing"),
        ((IMAGES, LABELS), {"mlp_cache": []}, "mlp_cache is a list"),
        ((IMAGES, LABELS), {"mlp_cache": [MLPCache(), 3]}, "mlp_cache is a list"),
        ((IMAGES, LABELS, MLPCache()), {}, "Caches are given more than once"),
        ((IMAGES, MLPCache(), LABELS), {"mlp_cache": None}, "amid the arguments"),
        ((IMAGES, LABELS), {"func": 3}, "func is a int"),
    ],
)
def test_an_argument_that_cannot_be_meant_is_refused_in_a_sentence(model, x, options, says):
    with pytest.raises(ConfigError, match=says):
        call(model, *x, **options)


def test_a_cache_is_given_once(model):
    cache = MLPCache()
    setattr(model, KEY, cache)
    with pytest.raises(ConfigError, match="a cache more than once"):
        call(model, mlp_cache=[cache, cache])


def test_the_function_is_called_with_v_or_with_x_and_v(model):
    ihvp = call(model)
    v = torch.zeros(sum(p.numel() for p in model.parameters()))
    with pytest.raises(ConfigError, match="called with 0 arguments"):
        ihvp()
    with pytest.raises(ConfigError, match="called with 4 arguments"):
        ihvp(v, v, v, v)
    with pytest.raises(ConfigError, match="x has 1 entries and func was fitted with 2"):
        ihvp(IMAGES, v)
    with pytest.raises(ConfigError, match="unequal numbers of examples"):
        ihvp((IMAGES, LABELS[:3]), v)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_told_with_its_place(model, value):
    images = IMAGES.clone()
    images[13, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match=r"call 3 of func \(examples 12 and on\)"):
        call(model, images, LABELS)


def test_losses_that_know_nothing_of_the_model_are_refused(model):
    with pytest.raises(ModelError, match="module fc1 received no gradient"):
        call(model, func=lambda images, labels: model(images).detach().sum(-1))


def test_inference_mode_is_left_for_the_fit_and_its_tensors_are_refused(model):
    model.eval()
    v = torch.ones(sum(p.numel() for p in model.parameters()))
    expected = call(model)(v)
    with torch.inference_mode():
        assert torch.equal(call(model)(v), expected)
        made_there = IMAGES * 1
        with pytest.raises(ConfigError, match=r"x\[0\] was made under torch\.inference_mode"):
            call(model, made_there, LABELS)


def test_an_output_gradient_that_is_not_finite_is_told(model):
    def func(images, labels):
        out = model(images)
        return (out - out.detach()).abs().sqrt().sum(-1)  # 0, with an infinite slope

    with pytest.raises(NonFiniteError, match="NaN or infinity in the output-gradient of module fc"):
        call(model, func=func)


def test_a_stack_has_the_same_leading_dimensions_throughout(model):
    ihvp = call(model)
    v = [torch.ones(2, *p.shape) for p in model.parameters()]
    v[-1] = v[-1][0]
    with pytest.raises(
        ConfigError, match=r"stacks \[2\] vectors in fc1.weight and \[\] in fc3.bias"
    ):
        ihvp(v)
