"""The server: OpenAI's routes and a few of its own, in front of an engine."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from peftfn.serving.answer import Answer, Failed, Gone
from peftfn.serving.asked import Limits, asked, parsed
from peftfn.serving.chat import Chat
from peftfn.serving.engine import Engine
from peftfn.serving.fields import Refused
from peftfn.serving.metrics import Metrics
from peftfn.serving.told import error

_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/adapters/{name}", "/health", "/metrics")
_GONE = 499
"""The status of an answer that nobody waits for. Nobody sees it."""


def app(engine: Engine, name: str, limits: Limits) -> FastAPI:
    """Return the application of a server; when it stops, so does the engine.

    Args:
        name: of the base, as `model` in requests.
        limits: of requests.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    out = FastAPI(title="peftfn", docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
    server = Server(engine, name, limits)
    for path, call, verbs in (
        ("/health", server.health, ["GET"]),
        ("/metrics", server.measured, ["GET"]),
        ("/v1/models", server.models, ["GET"]),
        ("/v1/models/{model:path}", server.model, ["GET"]),
        ("/v1/completions", server.completion, ["POST"]),
        ("/v1/chat/completions", server.chat, ["POST"]),
        ("/v1/adapters/{adapter:path}", server.put, ["POST"]),
        ("/v1/adapters/{adapter:path}", server.remove, ["DELETE"]),
    ):
        out.add_api_route(path, call, methods=verbs, response_model=None)
    out.add_exception_handler(Refused, _refused)
    out.add_exception_handler(HTTPException, _unrouted)
    out.add_exception_handler(Exception, _unforeseen)
    return out


class Server:
    """The routes."""

    def __init__(self, engine: Engine, name: str, limits: Limits):
        self.engine, self.name, self.limits = engine, name, limits
        self.metrics, self._began, self._chat = Metrics(engine), int(time.time()), Chat(engine.tokenizer)
        self._vocabulary = int(engine.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]

    async def health(self) -> Response:
        alive = self.engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def measured(self) -> Response:
        return Response(
            await run_in_threadpool(self.metrics.text), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def models(self) -> Response:
        names = await run_in_threadpool(lambda: self.engine.adapters.names)
        return JSONResponse({"object": "list", "data": [self._model(n) for n in dict.fromkeys([self.name, *names])]})

    async def model(self, model: str) -> Response:
        if model != self.name and model not in await run_in_threadpool(lambda: self.engine.adapters.names):
            raise Refused(404, f"there is no model {model[:200]!r}", "model", "model_not_found")
        return JSONResponse(self._model(model))

    def _model(self, name: str) -> dict[str, Any]:
        parent = None if name == self.name else self.name
        return {"id": name, "object": "model", "created": self._began, "owned_by": "peftfn", "parent": parent}

    async def put(self, request: Request, adapter: str) -> Response:
        body = await _body(request, self.limits.body, optional=True)
        fields = parsed(body) if body else {}
        if odd := fields.keys() - {"path"}:
            raise Refused(400, f"unknown field {min(odd)[:80]!r}; supported is path", min(odd)[:80])
        path = fields.get("path")
        if path is not None and not isinstance(path, str):
            raise Refused(400, "path must be a text: a folder in the adapters' directory", "path")
        if adapter == self.name:
            raise Refused(400, f"{adapter!r} is the base's name", "adapter")
        await self._changed(lambda: self.engine.adapters.put(adapter, path))
        return JSONResponse({"id": adapter, "object": "adapter", "registered": True})

    async def remove(self, adapter: str) -> Response:
        await self._changed(lambda: self.engine.adapters.remove(adapter))
        return JSONResponse({"id": adapter, "object": "adapter", "deleted": True})

    async def _changed(self, change: Callable[[], None]) -> None:
        try:
            await run_in_threadpool(change)
        except KeyError as e:
            raise Refused(404, str(e.args[0]), "adapter", "model_not_found") from e
        except ValueError as e:
            raise Refused(400, str(e), "adapter") from e

    async def completion(self, request: Request) -> Response:
        return await self._counted(request, None)

    async def chat(self, request: Request) -> Response:
        return await self._counted(request, self._chat)

    async def _counted(self, request: Request, chat: Chat | None) -> Response:
        began = time.monotonic()
        try:
            return await self._answered(request, chat, began)
        except Refused as e:
            self.metrics.requests.labels("rejected" if e.status in (429, 503) else "refused").inc()
            raise

    async def _answered(self, request: Request, chat: Chat | None, began: float) -> Response:
        fields = parsed(await _body(request, self.limits.body))
        engine, limits = self.engine, self.limits
        wanted = await run_in_threadpool(
            asked, fields, chat, self.name, engine.tokenizer, self._vocabulary, limits, engine.defaults
        )
        answer = Answer(engine, self.metrics, wanted, began)
        await answer.submitted()
        watch = asyncio.create_task(answer.watch(request.receive))
        if wanted.stream:
            return _Events(answer, watch)
        try:
            return JSONResponse(await answer.whole())
        except Failed as e:
            return JSONResponse(error(500, str(e)), 500)
        except Gone:
            return Response(status_code=_GONE)
        finally:
            watch.cancel()
            answer.close()


class _Events(StreamingResponse):
    """An answer as it comes. However it ends, the row is free afterwards."""

    def __init__(self, answer: Answer, watch: "asyncio.Task[None]"):
        super().__init__(answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer, self._watch = answer, watch

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.stream_response(send)
        except (Gone, OSError):  # there is nobody to send to
            return
        finally:
            self._watch.cancel()
            self._answer.close()


async def _body(request: Request, limit: int, optional: bool = False) -> bytes:
    """The body, read no further than the limit."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = b""
    if (length := request.headers.get("content-length", "0")).isdecimal() and int(length) > limit:
        raise Refused(413, f"the body has {length} bytes; this server reads at most {limit}")
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Refused(413, f"the body has more than {limit} bytes, the most that this server reads")
    if kind != "application/json" and (body or not optional):  # what a web page may send without being asked is none
        raise Refused(415, f"the body is {kind[:80] or 'of no type'}; give application/json")
    return body


async def _refused(_: Request, e: Any) -> Response:
    headers = None if e.retry is None else {"Retry-After": str(e.retry)}
    return JSONResponse(error(e.status, str(e), e.field, e.code), e.status, headers)


async def _unrouted(request: Request, e: Any) -> Response:
    what = f"{request.method} {request.url.path[:200]}: {e.detail}"
    if e.status_code == 404:
        what += f"; this server has {', '.join(_ROUTES)}"
    return JSONResponse(error(e.status_code, what), e.status_code, e.headers)


async def _unforeseen(_: Request, e: Exception) -> Response:
    return JSONResponse(error(500, f"the server failed: {type(e).__name__}"), 500)
