"""Rotary frequencies that follow a batch: each sequence as it is alone in a fresh model."""

import copy
import functools

import numpy as np
import pytest
import torch
from helpers.dense import DenseModule, dense_E, dense_influence, dense_modules, relative
from helpers.families import tiny_model
from helpers.networks import shifted
from torch import nn

from ekfac_dist import MaskedLM, estimate_factors, influence_scores
from ekfac_dist.data.batch_plan import plan_batches
from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.rotary import equal_lengths_above

ORIGINAL = 8  # the length that Phi-3 was first trained on, here
CONTEXT = 32
LENGTHS = (4, 20, 7, 31, 5, 31, 8, 9, 12, 6)
FIT = {"labels": "data", "accumulate": "float64"}
IN_BATCHES = 1e-6  # frequencies are float32


def longrope():
    pairs = 4  # of a head's 8 dimensions
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * pairs,
        "long_factor": [3.0, 5.0, 8.0, 13.0],
        "rope_theta": 100.0,
        "original_max_position_embeddings": ORIGINAL,
    }
    return tiny_model(
        "Phi3ForCausalLM",
        rope_parameters=rope,
        original_max_position_embeddings=ORIGINAL,
        max_position_embeddings=CONTEXT,
    )


def dynamic():
    """A Llama that has read a text longer than its context, and keeps that text's frequencies."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    return tiny_model("LlamaForCausalLM", rope_parameters=rope, max_position_embeddings=CONTEXT)


def sequences(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(1, 29, (n + 1,), generator=generator) for n in lengths]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in tokens]


def compared(names):
    """Modules whose E is compared: those that are small."""
    return [name for name in names if "down_proj" in name]


def alone_in_fresh_models(model, data, names):
    """`DenseModule` of each module, every sequence in a model of its own."""
    found = {name: DenseModule([], [], []) for name in names}
    for example in data:
        for name, one in dense_modules(copy.deepcopy(model), [shifted(example)], names).items():
            for part in ("gradients", "acts", "grads"):
                getattr(found[name], part).extend(getattr(one, part))
    return found


@functools.cache
def expected():
    model, data = longrope(), sequences(LENGTHS)
    names = [n for n, m in model.named_modules() if "mlp." in n and isinstance(m, nn.Linear)]
    return alone_in_fresh_models(model, data, names)


@pytest.mark.parametrize("budget", [1, 24, 64, 1000])
@pytest.mark.parametrize("used_before", [False, True])
def test_factors_are_those_of_each_sequence_alone_in_a_fresh_model(budget, used_before):
    model, data = longrope(), sequences(LENGTHS)
    if used_before:
        model(torch.ones(1, CONTEXT, dtype=torch.int64))
    frequencies = model.model.rotary_emb.inv_freq.clone()
    factors = estimate_factors(model, data, batch_tokens=budget, **FIT)
    for name in compared(factors.modules):
        assert relative(dense_E(factors, name), expected()[name].E()) < IN_BATCHES
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)  # as it came


def test_the_frequencies_matter():
    data = sequences(LENGTHS)
    model = longrope()
    fixed = copy.deepcopy(model)
    rotary = fixed.model.rotary_emb
    rotary.long_inv_freq = rotary.original_inv_freq.clone()  # as if every sequence were short
    names = compared(expected())
    short = dense_modules(fixed, [shifted(example) for example in data], names)
    assert relative(short[names[0]].E(), expected()[names[0]].E()) > 0.05


def test_scores_are_those_of_each_sequence_alone_in_a_fresh_model():
    model, data = longrope(), sequences(LENGTHS)
    queries = sequences((5, 20, 7), seed=1)
    factors = estimate_factors(model, data, batch_tokens=64, **FIT)
    asked = alone_in_fresh_models(longrope(), queries, list(expected()))
    wanted = dense_influence(expected(), asked)
    for budget in (1, 1000):
        found = influence_scores(
            model, factors, queries, data, batch_tokens=budget, top_k=4, per_token="top"
        )
        assert relative(found.scores, wanted) < IN_BATCHES
        of_details = found.details.module_scores.sum(1)
        assert relative(of_details, wanted[found.details.rows, found.details.columns]) < IN_BATCHES


def test_what_a_model_has_read_before_does_not_matter():
    data = sequences((CONTEXT, 9, CONTEXT, 5))
    fresh, used = dynamic(), dynamic()
    used(torch.ones(1, 3 * CONTEXT, dtype=torch.int64))
    assert not torch.equal(used.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)
    stale = used.model.rotary_emb.inv_freq.clone()
    names = [n for n, m in fresh.named_modules() if "mlp." in n and isinstance(m, nn.Linear)]
    dense = alone_in_fresh_models(fresh, data, names)
    for budget in (1, 1000):
        factors = estimate_factors(used, data, batch_tokens=budget, **FIT)
        for name in compared(names):
            assert relative(dense_E(factors, name), dense[name].E()) < IN_BATCHES
    assert torch.equal(used.model.rotary_emb.inv_freq, stale)
    assert used.model.rotary_emb.max_seq_len_cached == 3 * CONTEXT


def test_only_sequences_of_one_length_share_a_batch_above_the_limit():
    assert equal_lengths_above(longrope()) == ORIGINAL
    assert equal_lengths_above(dynamic()) == CONTEXT
    assert equal_lengths_above(tiny_model("LlamaForCausalLM")) is None
    lengths = np.array(LENGTHS)
    batches = plan_batches(lengths, 1000, ORIGINAL)
    assert sorted(n for batch in batches for n in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(set(lengths[batch])) == 1 or lengths[batch].max() <= ORIGINAL
    assert [lengths[batch].tolist() for batch in batches] == [
        [31, 31],
        [20],
        [12],
        [9],
        [8, 7, 6, 5, 4],
    ]


def test_batches_of_another_task_are_not_cut_by_length(tmp_path):
    data = [{"input_ids": e["input_ids"], "labels": e["labels"]} for e in sequences((5, 9, 12))]

    class Task(MaskedLM):
        """Of a model that sees what is before alone."""

    with pytest.raises(ModelError, match=r"rotary.*task Task.*batch_tokens=1"):
        estimate_factors(longrope(), data, batch_tokens=64, task=Task(), **FIT)
    estimate_factors(longrope(), data, batch_tokens=1, task=Task(), **FIT)


class Remembers(nn.Module):
    """Positions scaled by the longest batch so far, as some models' own code does."""

    def __init__(self):
        super().__init__()
        self.longest = 0

    def forward(self, hidden):
        self.longest = max(self.longest, hidden.shape[1])
        return hidden * (1 + 0.1 * self.longest)


class Beside(nn.Module):
    """Scaled by the length of this batch."""

    def forward(self, hidden):
        return hidden * (1 + 0.1 * hidden.shape[1])


@pytest.mark.parametrize(
    ("odd", "budget", "said"),
    [
        (Remembers, 64, r"after a longer one than before it.*order of the data"),
        (Remembers, 1, r"after a longer one than before it.*order of the data"),
        (Beside, 64, r"beside a longer one than alone.*batch_tokens: 1"),
    ],
)
def test_a_model_that_depends_on_the_batch_in_another_way_is_refused(odd, budget, said):
    model = tiny_model("LlamaForCausalLM")
    added = odd()
    model.model.embed_tokens.register_forward_hook(lambda *args: added(args[-1]))
    with pytest.raises(ModelError, match=said):
        estimate_factors(model, sequences(LENGTHS), batch_tokens=budget, **FIT)


def test_a_model_that_depends_on_the_batch_is_fitted_sequence_by_sequence():
    model, data = tiny_model("LlamaForCausalLM"), sequences(LENGTHS)
    added = Beside()
    model.model.embed_tokens.register_forward_hook(lambda *args: added(args[-1]))
    factors = estimate_factors(model, data, batch_tokens=1, **FIT)
    names = list(factors.modules)
    dense = dense_modules(model, [shifted(example) for example in data], names)
    for name in compared(names):
        assert relative(dense_E(factors, name), dense[name].E()) < IN_BATCHES
