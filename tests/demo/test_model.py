import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ekfac_dist.demo import model as demo_model
from ekfac_dist.demo.model import ModelShape, train_model, train_tokenizer
from ekfac_dist.errors import ConfigError, DataError, OutputError

TINY = ModelShape(hidden=32, mlp=48, layers=2, heads=2, context=32)
TEXTS = [f"def function_{n}(value):\n    return value + {n}  # adds {n}\n" for n in range(200)]
HELD_OUT = [text.replace("function", "method") for text in TEXTS[::5]]
ODD_TEXTS = ["def f(x):\n    return x  # é 漢字 🎉\n", "  two  spaces ", "", "\x00\t"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


def train(directory, tokenizer, **changes):
    arguments = {"shape": TINY, "seconds": None, "max_steps": 60, "show_progress": False}
    return train_model(directory, tokenizer, TEXTS, HELD_OUT, **{**arguments, **changes})


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "model"
    return directory, train(directory, tokenizer)


def test_every_text_begins_with_bos_and_comes_back_whole(tokenizer):
    for text in ODD_TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text


def test_offsets_say_where_a_token_stands_in_its_text(tokenizer):
    text = "def f(value):\n    return value"
    encoded = tokenizer(text, return_offsets_mapping=True)
    tokens = [tokenizer.decode([one]) for one in encoded["input_ids"][1:]]
    assert tokens == [text[start:end] for start, end in encoded["offset_mapping"][1:]]


def test_special_tokens_are_three_different_ones(tokenizer):
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(ids) == 3
    assert len(tokenizer) == 300


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="259 or more"):
        train_tokenizer(TEXTS, vocab_size=258)


def test_loss_falls(trained):
    _, training = trained
    assert training.steps == 60
    assert training.loss_to < training.loss_from - 0.5


def test_tokenizer_and_model_come_back_from_their_directory(tokenizer, trained):
    directory, _ = trained
    loaded = AutoTokenizer.from_pretrained(directory)
    assert loaded(ODD_TEXTS)["input_ids"] == tokenizer(ODD_TEXTS)["input_ids"]
    assert loaded.pad_token_id == tokenizer.pad_token_id
    padded = loaded(["a", "return value"], padding=True)
    assert padded["attention_mask"][0][-1] == 0
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(loaded)
    assert model.config.model_type == "llama"


def test_weights_are_safetensors_only(trained):
    directory, _ = trained
    names = {path.name for path in directory.iterdir()}
    assert "model.safetensors" in names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)


def test_the_same_steps_give_the_same_weights_and_leave_the_callers_random_state(
    tokenizer, trained, tmp_path
):
    directory, _ = trained
    state = torch.get_rng_state()
    train(tmp_path / "again", tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    first = load_file(directory / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_time_budget_ends_training_before_the_step_cap(tokenizer, tmp_path):
    training = train(tmp_path / "model", tokenizer, seconds=0.5, max_steps=10**6)
    assert training.steps < 10**6
    assert training.seconds < 5


def test_training_that_fails_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no luck")

    monkeypatch.setattr(demo_model, "_train", fail)
    with pytest.raises(RuntimeError, match="no luck"):
        train(tmp_path / "model", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_training_leaves_no_model_and_the_next_one_clears_up(tokenizer, tmp_path):
    program = textwrap.dedent(
        """
        import sys
        from test_model import TEXTS, train, train_tokenizer
        train(sys.argv[1], train_tokenizer(TEXTS, vocab_size=300), max_steps=10**6)
        """
    )
    directory = tmp_path / "model"
    # Its own folder is where `python -c` looks first.
    here = os.path.dirname(__file__)
    child = subprocess.Popen([sys.executable, "-c", program, str(directory)], cwd=here)
    try:
        deadline = time.monotonic() + 60
        while not any(tmp_path.iterdir()):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()
    assert not directory.exists()
    train(directory, tokenizer, max_steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_directory_is_refused_before_any_work(tokenizer, tmp_path):
    with pytest.raises(OutputError, match="exists"):
        train(tmp_path, tokenizer)


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        train(tmp_path / "file" / "model", tokenizer)


@pytest.mark.parametrize(("texts", "held_out"), [([], HELD_OUT), (TEXTS, []), (["a"], HELD_OUT)])
def test_too_little_text_is_an_error(tokenizer, tmp_path, texts, held_out):
    with pytest.raises(DataError, match="give more text"):
        train_model(tmp_path / "model", tokenizer, texts, held_out, shape=TINY, max_steps=1)


def test_no_steps_is_an_error(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="max_steps is 0"):
        train(tmp_path / "model", tokenizer, max_steps=0)
