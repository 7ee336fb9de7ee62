"""gpt-oss as published, its experts packed as MXFP4: weights are unpacked when they are loaded."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.networks import examples
from helpers.workshop import VOCABULARY, save_tiny
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig
from transformers.quantizers import quantizer_mxfp4

from ekfac_dist import estimate_factors
from ekfac_dist.config import ModelConfig
from ekfac_dist.models.load.pretrained import load_model, loads_quantised

CPU = torch.device("cpu")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
VALUES = torch.cat([E2M1, -E2M1])  # of the 16 codes


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny gpt-oss with packed experts, and the weights that they stand for, [E, I, O]."""
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = save_tiny(tmp_path_factory.mktemp("mxfp4") / "model", config, dtype=torch.bfloat16)
    stored = load_file(path / "model.safetensors")
    unpacked, draw = {}, torch.Generator().manual_seed(0)
    for name in [each for each in stored if each.endswith("_proj") and "experts" in each]:
        experts, inputs, outputs = stored.pop(name).shape
        shape = (experts, outputs, inputs // 32, 16)
        blocks = torch.randint(256, shape, dtype=torch.uint8, generator=draw)
        scales = torch.randint(118, 123, shape[:-1], dtype=torch.uint8, generator=draw)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        pairs = torch.stack([VALUES[(blocks & 15).long()], VALUES[(blocks >> 4).long()]], -1)
        values = pairs.flatten(-2) * 2.0 ** (scales.float() - 127)[..., None]
        unpacked[name] = values.flatten(-2).transpose(1, 2)
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (path / "config.json").write_text(json.dumps(settings))
    return path, unpacked


@pytest.fixture
def has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU that multiplies by packed weights."""
    for name in ("is_triton_available", "is_kernels_available"):
        monkeypatch.setattr(quantizer_mxfp4, name, lambda *_: True)
    gpu = SimpleNamespace(
        is_available=lambda: True,
        get_device_capability=lambda: (9, 0),
        empty_cache=lambda: None,
    )
    of_torch = SimpleNamespace(
        device=torch.device, cuda=gpu, xpu=SimpleNamespace(is_available=lambda: False)
    )
    monkeypatch.setattr(quantizer_mxfp4, "torch", of_torch)
    monkeypatch.setattr(quantizer_mxfp4, "get_current_accelerator", lambda: torch.device("cuda"))


@pytest.mark.usefixtures("has_kernels")
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_packed_experts_are_unpacked_even_where_kernels_could_use_them(published, dtype: str):
    path, unpacked = published
    model = load_model(ModelConfig(name=str(path), dtype=dtype), CPU)
    parameters = dict(model.named_parameters())
    wanted = torch.float32 if dtype == "float32" else torch.bfloat16
    assert {parameter.dtype for parameter in parameters.values()} == {wanted}
    assert len(unpacked) == 2
    for name, weight_EIO in unpacked.items():
        assert torch.equal(parameters[name].float(), weight_EIO)


@pytest.mark.usefixtures("has_kernels")
def test_it_is_fitted_as_any_model_of_experts(published):
    path, _ = published
    config = ModelConfig(name=str(path), dtype="float32")
    assert not loads_quantised(config, with_weights=True)
    factors = estimate_factors(load_model(config, CPU), examples(8), labels="data")
    assert all(module.lambda_OI.isfinite().all() for module in map(factors.module, factors.modules))
    coverage = factors.manifest["coverage"]
    assert coverage["tracked_parameters"] == coverage["mlp_parameters"] > 0
