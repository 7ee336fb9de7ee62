"""What the README says of other tasks and of a model of one's own, run as it stands there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.task_models import bert, classified_examples, masked_examples, t5, translated_examples
from transformers import BertForSequenceClassification

README = Path(__file__).parents[2] / "README.md"


def examples(heading="A model of your own"):
    section = README.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
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
    ready, own = examples("Other tasks")
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
