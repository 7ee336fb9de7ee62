"""A GGUF file's weights are those that the package `gguf` dequantises, and a model as any other."""

import json

import numpy as np
import pytest
import torch
from helpers.gguf_files import F16, Q4_1, Q8_0, dequantised, save_tiny_gguf
from helpers.networks import examples
from helpers.workshop import run_here, save_tiny_llama, texts, tiny_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from ekfac_dist import estimate_factors, load_factors
from ekfac_dist.config import ModelConfig, PlanConfig
from ekfac_dist.errors import ConfigError, ModelError
from ekfac_dist.fit.plan import make_plan
from ekfac_dist.models.load import gguf_file
from ekfac_dist.models.load.pretrained import load_model, load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny GGUF file, with nothing beside it."""
    return save_tiny_gguf(tmp_path_factory.mktemp("gguf") / "model")


def configured(path, **fields):
    return ModelConfig(name=str(path.parent), gguf=path.name, **fields)


@pytest.mark.parametrize("kind", [Q8_0, Q4_1, F16], ids=lambda kind: kind.name)
def test_weights_are_bitwise_those_of_the_gguf_package(kind, tmp_path):
    path = save_tiny_gguf(tmp_path / "model", kind)
    expected = dequantised(path)
    model = load_model(configured(path), CPU)
    weights = model.state_dict()
    assert set(weights) == set(expected)
    for name, array in expected.items():
        assert weights[name].dtype == torch.float32
        assert np.array_equal(weights[name].numpy(), array), name


def test_weights_are_rounded_to_the_configured_dtype(saved):
    model = load_model(configured(saved, dtype="bfloat16"), CPU)
    for name, array in dequantised(saved).items():
        assert torch.equal(model.state_dict()[name], torch.tensor(array).bfloat16())
    assert load_model(configured(saved, dtype="auto"), CPU).dtype == torch.float32


def test_a_file_of_the_same_name_in_the_working_directory_is_not_read(saved, tmp_path, monkeypatch):
    (tmp_path / saved.name).write_bytes(b"another one")
    monkeypatch.chdir(tmp_path)
    assert load_model(configured(saved), CPU).dtype == torch.float32


def test_the_tokenizer_is_the_files_own_or_the_one_beside_it(saved, tmp_path):
    own, _ = load_tokenizer(configured(saved))
    text = texts(1)[0]
    assert own(text)["input_ids"] == tiny_tokenizer(bos=False)(text)["input_ids"]
    beside = tmp_path / saved.name
    beside.write_bytes(saved.read_bytes())
    tiny_tokenizer(eos=True).save_pretrained(tmp_path)
    found, _ = load_tokenizer(configured(beside))
    assert found(text)["input_ids"] == tiny_tokenizer(eos=True)(text)["input_ids"]


def test_it_is_saved_and_its_factors_recognised_as_of_plain_weights(saved, tmp_path):
    model = load_model(configured(saved), CPU)
    data = examples(4)
    estimate_factors(model, data, output=tmp_path / "factors")
    model.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    load_factors(tmp_path / "factors", model=plain)
    plain.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(Exception, match="weights differ"):
        load_factors(tmp_path / "factors", model=plain)


def test_a_fit_and_a_query_from_the_command_line(saved, tmp_path):
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts(6)])
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"prompt": "the", "completion": " worker"}])
    model = ["--model.name", saved.parent, "--model.gguf", saved.name]
    fit = ["estimate", *model, "--data.source", data, "--output", tmp_path / "factors"]
    done = run_here(fit)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "factors" / "manifest.json").read_text())
    assert manifest["config"]["model"]["gguf"] == saved.name
    ask = ["query", "--factors", tmp_path / "factors", "--queries", queries]
    done = run_here([*ask, "--output", tmp_path / "scores"])
    assert done.returncode == 0, done.stderr


def test_a_plan_reads_the_files_configuration(saved):
    planned = make_plan(PlanConfig(model=configured(saved), gflops=1))
    assert len(planned.groups) == 1


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:num_bytes])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: cut(path, -1), "was cut short. Copy or download"),
        (lambda path: cut(path, 3000), "ends, after 3000 bytes, before its table"),
        (lambda path: cut(path, 10), "ends, after 10 bytes"),
        (lambda path: path.write_bytes(b""), "no GGUF file.*empty"),
        (lambda path: path.write_bytes(b"PK" * 1000), "no GGUF file.*does not begin with GGUF"),
        (lambda path: path.write_bytes(b"GGUF\7\0\0\0" + bytes(16)), "its version is 7"),
        (lambda path: path.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 64), "before its table"),
        (lambda path: path.unlink(), "no file tiny.gguf in .*; it holds no .gguf file"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_in_a_sentence(saved, tmp_path, spoil, sentence):
    path = tmp_path / saved.name
    path.write_bytes(saved.read_bytes())
    spoil(path)
    with pytest.raises(ModelError, match=sentence):
        load_model(configured(path), CPU)


def test_a_file_without_one_of_its_tensors_is_refused(tmp_path):
    path = save_tiny_gguf(tmp_path / "model", without="blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=r"lack 1 of its parameters.*layers\.1\.mlp\.up_proj"):
        load_model(configured(path), CPU)


def test_without_the_package_gguf_the_sentence_says_how_to_install_it(saved, monkeypatch):
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'ekfac_dist\[gguf\]'"):
        load_model(configured(saved), CPU)


def test_what_it_is_called_without_the_field_says_the_field(saved):
    with pytest.raises(ModelError, match=r"give the directory.*model\.gguf: tiny\.gguf"):
        load_model(ModelConfig(name=str(saved)), CPU)
    with pytest.raises(ModelError, match=r"set model\.gguf to tiny\.gguf"):
        load_model(ModelConfig(name=str(saved.parent)), CPU)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"gguf": "weights.bin"}, "name of a .gguf file"),
        ({"gguf": "/tmp/a.gguf"}, "its directory as model.name"),
        ({"gguf": "../a.gguf"}, "its directory as model.name"),
        ({"gguf": "a.gguf", "quantization": "4bit"}, "Give one of the two"),
    ],
)
def test_impossible_settings_are_refused(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ModelConfig(name="model", **fields)


def test_a_plain_model_beside_it_is_loaded_as_ever(saved, tmp_path):
    directory = save_tiny_llama(tmp_path / "plain")
    (directory / saved.name).write_bytes(saved.read_bytes())
    plain = load_model(ModelConfig(name=str(directory)), CPU)
    assert plain.config.hidden_size != load_model(configured(saved), CPU).config.hidden_size
    assert AutoTokenizer.from_pretrained(directory)
