"""One name for a request: Ray's proxy gives it and writes it into the answer; all logs have the same one."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
SAFE = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What may stand in a log as it is: a client can name its request."""


def name_of(headers: Headers) -> str:
    """The name that the proxy, or the client, has given the request; one of our own where it is not fit for a log."""
    given = headers.get(HEADER, "")
    return given if SAFE.fullmatch(given) else uuid.uuid4().hex[:16]


class NamedByProxy:
    """Takes the name of each request from its header, and leaves it to Ray's proxy to put it into the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[HEADER]
            await send(message)

        scope.setdefault("state", {})["request_id"] = name_of(Headers(scope=scope))
        await self.app(scope, receive, answer)
