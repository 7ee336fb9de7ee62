"""Who may ask: tokens, origins, hosts, bodies, and what a request can smuggle in or out."""

import json
import socket
import time

import httpx
import pytest
from fastapi.testclient import TestClient
from helpers.fake_session import HOSTILE, FakeSession, text_of
from helpers.services import Service, events_of, running
from hypothesis import given
from hypothesis import strategies as st

from ekfac_dist.config import ServeConfig
from ekfac_dist.serve import http, security
from ekfac_dist.serve.desk import Desk
from ekfac_dist.serve.metrics import Metrics
from ekfac_dist.serve.run import guarded_app
from ekfac_dist.serve.security import MOST_BODY_BYTES

TOKEN = "correct-horse"
PATHS = (
    "/v1/info",
    "/v1/sequences/3",
    "/v1/influence/aaaaaaaaaaaaaaaaaaaaaa",
    "/v1/influence/aaaaaaaaaaaaaaaaaaaaaa/report",
    "/healthz",
    "/metrics",
    "/openapi.json",
    "/nothing",
)


@pytest.fixture(scope="module")
def service():
    with running() as service:
        yield service


@pytest.fixture(scope="module")
def client(service):
    with service.client() as client:
        yield client


def guarded(host="127.0.0.1", token=None, base_url="http://127.0.0.1:8000"):
    """A client of a service that never answers questions; only its guard is asked."""
    config = ServeConfig(factors="f", index="i", host=host, token=token)
    desk = Desk(4, 1.0, Metrics())
    return TestClient(guarded_app(FakeSession(), desk, config), base_url=base_url)


def raw(service: Service, request: bytes) -> bytes:
    """What comes back for some bytes."""
    port = int(service.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
            if b"\r\n\r\n" in b"".join(parts) and b"detail" in b"".join(parts):
                break
    return b"".join(parts)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        TOKEN,
        "Bearer ÿ\x80".encode("latin-1"),
    ],
)
def test_without_the_right_token_nothing_is_told(path, header):
    headers = {} if header is None else {"authorization": header}
    response = guarded(token=TOKEN).get(path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json() == {
        "detail": "This service needs its token: send it as `Authorization: Bearer TOKEN`."
    }


def test_with_the_right_token_all_is_told_and_questions_need_it_too():
    client = guarded(token=TOKEN)
    for name in ("Bearer", "bearer"):
        assert client.get("/v1/info", headers={"authorization": f"{name} {TOKEN}"}).is_success
    assert client.post("/v1/influence", json={"completion": "x"}).status_code == 401
    assert client.post("/", json={}).status_code == 401
    assert client.delete("/v1/influence/" + "a" * 22).status_code == 401


def test_the_pages_own_files_hold_no_data_and_need_no_token():
    client = guarded(token=TOKEN)
    assert client.get("/").is_success
    assert client.get("/docs").is_success
    assert client.get("/static/../v1/info").status_code == 401
    assert client.get("/static/%2e%2e/v1/info").status_code in (401, 404)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9000"},
        {"origin": "http://localhost:8000"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://127.0.0.1:8000.evil.example"},
        {"origin": "http://[::1"},
        {"origin": "file://127.0.0.1:8000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "script"},
    ],
)
def test_another_sites_page_gets_no_answer_and_no_permission(headers):
    client = guarded()
    for response in (
        client.get("/v1/info", headers=headers),
        client.post("/v1/influence", json={"completion": "x"}, headers=headers),
        client.options("/v1/influence", headers=headers),
        client.get("/", headers=headers),
    ):
        assert response.status_code == 403
        assert not any(name.startswith("access-control") for name in response.headers)


def test_the_services_own_page_and_programs_may_ask():
    client = guarded()
    for headers in (
        {},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
    ):
        assert client.get("/v1/info", headers=headers).is_success
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    link["sec-fetch-dest"] = "document"
    assert client.get("/", headers=link).is_success
    assert client.get("/v1/info", headers=link).status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "169.254.1.1", "", "["]
)
def test_a_name_that_was_made_to_point_here_is_refused(host):
    response = guarded().get("/v1/info", headers={"host": host})
    assert response.status_code == 421


@pytest.mark.parametrize(
    ("listens", "host", "status"),
    [
        ("127.0.0.1", "localhost:8000", 200),
        ("127.0.0.1", "[::1]:9", 200),
        ("localhost", "127.0.0.1", 200),
        ("10.0.0.5", "10.0.0.5:80", 200),
        ("10.0.0.5", "localhost", 421),
        ("gpu.example", "GPU.example:8000", 200),
        ("gpu.example", "evil.example", 421),
        ("0.0.0.0", "gpu.example", 200),
        ("::", "gpu.example", 200),
    ],
)
def test_the_names_of_the_service_itself_are_let_in(listens, host, status):
    client = guarded(listens, TOKEN)
    headers = {"host": host, "authorization": f"Bearer {TOKEN}"}
    assert client.get("/v1/info", headers=headers).status_code == status


def test_every_response_forbids_what_a_browser_could_do_with_it(client):
    for response in (
        client.get("/"),
        client.get("/v1/info"),
        client.get("/nothing"),
        client.post("/v1/influence", json={"completion": "x"}),
        client.get("/v1/info", headers={"origin": "null"}),
    ):
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-store"
        assert "server" not in response.headers


def test_a_body_that_says_it_is_too_long_is_refused_before_it_comes(service):
    request = b"POST /v1/influence HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    request += b"Content-Type: application/json\r\nContent-Length: 104857600\r\n\r\n{"
    assert raw(service, request).startswith(b"HTTP/1.1 413")


def test_a_body_without_a_length_is_refused_once_it_is_too_long(service):
    def chunks():
        yield b'{"completion": "'
        for _ in range(100):
            yield b"x" * 2**20

    headers = {"content-type": "application/json"}
    try:
        with httpx.Client(timeout=30) as client:
            response = client.post(service.url + "/v1/influence", content=chunks(), headers=headers)
        assert response.status_code == 413
        assert str(MOST_BODY_BYTES) in response.json()["detail"]
    except httpx.WriteError:  # closed before the client was done
        pass
    assert not any("xxx" in str(scan) for scan in service.session.scans)


def chat(content: bytes) -> bytes:
    return b'{"messages": [{"role": "assistant", "content": ' + content + b"}]}"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"null", 422),
        (b"[]", 422),
        (b'"x"', 422),
        (b"[" * 100_000, 400),
        (b'{"completion": "x", "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"completion": "x", "damping": NaN}', 422),
        (b'{"completion": "x", "damping": 1e999}', 422),
        (b'{"completion": "x", "damping": -1}', 422),
        (b'{"completion": "\\ud800"}', 422),
        (chat(b'"\\udfff"'), 422),
        (chat(b'"x", "n": NaN'), 422),
        (chat(b'"x", "n": ' + b"[" * 300 + b"]" * 300), 422),
        (chat(b'"x", "n": ' + b"[" * 20 + b"]" * 20), 422),
        (b'{"completion": "x", "top_k": 0}', 422),
        (b'{"completion": "x", "top_k": true}', 422),
        (b'{"completion": "x", "top_k": 61}', 422),
        (b'{"completion": "x", "top_k": 5, "rescore": 4}', 422),
        (b'{"completion": "x", "against": "x"}', 422),
        (b'{"completion": ""}', 422),
        (b'{"completion": "impossible"}', 422),
        (b'{"completion": "x", "messages": []}', 422),
        (b'{"completion": "x", "refine": {"method": "cg", "momentum": 0.5}}', 422),
        (b'{"completion": "x", "normalise": "cosine", "refine": {"method": "cg"}}', 422),
        (b'{"completion": "x", "<b>\\u001b[31m": 1}', 422),
        (json.dumps({"completion": "x" * 20_001}).encode(), 422),
    ],
)
def test_a_wrong_body_is_answered_by_a_sentence(client, service, body, status):
    scans = len(service.session.scans)
    response = client.post(
        "/v1/influence", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == status
    detail = response.json()["detail"]
    assert detail.endswith(".")
    assert len(detail) < 400
    assert all(character.isprintable() for character in detail)
    assert len(service.session.scans) == scans


def test_a_body_that_a_foreign_form_could_send_is_not_read(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        response = client.post(
            "/v1/influence", content=b'{"completion": "x"}', headers={"content-type": kind}
        )
        assert response.status_code == 422


NORMALISATIONS = "'none', 'cosine', 'relatif_l' or 'relatif_theta'"


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"damping": "a"}, "damping: Input should be a valid number."),
        (
            {"damping": {"value": 0.5, "scale": "median"}},
            "damping.scale: Input should be 'mean', 'trimmed' or 'geometric'.",
        ),
        ({"damping": {"modules": {}}}, "damping.modules: Extra inputs are not permitted."),
        (
            {"completion": None},
            "The question has no completion, so nothing to explain; give one, or messages.",
        ),
        ({"normalize": "l2"}, f"normalize: Input should be {NORMALISATIONS}."),
        (
            {"normalise": "cosine", "normalize": "cosine"},
            "normalize: Extra inputs are not permitted.",
        ),
    ],
)
def test_a_wrong_field_is_named(client, fields, detail):
    response = client.post("/v1/influence", json={"completion": "x", **fields})
    assert (response.status_code, response.json()) == (422, {"detail": detail})


@pytest.mark.parametrize("name", ["normalise", "normalize"])
def test_a_refusal_names_the_field_as_the_request_does(client, name):
    asked = {"completion": "x", name: "cosine", "refine": {"method": "cg"}}
    detail = client.post("/v1/influence", json=asked).json()["detail"]
    assert detail.startswith(f"{name} is cosine, but refine.method is cg: norms of training")
    assert detail.endswith(f"; set {name}: none, or refine.method: none.")


def test_a_body_that_is_no_object_or_not_sent_as_json_is_told_so(client):
    kinds = {"content-type": "application/json"}, {"content-type": "text/plain"}
    for content, headers in ((b"[]", kinds[0]), (b'{"completion": "x"}', kinds[1])):
        response = client.post("/v1/influence", content=content, headers=headers)
        assert response.status_code == 422
        assert response.json()["detail"].endswith("with Content-Type: application/json.")
    broken = client.post("/v1/influence", content=b"{", headers=kinds[0])
    assert broken.json() == {"detail": "The body is no JSON that can be read."}


CONTROL = "a\r\ndata: {}\r\n\r\nevent: answer\x00\x1b[31m\u2028\u202e</script>\x85"


def test_control_characters_of_a_question_break_neither_events_nor_logs(client, service, capfd):
    asked = {"prompt": CONTROL, "completion": CONTROL, "top_k": 20}
    headers = {"accept": "text/event-stream"}
    with client.stream("POST", "/v1/influence", json=asked, headers=headers) as response:
        content = b"".join(response.iter_raw())
    assert not set(content) & (set(range(32)) - {10})
    assert content.isascii()
    events = list(events_of(iter(content.decode().split("\n"))))
    assert [name for name, _ in events].count("answer") == 1
    answer = dict(events)["answer"]
    assert answer["query"]["completion"] == CONTROL
    assert answer["question"]["prompt"] == CONTROL
    assert client.get("/v1/info", params={"q": CONTROL}).is_success
    printed = "".join(capfd.readouterr())
    assert "event: answer" not in printed
    assert "script" not in printed


def test_hostile_training_text_comes_back_as_data(client):
    response = client.get("/v1/sequences/3")
    assert HOSTILE in text_of(3)
    assert response.json()["text"] == text_of(3)
    assert response.headers["content-type"] == "application/json"
    answer = client.post("/v1/influence", json={"completion": "x", "top_k": 30}).json()
    assert any(HOSTILE in row["text"] for row in answer["top"] + answer["bottom"])
    report = client.get(f"/v1/influence/{answer['id']}/report")
    assert "alert(1)</script>" not in report.text
    assert "\\u003c/sc" in report.text


@pytest.mark.parametrize(
    "path",
    [
        "/v1/influence/../../etc/passwd",
        "/v1/influence/..%2f..%2fetc%2fpasswd",
        "/v1/influence/" + "a" * 23,
        "/v1/influence/aaaaaaaaaaaaaaaaaaaaa%0a",
        "/v1/influence/%00",
        "/v1/sequences/../info/x",
        "/v1/sequences/-1",
        "/v1/sequences/1e3",
        "/v1/sequences/99999999999999999999999999",
        "/v1/sequences/" + "9" * 5000,
        "/v1/sequences/0x1",
        "/static/../../pyproject.toml",
        "/static/%2e%2e/%2e%2e/pyproject.toml",
        "/static/..%5c..%5cpyproject.toml",
        "//etc/passwd",
        "/v1/info/",
    ],
)
def test_paths_lead_nowhere_else(service, path):
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    response = raw(service, request.encode())
    assert response.split()[1] in (b"404", b"422"), response
    assert b"build-system" not in response
    assert b"root:" not in response


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /v1/info HTTP/1.1\r\n\r\n",
        b"GET /v1/info HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        b"GET /v1/info HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: x\r\n\r\n",
        b"GET /v1/info\r\nHost: 127.0.0.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /v1/info HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 300_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(service, request_):
    port = int(service.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request_)
        assert connection.recv(1000).split()[1] in (b"400", b"421")
    assert service.client().get("/healthz").is_success


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: "])
@pytest.mark.parametrize("asks_before", [False, True])
def test_a_connection_that_asks_nothing_is_ended(service, monkeypatch, sent, asks_before):
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.3)
    port = int(service.url.rpartition(":")[2])
    whole = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

    def is_answered() -> bool:
        connection.sendall(whole)
        came = b""
        while not came.endswith(b'{"status":"ok"}') and (part := connection.recv(1000)):
            came += part
        return came.startswith(b"HTTP/1.1 200")

    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        if asks_before:
            assert is_answered()
            if not sent:  # what may be asked next is waited for longer
                time.sleep(0.6)
                assert is_answered()
                return
        connection.sendall(sent)
        assert connection.recv(1000) == b""


def test_an_answer_that_takes_long_is_no_connection_that_asks_nothing(monkeypatch):
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.1)
    with running(FakeSession(shard_seconds=0.2)) as service, service.client() as client:
        assert client.post("/v1/influence", json={"completion": "a"}).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(service, monkeypatch):
    monkeypatch.setattr(security, "BODY_SECONDS", 0.3)
    request = b"POST /v1/influence HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    request += b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    answer = raw(service, request)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not come" in answer
    assert service.client().get("/healthz").is_success


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_any_text_of_a_question_comes_back_as_it_was(client, text):
    response = client.post(
        "/v1/influence", json={"prompt": text, "completion": f" {text}", "rescore": 0, "top_k": 1}
    )
    if "impossible" in text:
        return
    assert response.json()["query"]["prompt"] == text


def test_a_request_that_fails_is_told_by_its_place_alone(monkeypatch, capfd):
    def fail(index):
        raise RuntimeError("the secret text")

    session = FakeSession()
    session.sequence = fail
    with running(session) as service, service.client() as client:
        response = client.get("/v1/sequences/3?secret=text")
    assert response.status_code == 500
    assert response.json() == {"detail": "The service has a defect; see its log."}
    printed = "".join(capfd.readouterr())
    assert "RuntimeError" in printed
    assert "secret" not in printed.replace('raise RuntimeError("the secret text")', "")
