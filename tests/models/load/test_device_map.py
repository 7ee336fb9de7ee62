"""A model spread over the devices that there are: the same factors, by one worker alone."""

from types import SimpleNamespace

import pytest
import torch
from helpers.long_runs import content
from helpers.workshop import run_cli, run_here, save_tiny_llama, texts, write_jsonl

from ekfac_dist import estimate_factors
from ekfac_dist.config import ModelConfig, QueryModelConfig
from ekfac_dist.errors import ConfigError
from ekfac_dist.models.load import pretrained
from ekfac_dist.models.load.pretrained import load_model


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("device-map")
    save_tiny_llama(root / "model")
    write_jsonl(root / "text.jsonl", [{"text": text} for text in texts(9)])
    return root


def arguments(root, output, *more):
    return [
        *("estimate", "--model.name", root / "model", "--data.source", root / "text.jsonl"),
        *("--output", output, *more),
    ]


def test_one_worker_fits_the_same_and_many_are_refused(setting, tmp_path):
    for name, more in (("whole", ()), ("spread", ("--model.device_map", "auto"))):
        done = run_here(arguments(setting, tmp_path / name, *more))
        assert done.returncode == 0, done.stderr
    stored = [content(tmp_path / name) for name in ("whole", "spread")]
    for one in stored:
        del one["manifest.json"]  # which names the way
    assert stored[0] == stored[1]
    more = ("--model.device_map", "auto")
    done = run_cli(arguments(setting, tmp_path / "two", *more), workers=2)
    assert done.returncode == 2
    assert done.stderr.count("model.device_map is auto and there are 2 workers") == 1


def test_a_way_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="device_map is 'everywhere'; it must be one of auto"):
        ModelConfig(name="x", device_map="everywhere")


def test_it_is_of_the_machine_and_not_of_the_factors():
    fitted = {"name": "x", "device_map": "auto", "dtype": "float32"}
    assert QueryModelConfig().over(fitted).device_map is None
    assert QueryModelConfig(device_map="balanced").over(fitted).device_map == "balanced"


@pytest.mark.gpu
def test_several_gpus_have_the_factors_of_one(setting):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    device, data = torch.device("cuda", 0), [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 3]}]
    alone, spread = (
        load_model(ModelConfig(name=str(setting / "model"), device_map=way), device)
        for way in (None, "balanced")
    )
    assert len({p.device for p in spread.parameters()}) > 1
    one, two = (estimate_factors(model, data, labels="data") for model in (alone, spread))
    for name in one.modules:
        assert torch.allclose(one.module(name).lambda_OI, two.module(name).lambda_OI, rtol=1e-4)


@pytest.mark.parametrize(
    ("device", "changes", "expected"),
    [
        ("cuda:1", {}, {"": "cuda:1"}),  # not whole into the host's memory first
        ("cpu", {}, None),
        ("cuda:0", {"device_map": "balanced"}, "balanced"),
        ("cuda:0", {"adapter": "lora"}, None),  # which is merged before it is moved
    ],
)
def test_weights_go_straight_to_a_gpu(device, changes, expected):
    config = ModelConfig(name="m", **changes)
    settings = SimpleNamespace(quantization_config=None)
    placement = pretrained._placement(config, settings, "auto", torch.device(device))
    assert placement.get("device_map") == expected
