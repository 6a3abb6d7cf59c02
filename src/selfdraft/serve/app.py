"""The routes of the server."""

from __future__ import annotations

import platform
import time
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from selfdraft.llm import LLM
from selfdraft.serve.answers import Document, Writer, event, padded
from selfdraft.serve.body import read_body
from selfdraft.serve.calls import AwaitedCall
from selfdraft.serve.errors import ApiError
from selfdraft.serve.guard import Guard
from selfdraft.serve.metrics import Metrics
from selfdraft.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Strict,
    TokenizeRequest,
)
from selfdraft.serve.service import Job, Service
from selfdraft.serve.settings import Keys, Settings
from selfdraft.serve.tracing import Tracer, describe, tracer_from_environment
from selfdraft.serve.worker import EngineWorker, together

PAGE = Path(__file__).parent / "page"
FRAME = 1024
"""Bytes whose multiples the parts of a paced stream are: several events fit into one."""
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": words, "content": {"application/json": {}}}
    for code, words in {
        400: "the request is wrong",
        401: "no API key, or a wrong one",
        403: "not allowed here",
        404: "unknown model or route",
        408: "the body did not come in time",
        413: "the body is too long",
        415: "the body is not JSON",
        429: "too many requests; see Retry-After",
        500: "the server failed",
        503: "no slot in time, or going down; see Retry-After",
    }.items()
}


REFERENCE = "#/components/schemas/{model}"
BODIES = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)


def body_of(model: type[Strict]) -> dict[str, object]:
    """What the OpenAPI document says of a body that a route reads by itself."""
    schema = {"$ref": REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def document_of(app: FastAPI) -> dict[str, object]:
    """The OpenAPI document: the framework's, and the schemas of the bodies."""
    document = FastAPI.openapi(app)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for model in BODIES:
        schema = model.model_json_schema(ref_template=REFERENCE)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    return document


class CallResponse(StreamingResponse):
    """The stream of a call, which ends with it however it ends: a client may go before the first event is asked for."""

    def __init__(self, call: AwaitedCall, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._awaited = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._awaited.worker.cancel(self._awaited.call)


class Server:
    """The application around one LLM. `worker` runs its engine; `app` is the ASGI application."""

    def __init__(self, llm: LLM, settings: Settings, tracer: Tracer | None = None) -> None:
        self.llm, self.settings = llm, settings
        self.tracer = tracer or tracer_from_environment()
        self.metrics = Metrics(vllm=settings.vllm_metrics)
        self.service = Service(llm, settings)
        self.worker = EngineWorker(llm.engine, self.metrics, max_queue=settings.max_queue, kv_tokens=settings.kv_tokens)
        self.started = int(time.time())
        self.app = self._app()

    def _app(self) -> FastAPI:
        app = FastAPI(
            title="selfdraft",
            version=version("selfdraft"),
            docs_url=None,
            redoc_url=None,
            openapi_url="/openapi.json",
        )
        add = app.add_api_route
        add("/v1/chat/completions", self.chat, methods=["POST"], openapi_extra=body_of(ChatRequest), responses=ERRORS)
        add(
            "/v1/completions",
            self.completions,
            methods=["POST"],
            openapi_extra=body_of(CompletionRequest),
            responses=ERRORS,
        )
        add("/tokenize", self.tokenize, methods=["POST"], openapi_extra=body_of(TokenizeRequest), responses=ERRORS)
        add(
            "/detokenize", self.detokenize, methods=["POST"], openapi_extra=body_of(DetokenizeRequest), responses=ERRORS
        )
        add("/v1/models", self.models, methods=["GET"], responses=ERRORS)
        add("/v1/models/{name:path}", self.model, methods=["GET"], responses=ERRORS)
        add("/v1/info", self.info, methods=["GET"], responses=ERRORS)
        add("/health", self.health, methods=["GET"], responses=ERRORS)
        add("/ready", self.ready, methods=["GET"], responses=ERRORS)
        add("/metrics", self.exported, methods=["GET"], responses=ERRORS)
        if self.settings.page:
            add("/", self.page, methods=["GET"], include_in_schema=False)
            add("/page/{name}", self.page_file, methods=["GET"], include_in_schema=False)
        app.openapi = lambda: document_of(app)  # type: ignore[method-assign]
        app.add_exception_handler(ApiError, _told)
        app.add_exception_handler(HTTPException, _told_by_framework)
        app.add_exception_handler(Exception, _told)
        keys = Keys.of(self.settings.keys)
        app.add_middleware(Guard, settings=self.settings, keys=keys, metrics=self.metrics)
        if self.settings.cors_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=[*self.settings.cors_origins],
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )
        return app

    # Answers

    async def chat(self, request: Request) -> Response:
        body = await read_body(request, ChatRequest, self.settings)
        return await self._answer(request, lambda: self.service.chat(body, request.state.caller), chat=True)

    async def completions(self, request: Request) -> Response:
        body = await read_body(request, CompletionRequest, self.settings)
        return await self._answer(request, lambda: self.service.completion(body, request.state.caller), chat=False)

    async def _answer(self, request: Request, make: Callable[[], Job], *, chat: bool) -> Response:
        try:
            job = await run_in_threadpool(make)
            call = AwaitedCall(self.worker, job.call)
            self._trace(job, request)
            call.submit()
        except Exception as error:
            raise ApiError.of(error) from error
        writer = Writer(self.llm, job, chat=chat)
        if job.stream:
            return CallResponse(call, self._events(call, writer))
        try:
            if not await call.end(request):
                return Response(status_code=499)
            document = writer.document()
        except Exception as error:
            raise ApiError.of(error) from error
        return JSONResponse(document)

    def _trace(self, job: Job, request: Request) -> None:
        """A span from now to the end of the call."""
        if self.tracer is None:
            return
        span, notify = self.tracer.start_span("generate"), job.call.notify

        def notified() -> None:
            notify()
            if job.call.done:
                for key, value in describe(job, request.state.request_id).items():
                    span.set_attribute(key, value)
                span.end()

        job.call.notify = notified

    async def _events(self, call: AwaitedCall, writer: Writer) -> AsyncIterator[bytes]:
        """The events of a stream; an error in its midst is an event, and the last one."""
        pace = self.settings.stream_pace
        size = FRAME if pace else 0
        updates = call.updates(pace)
        try:
            async for found in updates:
                if pace:  # as many events, whatever steps and drafts brought since the last one
                    found = together(found)
                lines = [event(chunk) for update in found for chunk in writer.chunks(update)]
                if lines or pace:
                    yield padded(b"".join(lines), size)
            if writer.job.include_usage or writer.job.details:
                yield padded(event(writer.last_chunk()), size)
        except Exception as error:
            yield padded(event(ApiError.of(error).document()), size)
        finally:
            await updates.aclose()
        yield padded(b"data: [DONE]\n\n", size)

    # Tokens

    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request, TokenizeRequest, self.settings)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give a prompt or messages, and not both")

        def work() -> Document:
            if body.messages is not None:
                ids = self.service.render(body.messages, add_generation_prompt=body.add_generation_prompt)
            else:
                ids = self.service.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
            found: Document = {"count": len(ids), "max_model_len": self.llm.target.max_length, "tokens": ids}
            if body.return_token_strs:
                found["token_strs"] = [self.service.decode([token]) for token in ids]
            return found

        return await _worked(work)

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request, DetokenizeRequest, self.settings)
        return await _worked(lambda: {"prompt": self.service.decode(body.tokens)})

    # About the server

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        if name != self.settings.model_name:
            raise ApiError(404, f"this server has the model {self.settings.model_name!r} only", code="model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> Document:
        name = self.settings.model_name
        card: Document = {"id": name, "object": "model", "created": self.started, "owned_by": "selfdraft"}
        return {**card, "max_model_len": self.llm.target.max_length}

    async def info(self) -> Response:
        target, settings = self.llm.target, self.settings
        return JSONResponse(
            {
                "version": version("selfdraft"),
                "model": settings.model_name,
                "drafter": self.service.own,
                "drafters": list(self.service.methods),
                "task_profiles": list(self.settings.task_profiles),
                "exactness": {"level": target.exactness.level, "why": target.exactness.why},
                "runner": target.runs,
                "max_model_len": target.max_length,
                "max_batch": target.slots,
                "max_queue": settings.max_queue,
                "max_output_tokens": settings.max_output_tokens,
                "details": settings.details,
                "shared_memory": settings.shared_memory,
                "prefix_reuse": settings.reuses,
                "machine": platform.machine(),
            }
        )

    async def health(self) -> Response:
        """Whether the process does its work: the engine's thread lives, and no step hangs."""
        if self.worker.failed is not None:
            return JSONResponse({"status": "failed"}, 503)
        if self.worker.stalled(self.settings.stall_timeout):
            return JSONResponse({"status": "stalled"}, 503)
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Whether requests are taken."""
        if self.worker.draining or self.worker.failed is not None:
            return JSONResponse({"status": "draining"}, 503, {"Retry-After": "5"})
        if self.worker.stalled(self.settings.stall_timeout):
            return JSONResponse({"status": "stalled"}, 503, {"Retry-After": "5"})
        return JSONResponse(
            {"status": "ready", "running": len(self.llm.engine.running), "waiting": self.worker.waiting}
        )

    async def exported(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self) -> Response:
        return _file("index.html")

    async def page_file(self, name: str) -> Response:
        return _file(name)


def _file(name: str) -> Response:
    """A file of the page. Names are looked up among those that there are: no path of a client is opened."""
    known = {path.name: path for path in PAGE.glob("*") if path.suffix in TYPES}
    if name not in known:
        raise ApiError(404, "there is no such page")
    path = known[name]
    return Response(path.read_bytes(), media_type=TYPES[path.suffix])


async def _worked(work: Callable[[], Document]) -> Response:
    try:
        return JSONResponse(await run_in_threadpool(work))
    except Exception as error:
        raise ApiError.of(error) from error


async def _told(request: Request, error: Exception) -> Response:
    return ApiError.of(error).response()


async def _told_by_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is no such route", 405: "this route has another method"}
    found = ApiError(error.status_code, words.get(error.status_code, "the request is wrong")).response()
    found.headers.update(error.headers or {})
    return found
