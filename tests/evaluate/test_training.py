"""The recipe, step by step, against plain torch; what subsets change and what they do not."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.networks import build

from ekfac_dist.config import TrainingConfig
from ekfac_dist.data.sequences import Sequence, Sequences
from ekfac_dist.errors import ConfigError, DataError
from ekfac_dist.evaluate.training import (
    batches_of,
    epoch_order,
    num_steps,
    query_losses,
    train,
)

DRAW = np.random.default_rng(0)
LENGTHS = [3, 9, 5, 7, 4, 8, 6, 2, 9, 5, 3]
ALL = np.ones(len(LENGTHS), dtype=bool)


def sequences():
    made = []
    for k, length in enumerate(LENGTHS):
        ids = np.random.default_rng(k).integers(1, 19, size=length + 1)
        targets = ids[1:].copy()
        targets[: k % 3] = -100  # a prompt's tokens
        made.append(Sequence(k, ids[:-1], targets if length > 3 else ids[1:]))
    return made


@pytest.fixture
def model():
    return build("llama")


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def test_training_is_plain_adamw_on_the_mean_loss_of_the_labels(model):
    recipe = TrainingConfig(
        epochs=2, batch_size=4, learning_rate=0.01, weight_decay=0.1, clip_norm=0.3, warmup_steps=2
    )
    plain, data, seed = copy.deepcopy(model), sequences(), 3
    trained = train(model, data, ALL, recipe, seed)

    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1)
    total, step, losses = 6, 0, []
    for epoch in range(2):
        order = epoch_order(len(data), seed, epoch)
        for start in range(0, len(order), 4):
            # A linear warm-up over two steps, then linearly to zero.
            rate = step / 2 if step < 2 else (total - step) / (total - 2)
            optimizer.param_groups[0]["lr"] = 0.01 * rate
            loss, num_labels = 0, 0
            for k in order[start : start + 4]:  # one at a time, so without padding
                ids, targets = torch.tensor(data[k].inputs), torch.tensor(data[k].targets)
                logs = plain(input_ids=ids[None]).logits[0].log_softmax(-1)
                labelled = torch.nonzero(targets != -100)[:, 0]
                loss = loss - logs[labelled, targets[labelled]].sum()
                num_labels += len(labelled)
            losses.append((loss.item(), num_labels, epoch))
            optimizer.zero_grad()
            (loss / num_labels).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
            optimizer.step()
            step += 1
    found, expected = weights(model), weights(plain)
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12), name
    for epoch, mean in enumerate((trained.first_loss, trained.last_loss)):
        sums = [sum(part) for part in list(zip(*[x for x in losses if x[2] == epoch]))[:2]]  # noqa: B905
        assert mean == pytest.approx(sums[0] / sums[1], rel=1e-12)
    assert trained.steps == step == num_steps(len(data), len(data), recipe)


@pytest.mark.parametrize("batches", ["gaps", "refilled"])
def test_a_subset_is_trained_on_as_if_the_others_were_not_there(model, batches):
    recipe = TrainingConfig(epochs=2, batch_size=3, learning_rate=0.01, batches=batches)
    kept = ALL.copy()
    kept[[1, 4, 8]] = False
    twin, other = copy.deepcopy(model), sequences()
    for k in (1, 4, 8):  # whatever they hold
        other[k] = Sequence(k, other[k].inputs * 0 + 5, other[k].targets * 0 + 7)
    train(model, sequences(), kept, recipe, 0)
    train(twin, other, kept, recipe, 0)
    assert same(weights(model), weights(twin))


def test_gaps_keep_the_steps_of_all_sequences_and_refilled_batches_are_full():
    kept = ALL.copy()
    kept[:6] = False
    gaps = TrainingConfig(epochs=3, batch_size=4)
    for epoch, batches in enumerate(batches_of(kept, gaps, 7)):
        order = epoch_order(len(ALL), 7, epoch)
        cuts = [order[start : start + 4] for start in range(0, len(order), 4)]
        assert [b.tolist() for b in batches] == [[k for k in cut if kept[k]] for cut in cuts]
    refilled = TrainingConfig(epochs=3, batch_size=4, batches="refilled")
    for batches in batches_of(kept, refilled, 7):
        assert [len(batch) for batch in batches] == [4, 1]
        assert sorted(np.concatenate(batches).tolist()) == np.flatnonzero(kept).tolist()
    assert num_steps(11, 5, gaps) == 9
    assert num_steps(11, 5, refilled) == 6


def test_equal_seeds_give_equal_weights_and_others_do_not(model):
    recipe = TrainingConfig(epochs=1, batch_size=4, learning_rate=0.01)
    results = []
    for seed in (0, 0, 1):
        twin = copy.deepcopy(model)
        train(twin, sequences(), ALL, recipe, seed)
        results.append(weights(twin))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_a_batch_that_is_all_gap_takes_no_step(model):
    kept = np.zeros(len(ALL), dtype=bool)
    kept[0] = True
    trained = train(model, sequences(), kept, TrainingConfig(epochs=1, batch_size=1), 0)
    assert trained.steps == len(ALL)
    assert np.isfinite(trained.last_loss)


def test_a_loss_that_is_not_finite_is_named_with_its_step(model):
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"diverges: the loss of step 1 of 3 is nan.*learning_r"):
        train(model, sequences(), ALL, TrainingConfig(epochs=1, batch_size=4), 0)


def test_nothing_to_train_on_is_refused(model):
    with pytest.raises(DataError, match="keeps no sequence"):
        train(model, sequences(), ~ALL, TrainingConfig(), 0)


def test_losses_of_queries_are_sums_over_their_labels(model):
    rows = {"input_ids": [], "labels": [], "tokens_cut": []}
    for k, length in enumerate(LENGTHS):
        ids = np.random.default_rng(k).integers(1, 19, size=length + 1).tolist()
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * (1 + k % 2) + ids[1 + k % 2 :])
        rows["tokens_cut"].append(0)
    queries = Sequences(Dataset.from_dict(rows))
    model.eval()
    found = query_losses(model, queries, batch_tokens=20)
    for k in range(len(queries)):
        ids, labels = rows["input_ids"][k], rows["labels"][k]
        logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = -sum(logs[t - 1, labels[t]] for t in range(1, len(ids)) if labels[t] != -100)
        assert found[k] == pytest.approx(expected.item(), rel=1e-10)
