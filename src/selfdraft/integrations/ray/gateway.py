"""The gateway: reads a request, checks key and size, sends it to a replica, and sends it again when that one dies.

It holds no model. What it may do again is bounded by one rule: a request whose answer has begun to reach the client is
never run a second time; such an answer ends with an error that says so.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from functools import partial
from typing import Protocol

from prometheus_client import Counter
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from selfdraft.cli.serve import ServeOptions, settings_of
from selfdraft.integrations.ray.conversation import conversation_of
from selfdraft.integrations.ray.exported import merged
from selfdraft.integrations.ray.replica import AnswerPart, ForwardedRequest, ReplicaFailed, ReplicaState
from selfdraft.integrations.ray.request_name import NamedByProxy
from selfdraft.serve.answers import event, padded
from selfdraft.serve.app import FRAME
from selfdraft.serve.body import read_bytes
from selfdraft.serve.errors import ApiError
from selfdraft.serve.guard import Guard
from selfdraft.serve.metrics import Metrics
from selfdraft.serve.settings import Keys

TRIES = 4
"""Replicas that a request may lose before it is refused."""
LOOK = 10.0
"""Seconds that replicas have to say how they are."""
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"upgrade", b"te"})
"""Headers of one connection, which are not sent on; the length is that of what is sent."""


class Gateway:
    """The deployment's class. `replicas` calls them; `given` are the options of `selfdraft serve`."""

    def __init__(self, replicas: DeploymentHandle, given: ServeOptions) -> None:
        logging.getLogger("selfdraft.serve").setLevel(logging.INFO)
        self.replicas, self.settings = replicas, settings_of(given)
        self.name = str(serve.get_replica_context().replica_id.unique_id)
        self.exported = Metrics()
        registry = self.exported.registry
        self.lost = Counter(
            "selfdraft_replicas_lost", "Requests whose replica died, by what was done", ("then",), registry=registry
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, as Ray asks for it."""
        routes = [
            Route("/health", partial(self.said, "healthy"), methods=["GET"]),
            Route("/ready", partial(self.said, "ready"), methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/{path:path}", self.forward, methods=METHODS),
        ]
        keys = Keys.of(self.settings.keys)
        handlers = {ApiError: _told, HTTPException: _told_by_framework, Exception: _told}
        layers = [Middleware(Guard, settings=self.settings, keys=keys, metrics=self.exported)]
        if self.settings.local and not self.settings.keys:
            layers.insert(0, Middleware(OwnMachineOnly))
        layers.insert(0, Middleware(NamedByProxy))
        return Starlette(routes=routes, middleware=layers, exception_handlers=handlers)

    # Answers of replicas

    async def forward(self, request: Request) -> Response:
        """The answer of a replica. Errors: ApiError."""
        body = await read_bytes(request, self.settings)
        headers = tuple((name, value) for name, value in request.headers.raw if name not in HOP_BY_HOP)
        path = request.url.path
        sent = ForwardedRequest(
            request.method, path, request.scope["query_string"], headers, body, request.state.request_id
        )
        key = conversation_of(path, body, request.headers.get("authorization", "")) if body else ""
        head, parts = await self._begun(key, sent)
        kept = [(name, value) for name, value in head.headers if name not in HOP_BY_HOP]
        response: Response
        if head.more:
            response = StreamingResponse(self._streamed(head, parts), head.status)
        else:
            with suppress(RayActorError):  # the answer is whole: what becomes of its replica now is all the same
                async for _ in parts:
                    pass
            response = Response(head.body, head.status)
            kept.append((b"content-length", str(len(head.body)).encode()))
        response.raw_headers = kept
        return response

    async def _begun(self, key: str, request: ForwardedRequest) -> tuple[AnswerPart, AsyncGenerator[AnswerPart, None]]:
        """The first part of an answer, of whichever replica gave it, and the others. Errors: ApiError."""
        calls = self.replicas.options(stream=True)
        limit = self.settings.queue_timeout + self.settings.request_timeout
        for _ in range(TRIES):
            parts = _parts(calls.answer.remote(key, request))
            try:
                return await asyncio.wait_for(anext(parts), limit), parts
            except (RayActorError, ReplicaFailed):
                self.lost.labels("retried").inc()
            except TimeoutError as error:
                raise _refused("no replica answered in time; ask again later", "queue_timeout") from error
            except BackPressureError as error:
                words = "too many requests wait for a replica: ask again later"
                raise ApiError(429, words, code="server_overloaded", wait=1) from error
            except DeploymentUnavailableError as error:
                raise _refused("there is no replica now; ask again later", "no_replica") from error
        raise _refused(f"{TRIES} replicas died one after the other under this request; ask again later", "replica_lost")

    async def _streamed(self, head: AnswerPart, parts: AsyncGenerator[AnswerPart, None]) -> AsyncGenerator[bytes, None]:
        """The bytes of a stream. When its replica dies, the last events are an error and [DONE]."""
        size = FRAME if self.settings.stream_pace else 0
        async with aclosing(parts):
            yield head.body
            try:
                async for part in parts:
                    yield part.body
            except RayError:
                self.lost.labels("ended").inc()
                words = "the replica died in the midst of this answer, of which a part has been sent: ask again"
                yield padded(event(ApiError(503, words, code="replica_lost").document()), size)
                yield padded(b"data: [DONE]\n\n", size)

    # About the replicas

    async def said(self, what: str, request: Request) -> Response:
        """Whether any replica is healthy, or ready, and what each says."""
        states = [state for state in await self._all("state") if isinstance(state, ReplicaState)]
        good = any(getattr(state, what) for state in states)
        words = {"healthy": ("ok", "failed"), "ready": ("ready", "draining")}[what]
        document = {"status": words[0 if good else 1], "replicas": {one.name: getattr(one, what) for one in states}}
        return JSONResponse(document, 200 if good else 503, {} if good else {"Retry-After": "5"})

    async def metrics(self, request: Request) -> Response:
        """The counters of all replicas and of this gateway, each with the label `replica`."""
        texts = [found for found in await self._all("metrics") if isinstance(found, tuple)]
        gateway = (f"gateway-{self.name}", self.exported.text().decode())
        return Response(merged([*texts, gateway]), media_type="text/plain; version=0.0.4")

    async def _all(self, method: str) -> list[object]:
        """What every replica says to a question; none where it does not answer in time."""
        try:
            found = await self.replicas.broadcast(method).results_async(timeout_s=LOOK, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            return []
        return [one for one in found if not isinstance(one, BaseException)]


class OwnMachineOnly:
    """Refuses callers of other machines, where there is no key: Ray's proxies may listen at any address."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client") or ("",)
        if scope["type"] == "http" and not _loopback(str(client[0])):
            words = "only this machine may call: the operator can set a key and host=0.0.0.0, or say no_auth=true"
            await ApiError(403, words, code="own_machine_only").response()(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


class Calling(Protocol):
    """A call over a handle, on its way: Ray's response generator."""

    def __aiter__(self) -> AsyncIterator[AnswerPart]: ...
    def cancel(self) -> None: ...


async def _parts(calling: Calling) -> AsyncGenerator[AnswerPart, None]:
    """The parts that come over a handle; left early, the call is cancelled."""
    try:
        async for part in calling:
            yield part
    finally:
        calling.cancel()


def _refused(words: str, code: str) -> ApiError:
    return ApiError(503, words, code=code, wait=2)


async def _told(request: Request, error: Exception) -> Response:
    return ApiError.of(error).response()


async def _told_by_framework(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return ApiError(status, "the request is wrong").response()
