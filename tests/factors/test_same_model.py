"""A model is compared with the one that factors were fitted for, outside tracked modules too."""

import shutil
import warnings

import accelerate
import peft
import pytest
import torch
import transformers
from helpers.networks import build, examples
from helpers.workshop import rewrite_manifest
from torch import nn
from transformers import AutoModelForCausalLM

from ekfac_dist import estimate_factors, influence_scores, load_factors
from ekfac_dist.errors import StoreError
from ekfac_dist.models.find.discovery import discover
from ekfac_dist.models.load.configuration import configuration
from ekfac_dist.models.load.fingerprints import fingerprints

DATA = examples(4)
LATER = ("whole", "untracked", "configuration")


def fitted(model, path, data=DATA):
    estimate_factors(model, data, output=path, batch_tokens=40)
    return path


def with_settings(model, **changes):
    """A model of the same weights whose configuration has other values of some fields."""
    config = type(model.config).from_dict({**model.config.to_dict(), **changes})
    other = AutoModelForCausalLM.from_config(config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Factors of a model of each family, by its name."""
    root = tmp_path_factory.mktemp("same-model")
    return {name: fitted(build(name), root / name) for name in ("llama", "gemma2")}


CHANGED = ("model.embed_tokens", "model.layers.1.self_attn.o_proj", "model.norm", "lm_head")


@pytest.mark.parametrize("name", CHANGED)
def test_other_weights_anywhere_are_refused_by_name_or_told_where_they_are_meant(stores, name):
    model, store = build("llama"), stores["llama"]
    with torch.no_grad():
        model.get_submodule(name).weight[0] += 0.1
    says = rf"differs from it outside the tracked.* 1 of 15 weights .*: {name}\.weight\..*allow_ch"
    with pytest.raises(StoreError, match=says):
        load_factors(store, model=model)
    with pytest.warns(UserWarning, match=rf"other numbers .*: {name}\.weight\.") as warned:
        load_factors(store, model=model, allow_changes=True)
    assert warned[0].filename == __file__


def test_scores_of_a_model_that_differs_are_refused_or_tell_of_it(stores):
    model, factors = build("llama"), load_factors(stores["llama"])
    with torch.no_grad():
        model.lm_head.weight[0] += 0.1
    with pytest.raises(StoreError, match=r"lm_head\.weight\..*allow_changes"):
        influence_scores(model, factors, DATA[:1], DATA, top_k=1)
    with pytest.warns(UserWarning, match="other numbers") as warned:
        scores = influence_scores(model, factors, DATA[:1], DATA, top_k=1, allow_changes=True)
    assert warned[0].filename == __file__
    assert len(scores.model_differs) == 1
    assert "lm_head.weight" in scores.model_differs[0]
    assert scores.not_compared == ()


def test_the_fitted_model_differs_in_nothing(stores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = influence_scores(build("llama"), stores["llama"], DATA[:1], DATA, top_k=1)
    assert scores.model_differs == scores.not_compared == ()


def test_tracked_weights_that_differ_are_never_allowed(stores):
    with pytest.raises(StoreError, match="weights differ"):
        load_factors(stores["llama"], model=build("llama", seed=1), allow_changes=True)


@pytest.mark.parametrize(
    ("field", "changes", "values"),
    [
        ("final_logit_softcapping", {"final_logit_softcapping": 9.0}, ("9.0", "30.0")),
        ("attn_logit_softcapping", {"attn_logit_softcapping": None}, ("None", "50.0")),
        ("hidden_activation", {"hidden_activation": "relu"}, ("'relu'", "'gelu_pytorch_tanh'")),
        ("rms_norm_eps", {"rms_norm_eps": 1e-3}, ("0.001", "1e-06")),
        ("sliding_window", {"sliding_window": 4}, ("4", "4096")),
        (
            "rope_parameters.rope_theta",
            {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
            ("500.0", "10000.0"),
        ),
    ],
)
def test_another_configuration_is_refused_by_its_field_with_both_values(
    stores, field, changes, values
):
    model = with_settings(build("gemma2"), **changes)
    says = rf"{field} in its configuration is {values[0]}; the factors were fitted with {values[1]}"
    with pytest.raises(StoreError, match=says):
        load_factors(stores["gemma2"], model=model)
    with pytest.warns(UserWarning, match=says):
        load_factors(stores["gemma2"], model=model, allow_changes=True)


def test_what_changes_no_number_is_no_difference(stores):
    changes = {"use_cache": False, "_name_or_path": "elsewhere", "id2label": {0: "no", 1: "yes"}}
    changes |= {"eos_token_id": 5, "attention_dropout": 0.3, "architectures": ["X"]}
    model = with_settings(build("llama"), **changes)
    model.set_attn_implementation("eager")
    assert load_factors(stores["llama"], model=model)


def test_another_class_is_refused(stores):
    class Other(transformers.LlamaForCausalLM):
        pass

    model = build("llama")
    model.__class__ = Other
    with pytest.raises(StoreError, match=r"class is Other; .* fitted with LlamaForCausalLM"):
        load_factors(stores["llama"], model=model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_weights_are_found_in_another_dtype_too(stores, dtype):
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[0] += 0.1
    with pytest.raises(StoreError, match=r"lm_head\.weight"):
        load_factors(stores["llama"], model=model.to(dtype))


def test_weights_of_which_some_stay_wider_are_the_same_model(stores):
    """Some models keep a few weights in float32, whatever dtype they are loaded in."""
    model, norm = build("llama").bfloat16(), build("llama").model.norm.float()
    model.model.norm = norm
    assert load_factors(stores["llama"], model=model)
    with torch.no_grad():
        norm.weight[0] += 1e-5
    with pytest.raises(StoreError, match=r"model\.norm\.weight\."):
        load_factors(stores["llama"], model=model)


def test_a_forward_with_long_rope_leaves_the_model_what_it_was(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8}
    rope |= {"short_factor": [1.0] * 3, "long_factor": [4.0] * 3, "factor": 4.0}
    config = transformers.Phi3Config.from_dict(
        {**build("phi3").config.to_dict(), "rope_parameters": rope}
    )
    config.original_max_position_embeddings = 8
    model = AutoModelForCausalLM.from_config(config).double().eval()
    store = fitted(model, tmp_path / "store", examples(4, longest=6))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(input_ids=torch.ones(1, 20, dtype=torch.int64))
    assert any(not torch.equal(buffers[name], b) for name, b in model.named_buffers())
    assert load_factors(store, model=model)


def test_weights_that_are_tied_or_only_equal_are_the_same(tmp_path):
    model = build("gpt2")
    store = fitted(model, tmp_path / "store")
    assert model.lm_head.weight is model.transformer.wte.weight
    model.lm_head.weight = nn.Parameter(model.transformer.wte.weight.detach().clone())
    assert load_factors(store, model=model)
    with torch.no_grad():
        model.lm_head.weight[0] += 0.1
    with pytest.raises(StoreError, match=r"1 of \d+ weights .*: lm_head\.weight\."):
        load_factors(store, model=model)


def test_the_scale_of_an_adapter_outside_the_mlp_counts(tmp_path):
    targets = ["up_proj", "q_proj"]
    settings = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), settings).double().eval()
    store = fitted(model, tmp_path / "store")
    assert load_factors(store, model=model)
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    with pytest.raises(StoreError, match=r"layers\.0\.self_attn\.q_proj\.scaling\."):
        load_factors(store, model=model)


def test_a_buffer_that_is_saved_counts(tmp_path):
    model = build("llama")
    model.model.register_buffer("scale", torch.ones(2))
    store = fitted(model, tmp_path / "store")
    model.model.scale[0] = 2
    with pytest.raises(StoreError, match=r"other numbers .*: model\.scale\."):
        load_factors(store, model=model)
    del model.model.scale
    with pytest.raises(StoreError, match=r"lacks 1 weights of the fitted model: model\.scale\."):
        load_factors(store, model=model)


def test_buffers_that_are_kept_elsewhere_count_as_they_are(stores):
    models = [build("llama"), build("llama")]
    for model in models:
        model.model.register_buffer("scale", torch.arange(3.0))
    modules = discover(models[0], None, torch.device("cpu")).modules
    accelerate.cpu_offload(models[1], torch.device("cpu"), offload_buffers=True)
    assert models[1].model.scale.is_meta
    one, other = (fingerprints(model, modules) for model in models)
    assert one == other


def test_a_store_that_knows_the_tracked_weights_alone_opens_with_a_warning(stores, tmp_path):
    store = shutil.copytree(stores["llama"], tmp_path / "store")
    rewrite_manifest(store, lambda m: [m["model"].pop(name) for name in LATER])
    with pytest.warns(UserWarning, match="earlier version.*were not compared"):
        load_factors(store, model=build("llama"))
    with pytest.warns(UserWarning, match="earlier version"):
        scores = influence_scores(build("llama"), store, DATA[:1], DATA, top_k=1)
    assert len(scores.not_compared) == 1
    assert scores.model_differs == ()


def test_fields_of_another_version_of_transformers_are_told_and_not_refused(stores, tmp_path):
    store = shutil.copytree(stores["llama"], tmp_path / "store")
    rewrite_manifest(store, lambda m: m["model"]["configuration"].pop("mlp_bias"))
    with pytest.raises(StoreError, match=r"mlp_bias in its configuration is False; .* it absent"):
        load_factors(store, model=build("llama"))
    rewrite_manifest(store, lambda m: m["software"].update(transformers="5.0.0"))
    with pytest.warns(UserWarning, match=r"transformers 5\.0\.0, .*: mlp_bias\."):
        load_factors(store, model=build("llama"))


@pytest.mark.parametrize("field", LATER[1:])
def test_a_manifest_with_a_part_of_what_is_compared_is_refused(stores, tmp_path, field):
    store = shutil.copytree(stores["llama"], tmp_path / "store")
    rewrite_manifest(store, lambda m: m["model"].pop(field))
    with pytest.raises(StoreError, match=rf"damaged: its model has no whole {field}"):
        load_factors(store)


def test_the_whole_fingerprint_does_not_depend_on_what_is_tracked():
    model = build("llama")
    all_modules = discover(model, None, torch.device("cpu")).modules
    found = [fingerprints(model, modules).whole for modules in (all_modules, all_modules[:1])]
    assert found[0] == found[1]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert fingerprints(model, all_modules).whole != found[0]


def test_each_weight_is_read_once(monkeypatch):
    from ekfac_dist.models.load import fingerprints as fingerprint

    model, read, values = build("gpt2"), [], fingerprint.weight_values
    modules = discover(model, None, torch.device("cpu")).modules
    monkeypatch.setattr(
        fingerprint, "weight_values", lambda model, name: read.append(name) or values(model, name)
    )
    fingerprints(model, modules)
    assert sorted(read) == sorted(name for name, _ in model.named_parameters())


def test_numbers_that_json_lacks_can_stand_in_a_configuration():
    model = build("llama")
    model.config.limits, model.config.dtype_of_cache = (0.0, float("inf")), torch.float16
    found = configuration(model)
    assert found["limits"] == [0.0, "inf"]
    assert found["dtype_of_cache"] == "torch.float16"
    assert found["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
