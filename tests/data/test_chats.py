"""Chats: labels on the assistant's last turn, by hand for two templates."""

import itertools

import numpy as np
import pytest
from helpers.tokenised import labelled, sequences_of, tokens
from helpers.workshop import EOS, tiny_tokenizer

from ekfac_dist.config import DataConfig
from ekfac_dist.data.chats import messages_of, rendered
from ekfac_dist.errors import ConfigError, DataError
from ekfac_dist.influence.examples import sequences_of as sequences_from_python
from ekfac_dist.influence.queries import tokenize_queries
from ekfac_dist.influence.query_texts import parse_query
from ekfac_dist.models.capture.tasks import CAUSAL_LM

# Of each turn a header, and an end; as ChatML.
HEADERS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + EOS + "\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# The user's turn in brackets, and the assistant's bare; as Llama 2.
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}" + "<|bos|>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} " + EOS + "{% endif %}{% endfor %}"
)
# Writes a turn that is not the last one differently.
FORGETFUL = (
    "{% for m in messages %}{% if loop.last %}{{ m.content }}{% else %}-{% endif %}{% endfor %}"
)
STRICT = "{{ raise_exception('no such role') }}"


def chat(*contents):
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


BY_HAND = [
    (HEADERS, f"<user>a batch{EOS}\n<assistant>", f"the sum{EOS}\n"),
    (BRACKETS, "<|bos|>[INST] a batch [/INST]", f" the sum {EOS}"),
]


@pytest.mark.parametrize(("template", "before", "answer"), BY_HAND)
def test_the_last_turns_tokens_alone_carry_labels(template, before, answer):
    tokenizer = with_template(template)
    sequences = sequences_of([{"chat": chat("a batch", "the sum")}], tokenizer, messages="chat")
    text_ids = tokenizer(before + answer, add_special_tokens=False)["input_ids"]
    before_ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    assert tokens(sequences) == text_ids  # and no special token besides the template's own
    assert text_ids[: len(before_ids)] == before_ids
    assert labelled(sequences) == text_ids[len(before_ids) :]


@pytest.mark.parametrize(("template", "before", "answer"), BY_HAND)
def test_a_query_is_the_same_chat(template, before, answer):
    tokenizer = with_template(template)
    query = parse_query({"messages": chat("a batch", "the sum")}, "line 1", 1)
    found = tokenize_queries([query], tokenizer, None)
    data = sequences_of([{"chat": chat("a batch", "the sum")}], tokenizer, messages="chat")
    assert np.array_equal(found.sequences[0].inputs, data[0].inputs)
    assert np.array_equal(found.sequences[0].targets, data[0].targets)
    assert (found.texts[0].prompt, found.texts[0].completion) == (before, answer)


@pytest.mark.parametrize(("template", "before", "answer"), BY_HAND)
def test_a_contrast_of_chats_is_of_two_last_turns(template, before, answer):
    tokenizer = with_template(template)
    asked = [chat("a batch", "the sum"), chat("a batch", "no one")]
    query = parse_query({"messages": asked[0], "against": "no one"}, "line 1", 1)
    found = tokenize_queries([query], tokenizer, None)
    data = sequences_of([{"chat": each} for each in asked], tokenizer, messages="chat")
    for side in (0, 1):
        assert np.array_equal(found.sequences[side].inputs, data[side].inputs)
        assert np.array_equal(found.sequences[side].targets, data[side].targets)
    rendered = (found.texts[0].completion, found.texts[0].against)
    assert rendered == (answer, answer.replace("the sum", "no one"))


def test_earlier_answers_carry_no_label():
    tokenizer = with_template(HEADERS)
    long = chat("a batch", "the sum", "another", "no")
    sequences = sequences_of([{"chat": long}], tokenizer, messages="chat")
    assert labelled(sequences) == tokenizer(f"no{EOS}\n", add_special_tokens=False)["input_ids"]


def test_chats_and_texts_may_be_among_the_same_queries_in_any_order():
    tokenizer = with_template(HEADERS)
    fields = [
        {"prompt": "the", "completion": " batch"},
        {"messages": chat("a batch", "the sum")},
        {"text": "no one"},
        {"messages": chat("other", "one")},
    ]
    queries = [parse_query(each, f"line {n}", n) for n, each in enumerate(fields)]
    together = tokenize_queries(queries, tokenizer, None).sequences
    for number, query in enumerate(queries):
        alone = tokenize_queries([query], tokenizer, None).sequences
        assert np.array_equal(together[number].targets, alone[0].targets)


def test_chats_from_python_are_those_of_a_column():
    tokenizer = with_template(HEADERS)
    rows = [{"messages": chat("a batch", "the sum")}, {"messages": chat("one", "no", "a", "b")}]
    model = None
    found = sequences_from_python(rows, tokenizer, 64, model, CAUSAL_LM)
    expected = sequences_of(rows, tokenizer, messages="messages")
    assert found.fingerprint == expected.fingerprint


def test_a_template_that_rewrites_what_was_before_is_a_sentence():
    with pytest.raises(DataError, match="row 0: the chat template writes the messages before"):
        rendered(chat("a", "b"), with_template(FORGETFUL), "row 0")


def test_a_template_that_refuses_is_a_sentence():
    with pytest.raises(DataError, match=r"row 0: the model's chat template refuses.*no such role"):
        rendered(chat("a", "b"), with_template(STRICT), "row 0")


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ("hello", "messages is 'hello'; it must be a list"),
        ([], "it must be a list"),
        (["hello"], "message 0 is 'hello', not an object"),
        ([{"role": "user"}], "message 0 has content None; it must be text that is not empty"),
        (chat("a", ""), "message 1 has content ''; it must be text that is not empty"),
        (chat("a", " \n"), "message 1 has content"),
        ([{"role": None, "content": "a"}], "message 0 has role None"),
        (chat("a", "b", "c"), "the last message is the user's; it must be the assistant's"),
    ],
)
def test_what_is_no_chat_is_a_sentence_for_data_and_queries(messages, sentence):
    with pytest.raises(DataError, match=f"here: .*{sentence}|here: {sentence}"):
        messages_of(messages, "here")
    with pytest.raises(DataError, match=sentence):
        parse_query({"messages": messages}, "line 1", 1)


def test_a_row_that_is_no_chat_is_named():
    rows = [{"chat": chat("a", "b")}, {"chat": chat("a", "")}]
    with pytest.raises(DataError, match=r"row 1 .from 0.: message 1 has content"):
        sequences_of(rows, with_template(HEADERS), messages="chat")


def test_a_tokenizer_without_a_template_is_a_sentence():
    with pytest.raises(DataError, match=r"data\.messages.*no chat template"):
        sequences_of([{"chat": chat("a", "b")}], tiny_tokenizer(), messages="chat")
    query = parse_query({"messages": chat("a", "b")}, "line 1", 1)
    with pytest.raises(DataError, match=r"line 1: messages.*no chat template"):
        tokenize_queries([query], tiny_tokenizer(), None)


@pytest.mark.parametrize("other", ["tokens", "template", "prompt"])
def test_data_is_of_one_kind(other):
    value = "{a}" if other == "template" else "a"
    with pytest.raises(ConfigError, match="both given"):
        DataConfig(source="rows", messages="chat", **{other: value})
