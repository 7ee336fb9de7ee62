"""Packed batches: the numbers of sequences alone, or no packing at all."""

import pytest
import torch
from helpers.dense import dense_E, relative
from helpers.families import tiny_model
from helpers.networks import build

from ekfac_dist import estimate_factors
from ekfac_dist.data.batches import NO_LABEL
from ekfac_dist.data.tokenized_examples import from_examples
from ekfac_dist.models.capture import packing
from ekfac_dist.models.capture.batch_checks import BatchChecks
from ekfac_dist.models.capture.labels import LabelRule, logit_gradient
from ekfac_dist.models.capture.packing import attending_within
from ekfac_dist.models.capture.prepare import prepared

CPU = torch.device("cpu")


def sequences(lengths=(4, 9, 14, 7, 14, 21)):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 29, (n,), generator=generator)} for n in lengths]


def packs(model, data, batch_tokens=64):
    with prepared(model):
        return BatchChecks(model, from_examples(data), CPU, batch_tokens).can_pack()


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen2ForCausalLM", "MixtralForCausalLM"]
)
def test_factors_are_the_same_packed_and_padded(name, monkeypatch):
    model, data = tiny_model(name).double(), sequences()
    assert packs(model, data)
    # The data's labels: drawn anew in the refit, they reach into the null space of an expert's few
    # gradients, whose basis is arbitrary.
    fit = {"accumulate": "float64", "batch_tokens": 64, "labels": "data"}
    packed = estimate_factors(model, data, **fit)
    monkeypatch.setattr(BatchChecks, "can_pack", lambda self: False)
    padded = estimate_factors(model, data, **fit)
    for module in padded.modules:
        assert relative(dense_E(packed, module), dense_E(padded, module)) < 1e-9


@pytest.mark.parametrize("name", ["BloomForCausalLM", "RwkvForCausalLM", "GPTNeoForCausalLM"])
def test_a_model_that_computes_in_another_way_is_not_packed(name):
    assert not packs(tiny_model(name).double(), sequences())


def test_a_window_matters_only_where_a_sequence_is_longer():
    data = sequences()
    wide = tiny_model("MistralForCausalLM", sliding_window=32).double()
    assert packs(wide, data)
    assert not packs(tiny_model("MistralForCausalLM", sliding_window=6).double(), data)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_chunk_size": 16},
        # Scaled by the place in the row, past so many positions of it.
        {
            "no_rope_layers": [1, 0],
            "floor_scale": 40,
            "attn_scale": 0.5,
            "attn_temperature_tuning": True,
        },
    ],
)
def test_attention_by_the_place_in_the_row_is_found_out(settings):
    data = sequences((3, 30, 8, 21, 5, 17))
    assert not packs(tiny_model("Llama4ForCausalLM", **settings).double(), data, 128)
    assert packs(tiny_model("Llama4ForCausalLM").double(), data, 128)


def test_a_batch_without_padding_is_not_tried():
    model, seen = build("llama"), []
    model.register_forward_hook(lambda *_: seen.append(1))
    assert not packs(model, sequences(), batch_tokens=1)
    assert not seen


def test_a_model_that_cannot_do_with_such_a_row_is_given_none(monkeypatch):
    model = build("llama")
    plain = model.forward

    def forward(*args, position_ids=None, **kwargs):
        assert position_ids is None
        return plain(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    assert not packs(model, sequences())
    assert model.config._attn_implementation == "sdpa"


def test_sequences_of_one_length_need_no_packing():
    model = build("llama")
    assert not packs(model, sequences((9, 9, 9)))
    assert packs(model, sequences((9, 9, 10)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_that_sees_other_sequences_is_found_out(dtype, monkeypatch):
    model = build("llama").to(dtype)
    assert packs(model, sequences())
    attend = packing.sdpa_attention_forward
    monkeypatch.setattr(
        packing,
        "_attend_within_sequences",
        lambda module, q, k, v, mask, **kwargs: attend(
            module, q, k, v, attention_mask=None, **kwargs
        ),
    )
    assert not packs(model, sequences())


def test_a_model_is_left_as_it_was_whatever_happens():
    model = build("llama")
    batch = from_examples(sequences()).packing().batch([0, 1])

    def fails():
        with attending_within(model, batch):
            assert model.config._attn_implementation == packing.IMPLEMENTATION
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert not packs(model, sequences())
    assert model.config._attn_implementation == "eager"


def test_a_packed_batch_has_every_sequence_once_and_no_padding():
    data = sequences((3, 5, 4))
    data[1]["labels"] = data[1]["input_ids"].clone()
    data[1]["labels"][:3] = NO_LABEL
    batch = from_examples(data).packing().batch([1, 0, 2])
    expected = torch.cat([data[k]["input_ids"][:-1] for k in (1, 0, 2)])
    assert batch.inputs["input_ids"].tolist() == [expected.tolist()]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert "attention_mask" not in batch.inputs
    assert batch.packed == batch.grid("").lengths == (4, 2, 3)
    assert batch.grid("").real is None
    assert batch.grid("").size == batch.num_positions == 9
    assert batch.labelled.flat.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert batch.labelled.sequences.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert batch.labelled.offsets.tolist() == [2, 3, 0, 1, 0, 1, 2]
    assert from_examples(data).packing().batch([1]).packed is None


def test_sampled_labels_are_the_same_packed_and_padded():
    data = sequences()
    data[2]["labels"] = data[2]["input_ids"].clone()
    data[2]["labels"][:5] = NO_LABEL
    plain, rule = from_examples(data), LabelRule("sampled", 3, 1)
    found = {}
    for name, source in (("padded", plain), ("packed", plain.packing())):
        batch = source.batch([4, 2, 0])
        labels = batch.inputs["labels"]
        generator = torch.Generator().manual_seed(1)
        row = torch.randn(31, generator=generator)  # one softmax everywhere
        logits = row.expand(*labels.shape, 31)
        result = logit_gradient(logits, labels, batch, rule)
        found[name] = (result.labels.tolist(), result.losses.tolist())
        assert torch.equal(result.gradient.abs().sum(-1) > 0, labels != NO_LABEL)
    assert found["packed"] == found["padded"]
