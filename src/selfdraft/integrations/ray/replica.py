"""One replica: the server's own application and engine in a process of Ray Serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from ray import serve
from starlette.types import Message

from selfdraft.cli.serve import ServeOptions, llm_of, settings_of
from selfdraft.errors import SelfdraftError
from selfdraft.integrations.ray.scaling import TOKENS_IN_FLIGHT
from selfdraft.serve.app import Server

Header = tuple[bytes, bytes]


class ReplicaFailed(SelfdraftError):
    """The engine of this replica was given up; another one can answer."""


@dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """A request as the gateway has read it."""

    method: str
    path: str
    query: bytes
    headers: tuple[Header, ...]
    body: bytes
    name: str = ""
    """What the logs call it."""


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """The head of an answer with its first bytes, or further bytes (`status` 0)."""

    body: bytes
    more: bool
    """Whether there are further parts."""
    status: int = 0
    headers: tuple[Header, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """What a replica says of itself."""

    name: str
    healthy: bool
    ready: bool


class Replica:
    """The deployment's class. `given`: the options of `selfdraft serve`; another `restart` makes Ray start all anew.

    Errors: those of opening the model.
    """

    def __init__(self, given: ServeOptions, restart: str = "") -> None:
        logging.getLogger("selfdraft.serve").setLevel(logging.INFO)
        self.server = Server(llm_of(given), settings_of(given))
        self.name = str(serve.get_replica_context().replica_id.unique_id)
        self.server.worker.start()

    async def answer(self, conversation: str, request: ForwardedRequest) -> AsyncGenerator[AnswerPart, None]:
        """The server's answer, in parts. `conversation` is for the router. Left early, the request is aborted.

        Errors: ReplicaFailed before the first part.
        """
        self.check_health()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "http",
            "path": request.path,
            "raw_path": request.path.encode(),
            "query_string": request.query,
            "root_path": "",
            "headers": [*request.headers],
            "client": None,
            "server": None,
            "state": {"request_id": request.name} if request.name else {},
        }
        client = _Client(request.body)
        running = asyncio.create_task(self.server.app(scope, client.receive, client.send))
        running.add_done_callback(lambda _: client.parts.put_nowait(None))
        try:
            head: Message = {}
            while (message := await client.parts.get()) is not None:
                if message["type"] == "http.response.start":
                    head = message
                    if head["status"] == 503:
                        self.check_health()  # the engine was given up while this request ran
                    continue
                more, headers = message.get("more_body", False), tuple(head.get("headers", ()))
                yield AnswerPart(message.get("body", b""), more, head.get("status", 0), headers)
                head = {}
            await running
        finally:
            client.gone.set()
            if not running.done():
                running.cancel()

    def check_health(self) -> None:
        """Ray asks this from time to time, and replaces a replica that is not well. Errors: ReplicaFailed."""
        worker = self.server.worker
        if worker.failed is not None:
            raise ReplicaFailed(f"the engine was given up: {type(worker.failed).__name__}")
        if worker.stalled(self.server.settings.stall_timeout):
            raise ReplicaFailed(f"one step takes longer than {self.server.settings.stall_timeout:g} seconds")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray asks this from time to time, for the scaling rule."""
        return {TOKENS_IN_FLIGHT: float(self.server.worker.tokens)}

    def state(self) -> ReplicaState:
        """Whether it works, and whether it takes requests."""
        try:
            self.check_health()
        except ReplicaFailed:
            return ReplicaState(self.name, healthy=False, ready=False)
        return ReplicaState(self.name, healthy=True, ready=not self.server.worker.draining)

    def metrics(self) -> tuple[str, str]:
        """Its name, and its counters as Prometheus reads them."""
        return self.name, self.server.metrics.text().decode()

    def __del__(self) -> None:
        if hasattr(self, "server"):
            self.server.worker.stop()


class _Client:
    """The server's client: gives the body, keeps what comes back, and goes when it is told."""

    def __init__(self, body: bytes) -> None:
        self.parts: asyncio.Queue[Message | None] = asyncio.Queue()
        self.gone = asyncio.Event()
        self._body: bytes | None = body

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.parts.put_nowait(message)
