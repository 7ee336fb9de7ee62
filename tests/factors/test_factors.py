"""Stored factors in use: solves against dense ones, reloading, damping, and what they refuse."""

import hashlib
import json

import pytest
import torch
from helpers.dense import dense_E, dense_modules, relative
from helpers.networks import KINDS, build, examples, shifted

from ekfac_dist import estimate_factors, load_factors
from ekfac_dist.curvature.damping import Damping
from ekfac_dist.errors import ConfigError, StoreError


def fitted(family="llama_bias", output=None, **options):
    model, data = build(family), examples(prompts=True)
    options = {"labels": "data", "accumulate": "float64", **options}
    return model, data, estimate_factors(model, data, output=output, **options)


def random_gradients(factors, number=2):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(
            number, m.num_outputs, m.input_size, generator=generator, dtype=torch.float64
        )
        for name, m in factors.modules.items()
    }


# -- solving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize(("damping", "to_mean"), [(0.1, True), (1e-3, True), (0.05, False)])
def test_solve_is_the_dense_solve_with_a_dense_E(family, damping, to_mean):
    model, data, factors = fitted(family)
    names = list(factors.modules)
    dense = dense_modules(model, [shifted(e) for e in data], names)
    gradients = random_gradients(factors)
    solved = factors.solve(gradients, damping, relative=to_mean)
    for name in (names[0], names[-1]):
        E = dense[name].E()
        value = damping * dense[name].lam().mean() if to_mean else damping
        damped = E + value * torch.eye(len(E), dtype=E.dtype)
        flat = gradients[name].flatten(1)
        expected = torch.linalg.solve(damped, flat.T).T.view_as(gradients[name])
        assert relative(solved[name], expected) < 1e-10
        # Inputs are anisotropic, so no multiple of the identity comes near.
        guess = gradients[name] * (solved[name] * gradients[name]).sum() / (flat.norm() ** 2)
        assert relative(guess, expected) > 0.1


def test_applying_the_damped_E_undoes_the_solve():
    _, _, factors = fitted()
    gradients = random_gradients(factors)
    solved = factors.solve(gradients, 0.1)
    applied = factors.apply(solved)
    for name, gradient in gradients.items():
        value = 0.1 * factors.module(name).lambda_OI.mean()
        assert relative(applied[name] + value * solved[name], gradient) < 1e-10


def test_damping_can_be_given_for_each_module():
    _, _, factors = fitted("gpt2")
    gradients = random_gradients(factors)
    names = list(factors.modules)
    chosen = {names[0]: 0.5, "*.c_proj": 0.2, "*": 0.1}
    solved = factors.solve(gradients, chosen)
    assert torch.equal(solved[names[0]], factors.solve(gradients, 0.5)[names[0]])
    assert torch.equal(solved[names[1]], factors.solve(gradients, 0.2)[names[1]])
    assert torch.equal(solved[names[2]], factors.solve(gradients, 0.1)[names[2]])


@pytest.mark.parametrize(
    ("damping", "says"),
    [
        (-0.1, "damping is -0.1"),
        (float("nan"), "damping is nan"),
        (float("inf"), "damping is inf"),
        (True, "damping is True"),
        ({"*.c_fc": 0.1}, r"no value for module .*c_proj"),
        ({"*": -1.0}, r"damping of \* is -1.0"),
    ],
)
def test_damping_that_cannot_be_meant_is_refused(damping, says):
    _, _, factors = fitted("gpt2")
    with pytest.raises(ConfigError, match=says):
        factors.solve(random_gradients(factors), damping)


def test_no_damping_where_lambda_has_zeros_is_refused_and_the_module_named():
    _, _, factors = fitted("gpt2")
    name = list(factors.modules)[2]
    factors.module(name).lambda_OI[1, 2] = 0
    with pytest.raises(ConfigError, match=f"Module {name}: damping is 0 and Λ has zeros"):
        factors.solve(random_gradients(factors), {name: 0.0, "*": 0.1})
    assert torch.isfinite(factors.solve(random_gradients(factors), 1e-12)[name]).all()


def test_a_globs_first_match_counts_and_names_go_before():
    damping = Damping(0.1, modules={"*.a": 1.0, "x.*": 2.0, "x.a": 3.0})
    lam = torch.ones(2, 2)
    assert [damping.absolute(n, lam) for n in ("x.a", "y.a", "x.b", "z")] == [3.0, 1.0, 2.0, 0.1]
    assert damping.absolute("z", 5 * lam) == pytest.approx(0.5)
    assert Damping(0.1, relative=False).absolute("z", 5 * lam) == 0.1


# -- what solving leaves alone ---------------------------------------------------------------------


def tensors_of(fitted):
    return [*fitted.blocks_OO, *fitted.blocks_II, fitted.lambda_OI]


def test_a_thousand_solves_change_no_stored_byte(tmp_path):
    fitted(output=tmp_path / "store", accumulate="float32")
    before = hashes(tmp_path)
    factors = load_factors(tmp_path / "store")
    gradients = {name: g[0].float() for name, g in random_gradients(factors).items()}
    first = factors.solve(gradients)
    name = next(iter(gradients))
    in_memory = [tensor.clone() for tensor in tensors_of(factors.module(name))]
    for _ in range(1000):
        last = factors.solve(gradients)
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert all(
        torch.equal(a, b) for a, b in zip(in_memory, tensors_of(factors.module(name)), strict=True)
    )
    assert hashes(tmp_path) == before


def test_writing_into_what_was_read_does_not_reach_the_file(tmp_path):
    fitted(output=tmp_path / "store")
    before = hashes(tmp_path)
    factors = load_factors(tmp_path / "store")
    for name in factors.modules:
        for tensor in tensors_of(factors.module(name)):
            tensor.fill_(1.0)
    assert hashes(tmp_path) == before


# -- reloading -------------------------------------------------------------------------------------


def test_a_modules_files_are_read_when_it_is_used(tmp_path, monkeypatch):
    fitted("llama", output=tmp_path / "store")
    factors = load_factors(tmp_path / "store")
    read = []
    original = type(factors._source).tensor

    def tensor(self, file, key, shape):
        read.append(file)
        return original(self, file, key, shape)

    monkeypatch.setattr(type(factors._source), "tensor", tensor)
    name = "model.layers.0.mlp.up_proj"
    factors.solve({name: torch.zeros(14, 12)})
    assert sorted(read) == [
        "eigenbasis/model.layers.0.mlp.gate_proj.input.safetensors",
        f"eigenbasis/{name}.output.safetensors",
        f"spectrum/{name}.safetensors",
    ]
    factors.solve({name: torch.zeros(14, 12)})
    assert len(read) == 3


def test_half_precision_gradients_are_solved_in_the_factors_own():
    _, _, factors = fitted("llama", accumulate="float32")
    gradients = {name: g.float() for name, g in random_gradients(factors).items()}
    expected = factors.solve({name: g.bfloat16().float() for name, g in gradients.items()})
    found = factors.solve({name: g.bfloat16() for name, g in gradients.items()})
    for name in found:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_weights_in_another_dtype_are_the_same_model(tmp_path, dtype):
    model, data = build("gpt2").bfloat16(), examples()
    estimate_factors(model, data, output=tmp_path / "store")
    assert load_factors(tmp_path / "store", model=model.to(dtype)).modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_weights_rounded_to_a_narrower_dtype_are_the_same_model(tmp_path, dtype):
    model, _, _ = fitted("gpt2", output=tmp_path / "store")
    assert load_factors(tmp_path / "store", model=model.to(dtype)).modules
    with pytest.raises(StoreError, match="weights differ"):
        load_factors(tmp_path / "store", model=build("gpt2", seed=1).to(dtype))


def test_other_weights_are_another_model(tmp_path):
    fitted("llama", output=tmp_path / "store")
    with pytest.raises(StoreError, match="weights differ"):
        load_factors(tmp_path / "store", model=build("llama", seed=1))


def test_a_module_of_another_shape_is_named_with_both(tmp_path):
    model, _, _ = fitted("llama", output=tmp_path / "store")
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(12, 15, bias=True).double()
    with pytest.raises(StoreError, match=r"up_proj is linear 12→14; in this .* 12→15 with a bias"):
        load_factors(tmp_path / "store", model=model)


def test_a_missing_module_is_named(tmp_path):
    fitted("llama", output=tmp_path / "store")
    with pytest.raises(StoreError, match=r"module model\.layers\.0\.mlp\.gate_proj this GPT2"):
        load_factors(tmp_path / "store", model=build("gpt2"))


def test_a_flipped_bit_is_found_when_the_file_is_read(tmp_path):
    fitted("gpt2", output=tmp_path / "store")
    file = next((tmp_path / "store" / "spectrum").glob("*c_fc*"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    factors = load_factors(tmp_path / "store")
    with pytest.raises(StoreError, match="is damaged"):
        factors.solve(random_gradients(factors))
    unverified = load_factors(tmp_path / "store", verify=False)
    assert unverified.solve(random_gradients(unverified))


def test_a_missing_file_is_found_at_once(tmp_path):
    fitted("gpt2", output=tmp_path / "store")
    next((tmp_path / "store" / "eigenbasis").glob("*c_fc.output*")).unlink()
    with pytest.raises(StoreError, match="is missing"):
        load_factors(tmp_path / "store")


def test_the_covariance_is_not_needed_to_solve(tmp_path):
    fitted("gpt2", output=tmp_path / "store", keep_covariance=False)
    assert load_factors(tmp_path / "store").solve(
        random_gradients(load_factors(tmp_path / "store"))
    )
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert not any(file.startswith("covariance") for file in manifest["files"])


def test_what_dense_E_says_is_what_apply_does():
    _, _, factors = fitted("opt")
    name = next(iter(factors.modules))
    gradient = random_gradients(factors)[name]
    expected = (dense_E(factors, name) @ gradient.flatten(1).T).T.view_as(gradient)
    assert relative(factors.apply({name: gradient})[name], expected) < 1e-10


def hashes(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
