"""What runs hold at their most: as planned, and no more for more data. They take minutes.

bash launch/test.sh -m slow -k peak_memory -s        prints what was planned and what was found
"""

import re
from pathlib import Path

import pytest
import transformers
from helpers.workshop import VOCABULARY, run_cli, save_tiny, texts, write_jsonl

pytestmark = pytest.mark.slow

COMMON = {"max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "Llama": lambda: transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=12,
        **COMMON,
    ),
    "GPT-2": lambda: transformers.GPT2Config(
        vocab_size=8192, n_embd=1024, n_layer=4, n_head=16, n_positions=512
    ),
    "Qwen 2": lambda: transformers.Qwen2Config(
        vocab_size=32000,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=3,
        num_attention_heads=14,
        num_key_value_heads=2,
        **COMMON,
    ),
}
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def in_bytes(said: str) -> float:
    number, unit = said.split()
    return float(number) * UNITS[unit]


def arguments(folder: Path, command: str, *more: str) -> list[str | Path]:
    common = ["--model.name", folder / "model", "--data.source", folder / "text.jsonl"]
    return [command, *common, "--output", folder / "store", "--data.max_tokens", "256", *more]


def peak(folder: Path, number: int, *more: str) -> float:
    long = [" ".join(texts(12, seed=k, words=(20, 24))) for k in range(number)]
    write_jsonl(folder / "text.jsonl", [{"text": text} for text in long])
    env = {"OMP_NUM_THREADS": "2"}
    done = run_cli(arguments(folder, "estimate", "--overwrite", *more), timeout=900, env=env)
    assert done.returncode == 0, done.stderr
    found = re.search(r"peak memory +([\d.]+ \wB) \(host\)", done.stdout)
    assert found is not None, done.stdout
    return in_bytes(found[1])


@pytest.mark.parametrize("name", MODELS)
def test_peak_memory_is_as_planned(name: str, tmp_path: Path):
    save_tiny(tmp_path / "model", MODELS[name]())
    found = peak(tmp_path, 24)
    planned = run_cli(arguments(tmp_path, "plan", "--gflops", "100"), env={"OMP_NUM_THREADS": "2"})
    assert planned.returncode == 0, planned.stderr
    said = re.search(r"a worker needs ([\d.]+ \wB)", planned.stdout)
    assert said is not None, planned.stdout
    print(f"\n{name}: planned {said[1]}, found {found / 1e9:.2f} GB")
    assert in_bytes(said[1]) == pytest.approx(found, rel=0.15)


def test_peak_memory_does_not_grow_with_the_data(tmp_path: Path):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        **COMMON,
    )
    save_tiny(tmp_path / "model", config)
    few, many = (peak(tmp_path, n, "--batch_tokens", "512") for n in (40, 400))
    print(f"\n40 sequences {few / 1e6:.0f} MB, 400 sequences {many / 1e6:.0f} MB")
    assert many < 1.05 * few
