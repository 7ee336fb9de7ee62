"""A service that answers every question from made-up results, for tests of its page.

service = FakeService(Made(num_queries=1, rescored=8))
service.hold("sequence", after=3)   # its stream waits after the third of these events …
service.release()                   # … until then

It keeps what it was asked, and answers wrongly where a test wants it to.
"""

import asyncio
import dataclasses
import json
import threading
import time
from collections import Counter
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse

from ekfac_dist.report.spread import carriers, distribution
from ekfac_dist.serve.page import page_routes
from helpers.made_results import Made

MANY = 10**9
GROWN = 1.5  # exact scores of every other sequence are so much larger than the index's


class FakeService:
    """What the page talks to.

    Attributes:
        made: The results that answers are made of; the first query's.
        token: What requests must carry; None: nothing.
        asked: The questions, as they came.
        cancelled: The names of questions that were cancelled.
        hung_up: The names of questions whose client went away.
        before: Number of questions that wait before each.
        refusal: (status, body, headers) in place of an answer; None: none.
        drops: Number of sequences that neither list has any more once scores are exact.
        fails_at: Event before which a stream ends with an error; None: none.
        breaks_at: Event before which a stream just ends; None: none.
        chats: Whether the tokenizer has a chat template.
        kept: Whether answers can still be had as reports.
        goes_on: What the model says.
    """

    def __init__(self, made: Made, token: str | None = None) -> None:
        self.made, self.token = made, token
        self.asked, self.completions, self.cancelled, self.hung_up = [], [], [], []
        self.before, self.drops, self.kept, self.chats = 0, 0, True, False
        self.refusal = self.fails_at = self.breaks_at = None
        self.goes_on = [" in", " Par", "is", "."]
        self._held: dict[str, int] = {}

    def hold(self, event: str, after: int = 0) -> None:
        self._held[event] = after

    def release(self, *events: str) -> None:
        for event in events or list(self._held):
            del self._held[event]

    # -- what an answer is -----------------------------------------------------------------------

    def scores(self):
        """The index's scores of all sequences, and the exact ones of those that are listed."""
        index = self.made.scores_QN[0]
        exact = {i: float(index[i]) * (GROWN if i % 2 else 1.0) for i in self.made.sequences}
        return index, exact

    def order(self, end: str) -> list[int]:
        """The listed sequences of one end by their exact scores."""
        _, exact = self.scores()
        listed = self.made.top[0] if end == "top" else self.made.bottom[0]
        ordered = sorted(listed, key=lambda i: exact[i], reverse=end == "top")
        return ordered[: len(ordered) - self.drops]

    def row(self, place: int | None, i: int, is_exact: bool) -> dict:
        index, exact = self.scores()
        tokens = self.made.sequences[i]
        return {
            "rank": place,
            "index": i,
            "score": exact[i] if is_exact else float(index[i]),
            "share": self.made.share(0, i),
            "scan_score": float(index[i]) if is_exact else None,
            "exact": is_exact,
            "text": "".join(tokens),
            "tokens": tokens,
        }

    def detail(self, i: int) -> dict:
        """Token scores of the made results, of the exact score's size."""
        index, exact = self.scores()
        p = self.made.pairs.index((0, i))
        begin, end = self.made.details["offsets"][p : p + 2].tolist()
        scale = exact[i] / float(index[i])
        scores = scale * self.made.details["token_scores"][begin:end]
        number = carriers(scores.numpy())
        return {
            "token_scores": scores.tolist(),
            "layer_token_scores": (
                scale * self.made.details["layer_token_scores"][:, begin:end]
            ).tolist(),
            "module_scores": (scale * self.made.details["module_scores"][p]).tolist(),
            "carriers": number,
            "few": 0 < number <= min(5, 0.1 * len(scores)),
            "strongest": int(scores.abs().argmax()) if len(scores) else 0,
        }

    def answer(self, name: str, request: dict, stage: str) -> dict:
        manifest, made = self.made._manifest(), self.made
        is_exact = stage == "exact"
        lists = {
            end: self.order(end) if is_exact else getattr(made, end)[0] for end in ("top", "bottom")
        }
        texts = request
        if "messages" in request:
            asked, answer = (message["content"] for message in request["messages"])
            texts = {**request, "prompt": f"<user>{asked}<assistant>", "completion": answer}
        query = self.side(texts, texts["completion"], 1.25)
        query["prompt"] = texts.get("prompt", "")
        query["against"] = None
        if request.get("against") is not None:
            query["against"] = self.side(request, request["against"], 3.25)
        damping = request.get("damping")
        if not isinstance(damping, dict):
            damping = {"value": 0.1 if damping is None else damping}
        question = {
            "prompt": "",
            "against": None,
            "top_k": made.listed,
            "normalise": "none",
            "tokens": "inputs",
            "refine": None,
            **request,
            "damping": {"relative": True, "scale": "mean", "modules": {}, **damping},
        }
        return {
            "id": name,
            "question": question,
            "model": made.model,
            "num_sequences": made.num_sequences,
            "layers": manifest["layers"],
            "modules": list(manifest["modules"]),
            "module_layers": [
                manifest["layers"].index(one) for one in manifest["modules"].values()
            ],
            "training_size": None,
            "meaning": {one: manifest["scores"][one] for one in ("sign", "scale", "share")},
            "index": {"rank": 1, "dtype": "bfloat16"},
            "query": query,
            "stage": stage,
            **{
                end: [self.row(k + 1, i, is_exact) for k, i in enumerate(lists[end])]
                for end in lists
            },
            "details": {str(i): self.detail(i) for i in made.sequences} if is_exact else {},
            "distribution": dataclasses.asdict(distribution(made.scores_QN[0])),
            "agreement": {"spearman_top": 0.987, "overlap": 0.9, "scored_again": 2 * made.listed}
            if is_exact
            else None,
            "refined": "by 20 steps of conjugate gradients" if question["refine"] else None,
            "seconds": {"waited": 0.3, "ranking": 1.1, "exact": 8.2 if is_exact else 0.0},
        }

    @staticmethod
    def side(request: dict, completion: str, nats: float) -> dict:
        before = request.get("prompt", "").split()
        return {
            "completion": completion,
            "tokens": [*before, completion],
            "is_label": [False] * len(before) + [True],
            "split_token": completion if request.get("prompt", "").endswith(" ") else None,
            "nats": nats,
        }

    def columns(self) -> list[int]:
        """Top 1, bottom 1, top 2, …"""
        pairs = zip(self.made.top[0], self.made.bottom[0], strict=True)
        return list(dict.fromkeys(i for pair in pairs for i in pair))

    async def events(self, name: str, request: dict):
        """The stream of one answer, as (event, data)."""
        yield "queued", {"id": name, "before": self.before}
        yield "started", {}
        if request.get("rescore") != 0:
            yield "ranking", self.answer(name, request, "ranking")
            columns = self.columns()
            for done, i in enumerate(columns):
                progress = {"done": done, "of": len(columns), "what": "sequences"}
                yield "progress", progress
                yield "sequence", {"row": self.row(None, i, True), "detail": self.detail(i)}
        stage = "ranking" if request.get("rescore") == 0 else "exact"
        yield "answer", self.answer(name, request, stage)

    async def stream(self, name: str, request: dict):
        """The same as it is sent."""
        finished, sent = False, Counter()
        try:
            async for event, data in self.events(name, request):
                while sent[event] >= self._held.get(event, MANY):
                    if name in self.cancelled:
                        return
                    yield ": still here\n\n"
                    await asyncio.sleep(0.02)
                if event == self.breaks_at:
                    finished = True
                    return
                if event == self.fails_at:
                    event, data = "error", {"status": 422, "detail": "The index is gone.<b>"}
                sent[event] += 1
                yield f"id: 1\nevent: {event}\ndata: {json.dumps(data)}\n\n"
                if event == "error":
                    break
            finished = True
        finally:
            if not finished:
                self.hung_up.append(name)

    # -- HTTP ------------------------------------------------------------------------------------

    def app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        page_routes(app)

        @app.middleware("http")
        async def require_token(request: Request, call_next):
            path = request.url.path
            is_open = path == "/" or path.startswith("/static/")
            right = request.headers.get("authorization") == f"Bearer {self.token}"
            if self.token is None or is_open or right:
                return await call_next(request)
            return Response('{"detail": "This service needs its token."}', 401)

        @app.get("/v1/info")
        def info() -> dict:
            return {
                "model": {"name": self.made.model, "dtype": "float32", "whole": "9f2c"}
                | {"chats": self.chats},
                "factors": {"path": "runs/tiny", "num_sequences": 60, "labels": "sampled"},
                "index": {"path": "runs/index", "rank": 1, "dtype": "bfloat16", "bytes": 10**6}
                | {"num_sequences": self.made.num_sequences},
                "layers": ["model.layers.0"],
                "damping": {"value": 0.1, "relative": True, "scale": "mean", "modules": {}},
            }

        @app.post("/v1/influence")
        async def influence(request: Request) -> Response:
            question = await request.json()
            self.asked.append(question)
            if self.refusal:
                status, body, headers = self.refusal
                return Response(json.dumps(body), status, headers)
            name = f"q{len(self.asked)}"
            assert request.headers["accept"] == "text/event-stream"
            return StreamingResponse(self.stream(name, question), media_type="text/event-stream")

        @app.delete("/v1/influence/{name}")
        def cancel(name: str) -> dict:
            self.cancelled.append(name)
            return {}

        @app.get("/v1/influence/{name}/report")
        def report(name: str) -> Response:
            if not self.kept:
                raise HTTPException(404, f"There is no answer {name}.")
            return Response(f"<!doctype html><title>{name}</title>", media_type="text/html")

        @app.post("/v1/complete")
        async def complete(request: Request) -> dict:
            self.completions.append(await request.json())
            while "complete" in self._held:
                await asyncio.sleep(0.02)
            tokens = self.goes_on
            return {"text": "".join(tokens), "tokens": tokens, "finish": "length"}

        return app


@contextmanager
def running(service: FakeService):
    """Serves on loopback in a thread; gives the address."""
    config = uvicorn.Config(service.app(), host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        service.release()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def made_answers(**settings) -> Made:
    """Results of one query, made in memory."""
    made = Made(num_queries=1, **settings)
    made.make()
    return made
