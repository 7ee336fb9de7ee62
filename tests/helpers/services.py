"""Running services: one in this process, its loop in another thread, or processes of one."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from ekfac_dist.config import ServeConfig
from ekfac_dist.influence.asking import Session
from ekfac_dist.serve.desk import Desk
from ekfac_dist.serve.http import HttpServer, bound_socket
from ekfac_dist.serve.loop import EndRequest, answer_until_end
from ekfac_dist.serve.metrics import Metrics
from ekfac_dist.serve.run import guarded_app, served
from helpers.fake_session import FakeSession


@dataclass
class Service:
    """A running service.

    Attributes:
        session: Its session.
        desk: Its desk.
        request: Asks it to end.
        url: Its address.
        ended: Is set when its loop has ended.
        errors: What its loop has raised.
    """

    session: Session
    desk: Desk
    request: EndRequest
    url: str
    ended: threading.Event = field(default_factory=threading.Event)
    errors: list[BaseException] = field(default_factory=list)

    def client(self, **settings) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **settings)

    def metric(self, line: str) -> float:
        """The value of a line of the metrics; 0 if it is not there."""
        for each in self.desk.metrics.text().decode().splitlines():
            if each.startswith(f"{line} "):
                return float(each.rpartition(" ")[2])
        return 0.0


@contextmanager
def running(session: Session | None = None, **settings) -> Iterator[Service]:
    session = session or FakeSession()
    config = ServeConfig(factors="f", index="i", port=0, **settings)
    desk = Desk(config.queue_length, config.drain_seconds, Metrics())
    bound = bound_socket(config.host, 0, has_token=config.token is not None)
    server = HttpServer(guarded_app(session, desk, config), bound)
    service = Service(session, desk, EndRequest(), f"http://127.0.0.1:{bound.getsockname()[1]}")

    is_up = threading.Event()

    def loop():
        try:
            with served(server, desk):
                is_up.set()
                answer_until_end(session, desk, service.request, lambda: server.is_alive)
        except BaseException as error:
            service.errors.append(error)
        service.ended.set()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        assert is_up.wait(30), service.errors
        yield service
    finally:
        if isinstance(session, FakeSession):
            session.gate.set()
        service.request.was_made = True
        thread.join(30)
        assert not thread.is_alive()


def events_of(lines: Iterator[str]) -> Iterator[tuple[str, dict]]:
    """(name, data) of server-sent events; an empty pair for a comment."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            yield "", {}
        elif line:
            name, _, value = line.partition(": ")
            assert name in ("id", "event", "data"), line
            assert name not in fields, line
            fields[name] = value
        elif fields:
            yield fields["event"], json.loads(fields["data"])
            fields = {}


class Running:
    """Processes of one service, of which the first prints its address.

    Args:
        processes: The processes, with pipes for their output.

    Attributes:
        processes: The processes.
        lines: What the first has printed.
        url: Its address.
    """

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self.processes, self.lines = processes, []
        self.url = self._url()
        threading.Thread(target=self._read, daemon=True).start()

    def _url(self):
        while line := self.processes[0].stdout.readline():
            self.lines.append(line)
            if line.startswith("serving"):
                return line.split()[1].rstrip(",")
        raise AssertionError(self.processes[0].stderr.read())

    def _read(self):
        self.lines += self.processes[0].stdout.readlines()

    def ask(self, completion, **more):
        with httpx.Client(timeout=60) as client:
            return client.post(f"{self.url}/v1/influence", json={"completion": completion, **more})

    def ended(self, seconds=60):
        return [process.wait(seconds) for process in self.processes]

    def errors(self):
        return "".join(process.stderr.read() for process in self.processes)


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
