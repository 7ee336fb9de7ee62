"""What must not matter: padding, batches, order, partitions, checkpointing, where factors lie."""

import hashlib

import pytest
import torch
from helpers.dense import dense_E, relative
from helpers.networks import KINDS, VOCAB, build, examples

from ekfac_dist import estimate_factors, load_factors

FIT = {"labels": "data", "accumulate": "float64", "batch_tokens": 24}


def assert_same(one, other, tolerance=1e-12):
    assert list(one.modules) == list(other.modules)
    for key in ("num_sequences", "num_positions", "num_labels"):
        assert one.manifest["data"][key] == other.manifest["data"][key]
    for name, module in one.modules.items():
        assert relative(dense_E(one, name), dense_E(other, name)) < tolerance
        for factor, size in (
            (module.input, module.input_size),
            (module.output, module.num_outputs),
        ):
            (count, total), (other_count, other_total) = (
                covariance(factors, factor, size) for factors in (one, other)
            )
            assert count == other_count == one.manifest["data"]["num_positions"]
            assert relative(total, other_total) < tolerance


def covariance(factors, factor, size):
    """A factor's count and raw sum, which E does not depend on."""
    file = f"covariance/{factor}.safetensors"
    count = int(factors._source.header(file)["count"])
    return count, factors._source.tensor(file, "sum", (size, size))


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("labels", ["data", "sampled"])
@pytest.mark.parametrize("refit", ["per_sequence", "per_token"])
def test_the_token_budget_changes_nothing(family, labels, refit):
    model, data = build(family), examples(prompts=True)
    fits = [
        estimate_factors(
            model, data, labels=labels, refit=refit, accumulate="float64", batch_tokens=budget
        )
        for budget in (1, 20, 1000)
    ]
    assert_same(fits[0], fits[1])
    assert_same(fits[0], fits[2])


def test_the_order_of_sequences_changes_nothing():
    model, data = build("llama_bias"), examples()
    assert_same(
        estimate_factors(model, data, **FIT), estimate_factors(model, list(reversed(data)), **FIT)
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing_whatever_it_holds(side):
    model, data = build("gpt2"), examples(prompts=True)
    width = 12
    padded = {"input_ids": [], "labels": [], "attention_mask": []}
    for example in data:
        gap = width - len(example["input_ids"])
        garbage = torch.randint(0, VOCAB, (gap,))
        for key, filler in (
            ("input_ids", garbage),
            ("labels", garbage),  # labels in padding are garbage too
            ("attention_mask", torch.zeros(gap, dtype=torch.long)),
        ):
            real = example.get(key, torch.ones(width - gap, dtype=torch.long))
            padded[key].append(torch.cat([filler, real] if side == "left" else [real, filler]))
    batch = {key: torch.stack(rows) for key, rows in padded.items()}
    assert_same(estimate_factors(model, data, **FIT), estimate_factors(model, [batch], **FIT))


@pytest.mark.parametrize("partitions", [2, 3, 99])
def test_partitions_change_nothing(partitions):
    model, data = build("llama"), examples()
    for labels in ("data", "sampled"):
        fit = FIT | {"labels": labels}
        assert_same(
            estimate_factors(model, data, **fit),
            estimate_factors(model, data, partitions=partitions, **fit),
        )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_counts_every_position_once(family):
    data = examples()
    plain = estimate_factors(build(family), data, **FIT)
    model = build(family)
    for probability in [k for k in vars(model.config) if "drop" in k]:
        setattr(model.config, probability, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.activation_checkpointing_enable()
    model.train()
    repeats = []

    def counting(found):  # what is only looked at before the passes has no backward
        return lambda *_: found.append(1) if torch.is_grad_enabled() else None

    handle = model.get_submodule(next(iter(plain.modules))).register_forward_hook(counting(repeats))
    checkpointed = estimate_factors(model, data, **FIT)
    handle.remove()
    assert model.training
    # Checkpointing really was at work: the module ran again in each backward.
    plain_model, plain_repeats = build(family), []
    plain_model.get_submodule(next(iter(plain.modules))).register_forward_hook(
        counting(plain_repeats)
    )
    estimate_factors(plain_model, data, **FIT)
    assert len(repeats) > 1.4 * len(plain_repeats)
    assert_same(plain, checkpointed)


def test_a_model_that_drops_out_is_evaluated():
    data = examples()
    model = build("gpt2").train()  # GPT-2 drops out a tenth by default
    assert_same(estimate_factors(build("gpt2"), data, **FIT), estimate_factors(model, data, **FIT))
    assert model.training


def test_saved_and_loaded_factors_solve_bitwise_as_those_in_memory(tmp_path):
    model, data = build("llama_bias"), examples()
    memory = estimate_factors(model, data)
    memory.save(tmp_path / "saved")
    estimate_factors(model, data, output=tmp_path / "direct")
    torch.manual_seed(1)
    gradients = {
        name: torch.randn(3, module.num_outputs, module.input_size)
        for name, module in memory.modules.items()
    }
    expected = memory.solve(gradients)
    before = hashes(tmp_path)
    for store in ("saved", "direct"):
        loaded = load_factors(tmp_path / store, model=model)
        for name, solved in loaded.solve(gradients).items():
            assert torch.equal(solved, expected[name])
    assert hashes(tmp_path) == before


def test_the_same_run_twice_writes_the_same_bytes(tmp_path):
    model, data = build("gpt2"), examples()
    for store in ("one", "two"):
        estimate_factors(model, data, output=tmp_path / store, seed=3)
    one, two = hashes(tmp_path / "one"), hashes(tmp_path / "two")
    assert {k: v for k, v in one.items() if k != "manifest.json"} == {
        k: v for k, v in two.items() if k != "manifest.json"
    }


def test_a_seed_gives_its_labels_and_another_seed_others():
    model, data = build("llama"), examples()
    one, again, other = (
        estimate_factors(model, data, accumulate="float64", seed=seed) for seed in (7, 7, 8)
    )
    assert_same(one, again)
    name = next(iter(one.modules))
    assert relative(dense_E(one, name), dense_E(other, name)) > 1e-3


def test_float32_sums_agree_with_float64_ones():
    model, data = build("llama"), examples()
    single = estimate_factors(model, data, **(FIT | {"accumulate": "float32"}))
    double = estimate_factors(model, data, **FIT)
    for name in single.modules:
        assert single.module(name).lambda_OI.dtype == torch.float32
        assert relative(dense_E(single, name), dense_E(double, name)) < 1e-5


def hashes(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
