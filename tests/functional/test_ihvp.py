"""The products themselves: against dense Fishers of plain autograd, and against `estimate`."""

from functools import partial

import pytest
import torch
from helpers.dense import dense_of_losses, relative
from helpers.networks import build
from helpers.small_mlps import Mixing, Rewritten, anisotropic, cross_entropy, linears, mlp
from torch import nn

from ekfac_dist import estimate_factors
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

EXACT = 1e-10
MARGIN = 0.3  # by which the best multiple of the identity must miss
DAMPING = 0.005


def each_output(net):
    """The output's coordinates that `weights` picks: squared error's gradients, in expectation.

    For squared error the expectation over labels is a sum over output coordinates, each the loss
    of an example of its own.
    """

    def losses(x, weights):
        return (net(x) * weights).sum(-1).flatten()

    return losses


def every_draw(x, num_outputs):
    """Each sequence once for each coordinate of each of its outputs: x and one-hot weights."""
    lead = x.shape[1:-1]
    count = num_outputs * lead.numel()
    one_hot = torch.eye(count, dtype=x.dtype).view(count, *lead, num_outputs)
    return x.repeat_interleave(count, 0), one_hot.repeat(len(x), *[1] * (one_hot.ndim - 1))


def random_vectors(net, number=3):
    generator = torch.Generator().manual_seed(1)
    size = sum(p.numel() for p in net.parameters())
    return torch.randn(number, size, generator=generator, dtype=torch.float64)


def blocks(net, flat):
    """Each linear map's part of flat vectors, [k, O, I], the bias last; by slicing alone."""
    found, start = {}, 0
    for name in linears(net):
        module = net.get_submodule(name)
        size = module.weight.numel()
        block = flat[:, start : start + size].reshape(-1, *module.weight.shape)
        start += size
        if module.bias is not None:
            bias = flat[:, start : start + len(module.bias)]
            block, start = torch.cat([block, bias[..., None]], -1), start + len(module.bias)
        found[name] = block
    return found


def check_against(matrices, net, v, solved, damping=DAMPING):
    """Equality with a dense solve, and that no multiple of the identity would come near it."""
    given, found = blocks(net, v), blocks(net, solved)
    for name, matrix in matrices.items():
        damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
        expected = torch.linalg.solve(damped, given[name].flatten(1).T).T
        assert relative(found[name].flatten(1), expected) < EXACT, name
        flat = given[name].flatten(1)
        identity = flat * (flat * expected).sum() / flat.square().sum()
        assert relative(identity, expected) > MARGIN, name


def dense(net, func, *x, names=None):
    losses = [
        lambda k=k: func(*(tensor[k : k + 1] for tensor in x)).sum() for k in range(len(x[0]))
    ]
    return dense_of_losses(net, losses, names or linears(net))


# -- where EK-FAC is exact: the dense Fisher itself ------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_deep_linear_network_with_squared_error(bias):
    net = mlp(4, 5, 3, 3, activation=nn.Identity, bias=bias)
    x, weights = every_draw(anisotropic(30, 4), 3)
    func = each_output(net)
    ihvp = ihvp_at_x_ekfac(
        func, x, weights, batch_size=32, mlp_cache=cache_linears(net), damping=DAMPING
    )
    v = random_vectors(net)
    found = dense(net, func, x, weights)
    check_against({name: layer.F for name, layer in found.items()}, net, v, ihvp(v))


def test_the_last_layer_of_a_tanh_network_with_squared_error():
    net = mlp(4, 5, 3)
    x, weights = every_draw(anisotropic(30, 4), 3)
    func = each_output(net)
    ihvp = ihvp_at_x_ekfac(
        func, x, weights, batch_size=7, mlp_cache=cache_linears(net), damping=DAMPING
    )
    v = random_vectors(net)
    first, last = linears(net)
    fisher = dense(net, func, x, weights)
    check_against({last: fisher[last].F}, net, v, ihvp(v))
    with pytest.raises(AssertionError):
        check_against({first: fisher[first].F}, net, v, ihvp(v))


@pytest.mark.parametrize("positions", [1, 3])
def test_a_single_example_is_exact_at_one_position_only(positions):
    net = mlp(4, 5, 6)
    x, y = anisotropic(1, positions, 4), torch.arange(positions)[None]
    func = cross_entropy(net)
    ihvp = ihvp_at_x_ekfac(func, x, y, mlp_cache=cache_linears(net), damping=1e-3)
    v = torch.stack(  # in the span of what was seen, where the identity is far off
        [
            torch.cat([p.grad.flatten() for p in net.parameters()])
            for _ in [func(x, y).sum().backward()]
        ]
    )
    fisher = {name: layer.F for name, layer in dense(net, func, x, y).items()}
    given, found = blocks(net, v), blocks(net, ihvp(v))
    for name, matrix in fisher.items():
        damped = matrix + 1e-3 * torch.eye(len(matrix), dtype=matrix.dtype)
        expected = torch.linalg.solve(damped, given[name].flatten(1).T).T
        error = relative(found[name].flatten(1), expected)
        assert error < EXACT if positions == 1 else error > 0.01


def test_a_token_wise_deep_linear_network_with_squared_error_per_token():
    net = mlp(4, 5, 3, activation=nn.Identity)
    x, weights = every_draw(anisotropic(6, 4, 4), 3)
    func = each_output(net)
    assert func(x, weights).shape == (4 * len(x),)  # t = 4
    ihvp = ihvp_at_x_ekfac(
        func, x, weights, batch_size=10, mlp_cache=cache_linears(net), damping=0.01
    )
    v = random_vectors(net)
    found = dense(net, func, x, weights)
    check_against({n: layer.F for n, layer in found.items()}, net, v, ihvp(v), damping=0.01)


# -- elsewhere: the dense E ------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU, partial(nn.ReLU, inplace=True)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_a_network_of_any_activation(activation, bias, batch_size):
    net = mlp(4, 6, 5, 3, activation=activation, bias=bias)
    x, y = anisotropic(11, 4), torch.arange(11) % 3
    func = cross_entropy(net)
    ihvp = ihvp_at_x_ekfac(
        func, x, y, batch_size=batch_size, mlp_cache=cache_linears(net), damping=DAMPING
    )
    v = random_vectors(net)
    for module in net.modules():
        module.inplace = False  # plain autograd has no gradient of what was overwritten
    expected = {name: layer.E() for name, layer in dense(net, func, x, y).items()}
    check_against(expected, net, v, ihvp(v))


@pytest.mark.parametrize(("length", "labels"), [(5, 5), (5, 2), (3, 1)])
def test_positions_that_mix_and_several_losses_for_each_example(length, labels):
    net = Mixing(mlp(4, 6), mlp(6, 5, 3)).double()
    x = anisotropic(9, length, 4)
    y = torch.randint(3, (9, labels), generator=torch.Generator().manual_seed(0))

    def func(x, y):
        out = net(x)[:, -y.shape[1] :]
        return nn.functional.cross_entropy(out.transpose(1, 2), y, reduction="none").flatten()

    ihvp = ihvp_at_x_ekfac(func, x, y, batch_size=4, mlp_cache=cache_linears(net), damping=0.01)
    v = random_vectors(net)
    found = dense(net, func, x, y)
    check_against({n: layer.E() for n, layer in found.items()}, net, v, ihvp(v), damping=0.01)
    if labels > 1:  # squaring before the sum over positions would be another matrix
        name = linears(net)[0]
        assert relative(found[name].E(per_token=True), found[name].E()) > 0.05


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("length", [None, 3])
@pytest.mark.parametrize("by_hooks", [False, True])
def test_an_activation_in_place_leaves_the_gradients_right(frozen, length, by_hooks):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = mlp(4, 6)[0], mlp(6, 3, seed=1)[0]

        @manual
        def forward(self, x):
            y1 = self.up(x)
            x2 = torch.relu_(y1)
            y2 = self.down(x2)
            if hasattr(self, KEY):
                getattr(self, KEY).input_hidden_pairs += [(x, y1), (x2, y2)]
            return y2

    net = Net().requires_grad_(not frozen)
    shape = (8,) if length is None else (8, length)
    x, y = anisotropic(*shape, 4), torch.arange(8 * (length or 1)).view(shape) % 3
    if by_hooks:
        caches = cache_linears(net)
    else:
        caches = [MLPCache()]
        setattr(net, KEY, caches[0])
    v = random_vectors(net)
    ihvp = ihvp_at_x_ekfac(
        cross_entropy(net), x, y, batch_size=3, mlp_cache=caches, damping=DAMPING
    )
    plain = mlp(4, 6, 3, activation=nn.ReLU)
    plain.load_state_dict(dict(zip(plain.state_dict(), net.state_dict().values(), strict=True)))
    expected = dense(plain, cross_entropy(plain), x, y).values()
    matrices = {name: layer.E() for name, layer in zip(["up", "down"], expected, strict=True)}
    check_against(matrices, net, v, ihvp(v))


def test_dropout_is_off_though_the_cache_is_of_a_part_alone():
    """The whole model runs in evaluation mode, and is in training mode again afterwards."""
    x, y = anisotropic(12, 5), torch.arange(12) % 4
    for attach in (
        lambda net: cache_linears(net),
        lambda net: cache_linears(net[2]),
        lambda net: [setattr(net[2], KEY, cache := MLPCache()), cache][1],
    ):
        net = nn.Sequential(nn.BatchNorm1d(5).double(), nn.Dropout(0.5), Rewritten())
        caches = attach(net)
        v = {n: torch.ones_like(p) for n, p in net.named_parameters() if "fc1" in n or "fc2" in n}
        results, func = [], cross_entropy(net)
        for mode in (True, True, False):
            net.train(mode)
            ihvp = ihvp_at_x_ekfac(
                func, x, y, batch_size=5, mlp_cache=caches, model=net, damping=0.1
            )
            assert all(module.training is mode for module in net.modules())
            results.append(ihvp(v))
        assert not net[0].running_mean.any()
        for one in results[1:]:
            assert all(map(torch.equal, one.values(), results[0].values()))


def _of(net):
    """Ones in the shapes of the first two linear maps' parameters."""
    return [torch.ones_like(p).detach() for p in list(net.parameters())[:4]]


def test_inputs_of_four_dimensions():
    net = mlp(4, 5, 3)
    x, y = anisotropic(6, 2, 3, 4), torch.arange(36).view(6, 2, 3) % 3
    func = cross_entropy(net)
    ihvp = ihvp_at_x_ekfac(func, x, y, batch_size=4, mlp_cache=cache_linears(net), damping=DAMPING)
    v = random_vectors(net)
    expected = {name: layer.E() for name, layer in dense(net, func, x, y).items()}
    check_against(expected, net, v, ihvp(v))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_rewritten_forward(frozen, training):
    net = Rewritten()
    x, y = anisotropic(12, 5), torch.arange(12) % 4
    func = cross_entropy(net)
    expected = {n: d.E() for n, d in dense(net.eval(), func, x, y).items() if n != "fc3"}
    net.train(training).requires_grad_(not frozen)
    cache = MLPCache()
    setattr(net, KEY, cache)
    ihvp = ihvp_at_x_ekfac(func, x, y, batch_size=5, mlp_cache=cache, damping=DAMPING)
    v = random_vectors(net)
    with pytest.warns(UserWarning, match=r"fc3\.weight, fc3\.bias"):
        solved = ihvp(v)
    check_against(expected, net, v, solved)
    assert not blocks(net, solved)["fc3"].any()
    assert net.training is training
    assert all(p.requires_grad is not frozen and p.grad is None for p in net.parameters())
    assert not cache.input_hidden_pairs


def test_padding_that_is_not_counted_is_as_if_it_were_not_there():
    net = Mixing(mlp(4, 6), mlp(6, 3)).double()
    caches = cache_linears(net)
    lengths = [4, 2, 3, 4, 1]
    sequences = [anisotropic(1, n, 4, seed=n) for n in lengths]
    labels = [torch.arange(n)[None] % 3 for n in lengths]

    def alone(k):
        return nn.functional.cross_entropy(net(sequences[k])[0], labels[k][0], reduction="sum")

    expected = dense_of_losses(net, [partial(alone, k) for k in range(5)], linears(net))
    x, y, mask = torch.full((5, 4, 4), 9.0).double(), torch.full((5, 4), -100), torch.zeros(5, 4)
    for k, n in enumerate(lengths):
        x[k, :n], y[k, :n], mask[k, :n] = sequences[k][0], labels[k][0], 1

    def func(x, y, mask):
        out = net(x)
        for cache in caches:
            cache.counted = mask.bool()
        return nn.functional.cross_entropy(out.transpose(1, 2), y, reduction="none").flatten()

    ihvp = ihvp_at_x_ekfac(func, x, y, mask, batch_size=2, mlp_cache=caches, damping=DAMPING)
    v = random_vectors(net)
    check_against({n: d.E() for n, d in expected.items()}, net, v, ihvp(v))
    assert caches[0].counted is None  # it held for that call
    for wrong in (mask[:, :-1].bool(), mask):

        def func_of_wrong(x, y, wrong=wrong):
            losses = func(x, y, mask)
            caches[0].counted = wrong
            return losses

        with pytest.raises(ModelError, match=r"counted of mlp_cache\[0\] is of torch"):
            ihvp_at_x_ekfac(func_of_wrong, x, y, batch_size=5, mlp_cache=caches)
    caches[0].counted = mask.bool()
    with pytest.raises(ConfigError, match="was set before func was called"):
        ihvp_at_x_ekfac(func, x, y, mask, batch_size=2, mlp_cache=caches)


# -- the same as `estimate` and `solve` ------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama_bias"])
def test_a_language_model_gives_what_estimate_and_solve_give(family):
    model = build(family)
    generator = torch.Generator().manual_seed(0)
    weights = torch.linspace(1, 8, 29) ** 2
    ids = torch.multinomial(weights.repeat(10, 1), 7, True, generator=generator)
    factors = estimate_factors(
        model, [{"input_ids": row} for row in ids], labels="data", accumulate="float64"
    )

    def func(ids):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
        return losses.flatten()

    with cache_linears(model) as caches:
        assert len(caches) == model.config.num_hidden_layers
        assert [len(names) for names in caches.names] == [2 if family == "gpt2" else 3] * 2
        ihvp = ihvp_at_x_ekfac(func, ids, batch_size=4, mlp_cache=caches, damping=DAMPING)
        merged = [
            torch.randn(2, m.num_outputs, m.input_size, generator=generator, dtype=torch.float64)
            for m in factors.modules.values()
        ]
        solved = ihvp(merged)
    expected = factors.solve(
        dict(zip(factors.modules, merged, strict=True)), DAMPING, relative=False
    )
    for found, right, given in zip(solved, expected.values(), merged, strict=True):
        assert relative(found, right) < EXACT
        assert relative(given * (given * right).sum() / given.square().sum(), right) > 0.1


# -- what is given and when ------------------------------------------------------------------------


def test_flat_parameters_are_an_argument_that_is_not_cut():
    net = mlp(4, 5, 3)
    x, y = anisotropic(9, 4), torch.arange(9) % 3
    # Another network's parameters, to see that those given are those used.
    other = mlp(4, 5, 3, seed=1)

    @flatten_func(net)
    def func(parameters, x, y):
        out = torch.func.functional_call(net, parameters, (x,))
        return nn.functional.cross_entropy(out, y, reduction="none")

    caches = cache_linears(net)
    flat = flatten_params(other).detach()
    expected = {n: d.E() for n, d in dense(other, cross_entropy(other), x, y).items()}
    v = random_vectors(net)
    for in_dims in (None, (None, 0, 0)):
        ihvp = ihvp_at_x_ekfac(
            func, flat, x, y, in_dims=in_dims, batch_size=4, mlp_cache=caches, damping=DAMPING
        )
        check_against(expected, net, v, ihvp(v))


def test_another_x_is_fitted_for_that_once():
    net = mlp(4, 5, 3)
    func = cross_entropy(net)
    caches = cache_linears(net)
    x, y = anisotropic(9, 4), torch.arange(9) % 3
    other = anisotropic(5, 4, seed=3), torch.arange(5) % 2
    options = {"batch_size": 4, "mlp_cache": caches, "damping": DAMPING}
    ihvp = ihvp_at_x_ekfac(func, x, y, **options)
    v = random_vectors(net)
    at_x = ihvp(v)
    at_other = ihvp_at_x_ekfac(func, *other, **options)(v)
    assert torch.equal(ihvp(other, v), at_other)
    assert torch.equal(ihvp(*other, v), at_other)
    assert torch.equal(ihvp(v), at_x)
    assert relative(at_other, at_x) > 0.1
    check_against({n: d.E() for n, d in dense(net, func, *other).items()}, net, v, at_other)


def test_at_most_max_iter_batches_are_used_twice_each():
    net = mlp(4, 5, 3)
    sizes = []

    def func(x, y):
        sizes.append(len(x))
        return cross_entropy(net)(x, y)

    x, y = anisotropic(11, 4), torch.arange(11) % 3
    caches = cache_linears(net)
    options = {"batch_size": 4, "mlp_cache": caches, "damping": DAMPING}
    v = random_vectors(net)
    all_of_it = ihvp_at_x_ekfac(func, x, y, **options)(v)
    assert sizes == [4, 4, 3] * 2
    sizes.clear()
    part = ihvp_at_x_ekfac(func, x, y, max_iter=2, **options)(v)
    assert sizes == [4, 4] * 2
    assert torch.equal(part, ihvp_at_x_ekfac(func, x[:8], y[:8], **options)(v))
    assert relative(part, all_of_it) > 0.01
    sizes.clear()
    assert torch.equal(ihvp_at_x_ekfac(func, x, y, max_iter=9, **options)(v), all_of_it)


def test_examples_may_run_along_any_dimension():
    net = mlp(4, 5, 3)
    x, y = anisotropic(6, 2, 4), torch.arange(12).view(6, 2) % 3

    def func(x, y):
        return cross_entropy(net)(x.movedim(1, 0), y.movedim(-1, 0))

    caches = cache_linears(net)
    v = random_vectors(net)
    options = {"batch_size": 4, "mlp_cache": caches, "damping": DAMPING}
    expected = ihvp_at_x_ekfac(cross_entropy(net), x, y, **options)(v)
    moved = ihvp_at_x_ekfac(func, x.movedim(0, 1), y.movedim(0, -1), in_dims=(1, -1), **options)
    assert torch.equal(moved(v), expected)


def test_func_may_cut_nothing_if_it_says_how_many_examples_it_has():
    net = mlp(4, 5, 3)
    x, y = anisotropic(9, 4), torch.arange(9) % 3
    func = cross_entropy(net)
    caches = cache_linears(net)
    v = random_vectors(net)
    expected = ihvp_at_x_ekfac(func, x, y, batch_size=9, mlp_cache=caches, damping=DAMPING)(v)
    bare = ihvp_at_x_ekfac(lambda: func(x, y), batch_size=9, mlp_cache=caches, damping=DAMPING)
    assert torch.equal(bare(v), expected)
    with pytest.warns(UserWarning, match="9 losses where batch_size is 1"):
        ihvp_at_x_ekfac(lambda: func(x, y), mlp_cache=caches, damping=DAMPING)


def test_a_model_in_float32_is_near_one_in_float64():
    net = mlp(4, 6, 3)
    x, y = anisotropic(20, 4), torch.arange(20) % 3
    v = random_vectors(net)
    wide = ihvp_at_x_ekfac(
        cross_entropy(net), x, y, batch_size=8, mlp_cache=cache_linears(net), damping=DAMPING
    )(v)
    net.float()
    narrow = ihvp_at_x_ekfac(
        cross_entropy(net),
        x.float(),
        y,
        batch_size=8,
        mlp_cache=cache_linears(net),
        damping=DAMPING,
    )
    assert narrow(v.float()).dtype == torch.float32
    assert relative(narrow(v.float()).double(), wide) < 1e-4
    assert narrow(v).dtype == torch.float64


def test_bfloat16_is_summed_in_float32():
    net = mlp(4, 6, 3)
    x, y = anisotropic(20, 4), torch.arange(20) % 3
    v = random_vectors(net)
    options = {"batch_size": 8, "damping": DAMPING}
    wide = ihvp_at_x_ekfac(cross_entropy(net), x, y, mlp_cache=cache_linears(net), **options)(v)
    net.bfloat16()
    narrow = ihvp_at_x_ekfac(
        cross_entropy(net), x.bfloat16(), y, mlp_cache=cache_linears(net), **options
    )(v.float())
    assert narrow.dtype == torch.float32
    assert relative(narrow.double(), wide) < 0.1


def test_the_callers_no_grad_does_not_reach_func():
    net = mlp(4, 5, 3)
    x, y = anisotropic(9, 4), torch.arange(9) % 3
    caches = cache_linears(net)
    options = {"batch_size": 4, "mlp_cache": caches, "damping": DAMPING}
    v = random_vectors(net)
    expected = ihvp_at_x_ekfac(cross_entropy(net), x, y, **options)(v)
    with torch.no_grad():
        assert torch.equal(ihvp_at_x_ekfac(cross_entropy(net), x, y, **options)(v), expected)


def test_maps_that_read_one_tensor_share_its_covariance(monkeypatch):
    from ekfac_dist.functional import fitting

    decomposed = []

    def counting(name, *rest):
        decomposed.append(name)
        return right(name, *rest)

    right = fitting.decompose
    monkeypatch.setattr(fitting, "decompose", counting)
    model = build("llama")
    ids = torch.arange(24).view(4, 6)

    def func(ids):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").flatten()

    ihvp_at_x_ekfac(func, ids, batch_size=2, mlp_cache=cache_linears(model), damping=DAMPING)
    inputs = [name for name in decomposed if name.endswith(".input")]
    assert len(inputs) == 2 * model.config.num_hidden_layers  # gate with up, and down


def test_maps_share_an_input_only_if_both_or_neither_have_a_bias():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = mlp(4, 3)[0], mlp(4, 3, bias=False, seed=1)[0]
            self.third = mlp(4, 3, seed=2)[0]

        def forward(self, x):
            return torch.tanh(self.one(x)) * self.other(x) + self.third(x)

    net = Fork()
    x, y = anisotropic(9, 4), torch.arange(9) % 3
    func = cross_entropy(net)
    v = random_vectors(net)
    ihvp = ihvp_at_x_ekfac(func, x, y, batch_size=4, mlp_cache=cache_linears(net), damping=DAMPING)
    check_against({n: d.E() for n, d in dense(net, func, x, y).items()}, net, v, ihvp(v))


def test_the_callers_autocast_does_not_reach_sums_or_solves():
    net = mlp(4, 6, 3).float()
    x, y = anisotropic(20, 4).float(), torch.arange(20) % 3
    v = random_vectors(net).float()
    options = {"batch_size": 8, "mlp_cache": cache_linears(net), "damping": 1e-3}

    def func(x, y):
        with torch.autocast("cpu", enabled=False):
            return cross_entropy(net)(x, y)

    expected = ihvp_at_x_ekfac(func, x, y, **options)(v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ihvp_at_x_ekfac(func, x, y, **options)(v)
        also = ihvp_at_x_ekfac(cross_entropy(net), x, y, **options)(v)
    assert torch.equal(found, expected)
    assert also.dtype == torch.float32
    assert 0 < relative(also, expected) < 0.3


def test_a_forward_by_no_grad_may_go_before_to_draw_labels():
    for by_hooks in (True, False):
        net = Rewritten().eval()
        x = anisotropic(9, 5)
        if by_hooks:
            caches = cache_linears(net)
        else:
            caches = [MLPCache()]
            setattr(net, KEY, caches[0])

        def func(x, before, net=net):
            if before:
                with torch.no_grad():
                    y = net(x).argmax(-1)
                return cross_entropy(net)(x, y)
            out = net(x)
            with torch.no_grad():
                y = net(x).argmax(-1)
            return nn.functional.cross_entropy(out, y, reduction="none")

        y = net(x).argmax(-1)
        options = {"batch_size": 4, "mlp_cache": caches, "damping": DAMPING}
        expected = ihvp_at_x_ekfac(cross_entropy(net), x, y, **options)(
            _of(net) if not by_hooks else [torch.ones_like(p) for p in net.parameters()]
        )
        for before in (True, False):
            found = ihvp_at_x_ekfac(partial(func, before=before), x, **options)(
                _of(net) if not by_hooks else [torch.ones_like(p) for p in net.parameters()]
            )
            assert all(map(torch.equal, found, expected))
