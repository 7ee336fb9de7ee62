import pytest
import torch
from helpers.networks import CONFIGS, build
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ekfac_dist.errors import ModelError
from ekfac_dist.fit.partition import partition
from ekfac_dist.models.find.discovery import discover
from ekfac_dist.models.load.fingerprints import fingerprints
from ekfac_dist.models.modules import TrackedModule

CPU = torch.device("cpu")
PER_LAYER = {"phi3": 2, "gpt2": 2, "gpt_neox": 2, "opt": 2}


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_mlp_linear_is_found_and_all_of_the_mlp_is_covered(family):
    model = build(family)
    found = discover(model, None, CPU)
    assert len(found.modules) == 2 * PER_LAYER.get(family, 3)
    assert found.coverage.tracked_parameters == found.coverage.mlp_parameters
    assert found.coverage.model_parameters == sum(p.numel() for p in model.parameters())
    assert found.coverage.skipped == {}
    for module in found.modules:
        weight = model.get_submodule(module.name).weight
        shape = (module.num_outputs, module.num_inputs)
        assert tuple(weight.shape) == (shape[::-1] if module.kind == "conv1d" else shape)


def test_globs_choose_and_what_they_leave_out_is_named():
    found = discover(build("llama"), ["*.layers.1.mlp.*", "*.0.mlp.down_proj"], CPU)
    assert [m.name.removeprefix("model.layers.") for m in found.modules] == [
        "0.mlp.down_proj",
        "1.mlp.gate_proj",
        "1.mlp.up_proj",
        "1.mlp.down_proj",
    ]
    assert set(found.coverage.skipped) == {
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    }
    assert set(found.coverage.skipped.values()) == {"not chosen by model.modules"}


def test_the_share_of_the_mlp_counts_the_mlps_own_alone():
    coverage = discover(build("llama"), ["*.q_proj", "*.k_proj"], CPU).coverage
    assert coverage.tracked_parameters > 0
    assert coverage.tracked_mlp_parameters == 0
    coverage = discover(build("llama"), ["model.*_proj"], CPU).coverage
    assert coverage.tracked_mlp_parameters == coverage.mlp_parameters < coverage.tracked_parameters


def test_a_follower_without_its_leader_leads_itself():
    found = discover(build("llama"), ["*.up_proj"], CPU)
    assert all(module.leads for module in found.modules)


def test_an_mlp_parameter_that_is_no_linears_is_named_with_the_reason():
    model = build("llama")
    model.model.layers[0].mlp.scale = nn.Parameter(torch.ones(3))
    coverage = discover(model, None, CPU).coverage
    assert coverage.skipped == {
        "model.layers.0.mlp.scale": "not the weight or bias of a Linear, a Conv1D or a fused expert"
    }
    assert coverage.mlp_parameters == coverage.tracked_parameters + 3


def test_an_mlp_that_text_does_not_pass_through_is_named():
    model = build("llama")
    model.vision = nn.ModuleList(
        [nn.ModuleDict({"attention": nn.Linear(3, 3), "mlp": nn.Linear(3, 4)})]
    )
    skipped = discover(model, None, CPU).coverage.skipped
    assert skipped == dict.fromkeys(
        ("vision.0.mlp.weight", "vision.0.mlp.bias"), "text does not pass through it"
    )


@pytest.mark.parametrize(
    ("globs", "sentence"),
    [
        (["*.fc9"], r"'\*\.fc9' matches none of the model's \d+ linear modules, such as model"),
        (
            ["*.layers.0.mlp"],
            r"matches model\.layers\.0\.mlp, a LlamaMLP; only Linear and",
        ),
        (["*.mlp.*", "nothing"], "'nothing' matches none"),
    ],
)
def test_globs_that_choose_nothing_are_refused(globs, sentence):
    with pytest.raises(ModelError, match=sentence):
        discover(build("llama"), globs, CPU)


def test_a_tied_head_is_refused():
    model = build("gpt2")
    with pytest.raises(ModelError, match="lm_head is tied"):
        discover(model, ["lm_head"], CPU)


def test_the_fingerprint_sees_every_tracked_byte_and_nothing_else():
    model = build("llama")
    modules = discover(model, None, CPU).modules
    before = fingerprints(model, modules).tracked
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    assert fingerprints(model, modules).tracked == before
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[-1, -1] += 1e-9
    assert fingerprints(model, modules).tracked != before
    assert fingerprints(model.float(), modules).tracked != before


@given(
    families=st.lists(st.integers(1, 3), min_size=1, max_size=12),
    number=st.integers(1, 15),
    size=st.integers(1, 9),
)
def test_partitions_keep_order_and_families_and_are_as_many_as_asked(families, number, size):
    modules = [
        TrackedModule(
            f"{f}.{k}", "linear", size + f, size, False, f"{f}.0.input", f"{f}.{k}.output"
        )
        for f, members in enumerate(families)
        for k in range(members)
    ]
    groups = partition(modules, number)
    assert [m for group in groups for m in group] == modules
    assert len(groups) == min(number, len(families))
    assert all(groups)
    homes = [{m.input for m in group} for group in groups]
    assert sum(map(len, homes)) == len(set().union(*homes))
