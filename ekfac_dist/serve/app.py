"""The HTTP application: its operations, what each takes and gives. Computes nothing.

It hands questions to the desk and waits for their events; what may be asked at all is the guard's
matter.
"""

from typing import Annotated, Any

from fastapi import FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from ekfac_dist import __version__
from ekfac_dist.config import ServeConfig
from ekfac_dist.errors import UserError
from ekfac_dist.influence.asking import Session
from ekfac_dist.report.page import report_text
from ekfac_dist.serve.desk import Desk, Ending, QueueFull
from ekfac_dist.serve.faults import in_words, is_no_json
from ekfac_dist.serve.field_names import field_names, named_as_in
from ekfac_dist.serve.jobs import ENDING, UNUSABLE, Event, Job, encoded
from ekfac_dist.serve.metrics import CONTENT_TYPE
from ekfac_dist.serve.models import (
    AnswerModel,
    CompletionModel,
    CompletionRequest,
    Problem,
    QuestionRequest,
    SequenceModel,
)
from ekfac_dist.serve.operations import operations_page
from ekfac_dist.serve.page import page_routes
from ekfac_dist.serve.questions import continuation_of, question_of
from ekfac_dist.serve.security import DEFECT_SENTENCE, NOTHING
from ekfac_dist.serve.streams import EventStream, Listening, unless_left

_DESCRIPTION = (
    "Which training sequences make a language model say what it says? Scores are of influence "
    "functions with EK-FAC curvature. Errors are a status and {“detail”: a sentence}."
)
_MEANINGS = {
    400: "The body is no JSON.",
    401: "The token is missing or wrong.",
    403: "Another site's page asks.",
    404: "There is nothing of that name.",
    408: "The body does not come.",
    409: "The question was cancelled.",
    413: "The body is too long.",
    421: "The Host is another's.",
    422: "It cannot be answered, and why.",
    429: "Too many wait; Retry-After says when to ask again.",
    503: "The service is ending.",
}
_ALL = (401, 403, 421)
_BODY = (*_ALL, 400, 408, 413, 422)
JobId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{22}$", description="A question's id.")]
_NO_SUCH = "There is no answer of this id; the last 64 are kept."


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"model": Problem, "description": _MEANINGS[status]} for status in sorted(statuses)
    }


def _content(model: Any, description: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model, "description": description}}


def make_app(session: Session, desk: Desk, config: ServeConfig) -> FastAPI:
    """The application of one service.

    Args:
        session: The open model; only its methods for any thread are used.
        desk: Where questions wait.
        config: The service's limits.
    """
    app = FastAPI(
        title="ekfac-dist",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_error_handlers(app)
    _add_asking(app, session, desk, config)
    _add_answers(app, desk)
    _add_information(app, session, desk, config)
    page_routes(app)
    return app


def _add_asking(app: FastAPI, session: Session, desk: Desk, config: ServeConfig) -> None:
    num_sequences: int = session.info["index"]["num_sequences"]
    streamed = _content(AnswerModel, "The answer.")
    streamed[200]["content"] = {
        "text/event-stream": {
            "schema": {"type": "string"},
        }
    }

    @app.post(
        "/v1/influence",
        responses={**streamed, **_problems(*_BODY, 409, 429, 503)},
        response_class=JSONResponse,
    )
    async def ask(body: QuestionRequest, request: Request) -> Response:
        """Which training sequences make the completion more likely, and which less?

        With Accept: text/event-stream, the steps to the answer as server-sent events.
        """
        with named_as_in(body):
            question, shown = question_of(body, config, num_sequences)
            await run_in_threadpool(session.check, question)
        accepts = request.headers.get("accept", "")
        streams, listening = "text/event-stream" in accepts, Listening()
        job = Job(question, listening, shown, field_names(body), streams)
        desk.add(job)
        if streams:
            return EventStream(listening, lambda: desk.cancel(job.id))
        return await _last_of(job, listening, desk, request)

    @app.post(
        "/v1/complete",
        responses={
            **_content(CompletionModel, "How the model goes on."),
            **_problems(*_BODY, 409, 429, 503),
        },
        response_class=JSONResponse,
    )
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """How does the model go on from a prompt, or a chat?"""
        listening = Listening()
        job = Job(continuation_of(body, config), listening)
        desk.add(job)
        return await _last_of(job, listening, desk, request)

    @app.delete("/v1/influence/{job_id}", responses=_problems(*_ALL, 404, 422))
    def cancel(job_id: JobId) -> dict[str, str]:
        """Cancels a question that waits, or is being answered."""
        if not desk.cancel(job_id):
            raise HTTPException(404, "No question of this id waits, or is being answered.")
        return {"cancelled": job_id}


async def _last_of(job: Job, listening: Listening, desk: Desk, request: Request) -> Response:
    """The response with a job's last event; the job is cancelled if the client goes away."""
    event: Event | None = None
    try:
        event = await unless_left(listening.last(), request.receive)
    finally:
        if event is None:
            desk.cancel(job.id)
    if event is None or event.name == "answer":  # nobody reads the first
        return _json(event.data if event else b"null")
    return _json(event.data, event.status)


def _json(content: bytes, status: int = 200) -> Response:
    return Response(content, status, media_type="application/json")


def _add_answers(app: FastAPI, desk: Desk) -> None:
    @app.get(
        "/v1/influence/{job_id}",
        responses={**_content(AnswerModel, "The answer."), **_problems(*_ALL, 404, 422)},
        response_class=JSONResponse,
    )
    def answer(job_id: JobId) -> Response:
        """An answer again; the last 64 are kept."""
        if (kept := desk.kept(job_id)) is None:
            raise HTTPException(404, _NO_SUCH)
        return _json(encoded(kept.json()))

    @app.get(
        "/v1/influence/{job_id}/report",
        responses={
            200: {"content": {"text/html": {"schema": {"type": "string"}}}},
            **_problems(*_ALL, 404, 422),
        },
        response_class=JSONResponse,  # of the problems
    )
    def report(job_id: JobId) -> Response:
        """An answer as the report's single HTML file."""
        if (kept := desk.kept(job_id)) is None:
            raise HTTPException(404, _NO_SUCH)
        # A lone surrogate can occur in data, but cannot be encoded in UTF-8.
        content = report_text(kept.results).encode("utf-8", errors="xmlcharrefreplace")
        named = f'attachment; filename="influence-{job_id}.html"'
        policy = f"{NOTHING}; sandbox"  # if a browser shows it after all
        headers = {"content-disposition": named, "content-security-policy": policy}
        return HTMLResponse(content, headers=headers)


def _add_information(app: FastAPI, session: Session, desk: Desk, config: ServeConfig) -> None:
    limits = ("max_prompt_characters", "max_top_k", "max_completion_tokens", "queue_length")

    @app.get(
        "/v1/sequences/{index}",
        responses={**_content(SequenceModel, "The sequence."), **_problems(*_ALL, 404, 422)},
        response_class=JSONResponse,
    )
    def sequence(index: Annotated[int, Path(ge=0, lt=2**63)]) -> Response:
        """A training sequence."""
        try:
            found = session.sequence(index)
        except KeyError:
            raise HTTPException(404, f"The index holds no sequence {index}.") from None
        return _json(encoded(found))

    @app.get("/v1/info", responses=_problems(*_ALL), response_class=JSONResponse)
    def info() -> Response:
        """Which model, factors and index answer, and the limits of what can be asked."""
        return _json(
            encoded({**session.info, "limits": {name: getattr(config, name) for name in limits}})
        )

    @app.get("/healthz", responses=_problems(*_ALL, 503))
    def health() -> dict[str, str]:
        """Whether questions are answered."""
        if (reason := desk.reason_to_end) is not None:
            raise HTTPException(ENDING, reason)
        return {"status": "ok"}

    @app.get(
        "/metrics",
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            **_problems(*_ALL),
        },
        response_class=JSONResponse,  # of the problems
    )
    def metrics() -> Response:
        """Counters, in Prometheus' text format."""
        return Response(desk.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/docs", include_in_schema=False)
    def operations() -> HTMLResponse:
        return HTMLResponse(operations_page(app.openapi()))


def _add_error_handlers(app: FastAPI) -> None:
    def problem(status: int, sentence: str, headers: Any = None) -> Response:
        return Response(
            encoded({"detail": sentence}), status, headers, media_type="application/json"
        )

    @app.exception_handler(RequestValidationError)
    async def wrong_fields(request: Request, error: RequestValidationError) -> Response:
        faults = error.errors()
        return problem(400 if is_no_json(faults) else UNUSABLE, in_words(faults))

    @app.exception_handler(UserError)
    async def unusable(request: Request, error: UserError) -> Response:
        return problem(UNUSABLE, str(error))

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> Response:
        return problem(429, str(error), {"retry-after": str(error.retry_seconds)})

    @app.exception_handler(Ending)
    async def ending(request: Request, error: Ending) -> Response:
        return problem(ENDING, str(error), {"retry-after": "30"})

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        sentence = _SENTENCES.get((error.status_code, error.detail), error.detail)
        return problem(error.status_code, sentence, error.headers)

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return problem(500, DEFECT_SENTENCE)  # the guard sees the error too, and logs it


_SENTENCES = {
    (404, "Not Found"): "There is nothing at this path; /docs lists what there is.",
    (405, "Method Not Allowed"): "This path has no such method; /docs lists what there is.",
    (400, "There was an error parsing the body"): "The body is no JSON that can be read.",
}
