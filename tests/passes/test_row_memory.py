"""The memory of rows that are exchanged: counted for what a step really captures."""

from dataclasses import replace

import pytest
import torch
from helpers.families import tiny_model
from helpers.networks import build, examples

from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.find.discovery import discover
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.owners import Places, families
from ekfac_dist.passes.row_memory import exchange_bytes, input_elements
from ekfac_dist.passes.step_memory import measured_step
from ekfac_dist.runtime.processes import World

CPU = torch.device("cpu")
TOKENS = 1000


def measured(model):
    """A step of the longest of some sequences, its positions, and the modules."""
    data = from_examples(examples(5))
    longest = int(data.num_positions.argmax())
    world = World(0, 1, 0, CPU, "none")
    with prepared(model):
        modules = discover(model, None, CPU).modules
        context = PassContext(model, data, [[longest]], world, torch.float32, False)
        return measured_step(context, modules), modules


def test_experts_together_see_each_position_as_often_as_it_is_routed():
    model = tiny_model("MixtralForCausalLM")
    step, modules = measured(model)
    assert set(step.routed) <= {module.name for module in modules}
    number = len(model.model.layers) * model.config.num_experts_per_tok
    for matrix in ("gate", "up", "down"):
        parts = [part for name, part in step.routed.items() if matrix in name]
        assert sum(parts) == pytest.approx(number)
    per_layer = model.config.hidden_size + model.config.intermediate_size
    assert input_elements(modules, step.routed) == pytest.approx(number * per_layer)


def test_what_is_exchanged_is_collected_once_and_travels_in_rounds():
    step, modules = measured(build("llama"))
    assert not step.routed
    places = Places.of(modules, 2)
    layer = [module for module in modules if ".0." in module.name]
    inputs = sum(members[0].input_size for members in families(layer).values())
    gradients = sum(module.num_outputs for module in layer)
    window = TOKENS * step.itemsize * max(inputs, gradients)  # of one layer
    found, rounds = exchange_bytes(modules, places, step, TOKENS)
    assert rounds == 1
    # Half of it travels: this round and the two before, at sender and owner.
    assert found == int(1.25 * window) + 6 * window // 2
    assert exchange_bytes(modules, Places.of(modules, 1), step, TOKENS)[0] == 0
    # At the end of a step all of its rows are there.
    at_end, _ = exchange_bytes(modules, places, replace(step, exchanges_at_end=True), TOKENS)
    layers = 2 * TOKENS * step.itemsize * (inputs + gradients)
    assert at_end == layers + 6 * window // 2


def test_gradients_of_float16_models_travel_as_float32():
    step, _ = measured(build("llama").to(torch.float16))
    assert (step.itemsize, step.gradient_itemsize) == (2, 4)
    step, _ = measured(build("llama").to(torch.bfloat16))
    assert (step.itemsize, step.gradient_itemsize) == (2, 2)
