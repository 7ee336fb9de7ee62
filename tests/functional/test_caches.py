"""Caches, the decorated forward, and hooks: what they hold, and what they leave alone."""

import copy
from functools import partial

import pytest
import torch
from helpers.networks import build
from helpers.small_mlps import Mixing, Rewritten, anisotropic, cross_entropy, mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

from ekfac_dist.errors import ConfigError, ModelError
from ekfac_dist.functional import (
    KEY,
    MLPCache,
    cache_linears,
    flatten_func,
    flatten_params,
    ihvp_at_x_ekfac,
    manual,
)


def attached(net):
    cache = MLPCache()
    setattr(net, KEY, cache)
    return cache


def test_each_cache_has_a_list_of_its_own():
    one, other = MLPCache(), MLPCache()
    one.input_hidden_pairs.append((torch.ones(1, 2), torch.ones(1, 3)))
    assert other.input_hidden_pairs == []


def test_a_forward_leaves_its_pairs_and_their_gradients():
    net, x = Rewritten().eval(), anisotropic(6, 5)
    cache = attached(net)
    for _ in range(2):  # the second forward's pairs replace the first's
        out = net(x)
        assert len(cache.collect_states()) == 2
    (x1, y1), (x2, y2) = cache.collect_states()
    assert torch.equal(x1, x)
    assert torch.equal(y1, net.fc1(x))
    assert torch.equal(x2, torch.tanh(y1))
    expected = torch.autograd.grad(out.square().sum(), [y1, y2], retain_graph=True)
    cache.zero_grad()
    out.square().sum().backward()
    assert torch.equal(y1.grad, expected[0])
    assert torch.equal(y2.grad, expected[1])
    named = dict(cache.named_parameters())
    assert list(named) == ["0.input", "0.hidden", "1.input", "1.hidden"]
    assert named["1.hidden"] is y2
    cache.zero_grad()
    assert y1.grad is None
    assert y2.grad is None
    cache.clear()
    assert cache.collect_states() == []


def test_with_no_cache_the_plain_forward_runs():
    net, x = Rewritten().eval(), anisotropic(6, 5)
    plain = net(x)
    attached(net)
    assert torch.equal(net(x), plain)
    assert Rewritten.forward.__name__ == "forward"


def test_a_cached_forward_under_no_grad_is_as_good_as_any():
    net, x = Rewritten().eval(), anisotropic(6, 5)
    cache = attached(net)
    with torch.no_grad():
        net(x)
    assert len(cache.collect_states()) == 2


def test_hooks_fill_the_same_pairs():
    net, x = Rewritten().eval(), anisotropic(6, 5)
    cache = attached(net)
    net(x)
    with cache_linears(net) as caches:
        assert caches.names == [["fc1", "fc2", "fc3"]]
        for _ in range(2):
            out = net(x)
            assert len(caches[0].collect_states()) == 3
        for mine, theirs in zip(caches[0].collect_states(), cache.collect_states(), strict=False):
            assert torch.equal(mine[0], theirs[0])
            assert torch.equal(mine[1], theirs[1])
        out.sum().backward()
        assert all(hidden.grad is not None for _, hidden in caches[0].collect_states())
    assert caches[0].collect_states() == []
    net(x)
    assert caches[0].collect_states() == []
    assert not any(module._forward_hooks for module in net.modules())
    assert not net._forward_pre_hooks


def test_a_transformer_has_a_cache_for_each_block():
    model = build("opt")
    with cache_linears(model) as caches:
        assert [[name.rpartition(".")[2] for name in names] for names in caches.names] == [
            ["fc1", "fc2"],
            ["fc1", "fc2"],
        ]
    with cache_linears(model, ["*.fc2", "*.q_proj"]) as caches:
        assert [len(names) for names in caches.names] == [1, 1, 1, 1]
    with cache_linears(model, "*.1.fc?") as caches:
        assert caches.names == [["model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2"]]


def test_a_deep_copy_of_a_model_can_be_fitted_as_the_model():
    net, x, y = Rewritten(), anisotropic(6, 5), torch.arange(6) % 4
    attached(net)
    for original in ((net, [getattr(net, KEY)]), (mlp(5, 4), None)):
        model, caches = original
        caches = caches or cache_linears(model)
        copied, copies = copy.deepcopy((model, list(caches)))
        assert copies[0] is not caches[0]
        results = []
        for n, c in ((model, caches), (copied, copies)):
            ihvp = ihvp_at_x_ekfac(cross_entropy(n), x, y, batch_size=4, mlp_cache=c, damping=0.1)
            results.append(ihvp(_ones(n, 2)))
        assert all(map(torch.equal, *results))


def test_a_deep_copy_keeps_which_rows_count():
    cache = MLPCache(counted=torch.tensor([True, False]))
    copied = copy.deepcopy(cache)
    assert torch.equal(copied.counted, cache.counted)
    assert copied.counted is not cache.counted


def test_hooks_keep_one_forward_though_only_parts_are_called():
    net, x = mlp(4, 5, 3), anisotropic(6, 4)
    cache = cache_linears(net)[0]
    for _ in range(3):
        net[2](torch.tanh(net[0](x)))
        assert len(cache.collect_states()) == 2


def test_a_wrapped_transformer_has_a_cache_for_each_block():
    with cache_linears(nn.ModuleDict({"inner": build("gpt2")})) as caches:
        assert caches.names[1] == [f"inner.transformer.h.1.mlp.{n}" for n in ("c_fc", "c_proj")]


@pytest.mark.parametrize("by_hooks", [False, True])
def test_a_deep_copy_records_for_itself(by_hooks):
    net, x = Rewritten().eval(), anisotropic(6, 5)
    caches = cache_linears(net) if by_hooks else [attached(net)]
    net(x).sum().backward()
    before = [pair[0].clone() for pair in caches[0].collect_states()]
    copied = copy.deepcopy(net)
    copied(x * 2).sum().backward()
    for pair, value in zip(caches[0].collect_states(), before, strict=True):
        assert torch.equal(pair[0], value)


def test_a_deep_copy_of_a_cache_has_the_values():
    net, x = Rewritten().eval(), anisotropic(6, 5)
    cache = attached(net)
    net(x).sum().backward()
    copied = copy.deepcopy(cache)
    for mine, theirs in zip(copied.collect_states(), cache.collect_states(), strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one, other)
            assert one is not other
            assert one.is_leaf
        assert torch.equal(mine[1].grad, theirs[1].grad)
    copied.clear()
    assert len(cache.collect_states()) == 2


@pytest.mark.parametrize("by_hooks", [False, True])
def test_transforms_of_torch_func_run_through_a_cached_model(by_hooks):
    net = Rewritten().eval()
    x, y = anisotropic(6, 5), torch.arange(6) % 4

    @flatten_func(net)
    def loss(parameters, x, y):
        out = torch.func.functional_call(net, parameters, (x[None],))
        return nn.functional.cross_entropy(out, y[None])

    flat = flatten_params(net).detach()
    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    expected = per_example(flat, x, y)
    caches = cache_linears(net) if by_hooks else [attached(net)]
    assert torch.equal(per_example(flat, x, y), expected)
    assert torch.func.jacrev(loss)(flat, x[0], y[0]).shape == flat.shape
    assert caches[0].collect_states() == []  # nothing outlives a transform
    copy.deepcopy(net)
    ihvp = ihvp_at_x_ekfac(cross_entropy(net), x, y, batch_size=3, mlp_cache=caches, damping=0.1)
    if by_hooks:
        assert torch.allclose(torch.func.vmap(ihvp)(expected), ihvp(expected), rtol=1e-12)


@pytest.mark.parametrize("by_hooks", [False, True])
def test_a_fit_leaves_the_model_as_it_was(by_hooks):
    net = Rewritten()
    net.fc2.weight.requires_grad_(False)
    net.fc3.eval()
    caches = cache_linears(net) if by_hooks else [attached(net)]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    modes = [m.training for m in net.modules()]
    x, y = anisotropic(6, 5), torch.arange(6) % 4
    ihvp_at_x_ekfac(cross_entropy(net), x, y, batch_size=4, mlp_cache=caches, damping=0.1)
    with pytest.raises(ZeroDivisionError):
        ihvp_at_x_ekfac(lambda x: net(x) / (1 // 0), x, mlp_cache=caches, damping=0.1)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()] == hooks
    assert [m.training for m in net.modules()] == modes
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["fc2.weight"]
    assert all(p.grad is None for p in net.parameters())
    assert caches[0].recording is None
    assert caches[0].collect_states() == []


def test_what_an_earlier_forward_left_is_not_counted():
    net = mlp(4, 5, 3)
    caches = cache_linears(net)
    x, y = anisotropic(6, 4), torch.arange(6) % 3
    v = torch.randn(sum(p.numel() for p in net.parameters())).double()
    options = {"batch_size": 4, "mlp_cache": caches, "damping": 0.1}
    first = ihvp_at_x_ekfac(cross_entropy(net), x, y, **options)(v)
    net(x * 3)
    assert torch.equal(ihvp_at_x_ekfac(cross_entropy(net), x, y, **options)(v), first)


# -- gradient checkpointing ------------------------------------------------------------------------


def checkpointed(inner, **options):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, **options)

    return Checkpointed()


@pytest.mark.parametrize("by_hooks", [False, True])
def test_a_checkpointed_forward_counts_every_row_once(by_hooks):
    x, y = anisotropic(6, 5), torch.arange(6) % 4
    results = []
    for wraps in (lambda net: net, lambda net: checkpointed(net, use_reentrant=False)):
        net = Rewritten()
        caches = cache_linears(net) if by_hooks else [attached(net)]
        ihvp = ihvp_at_x_ekfac(
            cross_entropy(wraps(net)), x, y, batch_size=4, mlp_cache=caches, damping=0.1
        )
        results.append(torch.cat([part.flatten() for part in ihvp([*_ones(net, 2 + by_hooks)])]))
    assert torch.allclose(*results, rtol=1e-12)


def _ones(net, number):
    """Ones in the shapes of the first so many linear maps' parameters."""
    return [torch.ones_like(p).detach() for p in list(net.parameters())[: 2 * number]]


def test_a_reentrant_checkpoint_is_refused_by_name():
    net = Rewritten()
    x, y = anisotropic(6, 5).requires_grad_(), torch.arange(6) % 4
    func = cross_entropy(checkpointed(net, use_reentrant=True))
    for caches in ([attached(net)], cache_linears(net)):
        with pytest.raises(ModelError, match=r"module fc1 received no gradient.*use_reentrant"):
            ihvp_at_x_ekfac(func, x, y, batch_size=4, mlp_cache=caches, damping=0.1)


# -- what a forward may not record -----------------------------------------------------------------


def recording(record, net=None):
    """A network whose forward records what `record(net, x, cache)` does; it returns the output."""

    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

        @manual
        def forward(self, x):
            return record(self, x, getattr(self, KEY).input_hidden_pairs)

    net = Custom()
    return net, attached(net)


def fitted(net, cache, x=None):
    x = anisotropic(6, 5) if x is None else x
    func = cross_entropy(net)
    return ihvp_at_x_ekfac(
        func, x, torch.zeros(len(x), dtype=torch.long), batch_size=2, mlp_cache=cache, damping=0.1
    )


def nothing(net, x, pairs):
    return net.last(net.first(x))


def after_activation(net, x, pairs):
    pairs.append((x, torch.tanh(net.first(x))))
    return net.last(pairs[0][1])


def wrong_input(net, x, pairs):
    pairs.append((x * 2, net.first(x)))
    return net.last(pairs[0][1])


def overwritten_input(net, x, pairs):
    x = x.clone()
    pairs.append((x, net.first(x)))
    x.zero_()
    return net.last(pairs[0][1])


def used_twice(net, x, pairs):
    net.first(x + 1)
    pairs.append((x, net.first(x)))
    return net.last(pairs[0][1])


def recorded_twice(net, x, pairs):
    pairs.append((x, net.first(x)))
    pairs.append(pairs[0])
    return net.last(pairs[0][1])


def no_gradient(net, x, pairs):
    with torch.no_grad():
        pairs.append((x, net.first(x)))
    return net.last(pairs[0][1])


def detached(net, x, pairs):
    pairs.append((x, net.first(x)))
    return net.last(pairs[0][1].detach())


def left_aside(net, x, pairs):
    pairs.append((x, net.first(x)))
    return net.last(x[:, :4])


def three(net, x, pairs):
    pairs.append((x, net.first(x), 3))
    return net.last(pairs[0][1])


def whole_numbers(net, x, pairs):
    pairs.append((torch.ones(6, 5, dtype=torch.long), net.first(x)))
    return net.last(pairs[0][1])


def no_tensor(net, x, pairs):
    pairs.append((x, "hidden"))
    return net.last(net.first(x))


def other_rows(net, x, pairs):
    pairs.append((x[:1], net.first(x)))
    return net.last(pairs[0][1])


def varying(net, x, pairs):
    hidden = net.first(x)
    if net.__dict__.setdefault("calls", []):
        pairs.append((hidden, net.last(hidden)))
        return pairs[0][1]
    net.calls.append(1)
    pairs.append((x, hidden))
    return net.last(hidden)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (nothing, r"mlp_cache\[0\] recorded no pair.*without appending"),
        (after_activation, r"output of no Linear or Conv1D.*before the activation"),
        (wrong_input, "has another input"),
        (overwritten_input, "was written to after"),
        (used_twice, r"\(5 → 4\) was used more than once"),
        (recorded_twice, "Module first was recorded twice"),
        (no_gradient, "module first received no gradient"),
        (detached, "module first received no gradient"),
        (left_aside, "module first received no gradient"),
        (three, "Entry 0 of input_hidden_pairs is a tuple"),
        (whole_numbers, "The input of pair 0 is torch.int64"),
        (no_tensor, "The hidden vector of pair 0 is str"),
        (
            other_rows,
            r"Pair 0 has an input of shape \[1, 5\] and a hidden vector of shape \[2, 4\]",
        ),
        (varying, "Call 2 of func recorded other pairs than the first one"),
    ],
)
def test_what_was_recorded_is_refused_in_a_sentence(record, says):
    with pytest.raises(ModelError, match=says):
        fitted(*recording(record))


def test_a_cache_attached_to_nothing():
    with pytest.raises(ModelError, match=r"attached to nothing.*setattr.*cache_linears"):
        fitted(mlp(5, 4, 3), MLPCache())
    net = Rewritten()
    caches = cache_linears(net)
    caches.remove()
    with pytest.raises(ModelError, match=r"recorded no pair.*hooks were removed"):
        fitted(net, caches)
    with pytest.raises(ModelError, match=r"mlp_cache\[1\] recorded no pair"):
        fitted(net, [*cache_linears(net), attached(mlp(5, 4, 3))])


def test_a_cache_that_is_nobodys_has_weights_alone():
    """`func` may fill a cache itself; its weights then have no names, and no bias."""
    weight = torch.randn(3, 4, dtype=torch.float64)
    cache = MLPCache()
    x, y = anisotropic(8, 4), torch.arange(8) % 3

    def func(x, y):
        hidden = (x @ weight.T).requires_grad_()
        cache.input_hidden_pairs.append((x, hidden))
        return nn.functional.cross_entropy(hidden, y, reduction="none")

    net = mlp(4, 3, bias=False)
    with torch.no_grad():
        net[0].weight.copy_(weight)
    options = {"batch_size": 3, "damping": 0.1}
    v = torch.randn(3, 4, dtype=torch.float64)
    expected = ihvp_at_x_ekfac(cross_entropy(net), x, y, mlp_cache=cache_linears(net), **options)
    found = ihvp_at_x_ekfac(func, x, y, mlp_cache=cache, **options)
    assert torch.equal(found([v])[0], expected([v])[0])
    assert torch.equal(found(v.flatten()), expected(v.flatten()))


def test_a_transform_inside_func_is_refused():
    net = mlp(4, 5, 3)
    x, y = anisotropic(6, 4), torch.arange(6) % 3
    for caches in (cache_linears(net),):
        with pytest.raises(ModelError, match=r"inside a transform of torch\.func"):
            ihvp_at_x_ekfac(
                lambda x, y: torch.func.vmap(lambda a, b: cross_entropy(net)(a[None], b[None])[0])(
                    x, y
                ),
                x,
                y,
                batch_size=3,
                mlp_cache=caches,
                damping=0.1,
            )


def test_tied_and_computed_weights_are_refused():
    net = mlp(4, 4, 4)
    net[2].weight = net[0].weight
    with pytest.raises(ModelError, match="Module 0 is tied"):
        fitted(net, cache_linears(net), anisotropic(6, 4))
    net = mlp(5, 4, 3)
    nn.utils.parametrizations.weight_norm(net[0])
    with pytest.raises(ModelError, match="Module 0 has no parameter of its own"):
        fitted(net, cache_linears(net))


class Masked(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.tril(), self.bias)


class Activated(nn.Linear):
    def forward(self, x):
        return torch.relu(super().forward(x))


@pytest.mark.parametrize("kind", [Masked, Activated])
def test_a_linear_that_does_something_else_is_refused(kind):
    net = mlp(5, 4, 3)
    net[0] = kind(5, 4).double()
    with pytest.raises(ModelError, match=f"Module 0 is a {kind.__name__} whose output is not"):
        fitted(net, cache_linears(net))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("decayed", [False, True])
def test_a_weight_that_is_used_elsewhere_too_is_refused(flat, decayed):
    net = mlp(5, 4, 4)
    caches = cache_linears(net)
    x, y = anisotropic(6, 5), torch.arange(6) % 4

    def func(parameters, x, y):
        out = torch.func.functional_call(net, parameters, (x,))
        losses = nn.functional.cross_entropy(out, y, reduction="none")
        if decayed:
            return losses + sum(p.square().sum() for p in parameters.values())
        return losses + (out @ parameters["0.weight"]).square().sum(-1)  # as a tied decoder

    if flat:
        func, arguments = flatten_func(net)(func), (flatten_params(net).detach(), x, y)
    else:
        func, arguments = partial(func, dict(net.named_parameters())), (x, y)
    with pytest.raises(ModelError, match="The weight of module 0 has a gradient beside"):
        ihvp_at_x_ekfac(func, *arguments, batch_size=3, mlp_cache=caches)


def test_another_hook_that_changes_the_output_comes_after_ours():
    net = mlp(5, 4, 3)
    net[0].register_forward_hook(lambda module, args, output: output * 3)
    x, y = anisotropic(6, 5), torch.arange(6) % 3

    def solved(net):
        ihvp = ihvp_at_x_ekfac(
            cross_entropy(net), x, y, batch_size=3, mlp_cache=cache_linears(net), damping=0.1
        )
        return torch.cat(
            [p.flatten() for p in ihvp([torch.ones_like(p) for p in net.parameters()])]
        )

    hooked = solved(net)

    class Times3(nn.Module):
        def forward(self, x):
            return x * 3

    plain = nn.Sequential(net[0], Times3(), *net[1:])
    net[0]._forward_hooks.clear()
    assert torch.allclose(hooked, solved(plain), rtol=1e-12)


@pytest.mark.parametrize(
    "losses",
    [
        lambda net, x: net(x.movedim(0, 1)).sum(-1).T.flatten(),  # positions first
        lambda net, x: net(x).sum((1, 2)).softmax(0),  # examples compete
        lambda net, x: net(x).sum((1, 2)) + net.below(x[0]).sum(),  # one for all
        lambda net, x: net(x).sum(-1).T.flatten(),  # losses by position, not by example
    ],
)
def test_examples_that_are_not_computed_apart_are_refused(losses):
    net = Mixing(mlp(5, 4), mlp(4, 3)).double()
    caches = cache_linears(net)
    with pytest.raises(ModelError, match=r"first example's losses depend on|used more than once"):
        ihvp_at_x_ekfac(partial(losses, net), anisotropic(4, 4, 5), batch_size=4, mlp_cache=caches)


def test_an_input_that_is_shared_in_some_calls_only_is_refused():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = mlp(5, 3)[0], mlp(5, 3, seed=1)[0]
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return torch.tanh(self.one(x)) + self.other(x if self.calls == 1 else x * 1)

    net = Sometimes()
    with pytest.raises(ModelError, match="Call 2 of func recorded other pairs"):
        fitted(net, cache_linears(net))


def test_of_nested_modules_with_caches_the_outer_ones_parameters_count():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = mlp(5, 5)[0], Rewritten()

        @manual
        def forward(self, x):
            y = self.first(x)
            if hasattr(self, KEY):
                getattr(self, KEY).input_hidden_pairs.append((x, y))
            return self.inner(torch.tanh(y))

    net = Outer()
    caches = [attached(net.inner), attached(net)]
    x, y = anisotropic(6, 5), torch.arange(6) % 4
    options = {"batch_size": 3, "damping": 0.1}
    v = [torch.ones_like(p) for p in net.parameters()]
    found = ihvp_at_x_ekfac(cross_entropy(net), x, y, mlp_cache=caches, **options)
    with cache_linears(net) as hooked:
        expected = ihvp_at_x_ekfac(cross_entropy(net), x, y, mlp_cache=hooked, **options)(v)
    with pytest.warns(UserWarning, match=r"records inner\.fc3\.weight"):
        solved = found(v)
    assert all(torch.allclose(a, b) for a, b in zip(solved[:6], expected[:6], strict=True))


def test_rows_that_cannot_be_told_apart_are_refused():
    net = Mixing(mlp(5, 4), mlp(4, 3)).double()
    caches = cache_linears(net)

    def time_first(x, y):
        return cross_entropy(net.below)(x.movedim(0, 1), y)

    x, y = anisotropic(6, 3, 5), torch.zeros(6, 3, dtype=torch.long)
    with pytest.raises(ModelError, match=r"\[3, 2, 4\] for a batch of 2 examples"):
        ihvp_at_x_ekfac(time_first, x, y, batch_size=2, mlp_cache=caches[:1], damping=0.1)


def test_something_else_under_the_key_is_refused():
    net = Rewritten()
    setattr(net, KEY, [])
    with pytest.raises(ConfigError, match="'__cache' of Rewritten is a list"):
        net(anisotropic(2, 5))


def test_cache_linears_refuses_what_it_cannot_hook():
    with pytest.raises(ConfigError, match="given a str"):
        cache_linears("model")
    with pytest.raises(ModelError, match="ReLU has no Linear or Conv1D"):
        cache_linears(nn.ReLU())
    with pytest.raises(ConfigError, match="'fc9' matches none of the 3 linear maps of Rewritten"):
        cache_linears(Rewritten(), "fc9")
