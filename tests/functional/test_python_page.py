"""The examples of docs/python.md, run as they stand there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import networks
from helpers.families import tiny_model
from helpers.task_models import bert, classified_examples, masked_examples, t5, translated_examples
from transformers import BertForSequenceClassification

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def examples(heading="A model of your own"):
    page = PAGE.read_text(encoding="utf-8")
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [part.partition("\n```")[0] for part in section.split("```python\n")[1:]]


@pytest.mark.parametrize("number", [0, 1])
def test_the_examples_run(number):
    assert len(examples()) == 2
    torch.manual_seed(0)
    found = {}
    exec(examples()[number], found)
    step, gradient = found["step"], found.get("gradient", found.get("params"))
    if isinstance(step, tuple):
        assert [s.shape for s in step] == [g.shape for g in gradient]
        step = torch.cat([part.flatten() for part in step])
    else:
        assert step.shape == gradient.shape
    assert torch.isfinite(step).all()
    assert step.any()


def test_the_examples_of_tasks_run():
    (ready,), (own,) = examples("Other tasks"), examples("A task of your own")
    measured = [
        {"input_ids": np.arange(1, 4 + k), "attention_mask": np.ones(3 + k), "labels": 0.5 * k}
        for k in range(4)
    ]
    found = {
        "bert": bert(),
        "masked": masked_examples(4),
        "classifier": bert(BertForSequenceClassification),
        "classified": classified_examples(4),
        "t5": t5(),
        "pairs": translated_examples(4),
        "regressor": bert(BertForSequenceClassification, num_labels=1),
        "measured": measured,
    }
    exec(ready, found)
    assert found["factors"].manifest["fisher"]["task"] == "Seq2SeqLM"
    exec(own, found)


def test_the_example_of_the_whole_api_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = examples("Fit, load, solve, score")
    model = tiny_model("GPT2LMHeadModel")
    data = networks.examples(100)
    found = {"model": model, "examples": data, "queries": data[:2], "gradients": {}}
    fitting, solving = example.split("step = ")
    exec(fitting, found)
    name, module = next(iter(found["factors"].modules.items()))
    found["gradients"] = {name: torch.randn(module.num_outputs, module.input_size)}
    exec(f"step = {solving}", found)
    assert found["step"][name].shape == found["gradients"][name].shape
    assert found["answer"].scores.shape == found["answer"].shares.shape == (2, 100)


def test_a_store_is_read_and_solved_with_safetensors_alone(tmp_path, monkeypatch):
    from ekfac_dist import estimate_factors

    monkeypatch.chdir(tmp_path)
    model = tiny_model("GPT2LMHeadModel").float()
    factors = estimate_factors(model, networks.examples(6), output="runs/gpt2")
    page = PAGE.with_name("store.md").read_text(encoding="utf-8")
    found = {}
    exec(page.partition("```python\n")[2].partition("\n```")[0], found)
    gradient = torch.randn(found["lambda_OI"].shape)
    expected = factors.solve({found["name"]: gradient}, damping=0.5, relative=False)[found["name"]]
    torch.testing.assert_close(found["solve"](gradient, 0.5), expected, rtol=1e-4, atol=1e-5)
