"""Layers that are computed again in the backward: seen as without, for less memory, or refused."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers.families import tiny_model
from helpers.networks import KINDS, build, examples
from helpers.recorded_steps import DATA, assert_seen_alike, step
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ekfac_dist.data.sequences import Sequence, collate, pack
from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.checkpointing import LayerCheckpointing
from ekfac_dist.models.capture.hooks import Capture
from ekfac_dist.models.capture.observers import NullObserver
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.capture.saved_tensors import noting_saved_tensors
from ekfac_dist.models.capture.tasks import CAUSAL_LM
from ekfac_dist.models.find.discovery import discover
from ekfac_dist.models.find.meta_device import discover_by_shape, estimate_step
from ekfac_dist.passes.sequences import why_not_checkpointed
from ekfac_dist.runtime.processes import World

CPU = torch.device("cpu")


def batch_of(number=4, collated=collate):
    return collated(list(from_examples(examples(number, prompts=True))))


def tracked(model, globs=None):
    return discover(model, globs, CPU).modules


# -- what is seen ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_observers_see_what_they_see_without(family):
    model = build(family)
    with prepared(model):
        for batch in (batch_of(), batch_of(collated=pack)):
            assert_seen_alike(model, tracked(model), batch)


def test_layers_are_seen_from_the_last_to_the_first_each_input_before_its_gradient():
    model = build("llama")
    with prepared(model):
        seen, _ = step(model, tracked(model), batch_of(), checkpoints=True)
    expected = []
    for number in (1, 0):
        mlp = f"model.layers.{number}.mlp"
        expected += [("input", f"{mlp}.gate_proj.input"), ("input", f"{mlp}.down_proj.input")]
        expected += [("gradient", f"{mlp}.{name}") for name in ("down_proj", "up_proj")]
        expected += [("gradient", f"{mlp}.gate_proj")]
    assert seen.order[:3] == expected[:3]
    assert set(seen.order[3:5]) == set(expected[3:5])
    assert seen.order[5:8] == expected[5:8]
    assert len(seen.order) == len(expected)


@pytest.mark.parametrize(
    "globs",
    [
        ["model.layers.0.mlp.down_proj"],  # autograd saves nothing in this layer
        ["model.layers.1.mlp.down_proj"],
        ["*.1.mlp.*"],
        ["*"],  # the head, which is in no layer, too
    ],
)
def test_whatever_is_tracked_is_seen(globs):
    model = build("llama")
    with prepared(model):
        assert_seen_alike(model, tracked(model, globs), batch_of())


def test_the_lowest_layer_is_not_computed_again_below_its_modules():
    model, calls = build("llama"), []
    for number, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, n=number: calls.append(n))
    with prepared(model):
        modules = tracked(model, ["*.1.mlp.*"])
        calls.clear()
        step(model, modules, batch_of(), checkpoints=True)
    assert calls == [0, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_seen_alike(dtype):
    model = build("llama").to(dtype)
    with prepared(model):
        plain, _ = assert_seen_alike(model, tracked(model), batch_of())
    assert any(rows.dtype == torch.float32 for rows in plain.rows.values()) is (
        dtype == torch.float16  # whose gradients are scaled
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast_of_the_callers_is_the_same_both_times(family):
    model = build(family).float()
    with prepared(model), torch.autocast("cpu", dtype=torch.bfloat16):
        plain, _ = assert_seen_alike(model, tracked(model), batch_of())
    assert {rows.dtype for rows in plain.rows.values()} == {torch.float32, torch.bfloat16}


def nested(model):
    """A model that checkpoints its MLPs by itself."""
    for layer in model.model.layers:
        plain = layer.mlp.forward
        layer.mlp.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=False)
    return model


def own(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


@pytest.mark.parametrize("change", [nested, own])
def test_a_model_that_checkpoints_by_itself_is_seen_alike_and_stays_as_it_was(change):
    plain_model, model = build("llama"), build("llama")
    with prepared(plain_model):
        modules = tracked(plain_model)
        expected, _ = step(plain_model, modules, batch_of(), checkpoints=False)
    change(model)
    with prepared(model):
        flags = [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
        _, again = assert_seen_alike(model, modules, batch_of())
        assert flags == [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
    for key, rows in expected.rows.items():
        assert torch.equal(again.rows[key], rows)


def test_the_models_own_checkpointing_does_not_compute_a_layer_a_third_time():
    model, calls = own(build("llama")), []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    with prepared(model):
        modules = tracked(model)
        calls.clear()
        step(model, modules, batch_of(), checkpoints=True)
    assert len(calls) == 2


# -- layers of a model of one's own ----------------------------------------------------------------


class Block(nn.Module):
    """An MLP of a block, in some unusual way."""

    def __init__(self, number, kind):
        super().__init__()
        self.number, self.kind, self.calls, self.alike = number, kind, 0, 1
        self.up, self.down = nn.Linear(6, 8).double(), nn.Linear(8, 6).double()

    def forward(self, hidden, first, handed_on):
        self.calls += 1  # `alike` of them do the same
        return getattr(self, self.kind)(hidden, first, handed_on)

    def plain(self, hidden, first, handed_on, scale=1.0):
        return hidden + scale * self.down(torch.tanh(self.up(hidden)))

    def reads_the_embeddings(self, hidden, first, handed_on):
        return hidden + self.down(torch.tanh(self.up(first)))

    def gives_a_dictionary(self, hidden, first, handed_on):
        return {"x": self.plain(hidden, first, handed_on), "rest": (None, 1)}

    def hands_on(self, hidden, first, handed_on):
        """Reads what the block before has put into a list, and puts its own there."""
        before = handed_on[-1] if handed_on else 0.0
        handed_on.append(torch.tanh(self.up(hidden)))
        return hidden + self.down(handed_on[-1] + before) + len(handed_on)

    # What cannot be computed again:

    def counts_its_calls(self, hidden, first, handed_on):
        return self.plain(hidden, first, handed_on, scale=1 + 0.1 * self.calls)

    def writes_into_its_input(self, hidden, first, handed_on):
        return hidden.add_(self.down(torch.tanh(self.up(hidden.clone()))))

    def saves_more_the_next_time(self, hidden, first, handed_on):
        more = torch.sin if self.calls > self.alike else lambda x: x
        return more(self.plain(hidden, first, handed_on))

    def is_wider_the_next_time(self, hidden, first, handed_on):
        width = 3 if self.calls > self.alike else 2
        wide = torch.tanh(torch.cat([hidden[..., :1]] * width, -1)).sum(-1, keepdim=True)
        return self.plain(hidden, first, handed_on) + wide

    def leaves_a_module_out_the_next_time(self, hidden, first, handed_on):
        if self.calls > self.alike:
            return hidden + torch.nn.functional.linear(
                torch.tanh(self.up(hidden)), self.down.weight, self.down.bias
            )
        return self.plain(hidden, first, handed_on)

    def fails_the_next_time(self, hidden, first, handed_on):
        if self.calls > self.alike:
            raise ValueError("not again")
        return self.plain(hidden, first, handed_on)


class Blocks(nn.Module):
    """A causal language model of such blocks."""

    def __init__(self, kind, number=2):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(29, 6).double()
        self.blocks = nn.ModuleList(Block(k, kind) for k in range(number))
        self.head = nn.Linear(6, 29).double()

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        hidden, handed_on = self.embedding(input_ids), []
        first = hidden
        if self.blocks[0].kind == "writes_into_its_input":
            hidden = hidden.clone()
        for block in self.blocks:
            hidden = block(hidden, first=first, handed_on=handed_on)
            hidden = hidden["x"] if isinstance(hidden, dict) else hidden
        return SimpleNamespace(logits=self.head(hidden))


def blocks_and_modules(kind):
    """The model, and its modules as they are found where a block is plain."""
    same = kind if kind in ("reads_the_embeddings", "hands_on") else "plain"
    model = Blocks(same)
    with prepared(model):
        modules = tracked(model, ["blocks.*"])
    for block in model.blocks:
        block.kind, block.calls = kind, 0
    return model, modules


@pytest.mark.parametrize("kind", ["plain", "gives_a_dictionary", "hands_on"])
def test_layers_of_ones_own_are_seen_alike(kind):
    model, modules = blocks_and_modules(kind)
    with prepared(model):
        assert_seen_alike(model, modules, batch_of())


def test_an_input_of_several_layers_is_shown_once():
    model, modules = blocks_and_modules("reads_the_embeddings")
    assert {module.input for module in modules if module.name.endswith("up")} == {
        "blocks.0.up.input"
    }
    with prepared(model):
        _, again = assert_seen_alike(model, modules, batch_of())
    shown = again.modules["input", "blocks.0.up.input"]
    assert shown.name == "blocks.0.up"  # though block 1 was computed before


REASONS = {
    "counts_its_calls": r"input of module blocks\.1\.up changes .* remembers something",
    "writes_into_its_input": r"Layer blocks\.0 cannot be computed again .* is written to",
    "saves_more_the_next_time": r"Layer blocks\.1 computes something else .*\(\d tensors",
    "is_wider_the_next_time": r"Layer blocks\.1 computes something else .*\[2, \d, 2\] in float64",
    "leaves_a_module_out_the_next_time": r"Module blocks\.1\.down was not used when its layer",
    "fails_the_next_time": r"Blocks fails when its layers are computed again .*\(not again\)",
}


def reason_of(model, modules, data=None):
    data = from_examples(examples(4) if data is None else data)
    with prepared(model):
        return why_not_checkpointed(model, modules, data, CAUSAL_LM, World.start())


@pytest.mark.parametrize("kind", REASONS)
def test_a_layer_that_cannot_be_computed_again_is_told_apart(kind):
    model, modules = blocks_and_modules(kind)
    for block in model.blocks:
        block.alike = 2  # without checkpointing, and in the forward with it
    reason = reason_of(model, modules)
    assert re.search(REASONS[kind], reason), reason
    assert reason.endswith("Leave gradient checkpointing off for this model.")
    assert not any("forward" in vars(block) for block in model.blocks)


@pytest.mark.parametrize(
    "kind", ["saves_more_the_next_time", "is_wider_the_next_time", "writes_into_its_input"]
)
def test_a_pass_refuses_such_a_layer_too(kind):
    model, modules = blocks_and_modules(kind)
    with prepared(model), pytest.raises(ModelError, match="Leave gradient checkpointing off"):
        step(model, modules, batch_of(), checkpoints=True)


def test_layers_that_can_be_computed_again_are_told_so():
    model = build("llama")
    assert reason_of(model, tracked(model)) is None
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_layers_is_told_so():
    model, modules = blocks_and_modules("plain")
    reason = reason_of(model, modules)
    assert reason is None
    model.blocks.__class__ = nn.Sequential  # the same modules, in no list
    assert "Blocks has no layers" in reason_of(model, modules)


def test_attention_that_writes_into_a_cache_is_told_apart():
    model = tiny_model("XLMWithLMHeadModel")
    reason = reason_of(model, tracked(model))
    assert "Layer transformer.attentions.1 computes something else" in reason


# -- faults are named as ever ----------------------------------------------------------------------


def refused(model, modules, match):
    with prepared(model), pytest.raises(ModelError, match=match):
        step(model, modules, batch_of(), checkpoints=True)


def test_modules_that_are_used_twice_or_not_at_all_or_cut_off_are_named():
    for change, match in (
        (lambda plain: lambda x: plain(plain(x)), r"1\.mlp\.gate_proj is used twice"),
        (lambda plain: lambda x: x, r"1\.mlp\.gate_proj was not used in this forward"),
        (lambda plain: lambda x: plain(x).detach(), r"1\.mlp\.gate_proj received no gradient"),
    ):
        model = build("llama")
        modules = tracked(model)
        mlp = model.model.layers[1].mlp
        mlp.forward = change(mlp.forward)
        refused(model, modules, match)


def test_an_input_that_is_no_longer_shared_is_named():
    model, modules = blocks_and_modules("reads_the_embeddings")
    model.blocks[1].kind = "plain"
    refused(model, modules, r"blocks\.\d\.up shared its input with another")


def test_a_model_is_as_it_was_after_a_fault():
    model, modules = blocks_and_modules("fails_the_next_time")
    with prepared(model), pytest.raises(ValueError, match="not again"):
        step(model, modules, batch_of(), checkpoints=True)
    for block in model.blocks:
        assert "forward" not in vars(block)
        block.kind = "plain"
    with prepared(model):
        assert_seen_alike(model, modules, batch_of())


# -- memory ----------------------------------------------------------------------------------------


def test_the_first_forward_leaves_nothing_of_a_layer_behind():
    model, made, alive = build("llama"), [], []

    def note(module, args, output):
        made.append(StorageWeakRef(output.untyped_storage()))

    class Watch(NullObserver):
        def on_input(self, module, rows, positions):
            alive.append(sum(not storage.expired() for storage in made))

    with prepared(model):
        modules = tracked(model)
        for layer in model.model.layers:
            layer.mlp.act_fn.register_forward_hook(note)
        for checkpoints, most in ((True, 1), (False, 2)):
            made.clear()
            alive.clear()
            checkpointing = LayerCheckpointing(model, modules) if checkpoints else None
            watch = Watch()
            with Capture(model, modules, watch, None, checkpointing=checkpointing) as capture:
                capture.run(batch_of(), DATA)
            assert max(alive) == most
            assert all(storage.expired() for storage in made)


def llama(num_layers, device="cpu"):
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def saved_bytes(model, *, checkpoints):
    ids = torch.arange(2, 34).numpy()
    batch = collate([Sequence(k, ids, ids) for k in range(3)])
    with prepared(model), noting_saved_tensors(model) as saved:
        modules = tracked(model)
        saved.tensors.clear()
        step(model, modules, batch, checkpoints=checkpoints, saved=saved)
    return saved.num_bytes, modules


def test_a_layer_more_costs_its_input_and_no_more():
    few, more = (saved_bytes(llama(n), checkpoints=True)[0] for n in (3, 5))
    assert more - few == 2 * (3 * 32 * 64 * 4)
    whole = [saved_bytes(llama(n), checkpoints=False)[0] for n in (3, 5)]
    a_layer = (whole[1] - whole[0]) // 2
    assert a_layer > 10 * (3 * 32 * 64 * 4)
    # The first layer's graph begins at its MLP.
    assert few < whole[0] - a_layer


@pytest.mark.parametrize("checkpoints", [False, True])
def test_what_is_estimated_without_weights_is_what_is_kept(checkpoints):
    found, _ = saved_bytes(llama(4), checkpoints=checkpoints)
    model = llama(4, "meta").requires_grad_(False)
    modules = discover_by_shape(model, None).modules
    estimate = estimate_step(model, modules, 3, 32, checkpoints=checkpoints)
    assert estimate.activation_bytes == pytest.approx(found, rel=0.02)
    assert not any("forward" in vars(module) for module in model.modules())


def test_operations_are_those_of_a_forward_more_from_the_lowest_layer_on():
    model = llama(4, "meta").requires_grad_(False)
    for globs, layers_again in ((None, 4), (["*.3.mlp.down_proj"], 1)):
        modules = discover_by_shape(model, globs).modules
        plain, again = (estimate_step(model, modules, 3, 32, checkpoints=c) for c in (False, True))
        assert again.forward == plain.forward
        head = 2 * 3 * 32 * 64 * 64
        a_layer = (plain.forward - head) // 4
        more = again.operations(modules) - plain.operations(modules)
        assert more == pytest.approx(layers_again * a_layer, rel=0.01)


def allocated_at_most(run):
    """Most bytes that are allocated at once, as PyTorch's profiler counts them."""
    run()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    total = most = 0
    for event in events:
        total += event.nbytes()
        most = max(most, total)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_memory_of_a_step_is_as_estimated(kind, checkpoints):
    config = {
        "llama": lambda: transformers.LlamaConfig(
            vocab_size=1024, hidden_size=512, intermediate_size=1408, num_hidden_layers=12
        ),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=1024, n_embd=512, n_layer=12, n_head=8),
    }[kind]()
    batch = collate([Sequence(k, (ids := torch.arange(128).numpy()), ids) for k in range(4)])
    with torch.device("meta"):
        meta = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    modules = discover_by_shape(meta, None).modules
    estimate = estimate_step(meta, modules, 4, 128, checkpoints=checkpoints)
    widest = max(max(module.num_inputs, module.num_outputs) for module in modules)
    planned = estimate.activation_bytes + 2 * estimate.logit_bytes + 4 * 4 * 128 * widest * 4
    model = transformers.AutoModelForCausalLM.from_config(config).eval()

    def run():
        checkpointing = LayerCheckpointing(model, modules) if checkpoints else None
        nobody = NullObserver()
        with Capture(model, modules, nobody, None, checkpointing=checkpointing) as capture:
            capture.run(batch, DATA)

    with prepared(model):
        found = allocated_at_most(run)
    print(f"\n{kind}, {checkpoints}: planned {planned / 1e6:.1f} MB, found {found / 1e6:.1f} MB")
    assert planned == pytest.approx(found, rel=0.15)
