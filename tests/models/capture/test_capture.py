"""Capture: the right rows, once, and a model that comes back as it was."""

import pytest
import torch
from helpers.dense import relative, sequence_loss, weight_gradient
from helpers.families import tiny_model
from helpers.float32_settings import float32_settings, restore_float32, set_of_each_device
from helpers.networks import CONFIGS, KINDS, VOCAB, build, examples, shifted
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ekfac_dist import estimate_factors
from ekfac_dist.data.sequences import collate
from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.hooks import Capture
from ekfac_dist.models.capture.labels import COVARIANCE_PASS, LabelRule
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.find.discovery import discover

CPU = torch.device("cpu")
DATA_LABELS = LabelRule("data", 0, COVARIANCE_PASS)


class Recorder:
    """Keeps every captured row."""

    def __init__(self):
        self.inputs, self.gradients = {}, {}

    def on_input(self, module, rows, batch):
        assert module.input not in self.inputs
        self.inputs[module.input] = rows.clone()

    def on_gradient(self, module, rows, batch):
        assert module.name not in self.gradients
        self.gradients[module.name] = rows.clone()

    def weight_gradients(self, modules, lengths):
        """Σ_t g_t a_tᵀ of each sequence, by module."""
        found = {}
        for module in modules:
            a = self.inputs[module.input]
            if module.bias:
                a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
            pairs = zip(self.gradients[module.name].split(lengths), a.split(lengths), strict=True)
            found[module.name] = [g.T @ x for g, x in pairs]
        return found


def captured(model, data, globs=None, dtype=torch.float64):
    batch = collate(list(from_examples(data)))
    recorder = Recorder()
    with prepared(model):
        modules = discover(model, globs, CPU).modules
        with Capture(model, modules, recorder, dtype) as capture:
            result = capture.run(batch, DATA_LABELS)
    return recorder, modules, batch, result


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_sum_of_outer_products_is_the_weight_gradient_bias_last(family):
    model, data = build(family), examples(5, prompts=True)
    recorder, modules, batch, result = captured(model, data)
    found = recorder.weight_gradients(modules, batch.grid("").lengths)
    total = 0.0
    for number, example in enumerate(data):
        model.zero_grad()
        loss = sequence_loss(model, *shifted(example))
        loss.backward()
        total += loss.item()
        for module in modules:
            expected = weight_gradient(model.get_submodule(module.name))
            assert relative(found[module.name][number], expected) < 1e-10
    assert result.loss.item() == pytest.approx(total, rel=1e-12)


def test_the_models_own_mean_loss_differs_by_the_number_of_labels_alone():
    # GPT-2, whose norms are float64 throughout; Llama's are float32 and would round.
    model, data = build("gpt2"), examples(1, longest=8)
    recorder, modules, batch, _ = captured(model, data)
    found = recorder.weight_gradients(modules, batch.grid("").lengths)
    ids = data[0]["input_ids"]
    logits = model(input_ids=ids[None, :-1]).logits[0]
    torch.nn.functional.cross_entropy(logits, ids[1:], reduction="mean").backward()
    for module in modules:
        mean = weight_gradient(model.get_submodule(module.name))
        assert relative(found[module.name][0], mean * len(batch.labelled.flat)) < 1e-10
    model.zero_grad()
    model(input_ids=ids[None], labels=ids[None]).loss.backward()
    for module in modules:
        own = weight_gradient(model.get_submodule(module.name)) * len(batch.labelled.flat)
        assert relative(found[module.name][0], own) < 1e-6  # the model's own loss is float32


@pytest.mark.parametrize("family", KINDS)
def test_garbage_in_padding_changes_no_row(family):
    model, data = build(family), examples(4)
    clean, modules, batch, _ = captured(model, data)
    assert "attention_mask" in batch.inputs
    batch.inputs["input_ids"][batch.inputs["attention_mask"] == 0] = torch.randint(
        1, VOCAB, ((batch.inputs["attention_mask"] == 0).sum(),)
    )
    dirty = Recorder()
    with prepared(model), Capture(model, modules, dirty, torch.float64) as capture:
        capture.run(batch, DATA_LABELS)
    for name, rows in clean.inputs.items():
        assert len(rows) == batch.num_positions
        assert relative(dirty.inputs[name], rows) < 1e-12
    for name, rows in clean.gradients.items():
        assert relative(dirty.gradients[name], rows) < 1e-12


def test_nan_in_padded_rows_of_an_activation_goes_nowhere():
    model, data = build("gpt2"), examples(4)
    clean, modules, batch, _ = captured(model, data)

    def poison(module, args):
        poisoned = args[0].clone()
        poisoned[batch.inputs["attention_mask"] == 0] = torch.nan
        return (poisoned, *args[1:])

    target = model.get_submodule(modules[-1].name)
    handle = target.register_forward_pre_hook(poison)
    dirty = Recorder()
    with prepared(model), Capture(model, modules, dirty, torch.float64) as capture:
        capture.run(batch, DATA_LABELS)
    handle.remove()
    assert relative(dirty.inputs[modules[-1].input], clean.inputs[modules[-1].input]) < 1e-12


def test_gate_and_up_share_one_input_factor():
    _, modules, _, _ = captured(build("llama"), examples(2))
    by_name = {
        module.name.rpartition(".mlp.")[2] + module.name.split(".")[2]: module for module in modules
    }
    assert by_name["gate_proj0"].input == by_name["up_proj0"].input
    assert by_name["gate_proj0"].leads
    assert not by_name["up_proj0"].leads
    assert by_name["down_proj0"].input != by_name["up_proj0"].input
    assert by_name["gate_proj1"].input != by_name["gate_proj0"].input


class InPlace(nn.Module):
    """An MLP whose activation overwrites the first linear's output."""

    def __init__(self, mlp):
        super().__init__()
        self.c_fc, self.c_proj = mlp.c_fc, mlp.c_proj

    def forward(self, x):
        return self.c_proj(nn.functional.relu_(self.c_fc(x)))


class OutOfPlace(InPlace):
    def forward(self, x):
        return self.c_proj(nn.functional.relu(self.c_fc(x)))


def test_activations_in_place_change_no_row():
    data = examples(4)
    recorders = []
    for kind in (InPlace, OutOfPlace):
        model = build("gpt2")
        for block in model.transformer.h:
            block.mlp = kind(block.mlp)
        recorders.append(captured(model, data)[0])
    for side in ("inputs", "gradients"):
        one, other = getattr(recorders[0], side), getattr(recorders[1], side)
        for name in one:
            assert relative(one[name], other[name]) < 1e-14


@pytest.mark.parametrize("family", KINDS)
def test_the_model_comes_back_as_it_was(family):
    model = build(family).train()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    hooks = count_hooks(model)
    estimate_factors(model, examples(4))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert count_hooks(model) == hooks
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name])


def test_the_model_comes_back_as_it_was_after_an_error():
    model = build("llama").train()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    hooks = count_hooks(model)
    with pytest.raises(Exception, match="NaN"):
        estimate_factors(model, examples(4))
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert count_hooks(model) == hooks


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_weight_gradient_is_computed_and_the_backward_stops_at_the_lowest_module():
    model = build("llama")
    layers = model.model.layers
    with prepared(model):
        modules = discover(model, ["model.layers.1.*"], CPU).modules
        mlp = [m for m in modules if ".mlp." in m.name]
        reached = {}

        def watch(name):
            def hook(module, args, output):
                tensor = output[0] if isinstance(output, tuple) else output
                reached[name] = tensor.requires_grad

            return hook

        handles = [
            layers[0].register_forward_hook(watch("layer 0")),
            layers[1].self_attn.register_forward_hook(watch("attention 1")),
            layers[1].mlp.register_forward_hook(watch("mlp 1")),
        ]
        with Capture(model, mlp, Recorder(), torch.float64) as capture:
            capture.run(collate(list(from_examples(examples(3)))), DATA_LABELS)
        for handle in handles:
            handle.remove()
    assert reached == {"layer 0": False, "attention 1": False, "mlp 1": True}
    assert all(p.grad is None for p in model.parameters())


def test_a_module_used_twice_is_refused_by_name():
    model = build("llama")
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(plain(x))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.gate_proj is used 2 times"):
        estimate_factors(model, examples(2))


def test_a_shared_block_is_refused_as_tied():
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        ModelError, match=r"layers\.0\.mlp\.up_proj is tied.*layers\.1\.mlp\.up_proj"
    ):
        estimate_factors(model, examples(2))


def test_a_module_that_a_forward_leaves_out_is_named():
    model = build("llama")
    layer = model.model.layers[1]
    forward, calls = layer.forward, []

    def sometimes(hidden_states, *args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            return hidden_states
        return forward(hidden_states, *args, **kwargs)

    layer.forward = sometimes
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.gate_proj was not used"):
        estimate_factors(model, examples(2))


def test_an_output_that_is_detached_is_named():
    model = build("llama")
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x).detach()
    model.model.layers[0].self_attn.requires_grad_(False)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.\w+ received no gradient"):
        estimate_factors(model, examples(2))


def test_rows_that_are_not_positions_are_refused():
    model = build("llama")
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(torch.cat([x, x], 1))[:, : x.shape[1]]
    with pytest.raises(ModelError, match=r"gate_proj does not compute sequence by sequence"):
        estimate_factors(model, examples(2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_low_precision_models_are_near_the_float64_factors(dtype, tolerance):
    data = examples(16)
    fit = {"labels": "data", "accumulate": "float64"}
    exact = estimate_factors(build("llama"), data, **fit)
    low = estimate_factors(build("llama").to(dtype), data, **fit)
    for name in exact.modules:
        found, expected = (f.module(name).lambda_OI.sum() for f in (low, exact))
        assert found == pytest.approx(expected.item(), rel=tolerance)


@pytest.mark.parametrize("refit", ["per_sequence", "per_token"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast_of_the_callers_reaches_the_model_and_not_the_sums(family, refit):
    data = examples(6)
    fit = {"labels": "data", "refit": refit}
    plain = estimate_factors(build(family).float(), data, **fit)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = estimate_factors(build(family).float(), data, **fit)
    for name in plain.modules:
        assert low.module(name).lambda_OI.dtype == torch.float32
        traces = [f.module(name).lambda_OI.sum().item() for f in (low, plain)]
        assert traces[0] == pytest.approx(traces[1], rel=0.1)


@pytest.fixture
def _restored_float32():
    yield
    restore_float32()


@pytest.mark.usefixtures("_restored_float32")
@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: set_of_each_device("tf32", "bf16"),
        lambda: set_of_each_device("tf32", "none"),  # as TrainingArguments(tf32=True) does
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    ],
    ids=["old", "old, of GPUs", "new", "new, of GPUs", "new, of all devices"],
)
def test_a_fast_float32_of_the_callers_does_not_reach_the_sums_and_stays_set(ask):
    ask()
    before, seen = float32_settings(), []

    class Watch(Recorder):
        def on_input(self, module, rows, batch):
            seen.append(float32_settings())

        def on_gradient(self, module, rows, batch):
            seen.append(float32_settings())

    model = build("llama")
    with prepared(model):
        modules = discover(model, None, CPU).modules
        with Capture(model, modules, Watch(), torch.float32) as capture:
            capture.run(collate(list(from_examples(examples(2)))), DATA_LABELS)
    assert set(seen) == {("highest", "ieee", "ieee")}
    assert float32_settings() == before


def test_a_fit_inside_inference_mode_works():
    model, data = build("llama"), examples(3)
    expected = estimate_factors(model, data)
    with torch.inference_mode():
        found = estimate_factors(model, data)
    name = next(iter(expected.modules))
    assert torch.equal(found.module(name).lambda_OI, expected.module(name).lambda_OI)


class Reads(TorchDispatchMode):
    """Counts the operations for which a host waits for a GPU, because it needs their result."""

    NAMES = ("nonzero", "_unique2", "_local_scalar_dense", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.number = 0

    def counted(self, value):
        self.number += 1
        return value

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


def reads_of_a_step(num_experts, num_layers, monkeypatch):
    """How often a step of experts reads something from its device."""
    number = {"num_local_experts": num_experts, "num_experts": num_experts}
    model = tiny_model("MixtralForCausalLM", num_hidden_layers=num_layers, **number)
    to_host = torch.Tensor.cpu
    batch = collate(list(from_examples(examples(5, prompts=True))))
    with prepared(model), monkeypatch.context() as patch:
        modules = discover(model, None, CPU).modules
        assert len(modules) == 2 * num_experts * num_layers
        with Capture(model, modules, Recorder(), torch.float64) as capture, Reads() as reads:
            patch.setattr(torch.Tensor, "cpu", lambda tensor: reads.counted(to_host(tensor)))
            capture.run(batch, DATA_LABELS)
    return reads.number


def test_a_layer_of_experts_is_waited_for_once_however_many_they_are(monkeypatch):
    few, many = (reads_of_a_step(number, 2, monkeypatch) for number in (2, 8))
    assert few == many
    assert reads_of_a_step(8, 4, monkeypatch) - many == 2  # one a layer
