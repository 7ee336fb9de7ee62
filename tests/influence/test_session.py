"""A session's answers: those of `query` on all of the data, whichever way they come."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.dense import relative
from helpers.made_indices import NUMBER, arguments, make_store
from helpers.workshop import run_here
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ekfac_dist.config import DampingConfig, RefineConfig, ServeConfig
from ekfac_dist.errors import ConfigError, DataError, NonFiniteError, StoreError
from ekfac_dist.influence import session as sessions
from ekfac_dist.influence.asking import Question, ScanStopped
from ekfac_dist.influence.index import scan as index_scan
from ekfac_dist.influence.query_texts import Query
from ekfac_dist.influence.results import BOTTOM, DETAILS, SEQUENCES, TOP
from ekfac_dist.influence.session import open_session
from ekfac_dist.report.answers import low_rank_gradients, rescored
from ekfac_dist.report.page_data import page_data
from ekfac_dist.runtime.processes import World

FULL_RANK = 16  # of the tiny model's modules
PROMPT, COMPLETION, OTHER = "The short", " sentence is real.", " paper was long."


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = make_store(tmp_path_factory.mktemp("session"))
    whole = ("--index.rank", "64", "--index.dtype", "float32")
    assert run_here(arguments(root, root / "index", *whole)).returncode == 0
    one = ("--index.rank", "1")
    assert run_here(arguments(root, root / "rank-1", *one)).returncode == 0
    return root


@contextmanager
def opened(root, index="index", **settings):
    config = ServeConfig(factors=str(root / "store"), index=str(root / index), **settings)
    with open_session(config, World.start()) as session:
        yield session


def question(completion=COMPLETION, prompt=PROMPT, against=None, **settings):
    query = Query(prompt, completion, None, 0, "the question", against=against)
    return Question(query=query, **{"top_k": 4, "bottom_k": 4, "rescore": 6, **settings})


def asked(root, output, query, *options):
    """The exact results of `query`, without an index."""
    (root / f"{output}.jsonl").write_text(json.dumps(query) + "\n")
    done = run_here(
        [
            *("query", "--factors", root / "store", "--queries", root / f"{output}.jsonl"),
            *("--output", root / output, *options),
        ]
    )
    assert done.returncode == 0, done.stderr
    return load_file(root / output / "scores.safetensors")


def answered(session, one):
    """A question's ranking and its final scores."""
    session.check(one)
    (ranking,) = session.rank([one])
    columns = session.to_rescore(ranking)
    parts = [session.exact(ranking, columns[k : k + 3]) for k in range(0, len(columns), 3)]
    return ranking, session.finish(ranking, parts)


CASES = {
    "plain": ({}, {}, ()),
    "contrast": ({"against": OTHER}, {}, ()),
    "damping": ({}, {"damping": DampingConfig(value=2.0)}, ("--damping.value", "2.0")),
    "cosine": ({}, {"normalize": "cosine"}, ("--scores.normalize", "cosine")),
    "of losses": ({}, {"tokens": "outputs"}, ("--scores.tokens", "outputs")),
    "refined": (
        {},
        {"refine": RefineConfig(method="cg", sequences=10, iterations=3)},
        ("--refine.method", "cg", "--refine.sequences", "10", "--refine.iterations", "3"),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("low_rank", [False, True])
def test_answers_are_those_of_a_query(root, name, low_rank, monkeypatch):
    query, settings, options = CASES[name]
    output = name.replace(" ", "-")
    if not (root / output).exists():
        asked(root, output, {"prompt": PROMPT, "completion": COMPLETION, **query}, *options)
    expected = load_file(root / output / "scores.safetensors")["scores"][0]
    monkeypatch.setattr(sessions, "_LEAST_FOR_LOW_RANK", 0 if low_rank else 10**9)
    monkeypatch.setattr(sessions, "_SCAN_RANK", FULL_RANK)
    with opened(root) as session:
        ranking, scores = answered(session, question(**query, **settings))
    assert ranking.scores.scores.shape == (1, NUMBER)
    assert bool(ranking.scores.ranks) == low_rank
    assert relative(ranking.scores.scores[0], expected) < 1e-4  # the index is of full rank
    order = torch.argsort(expected, descending=True)
    assert scores.top[0].columns.tolist() == order[:4].tolist()
    assert scores.bottom[0].columns.tolist() == order.flip(0)[:4].tolist()
    assert relative(scores.top[0].scores, expected[order[:4]]) < 1e-4
    details, wanted = scores.details, load_file(root / output / DETAILS)
    places = {int(index): k for k, index in enumerate(wanted["pair_index"])}
    assert len(details.columns) == 8
    for pair, column in enumerate(details.columns):
        k = places[int(column)]
        one, other = (
            (details.token_scores, details.offsets, pair),
            (wanted["token_scores"], wanted["offsets"], k),
        )
        found, exact = (scores_[at[i] : at[i + 1]] for scores_, at, i in (one, other))
        assert relative(found, exact) < 1e-3
    assert scores.losses == pytest.approx(ranking.scores.losses)


def test_of_rank_one_what_is_scored_again_is_exact(root):
    if not (root / "plain").exists():
        asked(root, "plain", {"prompt": PROMPT, "completion": COMPLETION})
    expected = load_file(root / "plain" / "scores.safetensors")["scores"][0]
    with opened(root, "rank-1") as session:
        ranking, scores = answered(session, question(rescore=NUMBER))
    assert relative(ranking.scores.scores[0], expected) > 0.01
    assert relative(scores.rescored[0].exact_scores, expected) < 1e-4


@pytest.mark.parametrize("least", [0, 10**6])  # scans of low rank, and of whole gradients
def test_questions_in_one_scan_are_answered_as_alone(root, least, monkeypatch):
    monkeypatch.setattr(sessions, "_LEAST_FOR_LOW_RANK", least)
    monkeypatch.setattr(sessions, "_SCAN_RANK", 2)
    monkeypatch.setattr(index_scan, "has_16_bit_units", lambda *_: False)
    several = [question(), question(OTHER, top_k=2), question(against=OTHER)]
    with opened(root, "rank-1") as session:
        together = session.rank(several)
        for one, ranking in zip(several, together, strict=True):
            alone, scores = answered(session, one)
            assert relative(ranking.scores.scores, alone.scores.scores) < 1e-5
            assert ranking.scores.losses == pytest.approx(alone.scores.losses)
            assert len(ranking.scores.top[0].columns) == one.top_k
            columns = session.to_rescore(ranking)
            found = session.finish(ranking, [session.exact(ranking, columns)])
            assert found.top[0].columns.tolist() == scores.top[0].columns.tolist()


def test_each_question_says_what_its_own_tokens_scores_are_of(root):
    several = [question(rescore=0, tokens="outputs"), question(tokens="outputs")]
    with opened(root) as session:
        first, second = session.rank(several)
    assert (first.scores.tokens, second.scores.tokens) == ("inputs", "outputs")


def test_whole_gradients_are_held_of_one_question_at_a_time(root, monkeypatch):
    monkeypatch.setattr(sessions, "_LEAST_FOR_LOW_RANK", 0)
    with opened(root, "rank-1") as session:
        rankings = session.rank([question(), question(OTHER), question(against=OTHER)])
        for ranking in rankings:
            session.exact(ranking, session.to_rescore(ranking)[:2])
            assert [one.prepared is not None for one in rankings].count(True) == 1


def test_what_is_scored_again_comes_in_the_order_of_interest(root):
    with opened(root, "rank-1") as session:
        (ranking,) = session.rank([question(rescore=5, bottom_k=2)])
        columns = session.to_rescore(ranking)
    order = torch.argsort(ranking.scores.scores[0], descending=True).tolist()
    assert columns == [*order[:5], *order[::-1][:5]]


def test_a_scan_that_nobody_wants_stops_between_shards(root):
    calls = []

    def go_on():
        calls.append(1)
        return len(calls) < 4

    with opened(root) as session:
        with pytest.raises(ScanStopped):
            session.rank([question()], go_on)
        assert len(calls) == 4
        assert answered(session, question())[1].top  # it can be asked again


REFINED = RefineConfig(method="cg", sequences=10, iterations=20, tolerance=0.0)


def test_a_refinement_that_nobody_wants_stops_between_products(root, monkeypatch):
    calls = []

    def go_on():
        calls.append(1)
        return len(calls) < 4

    with opened(root, "rank-1") as session:
        with monkeypatch.context() as patch:
            patch.delattr(sessions.IndexScan, "run")  # so far it does not come
            with pytest.raises(ScanStopped):
                session.rank([question(refine=REFINED)], go_on)
        assert len(calls) == 4  # of 21
        assert answered(session, question())[1].top


def test_a_refinement_that_is_computed_again_can_be_stopped(root):
    one = question(refine=REFINED)
    with opened(root, "rank-1") as session:
        (ranking,) = session.rank([one])
        ranking.prepared = None  # as where there is no memory for it
        with pytest.raises(ScanStopped):
            session.exact(ranking, [0], lambda: False)
        assert len(session.exact(ranking, [0]).columns) == 1


def test_scores_that_no_answer_can_hold_are_refused(root, monkeypatch):
    scan = sessions.DataPasses.scan

    def overflowing(passes, *rest):
        scan(passes, *rest)
        passes._result.scores[0, 3] = torch.inf

    one = question(normalize="cosine")
    with opened(root, "rank-1") as session:
        (ranking,) = session.rank([one])
        ranking.scores.norms[3] = 1e-45  # 1 over it is infinite in float32
        assert len(session.exact(ranking, [2]).columns) == 1
        with pytest.raises(NonFiniteError, match="another normalisation"):
            session.exact(ranking, [2, 3])
        with monkeypatch.context() as patch:
            patch.setattr(sessions.DataPasses, "scan", overflowing)
            with pytest.raises(NonFiniteError, match="another normalisation"):
                session.rank([one])
        assert answered(session, one)[1].top


def test_results_are_those_that_a_report_is_made_of(root):
    with opened(root, "rank-1") as session:
        ranking, scores = answered(session, question())
        results = session.results(ranking, scores)
        assert page_data(results).queries[0].members[0]["completion"] == COMPLETION
        assert [line["index"] for line in results.lines(TOP)] == scores.top[0].columns.tolist()
        assert len(results.lines(BOTTOM)) == 4
        line = results.lines(SEQUENCES)[0]
        assert session.sequence(line["index"]) == line
        first = session.results(ranking, ranking.scores)
        assert not first.has(DETAILS)
        with pytest.raises(KeyError):
            session.sequence(NUMBER)
    assert results.manifest["scan"]["index"]["rank"] == 1
    assert results.manifest["scan"]["rescored"] == 6
    assert rescored(results.manifest["scan"]) == "6 at either end"


def test_results_name_the_rank_of_the_scan(root, monkeypatch):
    monkeypatch.setattr(sessions, "_LEAST_FOR_LOW_RANK", 0)
    with opened(root, "rank-1") as session:
        ranking, scores = answered(session, question())
        scan = session.results(ranking, scores).manifest["scan"]
    assert low_rank_gradients(scan) == "of rank 12, and those of the index, of rank 1"


def test_the_model_goes_on_as_it_does_alone(root):
    model = AutoModelForCausalLM.from_pretrained(root / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    with opened(root) as session:
        found = session.complete(PROMPT, None, 5, 0.0, 0)
        again = session.complete(PROMPT, None, 5, 1.0, 3)
        assert session.complete(PROMPT, None, 5, 1.0, 3) == again
        assert found["text"] == tokenizer.decode(expected[0, ids.shape[1] :])
        assert "".join(found["tokens"]) == found["text"]
        assert found["finish"] == "length"
        with pytest.raises(DataError, match="no chat template"):
            session.complete("", [{"role": "user", "content": "hello"}], 5, 0.0, 0)
        with pytest.raises(DataError, match="reads 128 at most"):
            session.complete(PROMPT, None, 200, 0.0, 0)


TEMPLATE = (  # begins as the tokenizer lets a text begin
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_is_asked_and_gone_on_from_as_its_template_has_it(root):
    user = {"role": "user", "content": PROMPT}
    messages = (user, {"role": "assistant", "content": COMPLETION})
    prompt, completion = f"<user>{PROMPT}\n<assistant>", f"{COMPLETION}\n"
    with opened(root) as session:
        assert not session.info["model"]["chats"]
        tokenizer = session._opened.tokenizer
        tokenizer.chat_template = TEMPLATE
        assert session._opened.info([])["model"]["chats"]
        chat = replace(question(), query=Query("", "", None, 0, "the question", messages))
        found, wanted = (answered(session, one)[1] for one in (chat, question(completion, prompt)))
        assert relative(found.scores, wanted.scores) < 1e-6
        assert session.complete("", [user], 5, 0.0, 0) == session.complete(prompt, None, 5, 0.0, 0)
        tokenizer.chat_template = "{{ raise_exception('no such role') }}"
        with pytest.raises(DataError, match="template refuses these messages: no such role"):
            session.complete("", [user], 5, 0.0, 0)
        with pytest.raises(DataError, match="template refuses these messages: no such role"):
            session.check(chat)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_with_nan_in_its_logits_does_not_go_on(root, temperature):
    with opened(root) as session:
        head = session._opened.model.lm_head
        with torch.no_grad():
            head.weight[5] = torch.nan
        with pytest.raises(NonFiniteError, match="NaN in the model's logits after"):
            session.complete(PROMPT, None, 5, temperature, 0)


def test_wrong_questions_are_refused(root):
    with opened(root) as session:
        for wrong, kind, says in (
            (question(""), DataError, "nothing to predict"),
            (question("word " * 300), DataError, "the model reads 128 at most"),
            (question(top_k=NUMBER + 1, rescore=NUMBER + 1), ConfigError, "only 20 sequences"),
            (question(rescore=2), ConfigError, "lists of 4 are asked"),
            (question(damping=DampingConfig(modules={"x": 1.0})), ConfigError, "x"),
            (
                question(normalize="cosine", refine=RefineConfig(method="cg")),
                ConfigError,
                "refine.method is cg",
            ),
        ):
            with pytest.raises(kind, match=says):
                session.check(wrong)
            with pytest.raises(kind, match=says):
                session.rank([wrong])
        assert np.isfinite(answered(session, question())[1].top[0].scores).all()


def test_an_index_of_other_factors_is_refused(root, tmp_path):
    fit = ["estimate", "--model.name", root / "model", "--data.source", root / "more.jsonl"]
    assert run_here([*fit, "--output", tmp_path / "store"]).returncode == 0
    config = ServeConfig(factors=str(tmp_path / "store"), index=str(root / "index"))
    with pytest.raises(StoreError, match="made with other factors"):
        open_session(config, World.start()).__enter__()
