"""bergson's scores of an evaluation: what both sides are given; and, slowly, that they agree."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluation_scores import Stages, agreement, by_group, copy_model, read_config, rows_of
from helpers.workshop import save_tiny_gpt2, save_tiny_llama, texts, write_jsonl, write_yaml
from peer_sides import HERE, MAX_TOKENS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ekfac_dist.evaluate.inputs import read_inputs
from ekfac_dist.runtime.processes import World

ENVIRONMENTS = Path(os.environ.get("PEER_ENVIRONMENTS", HERE.parents[2] / "runs" / "peers"))
needs_bergson = pytest.mark.skipif(
    not (ENVIRONMENTS / "bergson" / "bin" / "python").exists(),
    reason=f"no environment of bergson in {ENVIRONMENTS}; evaluation_scores.py makes it",
)
TEXTS = texts(12, words=(3, 9))


@pytest.fixture
def evaluation(tmp_path):
    """The configuration of an evaluation whose model is there."""
    model = tmp_path / "evaluation" / "seed-3" / "model"
    save_tiny_llama(model, mlp_bias=True)
    write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    queries = [{"prompt": text[:8], "completion": text[8:]} for text in TEXTS[:4]]
    write_jsonl(tmp_path / "queries.jsonl", queries)
    config = {
        "model": {"name": model},
        "data": {"source": tmp_path / "text.jsonl", "max_tokens": 12},
        "queries": tmp_path / "queries.jsonl",
        "seeds": [3],
        "output": tmp_path / "evaluation",
    }
    return write_yaml(tmp_path / "evaluate.yaml", config)


def test_both_get_the_tokens_and_labels_of_the_evaluation(evaluation):
    inputs = read_inputs(read_config(str(evaluation)), World.start())
    train, queries = rows_of(inputs.sequences), rows_of(inputs.query_sequences)
    tokenizer = AutoTokenizer.from_pretrained(evaluation.parent / "evaluation/seed-3/model")
    for text, row in zip(TEXTS, train, strict=True):
        ids = tokenizer(text)["input_ids"][:12]
        assert row["input_ids"].tolist() == ids
        assert row["labels"].tolist() == [-100, *ids[1:]]
    for text, row in zip(TEXTS, queries, strict=False):
        encoded = tokenizer(text, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        wanted = [
            token if k and start >= 8 else -100 for k, (token, (start, _)) in enumerate(pairs)
        ]
        assert row["input_ids"].tolist() == encoded["input_ids"]
        assert row["labels"].tolist() == wanted
        assert -100 in wanted[1:]


def test_only_a_model_with_rotary_positions_is_said_to_read_more(tmp_path):
    ids = torch.arange(5, 15)[None]
    for save, reads_more in ((save_tiny_llama, True), (save_tiny_gpt2, False)):
        source = tmp_path / save.__name__
        save(source)
        copy_model(source, tmp_path / f"{save.__name__}-copy")
        one = AutoModelForCausalLM.from_pretrained(source)
        copy = AutoModelForCausalLM.from_pretrained(tmp_path / f"{save.__name__}-copy")
        assert (copy.config.max_position_embeddings == MAX_TOKENS) is reads_more
        assert torch.equal(one(ids).logits, copy(ids).logits)


def test_agreement_is_by_query_over_sequences():
    ours = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    theirs = torch.tensor([[2.0, 4.0, 6.0, 8.0], [8.0, 6.0, 4.0, 2.0]])
    found = agreement(theirs, ours)
    assert found["mean"] == pytest.approx(0)
    assert found["least"] == pytest.approx(-1)
    # Σ theirs · ours = 60 + 40, Σ ours² = 60.
    assert found["slope"] == pytest.approx(100 / 60)
    assert agreement(2 * ours, ours)["error"] == pytest.approx(1)


def test_a_query_group_has_the_sum_of_its_queries():
    scores = torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]])
    assert by_group(scores, ((0, 2), (1,))).tolist() == [[8.0, 13.0], [3.0, 5.0]]


def test_a_stage_runs_again_when_it_or_what_it_stands_on_has_changed(tmp_path, monkeypatch):
    ran = []

    def run(words, settings, log):
        ran.append(words)
        return {"seconds": 1.0}

    monkeypatch.setattr("evaluation_scores.run", run)
    args = SimpleNamespace(environments=None, threads=1, batch_tokens=8)

    def both(fit_word, score_word):
        ran.clear()
        stages = Stages(args, tmp_path)
        stages("fit", [fit_word], after=())
        stages("score", [score_word], after=["fit"])
        return [words[0] for words in ran]

    assert both("a", "b") == ["a", "b"]
    assert both("a", "b") == []
    assert both("a", "c") == ["c"]
    assert both("d", "c") == ["d", "c"]


@pytest.mark.slow
@needs_bergson
def test_scores_agree_with_bergson(evaluation, tmp_path):
    command = [sys.executable, HERE / "evaluation_scores.py", evaluation, tmp_path / "out"]
    command += ["--environments", ENVIRONMENTS, "--labels", "data", "--dampings", "0.1"]
    command += ["--cg_dampings", "1", "--documents", "5", "--iterations", "2"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "seed-3.json").read_text())
    assert found["agreement"]["ekfac-0.1"]["least"] > 0.9999
    assert found["agreement"]["ekfac-0.1"]["error"] < 1e-4
    assert found["agreement"]["ekfac-0.1"]["slope"] == pytest.approx(1, abs=1e-4)
    ekfac, cg = (
        load_file(tmp_path / "out" / f"{row}-3.safetensors")["scores"]
        for row in ("ekfac-0.1", "cg-1")
    )
    assert ekfac.shape == cg.shape == (4, len(TEXTS))
    assert f"{tmp_path}/out/cg-1-{{seed}}.safetensors" in done.stdout
