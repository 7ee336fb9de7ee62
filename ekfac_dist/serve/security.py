"""Who may ask: the guard before the application.

Browsers are held off from other sites: a request whose Host is not the service's own (a name that
was made to point here), or that another origin makes, is refused, and no response allows another
origin to read it. With a token every request carries it, except for the page's own files, which
hold no data. Bodies are limited while they arrive. What a request says is never logged.
"""

import asyncio
import hmac
import ipaddress
import traceback
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException

from ekfac_dist.config.serve import is_loopback
from ekfac_dist.runtime.terminal import show
from ekfac_dist.serve.jobs import encoded
from ekfac_dist.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MOST_BODY_BYTES = 2**20
BODY_SECONDS = 30  # in which the body of a request has to come
# What holds no data, so that a browser can show it before anybody has given a token.
OPEN_PATHS, OPEN_PREFIX = ("/", "/docs"), "/static/"
NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
PAGE_POLICY = f"{NOTHING}; script-src 'self'; style-src 'self'; img-src 'self' data:; " + (
    "connect-src 'self'"
)
DEFECT_SENTENCE = "The service has a defect; see its log."
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
    b"content-security-policy": NOTHING.encode(),
    b"x-frame-options": b"DENY",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
}


class Refused(Exception):
    """A request that is not let in.

    Args:
        status: Its status.
        sentence: Why.
        headers: More headers of the response.
    """

    def __init__(self, status: int, sentence: str, headers: Iterable[tuple[bytes, bytes]] = ()):
        super().__init__(sentence)
        self.status, self.headers = status, list(headers)


@dataclass(frozen=True)
class Guard:
    """An ASGI application that lets in what may be asked, and counts it.

    Attributes:
        app: What answers.
        host: Where the service listens.
        token: What requests carry; None: nothing.
        metrics: Where they are counted.
    """

    app: App
    host: str
    token: str | None
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return
        response = _Response(send)
        try:
            headers = scope["headers"]
            self._require_own_host(headers)
            _require_own_origin(scope)
            self._require_token(scope)
            body = _LimitedBody(receive, headers)
            await self.app(scope, body.receive, response.send)
        except Refused as refusal:
            await response.refuse(refusal)
        except Exception as error:
            # The message of an error may hold what was asked; its place does not.
            lines = [*traceback.format_tb(error.__traceback__), type(error).__name__]
            show(f"ekfac-dist: a request failed:\n{''.join(lines)}", error=True)
            await response.refuse(Refused(500, DEFECT_SENTENCE))
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, str(response.status)).inc()

    def _require_own_host(self, headers: Headers) -> None:
        """Refuses a Host that is not this service, so that no other site's name can stand for it.

        Where it listens at all addresses, any name may be its own; there the token protects it.
        """
        hosts = [value for name, value in headers if name == b"host"]
        name = _name_of(hosts[0].decode("latin-1")) if len(hosts) == 1 else None
        if name is not None and (
            name == self.host.lower().strip("[]")
            or (is_loopback(name) and (is_loopback(self.host) or _is_any_address(self.host)))
            or _is_any_address(self.host)
        ):
            return
        raise Refused(
            421,
            "The Host of this request is not this service's; ask it by the name or address at "
            "which it listens.",
        )

    def _require_token(self, scope: Scope) -> None:
        if self.token is None:
            return
        path = scope["path"]
        if scope["method"] == "GET" and (path in OPEN_PATHS or path.startswith(OPEN_PREFIX)):
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
        is_right = hmac.compare_digest(token.strip(), self.token.encode("ascii"))
        if scheme.lower() != b"bearer" or not is_right:
            raise Refused(
                401,
                "This service needs its token: send it as `Authorization: Bearer TOKEN`.",
                [(b"www-authenticate", b"Bearer")],
            )


def _require_own_origin(scope: Scope) -> None:
    """Refuses what another site's page asks for; but a link to the page may be followed.

    Raises:
        Refused: If it is so.
    """
    headers: dict[bytes, bytes] = dict(scope["headers"])
    origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
    if origin is not None:
        parts = _split(origin.decode("latin-1"))
        if parts is None or parts.lower() != headers[b"host"].decode("latin-1").lower():
            raise Refused(403, "Requests of other sites' pages are not answered.")
    elif site is not None and site not in (b"same-origin", b"none"):
        is_link = headers.get(b"sec-fetch-mode") == b"navigate"
        is_link &= headers.get(b"sec-fetch-dest") == b"document"
        if not (is_link and scope["method"] == "GET" and scope["path"] in OPEN_PATHS):
            raise Refused(403, "Requests of other sites' pages are not answered.")


def _split(origin: str) -> str | None:
    """Host and port of an origin; None if it has none."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc if parts.scheme in ("http", "https") and parts.netloc else None


def _name_of(host: str) -> str | None:
    """The name or address in a Host header, without its port and brackets; None if it is wrong."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_any_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


class _LimitedBody:
    """A request's body, refused as soon as it is too long, or if it does not come soon."""

    def __init__(self, receive: Receive, headers: Headers) -> None:
        self._receive, self._num_bytes, self._is_whole = receive, 0, False
        self._until = asyncio.get_running_loop().time() + BODY_SECONDS
        for name, value in headers:
            if name != b"content-length":
                continue
            if not value.isdigit():
                raise Refused(400, "The Content-Length of this request is no number.")
            if len(value) > 10 or int(value) > MOST_BODY_BYTES:
                raise _too_long()

    async def receive(self) -> MutableMapping[str, Any]:
        """The next part of it, or, after the last, whatever comes next."""
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, _LATE, {"connection": "close"}) from None
        self._is_whole = not message.get("more_body", False)
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > MOST_BODY_BYTES:
            # As the framework's own error, since it takes any other for a body that is no JSON.
            raise HTTPException(413, str(_too_long()), {"connection": "close"})
        return message


_LATE = f"The body of this request did not come within {BODY_SECONDS} seconds; ask again."


def _too_long() -> Refused:
    sentence = f"The body is longer than {MOST_BODY_BYTES} bytes; ask with shorter texts."
    return Refused(413, sentence, [(b"connection", b"close")])


class _Response:
    """One response, with the headers of all."""

    def __init__(self, send: Send) -> None:
        self._send, self.status = send, 0

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = list(message.get("headers", []))
            names = {name.lower() for name, _ in own}
            missing = [(name, value) for name, value in _HEADERS.items() if name not in names]
            message = {**message, "headers": [*own, *missing]}
        await self._send(message)

    async def refuse(self, refusal: Refused) -> None:
        """Sends a refusal, unless a response has begun."""
        if self.status:
            return
        body = encoded({"detail": str(refusal)})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *refusal.headers,
        ]
        await self.send(
            {"type": "http.response.start", "status": refusal.status, "headers": headers}
        )
        await self._send({"type": "http.response.body", "body": body})
