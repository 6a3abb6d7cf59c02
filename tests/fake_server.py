"""Servers of OpenAI's API without a model: one in a virtual time for the load generator, one on a socket."""

from __future__ import annotations

import asyncio
import json
import selectors
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import httpx

T = TypeVar("T")
Document = dict[str, Any]


class _Jumping(selectors.SelectSelector):
    """Waits for nothing: the time of the loop jumps instead."""

    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self.jump = jump

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for something that never comes"
            self.jump(timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock moves only when everybody sleeps, and then to the next who wakes."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jumping(self._jump))

    def time(self) -> float:
        return self.now

    def _jump(self, seconds: float) -> None:
        self.now += max(seconds, 0.0)


def in_virtual_time(work: Callable[[Callable[[], float]], Coroutine[Any, Any, T]]) -> T:
    """What `work(clock)` returns, in a loop of virtual time. With powers of two all sums of times are exact."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work(runner.get_loop().time))


def chunk(text: str, reason: str | None = None, **more: object) -> str:
    """A line of a stream: a piece of an answer."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return "data: " + json.dumps({"choices": [choice], **more})


def usage(tokens: int, prompt: int = 8, cached: int = 0) -> str:
    """A line of a stream: the counts of an answer."""
    found = {
        "completion_tokens": tokens,
        "prompt_tokens": prompt,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return "data: " + json.dumps({"choices": [], "usage": found})


DONE = "data: [DONE]"
Script = list[tuple[float, str]]
"""(seconds after the line before, line) of one stream."""


def said(first: float, *gaps: float, tokens: int, words: str = "abcdefgh", reason: str = "length") -> Script:
    """A stream: its first chunk after `first` seconds, further ones after these gaps, the reason with the last."""
    waits = [first, *gaps]
    lines = [(wait, chunk(words[place], None)) for place, wait in enumerate(waits)]
    lines[-1] = (waits[-1], chunk(words[len(waits) - 1], reason))
    return [*lines, (0.0, ""), (0.0, usage(tokens)), (0.0, DONE)]


@dataclass
class Refusal:
    """An answer that is none."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: Document = field(default_factory=lambda: {"error": {"message": "not now"}})


Reply = Script | Refusal | Exception
Handler = Callable[[int, Document], Reply]
"""(number of the request, its body) -> what comes back."""


class FakeTransport(httpx.AsyncBaseTransport):
    """A server that answers by a script, in the time of the loop that runs. It notes every body."""

    def __init__(
        self,
        handle: Handler,
        *,
        models: Document | None = None,
        info: Document | None = None,
        wait: Any = asyncio.sleep,
    ) -> None:
        self.handle, self.models, self.info = handle, models or {"data": [{"id": "m", "owned_by": "fake"}]}, info
        self.others: dict[str, Document] = {}
        """Further routes."""
        self.bodies: list[Document] = []
        self.sleep: Callable[[float], Awaitable[None]] = wait

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            known = {"/v1/models": self.models, "/v1/info": self.info, **self.others}
            found = known.get(request.url.path)
            return httpx.Response(200 if found is not None else 404, json=found or {})
        body = json.loads(await request.aread())
        self.bodies.append(body)
        reply = self.handle(len(self.bodies) - 1, body)
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, Refusal):
            return httpx.Response(reply.status, headers=reply.headers, json=reply.body)
        return httpx.Response(200, stream=_Lines(reply, self.sleep))


class _Lines(httpx.AsyncByteStream):
    def __init__(self, script: Script, sleep: Callable[[float], Awaitable[None]]) -> None:
        self.script, self.sleep = script, sleep

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for wait, line in self.script:
            if wait:
                await self.sleep(wait)
            yield f"{line}\n".encode()


@dataclass
class Listening:
    """A server on a socket of this machine."""

    url: str
    bodies: list[Document] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    """A client has gone in the midst of a stream."""


@contextmanager
def listening(handle: Handler, *, models: Document | None = None, info: Document | None = None) -> Iterator[Listening]:
    """A server that answers by a script over HTTP, without waiting between lines. An exception as reply ends it: the
    connection is cut and no other is taken. A script whose last line is "..." goes on until the client has gone.
    """
    cards = models or {"data": [{"id": "m", "owned_by": "fake"}]}

    class Requests(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            found = {"models": cards, "info": info}.get(self.path.rpartition("/")[2])
            self.whole(200 if found is not None else 404, found or {"error": "no such route"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            place.bodies.append(body)
            place.headers.append({name.lower(): value for name, value in self.headers.items()})
            reply = handle(len(place.bodies) - 1, body)
            if isinstance(reply, Exception):
                server.socket.shutdown(socket.SHUT_RDWR)  # at once: closing alone waits for the thread that listens
                server.socket.close()
                self.close_connection = True
                threading.Thread(target=server.shutdown, daemon=True).start()
            elif isinstance(reply, Refusal):
                self.whole(reply.status, reply.body, reply.headers)
            else:
                self.stream(reply)

        def whole(self, status: int, found: Document, headers: dict[str, str] | None = None) -> None:
            raw = json.dumps(found).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def stream(self, script: Script) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            try:
                for _, line in script:
                    while line == "...":
                        self.wfile.write(f"{chunk('more')}\n\n".encode())
                    self.wfile.write(f"{line}\n\n".encode())
            except OSError:
                place.left.set()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    server.daemon_threads = True
    place = Listening(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield place
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
