"""Tasks beside causal language modelling: factors and scores against dense autograd."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.dense import dense_influence, dense_of_losses, drawn_targets, relative
from helpers.task_models import (
    VOCAB,
    bart,
    bert,
    classified_examples,
    masked_examples,
    t5,
    tiny,
    translated_examples,
)
from helpers.workshop import run_here, write_jsonl
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import ekfac_dist
from ekfac_dist import (
    LossTask,
    MaskedLM,
    Seq2SeqLM,
    SequenceClassification,
    Task,
    estimate_factors,
    influence_scores,
)
from ekfac_dist.errors import ConfigError, DataError, ModelError, StoreError
from ekfac_dist.models.capture.labels import COVARIANCE_PASS, REFIT_PASS, uniforms

EXACT = 1e-10
FIT = {"accumulate": "float64", "batch_tokens": 24}


def tensors(example):
    return {
        name: torch.as_tensor(np.asarray(value)[None])
        for name, value in example.items()
        if name != "labels"
    }


def nll(logits, labels):
    return nn.functional.cross_entropy(logits.double(), labels, ignore_index=-100, reduction="sum")


def loss_of(model, example, task, labels=None):
    """One example's loss, alone, by the task's own definition."""
    labels = torch.as_tensor(np.asarray(example["labels"] if labels is None else labels))
    inputs = tensors(example)
    if isinstance(task, Seq2SeqLM):
        given = torch.as_tensor(example["labels"])[None]
        start = torch.full((1, 1), model.config.decoder_start_token_id)
        shifted = torch.cat([start, given[:, :-1]], 1)
        logits = model(**inputs, decoder_input_ids=shifted).logits[0]
    else:
        logits = model(**inputs).logits[0]
    if isinstance(task, SequenceClassification):
        logits, labels = logits[None], labels[None]
    return nll(logits, labels)


CASES = {
    "BERT, masked": (bert, masked_examples, MaskedLM()),
    "BERT, classifier": (
        lambda: bert(BertForSequenceClassification),
        classified_examples,
        SequenceClassification(),
    ),
    "T5": (t5, translated_examples, Seq2SeqLM()),
    "BART": (bart, translated_examples, Seq2SeqLM()),
}


def compare(factors, oracle):
    for name, expected in oracle.items():
        fitted = factors.module(name)
        Q = torch.kron(fitted.basis_OO, fitted.basis_II)
        assert relative(fitted.lambda_OI.flatten(), torch.diag(Q.T @ expected.F @ Q)) < EXACT
        A, S = sums_of(factors, name)
        assert relative(A, expected.A) < EXACT
        assert relative(S, expected.S) < EXACT


def sums_of(factors, name):
    """A and S from their eigenbases."""
    module, source = factors.modules[name], factors._source
    found = []
    for factor, size in ((module.input, module.input_size), (module.output, module.num_outputs)):
        file = f"eigenbasis/{factor}.safetensors"
        Q = source.tensor(file, "eigenvectors", (size, size))
        values = source.tensor(file, "eigenvalues", (size,))
        found.append(Q @ torch.diag(values) @ Q.T)
    return found


@pytest.mark.parametrize("case", CASES)
def test_factors_are_those_of_dense_autograd(case):
    make, some, task = CASES[case]
    model, data = make(), some(9)
    factors = estimate_factors(model, data, labels="data", task=task, **FIT)
    coverage = factors.manifest["coverage"]
    assert coverage["tracked_parameters"] == coverage["mlp_parameters"] > 0
    assert factors.manifest["fisher"]["task"] == type(task).__name__
    compare(
        factors,
        dense_of_losses(
            model, [lambda e=e: loss_of(model, e, task) for e in data], list(factors.modules)
        ),
    )


@pytest.mark.parametrize("case", CASES)
def test_sampled_labels_are_the_inverse_cdf_of_the_models_own_softmax(case):
    make, some, task = CASES[case]
    model, data = make(), some(4)
    factors = estimate_factors(model, data, task=task, seed=5, **FIT)

    def drawn(number, which):
        example = data[number]
        has_label = np.atleast_1d(np.asarray(example["labels"]) != -100)
        caught = []
        loss_of(Watched(model, caught), example, task)
        logits = caught[0][0]
        logits = logits[None] if logits.ndim == 1 else logits
        uniform = uniforms(5, which, number, len(logits))
        labels = drawn_targets(Fixed(logits), torch.zeros(len(logits)), has_label, uniform)
        return labels[0] if np.ndim(example["labels"]) == 0 else labels

    for which in (COVARIANCE_PASS, REFIT_PASS):
        labels = [drawn(number, which) for number in range(len(data))]
        oracle = dense_of_losses(
            model,
            [
                lambda e=e, found=found: loss_of(model, e, task, found)
                for e, found in zip(data, labels, strict=True)
            ],
            list(factors.modules),
        )
        for name, expected in oracle.items():
            if which == COVARIANCE_PASS:
                assert relative(sums_of(factors, name)[1], expected.S) < EXACT
            else:
                fitted = factors.module(name)
                Q = torch.kron(fitted.basis_OO, fitted.basis_II)
                diagonal = torch.diag(Q.T @ expected.F @ Q)
                assert relative(fitted.lambda_OI.flatten(), diagonal) < EXACT


class Watched:
    """A model whose logits are remembered."""

    def __init__(self, model, caught):
        self.model, self.caught, self.config = model, caught, model.config

    def __call__(self, **inputs):
        with torch.no_grad():
            output = self.model(**inputs)
        self.caught.append(output.logits)
        return output


class Fixed:
    """What `drawn_targets` takes for a model: always the same logits."""

    def __init__(self, logits):
        self.logits = logits[None]

    def __call__(self, **inputs):
        return self


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_dense_gradients(case):
    make, some, task = CASES[case]
    model, train, queries = make(), some(8), some(3, seed=7)
    factors = estimate_factors(model, train, labels="data", task=task, **FIT)
    answer = influence_scores(
        model, factors, queries, train, task=task, per_token="all", top_k=3, batch_tokens=20
    )
    names = list(factors.modules)
    of_train, of_queries = (
        dense_of_losses(model, [lambda e=e: loss_of(model, e, task) for e in data], names)
        for data in (train, queries)
    )
    expected = dense_influence(of_train, of_queries)
    assert relative(answer.scores.double(), expected) < 1e-9
    starts = answer.token_offsets
    summed = [answer.token_scores[:, a:b].sum(1) for a, b in pairwise(starts)]
    assert relative(torch.stack(summed, 1), answer.scores) < 1e-9


def test_padding_batches_and_their_order_change_nothing():
    model, data = bert(), masked_examples(9)
    padded = []
    for k, example in enumerate(data):
        wide = {name: np.pad(v, (0, 12 - len(v))) for name, v in example.items()}
        wide["labels"][len(example["labels"]) :] = -100
        wide["input_ids"][len(example["labels"]) :] = 1 + k  # garbage
        wide["attention_mask"] = np.arange(12) < len(example["labels"])
        padded.append(wide)
    batched = [
        {name: np.stack([e[name] for e in padded[k : k + 3]]) for name in padded[0]}
        for k in (0, 3, 6)
    ]
    fits = [
        estimate_factors(model, given, task=MaskedLM(), accumulate="float64", batch_tokens=tokens)
        for given, tokens in ((data, 4096), (padded, 9), (batched, 30))
    ]
    first = fits[0]
    for other in fits[1:]:
        for key in ("num_sequences", "num_positions", "num_labels"):
            assert other.manifest["data"][key] == first.manifest["data"][key]
        for name in first.modules:
            one, two = first.module(name), other.module(name)
            probe = {name: torch.randn(one.lambda_OI.shape, dtype=torch.float64)}
            assert relative(other.apply(probe)[name], first.apply(probe)[name]) < EXACT
            assert relative(one.lambda_OI.sum(), two.lambda_OI.sum()) < EXACT


def test_encoder_and_decoder_count_their_own_positions(tmp_path):
    data = translated_examples(7)
    factors = estimate_factors(t5(), data, task=Seq2SeqLM(), output=tmp_path / "f")
    num_inputs = sum(len(e["input_ids"]) for e in data)
    num_labels = sum(len(e["labels"]) for e in data)
    from safetensors import safe_open

    for name in factors.modules:
        with safe_open(tmp_path / "f" / "covariance" / f"{name}.output.safetensors", "pt") as file:
            count = int(file.metadata()["count"])
        assert count == (num_inputs if name.startswith("encoder") else num_labels)
    assert factors.manifest["data"]["num_positions"] == num_inputs + num_labels
    assert factors.manifest["data"]["num_labels"] == num_labels


class Regression(LossTask):
    """y = f(x) + a standard normal number, so −log p is half the squared distance."""

    def losses(self, model, batch, draws):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        means = model(**inputs).logits[:, 0]
        targets = batch["labels"] if draws is None else means.detach() + draws.normal(1)[:, 0]
        return 0.5 * (means - targets).square()


def regression_examples(number):
    draw = np.random.default_rng(1)
    return [
        {"input_ids": draw.integers(1, VOCAB, draw.integers(2, 9)), "labels": draw.normal()}
        for _ in range(number)
    ]


@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_a_loss_of_ones_own_samples_its_own_labels(labels):
    model, data = bert(BertForSequenceClassification, num_labels=1), regression_examples(8)
    fits = [
        estimate_factors(model, data, task=Regression(), labels=labels, seed=3, **(FIT | changes))
        for changes in ({}, {"batch_tokens": 9})
    ]

    def loss(example, number, which):
        mean = model(**tensors(example)).logits[0, 0]
        if labels == "data":
            return 0.5 * (mean - float(example["labels"])) ** 2
        (uniform,) = uniforms(3, which, number, 1)
        noise = torch.special.ndtri(torch.tensor(uniform + 2.0**-53, dtype=torch.float64))
        return 0.5 * (mean - mean.detach() - noise) ** 2

    names = list(fits[0].modules)
    by_pass = [
        dense_of_losses(
            model,
            [lambda e=e, k=k, w=which: loss(e, k, w) for k, e in enumerate(data)],
            names,
        )
        for which in (COVARIANCE_PASS, REFIT_PASS)
    ]
    for factors in fits:
        for name in names:
            assert relative(sums_of(factors, name)[1], by_pass[0][name].S) < EXACT
            fitted = factors.module(name)
            Q = torch.kron(fitted.basis_OO, fitted.basis_II)
            diagonal = torch.diag(Q.T @ by_pass[1][name].F @ Q)
            assert relative(fitted.lambda_OI.flatten(), diagonal) < EXACT


class SecondSegment(Task):
    """A task of a caller's own: only the last token's logits count, as a classifier's."""

    def forward(self, model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        return logits[:, -1], batch["answer"]


def test_a_task_of_ones_own_needs_a_forward_alone():
    torch.manual_seed(0)
    from helpers.networks import build

    model = build("gpt2")
    draw = np.random.default_rng(0)
    data = [{"input_ids": draw.integers(1, 20, 6), "answer": draw.integers(20)} for _ in range(7)]
    factors = estimate_factors(model, data, task=SecondSegment(), labels="data", **FIT)
    oracle = dense_of_losses(
        model,
        [
            lambda e=e: nll(
                model(input_ids=torch.as_tensor(e["input_ids"])[None]).logits[:, -1],
                torch.as_tensor(e["answer"])[None],
            )
            for e in data
        ],
        list(factors.modules),
    )
    compare(factors, oracle)


def with_gaps(examples, seed=3):
    """The same, a token inside that is no label left out by an `attention_mask`."""
    draw, found = np.random.default_rng(seed), []
    for example in examples:
        mask = np.ones(len(example["input_ids"]), dtype=np.int64)
        inside = [t for t in range(1, len(mask) - 1) if example["labels"][t] == -100]
        if inside:
            mask[draw.choice(inside)] = 0
        found.append(example | {"attention_mask": mask})
    assert any(not example["attention_mask"].all() for example in found)
    return found


def test_masks_with_zeros_inside_are_the_models_own_to_read_and_such_positions_do_not_count():
    model, data, task = bert(), with_gaps(masked_examples(7)), MaskedLM()
    factors = estimate_factors(model, data, labels="data", task=task, **FIT)
    real = sum(int(example["attention_mask"].sum()) for example in data)
    assert factors.manifest["data"]["num_positions"] == real
    oracle = dense_of_losses(
        model, [lambda e=e: loss_of(model, e, task) for e in data], list(factors.modules)
    )
    for name, dense in oracle.items():
        for kept, acts, grads in zip(data, dense.acts, dense.grads, strict=True):
            unread = kept["attention_mask"] == 0
            acts[unread] = 0
            assert not grads[unread].any()
        fitted = factors.module(name)
        Q = torch.kron(fitted.basis_OO, fitted.basis_II)
        assert relative(fitted.lambda_OI.flatten(), torch.diag(Q.T @ dense.F @ Q)) < EXACT
        A, S = sums_of(factors, name)
        total = sum(map(len, dense.acts))
        assert relative(A, dense.A * total / real) < EXACT
        assert relative(S, dense.S * total / real) < EXACT


def test_position_ids_of_an_example_are_the_models_to_read():
    model, data, task = bert(), masked_examples(6), MaskedLM()
    for example in data:
        example["position_ids"] = np.arange(len(example["input_ids"]))[::-1].copy() + 5
    factors = estimate_factors(model, data, labels="data", task=task, **FIT)
    losses = [lambda e=e: loss_of(model, e, task) for e in data]
    compare(factors, dense_of_losses(model, losses, list(factors.modules)))


def test_decoder_positions_that_a_mask_leaves_out_do_not_count():
    model, data, task = t5(), translated_examples(6), Seq2SeqLM()
    for example in data:
        example["decoder_attention_mask"] = np.ones(len(example["labels"]), dtype=np.int64)
        if len(example["labels"]) > 2:
            example["labels"][1] = -100
            example["decoder_attention_mask"][1] = 0
    left_out = sum(int((e["decoder_attention_mask"] == 0).sum()) for e in data)
    assert left_out
    factors = estimate_factors(model, data, task=task, **FIT)
    expected = sum(len(e["input_ids"]) + len(e["labels"]) for e in data) - left_out
    assert factors.manifest["data"]["num_positions"] == expected
    data[2]["labels"][1] = 3
    with pytest.raises(DataError, match="has a label where its decoder_attention_mask is 0"):
        estimate_factors(model, data, task=task, **FIT)


def test_a_forward_that_reads_what_a_mask_leaves_out_is_refused():
    class Unmasked(MaskedLM):
        def forward(self, model, batch):
            return super().forward(model, {n: t for n, t in batch.items() if n != "attention_mask"})

    data = masked_examples(6)
    for example in data:
        for name, value in example.items():
            example[name] = np.resize(value, 6)  # of one length, so that there is no other padding
    data = with_gaps(data)
    with pytest.raises(ModelError, match="is 0 inside it, but its loss depends on the tokens ther"):
        estimate_factors(bert(), data, task=Unmasked(), labels="data", **FIT)


def test_albert_is_refused_with_the_reason():
    config = AlbertConfig(
        vocab_size=VOCAB,
        embedding_size=8,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=24,
    )
    with pytest.raises(ModelError, match=r"ffn is used 3 times in one forward; its uses share"):
        estimate_factors(tiny(AlbertForMaskedLM, config), masked_examples(4), task=MaskedLM())


def test_mlps_that_are_applied_in_chunks_are_as_those_that_are_not():
    data, task = masked_examples(6), MaskedLM()
    for example in data:
        for name, value in example.items():
            example[name] = np.resize(value, 6)  # a multiple of the chunks
    whole, chunked = bert(), bert(chunk_size_feed_forward=2)
    one, two = (estimate_factors(m, data, task=task, **FIT) for m in (whole, chunked))
    for name in one.modules:
        assert torch.equal(one.module(name).lambda_OI, two.module(name).lambda_OI)
    assert chunked.bert.encoder.layer[0].chunk_size_feed_forward == 2


def test_a_model_that_sees_what_it_would_predict_is_no_causal_language_model():
    data = [{"input_ids": np.arange(2, 9)}]
    with pytest.raises(ModelError, match="sees the tokens that it would have to predict"):
        estimate_factors(bert(), data)


def test_factors_are_of_their_task_alone():
    model, data = bert(), masked_examples(6)
    factors = estimate_factors(model, data, task=MaskedLM())
    with pytest.raises(StoreError, match="fitted with the task MaskedLM, not Regression"):
        influence_scores(model, factors, data[:1], data, task=Regression())


@pytest.mark.parametrize(
    ("data", "task", "error", "sentence"),
    [
        (masked_examples(2), MaskedLM, ConfigError, "task is the class MaskedLM; give an instance"),
        (["text"], MaskedLM(), DataError, "The data holds a str; give mappings"),
        ([{"input_ids": "text"}], MaskedLM(), DataError, "input_ids is str, no array of numbers"),
        ([], MaskedLM(), DataError, "no sequences"),
        (
            [*masked_examples(1), {"input_ids": np.arange(3)}],
            MaskedLM(),
            DataError,
            "Example 1 has input_ids; the first has",
        ),
        (
            [{"input_ids": np.arange(3), "labels": np.full(3, -100)}],
            MaskedLM(),
            DataError,
            "None of the 1 examples has a label",
        ),
        (
            [{"input_ids": np.arange(3), "labels": np.full(3, 40)}] * 2,
            MaskedLM(),
            DataError,
            "has label 40, but the model has 23 logits",
        ),
        (
            [{"input_ids": np.full(3, 40), "labels": np.full(3, 4)}],
            MaskedLM(),
            DataError,
            "token id 40, but the model knows 23",
        ),
        (
            [{"input_ids": np.full(30, 4), "labels": np.full(30, 4)}],
            MaskedLM(),
            DataError,
            "has 30 positions, but the model reads 24",
        ),
        (
            [
                *with_gaps(masked_examples(1)),
                {
                    "input_ids": np.arange(3),
                    "labels": np.arange(3),
                    "token_type_ids": np.zeros(3, dtype=np.int64),
                    "attention_mask": np.array([1, 0, 1]),
                },
            ],
            MaskedLM(),
            DataError,
            "Example 1 has a label at position 1, where its attention_mask is 0",
        ),
        (
            [{"input_ids": np.arange(3), "labels": 1, "attention_mask": np.array([1, 1, 2])}],
            SequenceClassification(),
            DataError,
            "Example 0 has 2 in its attention_mask; it must be 1 at real tokens",
        ),
        (
            [{"input_ids": np.arange(2), "labels": 1, "attention_mask": np.array([0, -np.inf])}],
            SequenceClassification(),
            DataError,
            "Example 0 has -inf in its attention_mask",
        ),
        (translated_examples(3), Seq2SeqLM(), ModelError, "has no encoder; give another task"),
        (classified_examples(3), MaskedLM(), ModelError, "labels of shape"),
        ([{"pixels": np.zeros(3)}], MaskedLM(), DataError, "no input_ids, so their positions"),
        ([{"input_ids": np.arange(3)}], MaskedLM(), DataError, "but no labels; give them"),
        (
            [{"input_ids": np.arange(3), "labels": np.array([1, -1, 2])}],
            MaskedLM(),
            DataError,
            r"has label -1, but .* what has no label is -100",
        ),
        (
            [{"input_ids": np.array([3, -2]), "labels": np.array([1, 2])}],
            MaskedLM(),
            DataError,
            "Example 0 has -2 in input_ids",
        ),
        (
            [{"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]}],
            MaskedLM(),
            DataError,
            "input_ids has rows of different lengths",
        ),
    ],
)
def test_bad_examples_and_tasks_are_refused_in_a_sentence(data, task, error, sentence):
    with pytest.raises(error, match=sentence):
        estimate_factors(bert(), data, task=task, labels="data")


def test_an_encoder_decoder_that_cannot_shift_labels_is_refused():
    model = t5()
    del model.config.decoder_start_token_id
    with pytest.raises(ModelError, match=r"could not shift labels.*decoder_start_token_id"):
        estimate_factors(model, translated_examples(3), task=Seq2SeqLM())


def test_losses_of_another_shape_are_refused():
    class Whole(Regression):
        def losses(self, model, batch, draws):
            return super().losses(model, batch, draws).mean()

    model = bert(BertForSequenceClassification, num_labels=1)
    with pytest.raises(ModelError, match=r"Whole.losses gave \[\] for \d sequences"):
        estimate_factors(model, regression_examples(3), task=Whole())


def test_the_package_names_its_tasks():
    for name in ("Task", "LossTask", "Draws", "CausalLM", "MaskedLM", "Seq2SeqLM"):
        assert getattr(ekfac_dist, name).__name__ == name


def test_the_command_line_refuses_factors_of_another_task(tmp_path):
    estimate_factors(bert(), masked_examples(4), task=MaskedLM(), output=tmp_path / "factors")
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"text": "The worker reads."}])
    given = ["--factors", tmp_path / "factors", "--queries", queries, "--output", tmp_path / "s"]
    done = run_here(["query", *given])
    assert done.returncode == 2
    assert "fitted with the task MaskedLM, not CausalLM" in done.stderr
    assert "Traceback" not in done.stderr


def causal_classifier(model_class, config_class, pad):
    sizes = {"vocab_size": VOCAB, "num_labels": 4, "pad_token_id": pad}
    if config_class is GPT2Config:
        sizes |= {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 24}
        sizes |= {"bos_token_id": 0, "eos_token_id": 1}
    else:
        sizes |= {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    return tiny(model_class, config_class(**sizes))


@pytest.mark.parametrize("pad", [0, 22])
@pytest.mark.parametrize(
    ("model_class", "config_class"),
    [
        (GPT2ForSequenceClassification, GPT2Config),
        (LlamaForSequenceClassification, LlamaConfig),
    ],
)
def test_a_classifier_that_reads_the_last_token_finds_it_before_the_padding(
    model_class, config_class, pad
):
    model, task = causal_classifier(model_class, config_class, pad), SequenceClassification()
    data = classified_examples(9)
    for example in data:
        example["input_ids"] = np.clip(example["input_ids"], 1, 20)
    factors = estimate_factors(model, data, labels="data", task=task, **FIT)
    oracle = dense_of_losses(
        model, [lambda e=e: loss_of(model, e, task) for e in data], list(factors.modules)
    )
    for name, expected in oracle.items():
        found = factors.module(name).lambda_OI.sum()
        # Llama computes its norms in float32 whatever the dtype, in batches of another shape.
        assert relative(found, expected.F.trace()) < 1e-6


def test_a_classifier_without_a_padding_token_is_refused():
    model = causal_classifier(GPT2ForSequenceClassification, GPT2Config, None)
    with pytest.raises(ModelError, match="set pad_token_id in its configuration"):
        estimate_factors(model, classified_examples(5), task=SequenceClassification())


class LastPosition(Task):
    """A task that takes padding for text: the last position of a batch, whatever is there."""

    def forward(self, model, batch):
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return model(**inputs).logits[:, -1], batch["answer"]


def test_a_loss_that_padding_reaches_is_refused():
    draw = np.random.default_rng(0)
    data = [{"input_ids": draw.integers(1, 20, 3 + k), "answer": np.int64(k)} for k in range(5)]
    with pytest.raises(ModelError, match=r"alone and .* with a longer one, so padding reaches it"):
        estimate_factors(bert(), data, task=LastPosition())
    same = [{**example, "input_ids": example["input_ids"][:3]} for example in data]
    estimate_factors(bert(), same, task=LastPosition())


class ManyLabels(LossTask):
    """Each class is there or not."""

    def losses(self, model, batch, draws):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = model(**inputs).logits
        labels = batch["labels"].to(logits.dtype)
        if draws is not None:
            labels = (draws.uniform(logits.shape[1]) < torch.sigmoid(logits.detach())).double()
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(
            1
        )


def test_labels_that_are_as_many_as_padded_positions_stay_whole():
    draw = np.random.default_rng(3)
    model, plain, padded = bert(BertForSequenceClassification, num_labels=8), [], []
    for length in (3, 5, 8, 4):
        ids, labels = draw.integers(1, VOCAB, length), draw.integers(0, 2, 8)
        plain.append({"input_ids": ids, "labels": labels})
        padded.append(
            {
                "input_ids": np.pad(ids, (0, 8 - length)),
                "attention_mask": np.arange(8) < length,
                "labels": labels,
            }
        )
    one, other = (
        estimate_factors(model, data, task=ManyLabels(), labels="data", **FIT)
        for data in (plain, padded)
    )
    for name in one.modules:
        assert relative(one.module(name).lambda_OI.sum(), other.module(name).lambda_OI.sum()) < 1e-9


def test_left_padding_with_fields_that_may_count_positions_is_refused():
    example = {
        "input_ids": np.array([0, 0, 3, 4, 5]),
        "attention_mask": np.array([0, 0, 1, 1, 1]),
        "start_positions": np.int64(3),
    }
    with pytest.raises(DataError, match="padded on the left, and its start_positions"):
        estimate_factors(bert(), [example], task=MaskedLM())


class Forgets(Task):
    """A task that changes the labels it was given."""

    def forward(self, model, batch):
        batch["labels"][:, 0] = -100
        return model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]


def test_labels_that_a_forward_changes_are_read_anew():
    draw = np.random.default_rng(0)
    data = [{"input_ids": (ids := draw.integers(1, 20, 4)), "labels": ids} for _ in range(5)]
    model = bert()
    changed = estimate_factors(model, data, task=Forgets(), labels="data", **FIT)
    assert changed.manifest["data"]["num_labels"] == 5 * 3
    less = [{**e, "labels": np.concatenate([[-100], e["labels"][1:]])} for e in data]
    plain = estimate_factors(model, less, task=MaskedLM(), labels="data", **FIT)
    for name in plain.modules:
        assert relative(changed.module(name).lambda_OI, plain.module(name).lambda_OI) < EXACT


class Whole(Task):
    def forward(self, model, batch):
        return model(batch["input_ids"])


def test_a_forward_that_gives_something_else_is_refused():
    with pytest.raises(ModelError, match=r"Whole\.forward gave MaskedLMOutput; it must give two"):
        estimate_factors(bert(), masked_examples(3), task=Whole())


def test_inputs_of_one_token_are_enough():
    data = [{"input_ids": np.array([k + 2]), "labels": np.int64(k)} for k in range(4)]
    model = bert(BertForSequenceClassification)
    assert estimate_factors(model, data, task=SequenceClassification(), **FIT).modules


def test_given_decoder_inputs_need_no_shift():
    model = t5()
    del model.config.decoder_start_token_id
    data = translated_examples(5)
    for example in data:
        example["decoder_input_ids"] = np.concatenate([[0], example["labels"][:-1]])
    given = estimate_factors(model, data, task=Seq2SeqLM(), labels="data", **FIT)
    plain = estimate_factors(t5(), translated_examples(5), task=Seq2SeqLM(), labels="data", **FIT)
    for name in plain.modules:
        assert relative(given.module(name).lambda_OI, plain.module(name).lambda_OI) < EXACT


def test_experts_in_a_dictionary_see_their_own_tokens():
    config = SwitchTransformersConfig(
        vocab_size=VOCAB,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=2,
        num_heads=2,
        num_experts=3,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
        decoder_start_token_id=0,
    )
    model = tiny(SwitchTransformersForConditionalGeneration, config)
    data, task = translated_examples(7), Seq2SeqLM()
    with torch.no_grad():
        loss_of(model, data[0], task)  # its routers become float32 when it first runs
    factors = estimate_factors(model, data, task=task, labels="data", **(FIT | {"batch_tokens": 1}))
    experts = [name for name in factors.modules if ".experts." in name]
    assert len(experts) > 2
    compared = [name for name in factors.modules if ".experts." not in name]
    oracle = dense_of_losses(model, [lambda e=e: loss_of(model, e, task) for e in data], compared)
    compare_lambdas(factors, oracle)
    in_batches = estimate_factors(model, data, task=task, labels="data", **FIT)
    for name in experts:
        one, other = (f.module(name).lambda_OI.sum() for f in (factors, in_batches))
        assert relative(other, one) < 1e-6


def compare_lambdas(factors, oracle):
    for name, expected in oracle.items():
        assert relative(factors.module(name).lambda_OI.sum(), expected.F.trace()) < 1e-9
