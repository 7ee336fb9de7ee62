"""What v may be: flat, stacked, a list or a mapping; the result has its structure."""

import warnings

import pytest
import torch
from helpers.networks import build
from helpers.small_mlps import Rewritten, anisotropic, cross_entropy, mlp
from torch import nn

from ekfac_dist.errors import ConfigError, NonFiniteError
from ekfac_dist.functional import (
    KEY,
    MLPCache,
    cache_linears,
    flatten_func,
    flatten_params,
    ihvp_at_x_ekfac,
)

BATCH = {"batch_size": 4, "damping": 0.1}


def data(inputs=4, outputs=3):
    return anisotropic(8, inputs), torch.arange(8) % outputs


def shaped(net, *lead, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*lead, *p.shape, generator=generator, dtype=torch.float64)
        for name, p in net.named_parameters()
    }


def flat(parts, ndim=0):
    return torch.cat([part.flatten(ndim) for part in parts], -1)


@pytest.fixture(scope="module")
def net():
    return mlp(4, 6, 3)


@pytest.fixture(scope="module")
def ihvp(net):
    return ihvp_at_x_ekfac(cross_entropy(net), *data(), mlp_cache=cache_linears(net), **BATCH)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_every_structure_gives_the_same_numbers(net, ihvp, lead):
    v = shaped(net, *lead)
    expected = ihvp(flat(v.values(), len(lead)))
    assert expected.shape == (*lead, sum(p.numel() for p in net.parameters()))
    for structure in (list, tuple):
        solved = ihvp(structure(v.values()))
        assert type(solved) is structure
        assert [part.shape for part in solved] == [part.shape for part in v.values()]
        assert torch.allclose(flat(solved, len(lead)), expected, rtol=1e-12)
    named = ihvp(v)
    assert list(named) == list(v)
    assert torch.allclose(flat(named.values(), len(lead)), expected, rtol=1e-12)
    merged = ihvp([torch.cat([v["0.weight"], v["0.bias"][..., None]], -1), *list(v.values())[2:]])
    assert merged[0].shape == (*lead, 6, 5)
    assert torch.equal(merged[0][..., :-1], named["0.weight"])
    assert torch.equal(merged[0][..., -1], named["0.bias"])
    assert torch.equal(merged[1], named["2.weight"])


def test_a_stack_is_its_vectors_one_by_one(net, ihvp):
    v = flat(shaped(net, 3).values(), 1)
    assert torch.allclose(ihvp(v), torch.stack([ihvp(one) for one in v]), rtol=1e-12)
    assert ihvp(v[:0]).shape == v[:0].shape


def test_v_is_left_alone_and_so_are_the_factors(net, ihvp):
    v = flat(shaped(net).values())
    before = v.clone()
    solved = ihvp(v)
    assert torch.equal(v, before)
    for _ in range(100):
        ihvp(v)
    assert torch.equal(ihvp(v), solved)


def test_gradients_flow_through_to_v(net, ihvp):
    v = flat(shaped(net).values())
    assert not ihvp(v).requires_grad
    expected = 2 * ihvp(v)  # of vᵀ F⁻¹ v
    assert torch.allclose(torch.func.grad(lambda v: v @ ihvp(v))(v), expected, rtol=1e-10)
    v.requires_grad_()
    (v @ ihvp(v)).backward()
    assert torch.allclose(v.grad, expected, rtol=1e-10)


def test_another_damping_may_be_given_with_v(net, ihvp):
    func, v = cross_entropy(net), flat(shaped(net, 2).values(), 1)
    options = {"batch_size": 4, "mlp_cache": cache_linears(net)}
    other = ihvp_at_x_ekfac(func, *data(), damping=0.03, **options)
    assert torch.allclose(ihvp(v, damping=0.03), other(v), rtol=1e-12)
    assert torch.allclose(ihvp(data(), v, damping=torch.tensor(0.03).double()), other(v))
    # Relative: mean(Λ) is the mean square of the examples' gradients, in whichever basis.
    gradients = [
        torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        for loss in func(*data())
    ]
    first = torch.stack([torch.cat([g[0].flatten(), g[1]]) for g in gradients])
    relative = ihvp(v, damping=0.2, relative=True)[:, :30]
    same = ihvp(v, damping=0.2 * first.square().mean())[:, :30]
    assert torch.allclose(relative, same, rtol=1e-10)
    with pytest.raises(ConfigError, match="damping is -1"):
        ihvp(v, damping=-1)


def test_a_large_stack_is_solved_a_few_at_a_time(net, ihvp, monkeypatch):
    from ekfac_dist.functional import ihvp as module

    v = flat(shaped(net, 7).values(), 1)
    expected = ihvp(v)
    monkeypatch.setattr(module, "STACK_BYTES", 2 * 6 * 5 * 8)
    assert torch.allclose(ihvp(v), expected, rtol=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_in_v_is_told(net, ihvp, value):
    v = shaped(net)
    v["2.bias"][1] = value
    with pytest.raises(NonFiniteError, match=r"v holds NaN or infinity in its part for 2\.bias"):
        ihvp(v)


def test_a_conv1d_weight_is_given_as_it_is_shaped():
    model = build("gpt2")
    ids = torch.arange(24).view(4, 6)

    def func(ids):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").flatten()

    ihvp = ihvp_at_x_ekfac(func, ids, batch_size=2, mlp_cache=cache_linears(model), damping=0.1)
    v = shaped(model)
    with pytest.warns(UserWarning, match="No cache records") as caught:
        everything = ihvp(flat(v.values()))
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "transformer.h.0.attn.c_attn.weight" in message
    assert "mlp" not in message
    recorded = {name: tensor for name, tensor in v.items() if ".mlp." in name}
    named = ihvp(recorded)
    weights = {n: t for n, t in named.items() if n.endswith("c_fc.weight")}
    assert all(t.shape == (12, 14) for t in weights.values())  # inputs × outputs
    parts = everything.split([p.numel() for p in model.parameters()])
    for (name, _), part in zip(model.named_parameters(), parts, strict=True):
        if ".mlp." in name:
            assert torch.allclose(part.view_as(named[name]), named[name], rtol=1e-12)
        else:
            assert not part.any()
    merged = [
        torch.cat([recorded[n].mT, recorded[n.replace("weight", "bias")][..., None]], -1)
        for n in recorded
        if n.endswith("weight")
    ]
    solved = ihvp(merged)
    for name, part in zip((n for n in recorded if n.endswith("weight")), solved, strict=True):
        assert torch.equal(part[..., :-1].mT, named[name])
        assert torch.equal(part[..., -1], named[name.replace("weight", "bias")])


def test_parameters_without_a_cache_are_warned_of_once():
    net = Rewritten()
    cache = MLPCache()
    setattr(net, KEY, cache)
    ihvp = ihvp_at_x_ekfac(cross_entropy(net), *data(5, 4), mlp_cache=cache, **BATCH)
    v = shaped(net)
    with pytest.warns(UserWarning, match=r"No cache records fc3\.weight, fc3\.bias:") as caught:
        solved = ihvp(list(v.values()))
    assert len(caught) == 1
    assert not solved[4].any()
    assert not solved[5].any()
    assert all(part.any() for part in solved[:4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ihvp(flat(v.values()))
        recorded = ihvp(list(v.values())[:4])
        ihvp({name: v[name] for name in ("fc2.weight", "fc2.bias")})
    assert torch.allclose(again, flat(solved), rtol=1e-12)
    assert torch.allclose(flat(recorded), flat(solved[:4]), rtol=1e-12)


def test_the_parameters_are_those_of_what_the_caches_are_attached_to():
    one, other = Rewritten(seed=0), Rewritten(seed=1)
    caches = []
    for net in (one, other):
        caches.append(MLPCache())
        setattr(net, KEY, caches[-1])

    def func(x, y):
        return cross_entropy(one)(x, y) + cross_entropy(other)(x, y)

    x, y = data(5, 4)
    ihvp = ihvp_at_x_ekfac(func, x, y, mlp_cache=caches, **BATCH)
    size = sum(p.numel() for p in one.parameters())
    v = torch.randn(2 * size, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"0\.fc3\.weight, 0\.fc3\.bias, 1\.fc3\.weight"):
        solved = ihvp(v)
    alone = ihvp_at_x_ekfac(cross_entropy(other), x, y, mlp_cache=caches[1], **BATCH)
    with pytest.warns(UserWarning, match="No cache records fc3"):
        assert torch.allclose(solved[size:], alone(v[size:]), rtol=1e-12)

    # Of a part of the model alone, or of the whole if func's parameters say so.
    whole = nn.Sequential(nn.Linear(5, 5).double(), nn.Tanh(), one)
    part = ihvp_at_x_ekfac(cross_entropy(whole), x, y, mlp_cache=caches[0], **BATCH)
    with pytest.warns(UserWarning, match="No cache records fc3"):
        of_part = part(v[:size])
    assert of_part.shape == (size,)

    @flatten_func(whole)
    def flattened(parameters, x, y):
        out = torch.func.functional_call(whole, parameters, (x,))
        return nn.functional.cross_entropy(out, y, reduction="none")

    flat_whole = flatten_params(whole)
    ihvp = ihvp_at_x_ekfac(flattened, flat_whole, x, y, mlp_cache=caches[0], **BATCH)
    longer = torch.cat([torch.ones(30, dtype=torch.float64), v[:size]])
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias, 2\.fc3\.weight, 2\.fc3\.bias"):
        solved = ihvp(longer)
    assert not solved[:30].any()
    assert torch.allclose(solved[30:], of_part, rtol=1e-12)


@pytest.mark.parametrize(
    ("v", "says"),
    [
        (torch.zeros(50), r"v has shape \[50\] and dtype float32; a flat vector has length 51"),
        (torch.zeros(52), "has length 51, one number for each parameter"),
        (torch.zeros(51, 2), r"v has shape \[51, 2\].*a stack of them has shape \[number, 51\]"),
        (torch.zeros(()), r"v has shape \[\]"),
        (torch.zeros(51, dtype=torch.long), "dtype int64"),
        ([], r"v is a list of 0: nothing\. It must have"),
        ([torch.zeros(6, 4)], r"v is a list of 1: \[6, 4\].*0\.weight \[6, 4\], 0\.bias \[6\]"),
        ([torch.zeros(6, 4), torch.zeros(3, 6)], "a bias beside its weight"),
        ([torch.zeros(6, 5), torch.zeros(7, 3)], r"v is a list of 2: \[6, 5\], \[7, 3\]"),
        ([torch.zeros(6, 5), 3], r"\[6, 5\], a int"),
        ([torch.zeros(6, 5), None, None], r"None \(no gradient\?\)"),
        ({"0.weight": torch.zeros(6, 4)}, "a tensor for 0.weight and none for 0.bias"),
        ({"0.weigth": torch.zeros(6, 4)}, "a tensor for '0.weigth'"),
        ({"0.weight": torch.zeros(4, 6)}, r"v's 0.weight is \[4, 6\]; it must be .* \[6, 4\]"),
        ({}, "v has no tensors"),
        ("v", "v is a str"),
        (None, "v is a NoneType"),
    ],
)
def test_what_is_no_vector_is_refused_in_a_sentence(ihvp, v, says):
    with pytest.raises(ConfigError, match=says):
        ihvp(v)


# -- flat parameters -------------------------------------------------------------------------------


def test_flat_parameters_reach_the_function_by_name():
    net = mlp(4, 6, 3)
    flat_of = flatten_params(dict(net.named_parameters()))
    assert torch.equal(flat_of, flat(net.parameters()))
    assert torch.equal(flatten_params(net), flat_of)
    assert torch.equal(flatten_params(net.parameters()), flat_of)

    @flatten_func(net, param_num=1)
    def function(x, parameters, *, factor):
        """Its own words."""
        return factor * torch.func.functional_call(net, parameters, (x,))

    x, _ = data()
    assert function.__doc__ == "Its own words."
    assert torch.equal(function(x, flat_of, factor=2), 2 * net(x))
    gradient = torch.func.grad(lambda p: function(x, p, factor=1).sum())(flat_of)
    net(x).sum().backward()
    assert torch.allclose(gradient, flat([p.grad for p in net.parameters()]), rtol=1e-12)
    many = torch.func.vmap(lambda p: function(x, p, factor=1))(torch.stack([flat_of, flat_of * 2]))
    assert torch.allclose(many[0], net(x), rtol=1e-12)


def test_what_cannot_be_flattened_is_refused():
    net = mlp(4, 6, 3)
    with pytest.raises(ConfigError, match="The parameters to flatten are none"):
        flatten_params({})
    with pytest.raises(ConfigError, match="The parameters to flatten are str"):
        flatten_params(["0.weight"])
    with pytest.raises(ConfigError, match="The model of flatten_func is a list"):
        flatten_func([])
    with pytest.raises(ConfigError, match="param_num is -1"):
        flatten_func(net, param_num=-1)
    function = flatten_func(net)(lambda parameters: parameters)
    with pytest.raises(ConfigError, match="called with 0 positional arguments"):
        function()
    with pytest.raises(ConfigError, match=r"have shape \[50\]; Sequential has 51"):
        function(torch.zeros(50))
    with pytest.raises(ConfigError, match="have shape dict"):
        function(dict(net.named_parameters()))
