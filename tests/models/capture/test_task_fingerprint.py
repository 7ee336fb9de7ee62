"""A task of a user's own is known again by its code and its attributes, however it is laid out."""

import importlib.util
import sys
import textwrap

import numpy as np
import pytest
import torch
from helpers.networks import build, examples

from ekfac_dist import CausalLM, MaskedLM, Task, estimate_factors, influence_scores, load_factors
from ekfac_dist.errors import StoreError
from ekfac_dist.models.capture.task_fingerprint import task_fingerprint

SOURCE = '''
from ekfac_dist import Task

class Scaled(Task):
    """The model's logits, scaled."""
    aligned = ("input_ids", "labels")

    def forward(self, model, batch):
        """Logits and labels."""
        logits = model(input_ids=batch["input_ids"]).logits  # unscaled
        return 2.0 * logits, batch["labels"]
'''
REFORMATTED = """
from ekfac_dist import Task


class Scaled(Task):
    # Other comments, another docstring, other lines and quotes.
    aligned = ('input_ids',
               'labels',)

    def forward(self, model, batch):
        logits = (model(
            input_ids=batch['input_ids'],
        ).logits)
        return 2.0 * logits, batch['labels']
"""


def made(folder, source, name="tasks_of_mine", **attributes):
    """A task of a module's source."""
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    task = module.Scaled()
    vars(task).update(attributes)
    return task


def test_layout_comments_and_docstrings_do_not_count(tmp_path):
    one, other = made(tmp_path, SOURCE, "one"), made(tmp_path, REFORMATTED, "other")
    assert task_fingerprint(one) == task_fingerprint(other)


@pytest.mark.parametrize(
    ("old", "new"), [("2.0 *", "3.0 *"), ('("input_ids", "labels")', '("input_ids",)')]
)
def test_code_counts(tmp_path, old, new):
    one, other = made(tmp_path, SOURCE, "one"), made(tmp_path, SOURCE.replace(old, new), "other")
    assert task_fingerprint(one) != task_fingerprint(other)


def test_code_of_base_classes_counts(tmp_path):
    based = SOURCE.replace("(Task)", "(Base)").replace(
        "class Scaled", "class Base(Task):\n    number = 1\n\nclass Scaled"
    )
    one = made(tmp_path, based, "one")
    other = made(tmp_path, based.replace("number = 1", "number = 2"), "other")
    assert task_fingerprint(one) != task_fingerprint(other)


VALUES = [1, 1.5, "a", None, [1, 2], [2, 1], (1, 2), {"a": 1}, {"a": 2}, {1, 2}, True]
VALUES += [torch.ones(3), torch.zeros(3), torch.ones(3, dtype=torch.float64), np.ones(3)]
VALUES += [np.zeros(3), {"a": [torch.ones(2)]}, {"a": [torch.zeros(2)]}, torch.nn.Linear(1, 1)]
VALUES += [len, lambda x: x + 1, lambda x: x + 2]


def test_attributes_count(tmp_path):
    prints = [task_fingerprint(made(tmp_path, SOURCE, value=value)) for value in VALUES]
    assert len(set(prints)) == len(VALUES)
    again = [task_fingerprint(made(tmp_path, SOURCE, value=value)) for value in VALUES]
    assert prints == again


def test_what_a_function_closes_over_counts_and_a_circle_ends(tmp_path):
    def times(number):
        return lambda x: number * x

    circle = []
    circle.append(circle)
    values = [times(2), times(3), circle]
    assert len({task_fingerprint(made(tmp_path, SOURCE, value=value)) for value in values}) == 3


def test_a_class_without_source_is_known_by_its_bytecode():
    def typed(source):
        names = {"Task": Task, "__name__": "typed"}
        exec(compile(textwrap.dedent(source.partition("\n\n")[2]), "<typed>", "exec"), names)
        return task_fingerprint(names["Scaled"]())

    assert typed(SOURCE) == typed(REFORMATTED)
    assert typed(SOURCE) != typed(SOURCE.replace("2.0 *", "3.0 *"))
    with_set = SOURCE.replace("2.0 * logits", "logits if 'a' in {'b', 'c'} else 0")
    assert typed(with_set) == typed(with_set) != typed(SOURCE)


def test_built_in_tasks_are_known_by_their_names_and_others_made_of_them_are_not():
    class Mine(CausalLM):
        pass

    assert task_fingerprint(CausalLM()) is task_fingerprint(MaskedLM()) is None
    assert task_fingerprint(Mine()) is not None


def test_factors_of_a_task_that_has_changed_are_refused(tmp_path):
    model, data = build("llama"), [{**e, "labels": e["input_ids"]} for e in examples(4)]
    store, fit = tmp_path / "store", {"batch_tokens": 40, "labels": "data"}
    estimate_factors(model, data, output=store, task=made(tmp_path, SOURCE, "a"), **fit)
    manifest = load_factors(store).manifest
    assert manifest["fisher"]["task"] == "Scaled"
    assert len(manifest["fisher"]["task_fingerprint"]) == 64
    same, other = made(tmp_path, REFORMATTED, "b"), made(tmp_path, SOURCE, "c", scale=3)
    influence_scores(model, store, data[:1], data, task=same, top_k=1)
    with pytest.raises(StoreError, match=r"task Scaled, whose code or attributes were others"):
        influence_scores(model, store, data[:1], data, task=other, top_k=1)
