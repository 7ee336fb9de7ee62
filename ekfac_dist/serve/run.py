"""`serve`, the command: opens model, factors and index, and answers until it is asked to end."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from ekfac_dist.config import ServeConfig
from ekfac_dist.influence.asking import Session
from ekfac_dist.runtime.extras import require_extra
from ekfac_dist.runtime.heartbeat import last_words
from ekfac_dist.runtime.local_peers import watching_this_host
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.processes import World

if TYPE_CHECKING:  # of the extra, which is asked for in a sentence first
    from ekfac_dist.serve.desk import Desk
    from ekfac_dist.serve.http import HttpServer
    from ekfac_dist.serve.security import Guard

OpenSession = Callable[[ServeConfig, World], AbstractContextManager[Session]]


def run_service(config: ServeConfig, world: World, open_session: OpenSession) -> str:
    """Serves until the process is asked to end; a collective.

    Args:
        config: The service's configuration.
        world: The workers.
        open_session: Opens model, factors and index; a collective.

    Returns:
        What worker 0 says at the end.

    Raises:
        UserError: If the user can mend the cause; or if a worker is lost.
    """
    with world.agree():
        require_extra("serve", ("fastapi", "uvicorn", "prometheus_client", "jinja2"))
    from ekfac_dist.serve.desk import Desk
    from ekfac_dist.serve.http import HttpServer, bound_socket
    from ekfac_dist.serve.loop import EndRequest, answer_until_end
    from ekfac_dist.serve.metrics import Metrics

    has_token = config.token is not None
    bound = world.on_main(lambda: bound_socket(config.host, config.port, has_token=has_token))
    request = EndRequest()
    with open_session(config, world) as session, watching_this_host(world):
        request.listen()
        if bound is None:
            answer_until_end(session, None, request)
            return ""
        desk = Desk(config.queue_length, config.drain_seconds, Metrics())
        server = HttpServer(guarded_app(session, desk, config), bound)
        with served(server, desk):
            host, port = bound.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            log_on_main(world, f"serving       http://{shown}:{port}, ends with Ctrl-C or SIGTERM")
            answer_until_end(session, desk, request, lambda: server.is_alive)
    return "The service has ended; every question that there was time for is answered."


def guarded_app(session: Session, desk: "Desk", config: ServeConfig) -> "Guard":
    """The application of a service, behind its guard.

    Args:
        session: The open model.
        desk: Where questions wait.
        config: Who may ask, and what.
    """
    from ekfac_dist.serve.app import make_app
    from ekfac_dist.serve.security import Guard

    return Guard(make_app(session, desk, config), config.host, config.token, desk.metrics)


@contextmanager
def served(server: "HttpServer", desk: "Desk") -> Iterator[None]:
    """Context in which a server runs; an error in it is told to all who wait before it ends.

    Args:
        server: The server.
        desk: Where its questions wait.
    """

    def tell(sentence: str) -> None:
        desk.fail(sentence)
        server.stop()

    server.start()
    try:
        with last_words(tell), desk.failing():
            yield
    finally:
        server.stop()
