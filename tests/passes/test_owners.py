"""Who owns which factors: every family once, in windows that keep every owner busy."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.families import tiny_model
from helpers.networks import CONFIGS, build, examples

from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.models.capture.labels import LabelRule
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.find.discovery import discover
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.owners import NOT_SHARED, Owners, Places, families, family_cost, windows
from ekfac_dist.passes.row_order import GRADIENT, INPUT
from ekfac_dist.passes.schedule import _ROUND_BYTES, Schedule, num_rounds
from ekfac_dist.runtime.processes import World

CPU = torch.device("cpu")


def gated_mlps(layers: int, hidden: int, ffn: int, num_experts: int = 0) -> list[TrackedModule]:
    """The modules of gated MLPs, of one a layer or of several experts."""
    modules = []
    for layer, expert in itertools.product(range(layers), range(max(1, num_experts))):
        place = f"model.layers.{layer}.mlp" + f".experts.{expert}" * (num_experts > 0)
        for name, inputs, outputs in (
            ("gate_proj", hidden, ffn),
            ("up_proj", hidden, ffn),
            ("down_proj", ffn, hidden),
        ):
            shared = "gate_proj" if name == "up_proj" else name
            modules.append(
                TrackedModule(
                    name=f"{place}.{name}",
                    kind="linear",
                    num_inputs=inputs,
                    num_outputs=outputs,
                    bias=False,
                    input=f"{place}.{shared}.input",
                    output=f"{place}.{name}.output",
                )
            )
    return modules


MODELS = {
    "Llama-3-70B": gated_mlps(80, 8192, 28672),
    "Llama-3-8B": gated_mlps(32, 4096, 14336),
    "Mixtral-8x7B": gated_mlps(32, 4096, 14336, num_experts=8),
    "two layers": gated_mlps(2, 12, 14),
    "one layer": gated_mlps(1, 12, 14),
}
LARGE = ("Llama-3-70B", "Llama-3-8B", "Mixtral-8x7B")


@pytest.mark.parametrize("shard", [2, 3, 8, 32, 64])
@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_in_one_window_and_has_one_owner(name: str, shard: int):
    modules = MODELS[name]
    cut = windows(modules, shard)
    assert [family for window in cut for family in window] == list(families(modules))
    assert all(cut)
    places = Places.of(modules, shard)
    assert set(places.of_families) == set(families(modules))
    assert set(places.of_families.values()) <= set(range(shard))
    parts = places.parts(modules)
    assert len(parts) == shard
    assert sorted(m.name for part in parts for m in part) == sorted(m.name for m in modules)
    for part in parts:  # modules that read one input, and it, are on one worker
        for family, members in families(part).items():
            assert members == families(modules)[family]


@pytest.mark.parametrize("shard", [8, 32])
@pytest.mark.parametrize("name", LARGE)
def test_memory_is_balanced_over_all_and_every_owner_has_something_to_do_in_a_window(
    name: str, shard: int
):
    modules = MODELS[name]
    members = families(modules)
    places = Places.of(modules, shard)
    loads = [sum(map(family_cost, families(part).values())) for part in places.parts(modules)]
    assert max(loads) < 1.1 * sum(loads) / shard
    for window in windows(modules, shard):
        of_owners = [0] * shard
        for family in window:
            of_owners[places.of_families[family]] += family_cost(members[family])
        # As even as the costliest family allows: see _EVEN.
        assert sum(of_owners) >= 0.75 * shard * max(family_cost(members[f]) for f in window)
        assert sum(load > 0 for load in of_owners) >= 0.75 * shard


def test_a_window_is_no_larger_than_it_has_to_be():
    modules, shard = MODELS["Llama-3-70B"], 8
    layers = [{name.split(".")[2] for name in window} for window in windows(modules, shard)]
    assert {len(of_window) for of_window in layers} == {4}
    costs = [family_cost(family) for family in families(gated_mlps(3, 8192, 28672)).values()]
    assert sum(costs) < 0.75 * shard * max(costs)  # so three would not do


def test_fewer_families_than_owners_leave_some_without():
    modules = MODELS["one layer"]
    assert windows(modules, 5) == [list(families(modules))]
    parts = Places.of(modules, 5).parts(modules)
    assert sorted(map(len, parts)) == [0, 0, 0, 1, 2]
    assert Places.of([], 5).parts([]) == [[]] * 5
    assert windows([], 5) == [[]]


def test_factors_that_are_not_shared_have_one_owner():
    modules = MODELS["two layers"]
    assert NOT_SHARED.parts(modules) == [modules]
    assert Places.of(modules, 1).parts(modules) == [modules]


def test_rows_travel_in_more_rounds_the_more_they_are():
    assert num_rounds(0, 1) == num_rounds(100 * _ROUND_BYTES, 1) == 1
    assert num_rounds(2 * _ROUND_BYTES - 1, 8) == 1
    assert num_rounds(3 * _ROUND_BYTES, 8) == 3
    assert num_rounds(100 * _ROUND_BYTES, 8) == 7  # one owner a round
    assert num_rounds(100 * _ROUND_BYTES, 2) == 1


# -- the order of exchanges ------------------------------------------------------------------------


class Shown:
    """An observer that lists which rows a step shows, in order."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str]] = []

    def on_input(self, module, acts_Mi, positions) -> None:
        self.entries.append((module.name, INPUT))

    def on_gradient(self, module, grads_MO, positions) -> None:
        self.entries.append((module.name, GRADIENT))


def schedule_and_shown(family: str, shard: int, *, checkpoints: bool):
    """The schedule of a model's modules, and what a step of all sequences shows."""
    model = build(family) if family in CONFIGS else tiny_model(family)
    data = from_examples(examples(5))
    world = World(0, 1, 0, CPU, "none")
    with prepared(model):
        modules = discover(model, None, CPU).modules
        places = Places.of(modules, shard).of_families
        owners = Owners(shard, places, {}, 0, world, world, world)
        context = PassContext(model, data, [], world, torch.float64, False, checkpoints=checkpoints)
        context = replace(context, owners=owners)
        context = replace(context, row_order=context.noted_row_order(modules))
        schedule, shown = Schedule.of(context, modules, owners), Shown()
        with context.capture(modules, shown, None) as capture:
            capture.run(context.batch(range(len(data))), LabelRule("data", 0, 0))
    return schedule, shown.entries, modules


DENSE = ("llama", "gpt2", "opt", "gpt_neox")


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("shard", [2, 3])
@pytest.mark.parametrize("family", DENSE)
def test_rows_are_exchanged_in_the_order_in_which_they_come(family, shard, checkpoints):
    schedule, shown, _ = schedule_and_shown(family, shard, checkpoints=checkpoints)
    entries = [entry for window in schedule.windows for entry in window]
    assert len(entries) == len(set(entries)) == len(shown)
    assert set(entries) == set(shown)
    assert not schedule.routed
    window_of = {entry: k for k, window in enumerate(schedule.windows) for entry in window}
    order = [window_of[entry] for entry in shown]
    assert order == sorted(order)  # no row comes late
    assert schedule.dtypes == dict.fromkeys(shown, torch.float64)


@pytest.mark.parametrize("family", ["llama", "MixtralForCausalLM"])
def test_inputs_of_repeated_layers_are_exchanged_with_their_gradients(family):
    plain, _, modules = schedule_and_shown(family, 2, checkpoints=False)
    repeated, _, _ = schedule_and_shown(family, 2, checkpoints=True)
    sides = [{side for _, side in window} for window in plain.windows]
    assert sides == [{INPUT}] * (len(sides) // 2) + [{GRADIENT}] * (len(sides) // 2)
    # The last layer is not repeated. The backward comes to it first.
    *before, last = [[m for m in modules if f".layers.{k}." in m.name] for k in (0, 1)]
    inputs, gradients, together = map(set, repeated.windows)
    assert inputs == inputs_of(last)
    assert gradients == {(module.name, GRADIENT) for module in last}
    assert together == inputs_of(before[0]) | {(module.name, GRADIENT) for module in before[0]}


def inputs_of(modules):
    return {(members[0].name, INPUT) for members in families(modules).values()}


def test_experts_tell_what_they_send():
    schedule, _, modules = schedule_and_shown("MixtralForCausalLM", 2, checkpoints=False)
    assert schedule.routed == {module.name for module in modules}
