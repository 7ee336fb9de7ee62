"""What the README says of a model of one's own, run as it stands there."""

from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"


def examples():
    section = README.read_text().partition("\n## A model of your own\n")[2].partition("\n## ")[0]
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
