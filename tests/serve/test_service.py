"""Questions over HTTP, answered by a session without a model: order, steps, cancelling, ending."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from helpers.fake_session import FakeSession, exact_scores, scan_scores
from helpers.services import events_of, running

from ekfac_dist.errors import NonFiniteError, PeerError
from ekfac_dist.influence.asking import ScanStopped
from ekfac_dist.serve import desk as desks
from ekfac_dist.serve import loop, streams

STREAM = {"accept": "text/event-stream"}


@pytest.fixture
def service():
    with running() as service:
        yield service


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def ask(service, completion, **more):
    with service.client() as client:
        return client.post("/v1/influence", json={"completion": completion, **more})


def asked_in_turn(service, pool, completions, **more):
    """Asks questions in this order, each once the one before it waits; their responses to come."""
    coming = []
    for number, completion in enumerate(completions, start=1):
        coming.append(pool.submit(ask, service, completion, **more))
        until(lambda number=number: len(service.desk._waiting) == number)
    return coming


@pytest.fixture
def held(service):
    """A service that is held up in its first question; (service, pool, the first's response)."""
    with ThreadPoolExecutor(20) as pool:
        service.session.gate.clear()
        first = pool.submit(ask, service, "first")
        assert service.session.arrived.wait(30)
        until(lambda: service.desk._current)
        yield service, pool, first
        service.session.gate.set()


def test_an_answer_has_the_best_sequences_by_exact_scores(service):
    asked = {"prompt": "The tower is in", "completion": " Paris", "top_k": 5, "bottom_k": 3}
    with service.client() as client:
        response = client.post("/v1/influence", json=asked)
    answer = response.json()
    assert response.status_code == 200
    exact = exact_scores(" Paris", 60)
    order = exact.argsort(descending=True).tolist()
    assert [row["index"] for row in answer["top"]] == order[:5]
    assert [row["index"] for row in answer["bottom"]] == order[:-4:-1]
    assert [row["rank"] for row in answer["top"]] == [1, 2, 3, 4, 5]
    for row in answer["top"] + answer["bottom"]:
        assert row["exact"]
        assert row["score"] == pytest.approx(float(exact[row["index"]]))
        assert row["scan_score"] == pytest.approx(float(scan_scores(" Paris", 60)[row["index"]]))
        detail = answer["details"][str(row["index"])]
        assert sum(detail["token_scores"]) == pytest.approx(row["score"], rel=1e-4)
        assert sum(map(sum, detail["layer_token_scores"])) == pytest.approx(row["score"], rel=1e-4)
        assert sum(detail["module_scores"]) == pytest.approx(row["score"], rel=1e-4)
        assert len(detail["token_scores"]) == len(row["tokens"]) - 1
        assert "".join(row["tokens"]) == row["text"]
    assert set(answer["details"]) == {str(k) for k in order[:5] + order[-3:]}
    assert answer["stage"] == "exact"
    assert answer["agreement"]["scored_again"] == 10
    assert answer["question"]["rescore"] == 5
    assert answer["distribution"]["number"] == 60
    assert answer["query"]["completion"] == " Paris"


def test_without_rescoring_the_ranking_is_the_answer(service):
    answer = ask(service, "x", rescore=0, top_k=4).json()
    order = scan_scores("x", 60).argsort(descending=True).tolist()
    assert [row["index"] for row in answer["top"]] == order[:4]
    assert answer["stage"] == "ranking"
    assert answer["details"] == {}
    assert answer["agreement"] is None
    assert not any(row["exact"] for row in answer["top"])
    assert service.session.exact_calls == []


def test_a_stream_has_the_ranking_first_then_each_sequence_then_the_answer(service):
    asked = {"completion": "x", "top_k": 6, "bottom_k": 0}
    with (
        service.client() as client,
        client.stream("POST", "/v1/influence", json=asked, headers=STREAM) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(events_of(response.iter_lines()))
    names = [name for name, _ in events]
    assert [name for name in names if name != "progress"] == (
        ["queued", "started", "ranking", *["sequence"] * 6, "answer"]
    )
    by_name = dict(events)
    assert by_name["ranking"]["stage"] == "ranking"
    assert by_name["ranking"]["details"] == {}
    answer = by_name["answer"]
    rows = {row["index"]: row for row in answer["top"]}
    for data in (data for name, data in events if name == "sequence"):
        row = data["row"]
        assert row["exact"]
        assert row["score"] == pytest.approx(rows[row["index"]]["score"])
        assert row["share"] == pytest.approx(rows[row["index"]]["share"])
        assert row["text"] == rows[row["index"]]["text"]
        assert data["detail"] == answer["details"][str(row["index"])]
    progress = [data for name, data in events if name == "progress"]
    assert [data["done"] for data in progress] == [0, 4, 6]
    assert {data["of"] for data in progress} == {6}
    assert by_name["queued"]["id"] == answer["id"]
    assert ask(service, "x", top_k=6, bottom_k=0).json() | {"id": 0, "seconds": 0} == (
        answer | {"id": 0, "seconds": 0}
    )


def test_a_stream_that_waits_is_kept_open_by_comments(held, monkeypatch):
    service, _, _ = held
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.05)
    with (
        service.client() as client,
        client.stream(
            "POST", "/v1/influence", json={"completion": "x"}, headers=STREAM
        ) as response,
    ):
        names = []
        for name, _ in events_of(response.iter_lines()):
            names.append(name)
            if names.count("") == 2:
                service.session.gate.set()
    assert names[0] == "queued"
    assert names[-1] == "answer"


def test_questions_are_answered_in_order_and_those_alike_by_one_scan(held):
    service, pool, _ = held
    coming = asked_in_turn(service, pool, ["a", "b"])
    coming += asked_in_turn_after(service, pool, ["other"], 3, damping=0.5)
    coming += asked_in_turn_after(service, pool, ["c"], 4)
    service.session.gate.set()
    assert [one.result().status_code for one in coming] == [200] * 4
    assert service.session.scans == [["first"], ["a", "b", "c"], ["other"]]
    for completion, response in zip(["a", "b", "other", "c"], coming, strict=True):
        best = int(exact_scores(completion, 60).argmax())
        assert response.result().json()["top"][0]["index"] == best
    assert [name for name, _ in service.session.exact_calls] == sorted(
        [name for name, _ in service.session.exact_calls],
        key=["first", "a", "b", "c", "other"].index,
    )


def asked_in_turn_after(service, pool, completions, number, **more):
    coming = [pool.submit(ask, service, completion, **more) for completion in completions]
    until(lambda: len(service.desk._waiting) == number)
    return coming


def test_a_full_queue_says_429_and_when_to_ask_again():
    with running(queue_length=2) as service, ThreadPoolExecutor(4) as pool:
        service.session.gate.clear()
        first = pool.submit(ask, service, "first")
        assert service.session.arrived.wait(30)
        until(lambda: service.desk._current)
        coming = asked_in_turn(service, pool, ["a", "b"])
        refused = ask(service, "c")
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert "Too many questions" in refused.json()["detail"]
        service.session.gate.set()
        assert [one.result().status_code for one in [first, *coming]] == [200] * 3
        assert ask(service, "c").status_code == 200


def test_a_cancelled_question_that_waits_is_never_scanned(held):
    service, _, first = held
    with (
        service.client() as client,
        client.stream(
            "POST", "/v1/influence", json={"completion": "b"}, headers=STREAM
        ) as response,
    ):
        events = events_of(response.iter_lines())
        _, queued = next(events)
        assert queued["before"] == 1
        assert service.client().delete(f"/v1/influence/{queued['id']}").status_code == 200
        assert list(events) == [("error", {"status": 409, "detail": "The question was cancelled."})]
    assert service.client().delete(f"/v1/influence/{queued['id']}").status_code == 404
    service.session.gate.set()
    assert first.result().status_code == 200
    assert service.session.scans == [["first"]]


def test_a_cancelled_question_stops_its_scan(held):
    service, _, first = held
    (job,) = service.desk._current
    assert service.client().delete(f"/v1/influence/{job.id}").status_code == 200
    service.session.gate.set()
    assert first.result().status_code == 409
    assert service.session.num_stopped == 1
    assert service.session.exact_calls == []
    assert ask(service, "next").status_code == 200


def test_a_client_that_goes_away_stops_the_exact_scores_of_its_question(service):
    service.session.exact_seconds = 0.05
    with (
        service.client() as client,
        client.stream(
            "POST", "/v1/influence", json={"completion": "long"}, headers=STREAM
        ) as response,
    ):
        for name, _ in events_of(response.iter_lines()):
            if name == "sequence":
                break
    until(
        lambda: service.metric('ekfac_dist_questions_total{kind="influence",outcome="cancelled"}')
    )
    assert len(service.session.exact_calls) < 10  # of 40 sequences, 4 at a time
    assert ask(service, "next").status_code == 200


def test_a_question_that_is_stopped_while_it_is_scored_exactly_is_cancelled(held):
    """As where its gradient has to be refined again first."""
    service, _, first = held

    def exact(ranking, columns, go_on):
        assert go_on()
        assert service.desk.cancel(service.desk._current[0].id)
        assert not go_on()
        raise ScanStopped

    service.session.exact = exact
    service.session.gate.set()
    assert first.result().status_code == 409
    del service.session.exact
    assert ask(service, "next").status_code == 200


@pytest.mark.parametrize("path", ["/v1/influence", "/v1/complete"])
def test_a_client_that_goes_away_is_not_waited_for(held, path):
    service, _, first = held
    body = {"completion": "b"} if path == "/v1/influence" else {"prompt": "b"}
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.3) as client:
        client.post(service.url + path, json=body)
    until(lambda: not service.desk._waiting)
    service.session.gate.set()
    assert first.result().status_code == 200
    assert service.session.scans == [["first"]]


def test_the_faulty_question_of_a_scan_is_refused_and_the_others_are_answered(held):
    service, pool, _ = held
    service.session.failures["bad"] = lambda: NonFiniteError("NaN in its gradient.")
    coming = asked_in_turn(service, pool, ["a", "bad", "c"])
    service.session.gate.set()
    statuses = [one.result().status_code for one in coming]
    assert statuses == [200, 422, 200]
    assert coming[1].result().json() == {"detail": "NaN in its gradient."}
    assert service.session.scans[1:] == [["a", "bad", "c"], ["a"], ["bad"], ["c"]]


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        (
            {"normalize": "cosine", "damping": 0.5},
            "Scores are infinite with damping 0.5; set normalize: none, tokens: inputs.",
        ),
        (
            {"damping": {"value": 0.5}},
            "Scores are infinite with damping.value 0.5; set normalise: none, tokens: inputs.",
        ),
    ],
)
def test_what_fails_while_it_is_answered_names_fields_as_the_request_does(service, fields, detail):
    sentence = "with damping.value 0.5; set scores.normalize: none, scores.tokens: inputs."
    failure = NonFiniteError(f"Scores are infinite {sentence}")
    service.session.failures["bad"] = lambda: failure
    assert ask(service, "bad", **fields).json() == {"detail": detail}


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (PeerError("worker 1 of 2: was lost"), "worker 1 of 2: was lost"),
        (RuntimeError("a shape"), "The service has failed; see its log."),
    ],
)
def test_a_lost_worker_or_a_defect_ends_all_with_503(held, failure, sentence):
    service, pool, first = held
    service.session.failures["first"] = lambda: failure
    coming = asked_in_turn(service, pool, ["a", "b"], damping=0.5)
    service.session.gate.set()
    for one in [first, *coming]:
        assert one.result().status_code == 503
        assert one.result().json() == {"detail": sentence}
    assert service.ended.wait(30)
    assert service.errors == [failure]
    assert service.desk.reason_to_end == sentence


def test_a_service_that_is_asked_to_end_answers_what_waits_and_takes_no_more(held):
    service, pool, first = held
    coming = asked_in_turn(service, pool, ["a"])
    with service.client() as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        service.desk.drain()
        assert client.get("/healthz").status_code == 503
        refused = client.post("/v1/influence", json={"completion": "late"})
        assert refused.status_code == 503
        assert "ending" in refused.json()["detail"]
    service.session.gate.set()
    assert [one.result().status_code for one in [first, *coming]] == [200, 200]
    assert service.ended.wait(30)
    assert service.errors == []


@pytest.mark.parametrize("exact_seconds", [0.0, 0.05])
def test_a_wish_to_end_is_heard_in_the_middle_of_a_question(exact_seconds):
    session = FakeSession(shard_seconds=0.5, exact_seconds=exact_seconds)
    with running(session, drain_seconds=0.3) as service, ThreadPoolExecutor(2) as pool:
        coming = pool.submit(ask, service, "long", rescore=20, top_k=20)
        place = session.exact_calls if exact_seconds else session.scans
        until(lambda: place)
        session.shard_seconds, session.exact_seconds = 0.2, 1.0
        service.request.was_made = True
        with service.client() as client:
            until(lambda: client.get("/healthz").status_code == 503)
            assert not coming.done()
            assert client.post("/v1/influence", json={"completion": "late"}).status_code == 503
        assert coming.result().status_code == 503
        assert service.ended.wait(30)
        assert service.errors == []


def test_a_service_that_has_no_more_time_to_drain_says_so_to_those_who_wait():
    with running(drain_seconds=0.2) as service, ThreadPoolExecutor(4) as pool:
        service.session.gate.clear()
        first = pool.submit(ask, service, "first")
        assert service.session.arrived.wait(30)
        until(lambda: service.desk._current)
        coming = asked_in_turn(service, pool, ["a"])
        service.desk.drain()
        time.sleep(0.3)
        service.session.gate.set()
        for one in [first, *coming]:
            assert one.result().status_code == 503
        assert service.ended.wait(30)
        assert service.errors == []
        assert service.session.scans == [["first"]]


def test_an_answer_is_kept_for_a_while_with_its_report(service, monkeypatch):
    monkeypatch.setattr(desks, "KEPT_ANSWERS", 2)
    answers = [ask(service, name).json() for name in "abc"]
    with service.client() as client:
        for answer in answers[1:]:
            assert client.get(f"/v1/influence/{answer['id']}").json() == answer
            report = client.get(f"/v1/influence/{answer['id']}/report")
            assert report.status_code == 200
            assert report.headers["content-disposition"].startswith("attachment")
            assert "<script>alert(1)" not in report.text
            assert report.text.startswith("<!doctype html>")
        gone = client.get(f"/v1/influence/{answers[0]['id']}")
        assert gone.status_code == 404
        assert client.get(f"/v1/influence/{answers[0]['id']}/report").status_code == 404


def test_kept_answers_are_bounded_in_memory(service, monkeypatch):
    monkeypatch.setattr(desks, "KEPT_BYTES", 1)
    first, second = (ask(service, name).json()["id"] for name in "ab")
    assert service.desk.kept(first) is None
    assert service.desk.kept(second) is not None


def test_the_model_goes_on_from_a_prompt(service):
    with service.client() as client:
        response = client.post("/v1/complete", json={"prompt": "The tower", "max_tokens": 2})
        assert response.json() == {"text": " on and on", "tokens": [" on", " and"], "finish": "end"}
        refused = client.post("/v1/complete", json={"prompt": "too long"})
        assert refused.status_code == 422
        assert refused.json()["detail"].startswith("The prompt has more tokens")
        cold = client.post("/v1/complete", json={"prompt": "x", "temperature": 1e-300})
        assert cold.status_code == 422
        assert cold.json()["detail"].startswith("temperature is 1e-300; give 0,")
        assert client.post("/v1/complete", json={"prompt": "x"}).status_code == 200


def test_sequences_and_information(service):
    with service.client() as client:
        assert client.get("/v1/sequences/4").json() == service.session.sequence(4)
        assert client.get("/v1/sequences/60").status_code == 404
        info = client.get("/v1/info").json()
        assert info["index"]["rank"] == 1
        assert info["limits"]["max_top_k"] == 100


def test_the_metrics_count_what_was_asked(service):
    ask(service, "a")
    ask(service, "impossible")
    with service.client() as client:
        client.get("/nothing/here")
        text = client.get("/metrics").text
    for line in (
        'ekfac_dist_requests_total{route="/v1/influence",status="200"} 1.0',
        'ekfac_dist_requests_total{route="/v1/influence",status="422"} 1.0',
        'ekfac_dist_requests_total{route="none",status="404"} 1.0',
        'ekfac_dist_questions_total{kind="influence",outcome="answered"} 1.0',
        "ekfac_dist_waiting 0.0",
        'ekfac_dist_seconds_count{stage="exact"} 1.0',
        "ekfac_dist_sequences_scanned_total 60.0",
    ):
        assert line in text.splitlines()
    assert service.metric("ekfac_dist_resident_bytes") > 1e7


def test_operations_are_listed_without_the_network(service):
    with service.client() as client:
        page = client.get("/docs").text
        assert "POST" in page
        assert "/v1/influence" in page
        assert "How many sequences at either end" in page
        assert "//" not in page.replace("<!doctype html>", "")
        paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/v1/influence",
        "/v1/influence/{job_id}",
        "/v1/influence/{job_id}/report",
        "/v1/complete",
        "/v1/sequences/{index}",
        "/v1/info",
        "/healthz",
        "/metrics",
    }


def test_an_idle_service_hears_a_question_at_once(service, monkeypatch):
    monkeypatch.setattr(loop, "IDLE_SECONDS", 0.05)
    time.sleep(0.3)
    start = time.monotonic()
    assert ask(service, "a").status_code == 200
    assert time.monotonic() - start < 2


def test_many_clients_at_once_each_get_their_own_answer(service):
    def one(number):
        answer = ask(service, f"question {number}", top_k=2)
        best = exact_scores(f"question {number}", 60).argsort(descending=True)[:2].tolist()
        return [row["index"] for row in answer.json()["top"]] == best

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(48)))
    assert threading.active_count() < 60
