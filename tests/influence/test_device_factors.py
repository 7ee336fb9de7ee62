"""Factors on the device: what stays there, what is sent for each batch, and what is sent ahead."""

import pytest
import torch
from helpers.networks import build, examples

from ekfac_dist import estimate_factors
from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.influence.device_factors import DeviceFactors
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.passes import step_memory
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.step_memory import measured_step, room_beside_steps
from ekfac_dist.runtime.processes import World

CPU = torch.device("cpu")
BATCHES = 4
# On a CPU only a conversion is a transfer.
OTHER = torch.float64


@pytest.fixture(scope="module")
def factors():
    return estimate_factors(build("llama_bias"), examples(5), labels="data")


def scan(fitted, modules):
    """What a batch of a scan asks for, in the eigenbasis."""
    inputs = {module.input: module for module in modules}
    yield from (fitted.input_basis(module) for module in inputs.values())
    for module in reversed(modules):
        yield fitted.output_basis(module)
        yield [fitted.lambda_of(module)]


def query(fitted, modules):
    """What a batch of queries asks for, whose gradients are rotated back."""
    inputs = {module.input: module for module in modules}
    yield from (fitted.input_basis(module) for module in inputs.values())
    for module in reversed(modules):
        yield fitted.output_basis(module)
        yield [fitted.lambda_of(module)]
        yield fitted.output_basis(module)
        yield fitted.input_basis(module)


def all_batches(fitted, modules, of):
    """The same for all batches; bytes of what a batch asks for, and how often it does."""
    sizes = []
    for _ in range(BATCHES):
        sizes = [sum(block.nbytes for block in blocks) for blocks in of(fitted, modules)]
    return sizes


@pytest.mark.parametrize("of", [scan, query])
def test_what_there_is_room_for_is_sent_once(factors, of):
    modules = list(factors.modules.values())
    fitted = DeviceFactors(factors, CPU, OTHER, 1e9)
    all_batches(fitted, modules, of)
    distinct = {m.input for m in modules} | {m.output for m in modules} | {m.name for m in modules}
    assert len(modules) < len(distinct) == fitted.num_sent
    kept = sum(tensor.nbytes for tensors in fitted._kept.values() for tensor in tensors)
    assert fitted.bytes_left == 1e9 - kept


@pytest.mark.parametrize("of", [scan, query])
def test_without_room_each_batch_is_sent_everything_once_ahead_of_its_use(factors, of):
    modules = list(factors.modules.values())
    fitted = DeviceFactors(factors, CPU, OTHER, 0)
    number = len(all_batches(fitted, modules, of))
    assert BATCHES * number <= fitted.num_sent <= BATCHES * number + 1  # the next batch's first
    expected = factors.module(modules[0].name)
    for _ in range(2):  # sent ahead, or not
        for found, stored in (
            (fitted.input_basis(modules[0]), expected.blocks_II),
            (fitted.output_basis(modules[0]), expected.blocks_OO),
            ([fitted.lambda_of(modules[0])], [expected.lambda_OI]),
        ):
            assert all(torch.equal(f, s.double()) for f, s in zip(found, stored, strict=True))
            assert {block.dtype for block in found} == {OTHER}


@pytest.mark.parametrize("part", [0.2, 0.6])
def test_what_stays_is_chosen_once_and_fits(factors, part):
    modules = list(factors.modules.values())
    sizes = all_batches(DeviceFactors(factors, CPU, OTHER, 1e9), modules, scan)
    budget = part * sum(sizes)
    fitted = DeviceFactors(factors, CPU, OTHER, budget)
    all_batches(fitted, modules, scan)
    kept = sum(block.nbytes for blocks in fitted._kept.values() for block in blocks)
    smallest_left = min(size for size in sizes if size)
    assert budget - max(sizes) < kept <= budget or smallest_left > budget
    sent = len(fitted._kept) + BATCHES * (len(sizes) - len(fitted._kept))
    assert sent <= fitted.num_sent <= sent + 1
    assert fitted.num_sent < BATCHES * len(sizes)


def test_what_is_there_already_is_not_sent(factors):
    fitted = DeviceFactors(factors, CPU, torch.float32, 0)
    module = next(iter(factors.modules.values()))
    assert fitted.input_basis(module)[0] is factors.module(module.name).blocks_II[0]
    all_batches(fitted, list(factors.modules.values()), query)
    assert fitted.num_sent == 0


def test_there_is_room_for_what_a_step_leaves(factors, monkeypatch):
    data, modules = from_examples(examples(5)), list(factors.modules.values())
    world = World(0, 1, 0, CPU, "none")
    model = build("llama_bias")

    def room(free, held, wanted):
        monkeypatch.setattr(step_memory, "free_bytes", lambda world: (free, free))
        return room_beside_steps(context, modules, 20, held, wanted)

    with prepared(model):
        context = PassContext(model, data, [[0, 1], [2]], world, torch.float32, False)
        step = measured_step(context, modules).activation_bytes
        assert room(10**12, 0, 1000) == 1000
        some = room(10 * step, 0, 10**9)
        assert 0 < some < 0.9 * 10 * step - step
        assert room(10 * step, 500, 10**9) == some - 500  # less what is held
        assert room(10 * step, 0, some // 2) == some // 2
        assert room(step, 0, 10**9) == 0
