"""The HTTP server of worker 0: its socket, and its thread."""

import asyncio
import ipaddress
import logging
import socket
import threading
import time

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ekfac_dist.errors import ConfigError, LaunchError
from ekfac_dist.serve.security import App

MOST_CONNECTIONS = 512
KEEP_ALIVE_SECONDS = 15
HEAD_SECONDS = 15  # in which the head of a request has to come
FLUSH_SECONDS = 3  # what connections have to hear the end of their answers
_START_SECONDS = 30.0


def bound_socket(host: str, port: int, *, has_token: bool) -> socket.socket:
    """A socket at an address; nobody can connect before the server is started.

    Args:
        host: Address or name.
        port: Port; 0: one that is free.
        has_token: Whether requests carry a token.

    Raises:
        ConfigError: If the address is not this machine's, the port is in use, or others can reach
            it and there is no token.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"host is {host}, which is no address or name that is known here ({error}); give one "
            "of this machine, such as 127.0.0.1."
        ) from error
    if not has_token and not ipaddress.ip_address(address[0]).is_loopback:
        raise ConfigError(
            f"host is {host}, which stands for {address[0]} here: others can reach it, so a token "
            "is needed; give --token, or 127.0.0.1 as host."
        )
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"Nothing can listen at {host}, port {port}: {error.strerror}; give another --port or "
            "--host."
        ) from error
    return bound


class _Protocol(H11Protocol):
    """HTTP/1.1 over connections that are ended if a request's head does not come soon.

    Else a few hundred that say nothing would keep everybody out.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first request."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Takes a part of a request."""
        super().data_received(data)
        self._wait_for_head()

    def _wait_for_head(self) -> None:
        is_asked = self.cycle is not None and not self.cycle.response_complete
        if self._head_timer is None and not is_asked:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif self._head_timer is not None and is_asked:
            self._head_timer.cancel()
            self._head_timer = None


class HttpServer:
    """Serves an application in a thread of its own.

    Args:
        app: The application.
        bound: The socket that it listens at.
    """

    def __init__(self, app: App, bound: socket.socket) -> None:
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it would log what clients do
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            http=_Protocol,
            loop="asyncio",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        self._server, self._socket = uvicorn.Server(settings), bound
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether it serves."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Starts it, and returns once it listens.

        Raises:
            LaunchError: If it does not start.
        """
        self._thread.start()
        until = time.monotonic() + _START_SECONDS
        while not self._server.started and time.monotonic() < until and self.is_alive:
            time.sleep(0.01)
        if not self._server.started:
            raise LaunchError("The HTTP server did not start.")

    def stop(self) -> None:
        """Ends it, after what was answered has been sent."""
        self._server.should_exit = True
        self._thread.join(FLUSH_SECONDS + 2)

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])
