"""The service with a real model, factors and index, alone and on two workers of a launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from helpers.made_indices import NUMBER, arguments, make_store
from helpers.pages import Page
from helpers.services import Running, events_of, running, until
from helpers.workshop import cpu_launcher_config, run_here, with_helpers
from safetensors.torch import load_file

from ekfac_dist.config import ServeConfig
from ekfac_dist.influence.session import open_session
from ekfac_dist.runtime.processes import World

PLAIN = {"prompt": "The short", "completion": " sentence is real."}
CONTRAST = {**PLAIN, "against": " paper was long."}
# It would go on for minutes.
ENDLESS = {
    **PLAIN,
    "refine": {"method": "cg", "iterations": 1000, "sequences": 20, "tolerance": 0.0},
    "damping": 1e-6,
}
STREAM = {"accept": "text/event-stream"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A store, a rank-1 index of it, and all exact scores of both questions."""
    root = make_store(tmp_path_factory.mktemp("service"))
    assert run_here(arguments(root, root / "index")).returncode == 0
    lines = [json.dumps(query) + "\n" for query in (PLAIN, CONTRAST)]
    (root / "asked.jsonl").write_text("".join(lines))
    done = run_here(
        [
            *("query", "--factors", root / "store"),
            *("--queries", root / "asked.jsonl", "--output", root / "exact"),
        ]
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def service(root):
    config = ServeConfig(factors=str(root / "store"), index=str(root / "index"))
    with open_session(config, World.start()) as session, running(session) as service:
        yield service


def scores_of(answer):
    return {row["index"]: row["score"] for end in ("top", "bottom") for row in answer[end]}


def require_right(answer, root, number):
    """The lists are those of `query` on all of the data, as all sequences are scored exactly."""
    expected = load_file(root / "exact" / "scores.safetensors")["scores"][number]
    order = expected.argsort(descending=True).tolist()
    assert answer["stage"] == "exact"
    assert [row["index"] for row in answer["top"]] == order[:5]
    assert [row["index"] for row in answer["bottom"]] == order[::-1][:5]
    for index, score in scores_of(answer).items():
        assert score == pytest.approx(float(expected[index]), rel=1e-3)
        detail = answer["details"][str(index)]
        assert sum(detail["token_scores"]) == pytest.approx(score, rel=1e-3)
        assert sum(detail["module_scores"]) == pytest.approx(score, rel=1e-3)


@pytest.mark.parametrize("number", [0, 1])
def test_an_answer_is_that_of_a_query(service, root, number):
    asked = {**(PLAIN, CONTRAST)[number], "top_k": 5, "rescore": NUMBER}
    with service.client() as client:
        answer = client.post("/v1/influence", json=asked).json()
        require_right(answer, root, number)
        assert client.get(f"/v1/influence/{answer['id']}").json() == answer
        page = Page(client.get(f"/v1/influence/{answer['id']}/report").text)
        assert page.data["queries"][0]["top"]["index"] == [row["index"] for row in answer["top"]]
        best = answer["top"][0]
        assert client.get(f"/v1/sequences/{best['index']}").json()["tokens"] == best["tokens"]
    assert not service.errors


def test_a_stream_ends_with_the_answer_that_its_steps_make(service):
    asked = {**PLAIN, "top_k": 3}
    with (
        service.client() as client,
        client.stream("POST", "/v1/influence", json=asked, headers=STREAM) as response,
    ):
        events = [event for event in events_of(response.iter_lines()) if event[0]]
    names = [name for name, _ in events]
    assert names[:4] == ["queued", "started", "ranking", "progress"]
    assert names.count("sequence") == 6
    rows = {event["row"]["index"]: event["row"] for name, event in events if name == "sequence"}
    answer = events[-1][1]
    assert scores_of(answer) == pytest.approx(
        {index: row["score"] for index, row in rows.items()}, rel=1e-5
    )
    assert {row["index"] for row in events[2][1]["top"]} == {row["index"] for row in answer["top"]}


def test_a_refined_question_can_be_cancelled(service):
    with service.client() as client:
        with client.stream("POST", "/v1/influence", json=ENDLESS, headers=STREAM) as response:
            for name, event in events_of(response.iter_lines()):
                if name == "queued":
                    job = event["id"]
                if name == "started":
                    assert client.delete(f"/v1/influence/{job}").status_code == 200
                last = event
        assert (name, last["status"]) == ("error", 409)
        assert client.post("/v1/influence", json={**PLAIN, "rescore": 0}).status_code == 200
    assert service.metric("ekfac_dist_sequences_scanned_total") == NUMBER


def test_what_cannot_be_answered_leaves_the_service_as_it_was(service):
    refused = [
        ("/v1/influence", {"completion": ""}),
        ("/v1/influence", {"completion": "word " * 300}),
        ("/v1/influence", {"messages": [{"role": "assistant", "content": "hello"}]}),
        ("/v1/influence", {**PLAIN, "damping": 1e300}),
        ("/v1/influence", {**PLAIN, "damping": 1e-6, "normalise": "cosine"}),
        ("/v1/influence", {**PLAIN, "refine": {"method": "cg", "sequences": NUMBER + 1}}),
        ("/v1/complete", {"prompt": "The", "temperature": 1e-300}),
        ("/v1/complete", {"prompt": "word " * 300}),
        ("/v1/complete", {"messages": [{"role": "user", "content": "hello"}]}),
    ]
    with service.client() as client:
        for path, asked in refused:
            response = client.post(path, json=asked)
            assert response.status_code == 422, (asked, response.text)
            assert "scores." not in response.json()["detail"]
            assert response.json()["detail"].endswith(".")
        assert client.post("/v1/complete", json={"prompt": "The\x00\x1b"}).status_code == 200
        hostile = {"prompt": "a\x00\x1b[31m</script>", "completion": "\x07\u2028 \U0001f600"}
        answer = client.post("/v1/influence", json={**hostile, "top_k": 2})
        assert answer.status_code == 200
        assert answer.json()["query"]["prompt"] == hostile["prompt"]
    assert not service.errors


# -- two workers -------------------------------------------------------------------------------


@pytest.fixture
def launched(root, tmp_path):
    """Two workers that `launch` has started: their service, the launcher and worker 1."""
    command = [sys.executable, "-m", "ekfac_dist", "launch"]
    command += ["--config_file", str(cpu_launcher_config(tmp_path / "launcher.yaml", 2))]
    command += ["serve", "--factors", str(root / "store"), "--index", str(root / "index")]
    process = subprocess.Popen(
        [*command, "--port", "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **with_helpers()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    family = []
    try:
        service = Running([process])
        family = psutil.Process(process.pid).children(recursive=True)
        (worker,) = [one for one in family if one.environ().get("RANK") == "1"]
        yield service, process, worker
    finally:
        for member in (*family, process):
            with suppress(psutil.Error):
                member.kill()
        process.communicate()


def metric(service, line):
    for each in httpx.get(f"{service.url}/metrics").text.splitlines():
        if each.startswith(f"{line} "):
            return float(each.rpartition(" ")[2])
    return 0.0


@pytest.mark.slow
def test_two_workers_answer_as_one_also_after_a_rest_and_drain(launched, root):
    service, process, _ = launched
    for number, question in enumerate((PLAIN, CONTRAST)):
        answer = service.ask(**question, top_k=5, rescore=NUMBER)
        assert answer.status_code == 200, answer.text
        require_right(answer.json(), root, number)
    time.sleep(70)  # idle
    require_right(service.ask(**PLAIN, top_k=5, rescore=NUMBER).json(), root, 0)
    scanned = metric(service, "ekfac_dist_sequences_scanned_total")
    with (
        httpx.Client(base_url=service.url, timeout=60) as client,
        client.stream("POST", "/v1/influence", json=ENDLESS, headers=STREAM) as response,
    ):
        for name, _ in events_of(response.iter_lines()):
            if name == "started":
                break  # and hang up
    assert service.ask(**PLAIN, rescore=0).status_code == 200
    cancelled = 'ekfac_dist_questions_total{kind="influence",outcome="cancelled"}'
    assert metric(service, cancelled) == 1
    assert metric(service, "ekfac_dist_sequences_scanned_total") == scanned + NUMBER
    with ThreadPoolExecutor(1) as pool:
        waiting = {**ENDLESS, "refine": {**ENDLESS["refine"], "iterations": 20}}
        coming = pool.submit(service.ask, **waiting, top_k=5)
        until(lambda: metric(service, 'ekfac_dist_seconds_count{stage="waiting"}') == 6)
        process.send_signal(signal.SIGTERM)
        assert coming.result().status_code == 200
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "The service has ended" in "".join(service.lines)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_named_to_who_waits(launched):
    service, process, worker = launched
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(service.ask, **ENDLESS)
        until(lambda: metric(service, 'ekfac_dist_seconds_count{stage="waiting"}') == 1)
        worker.kill()
        response = coming.result()
    assert response.status_code == 503
    assert "worker 1 of 2 has ended" in response.json()["detail"]
    assert process.wait(60) == 1
    assert "worker 1 of 2 has ended" in process.stderr.read()
