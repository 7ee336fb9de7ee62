"""Models that are not as they seem: seen for what they are, or refused with the true reason."""

import pytest
import torch
import transformers
from helpers.dense import dense_modules, relative
from helpers.families import tiny_model
from helpers.networks import build, examples, shifted
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ekfac_dist import estimate_factors, load_factors
from ekfac_dist.config import ModelConfig
from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.load.pretrained import load_model

FIT = {"labels": "data", "accumulate": "float64", "batch_tokens": 24}
EXACT = 1e-10


def compare_with_dense(model, data, **options):
    factors = estimate_factors(model, data, **(FIT | options))
    oracle = dense_modules(model, [shifted(e) for e in data], list(factors.modules))
    for name, dense in oracle.items():
        fitted = factors.module(name)
        Q = torch.kron(fitted.basis_OO, fitted.basis_II)
        assert relative(fitted.lambda_OI.flatten(), torch.diag(Q.T @ dense.F @ Q)) < EXACT
    return factors


@pytest.mark.parametrize("change", [lambda o: 2 * o, torch.relu])
def test_a_callers_own_hook_changes_the_output_after_it_was_looked_at(change):
    model = build("gpt2")
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, args, o: change(o))
    compare_with_dense(model, examples(6))


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def test_a_linear_map_that_computes_something_else_is_refused():
    model = build("llama")
    plain = model.model.layers[1].mlp.up_proj
    other = Scaled(plain.in_features, plain.out_features, bias=False).double()
    other.weight = plain.weight
    model.model.layers[1].mlp.up_proj = other
    with pytest.raises(ModelError, match=r"1\.mlp\.up_proj does not compute its weight's product"):
        estimate_factors(model, examples(3))
    left = estimate_factors(model, examples(3), modules=["*.gate_proj", "*.down_proj"])
    assert len(left.modules) == 4


@pytest.mark.parametrize(
    ("family", "noise"),
    [
        ("MixtralForCausalLM", {"router_jitter_noise": 0.3}),
        ("BartForCausalLM", {"decoder_layerdrop": 0.5, "dropout": 0.0, "activation_dropout": 0.0}),
    ],
)
def test_gradient_checkpointing_in_training_mode_lets_no_noise_in(family, noise):
    model, data = tiny_model(family, **noise), examples(6)
    quiet = estimate_factors(model, data, **FIT)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    noisy = estimate_factors(model, data, **FIT)
    assert list(quiet.modules) == list(noisy.modules)
    for name in quiet.modules:
        assert relative(noisy.module(name).lambda_OI, quiet.module(name).lambda_OI) < 1e-12
    assert all(module.training for module in model.modules())


class PositionsFirst(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        rows = x.transpose(0, 1).reshape(-1, x.shape[-1])
        return self.inner(rows).view(x.shape[1], x.shape[0], -1).transpose(0, 1)


@pytest.mark.parametrize("requires", [False, True])
def test_rows_that_are_not_sequence_by_sequence_are_refused(requires):
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp = PositionsFirst(layer.mlp)
    if requires:
        model.enable_input_require_grads()
    with pytest.raises(ModelError, match="does not compute sequence by sequence"):
        estimate_factors(model, examples(4))


class Block(nn.Module):
    """A Llama layer whose MLP bears any name, and maps that are called in any order."""

    def __init__(self, layer, name):
        super().__init__()
        self.self_attn, self.norm_1 = layer.self_attn, layer.input_layernorm
        self.norm_2, self.name = layer.post_attention_layernorm, name
        mlp = nn.Module()
        mlp.up, mlp.down, mlp.gate = layer.mlp.up_proj, layer.mlp.down_proj, layer.mlp.gate_proj
        self.add_module(name, mlp)
        mlp.forward = lambda x: mlp.down(nn.functional.silu(mlp.gate(x)) * mlp.up(x))

    def forward(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.norm_1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + getattr(self, self.name)(self.norm_2(hidden_states))


def renamed(name):
    model = build("llama")
    model.model.layers[1] = Block(model.model.layers[1], name)
    return model


@pytest.mark.parametrize("name", ["attention_mlp", "switch_mlp", "token_mixer", "swiglu"])
def test_an_mlp_of_any_name_is_one_and_its_maps_may_be_called_in_any_order(name):
    factors = compare_with_dense(renamed(name), examples(6))
    assert len(factors.modules) == 6
    gate = factors.modules[f"model.layers.1.{name}.gate"]
    assert gate.input == f"model.layers.1.{name}.up.input"  # the first in the model's order


def test_what_a_name_says_is_a_norms_is_told_of():
    coverage = estimate_factors(renamed("norm_mlp"), examples(3)).manifest["coverage"]
    assert set(coverage["skipped"].values()) == {"taken for part of a norm, by its name"}
    assert len(coverage["skipped"]) == 3


def test_a_gate_beside_a_convolution_of_as_many_channels_is_no_router():
    model = renamed("mlp")
    model.model.layers[1].short = nn.Conv1d(14, 14, 3, groups=14).double()
    assert "model.layers.1.mlp.gate" in estimate_factors(model, examples(3)).modules


@pytest.mark.parametrize("sizes", [{"n_positions": 4}, {"n_positions": 2}, {"vocab_size": 3}])
def test_the_smallest_contexts_and_vocabularies_are_traced(sizes):
    settings = {"vocab_size": 29, "n_positions": 32, "n_embd": 12, "n_layer": 1, "n_head": 2}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**(settings | sizes | {"bos_token_id": 0, "eos_token_id": 1}))
    model = transformers.GPT2LMHeadModel(config).double().eval()
    data = [{"input_ids": ids, "labels": ids} for ids in torch.tensor([[1, 2], [2, 0]])]
    assert len(compare_with_dense(model, data).modules) == 2


def test_a_weight_that_is_computed_is_refused():
    model = build("llama")
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    with pytest.raises(ModelError, match=r"0\.mlp\.up_proj has a parametrization"):
        estimate_factors(model, examples(3))
    factors = estimate_factors(model, examples(3), modules=["*.gate_proj", "*.down_proj"])
    skipped = factors.manifest["coverage"]["skipped"]
    assert skipped["model.layers.1.mlp.up_proj.weight"] == "not chosen by model.modules"


def test_a_model_that_changes_its_weights_as_it_runs_is_refused():
    model = tiny_model("RwkvForCausalLM", rescale_every=1)
    with pytest.raises(ModelError, match=r"changes its weight rwkv\.blocks\.1.*rescale_every: 0"):
        estimate_factors(model, examples(3))


def test_rwkv_is_loaded_as_a_model_that_does_not(tmp_path):
    tiny_model("RwkvForCausalLM", rescale_every=1).save_pretrained(tmp_path / "model")
    config = ModelConfig(name=str(tmp_path / "model"), dtype="float64")

    def load():
        return load_model(config, torch.device("cpu"))

    estimate_factors(load(), examples(4), output=tmp_path / "factors")
    load_factors(tmp_path / "factors", model=load())


def test_a_model_compiled_in_place_is_looked_at_as_it_is():
    model = tiny_model("MixtralForCausalLM")
    model.set_experts_implementation("eager")
    data = examples(3)
    plain = estimate_factors(model, data, **FIT)
    model.compile(backend="eager")
    with torch.no_grad():
        model(input_ids=torch.arange(10).view(2, 5))
    compiled = estimate_factors(model, data, **FIT)
    assert list(compiled.modules) == list(plain.modules)
    for name in plain.modules:
        assert relative(compiled.module(name).lambda_OI, plain.module(name).lambda_OI) < 1e-9


def test_a_model_of_which_a_worker_holds_a_part_is_refused(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = build("llama")
        fully_shard(model.model.layers[0], mesh=init_device_mesh("cpu", (1,)))  # and not the rest
        with (
            pytest.raises(ModelError, match="otherwise than by FSDP2 of the whole model"),
            prepared(model),
        ):
            pass
    finally:
        torch.distributed.destroy_process_group()
