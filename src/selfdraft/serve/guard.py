"""The door: API keys, host names, and what every response carries. A plain ASGI layer around all routes."""

from __future__ import annotations

import base64
import binascii
import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfdraft.serve.errors import ApiError
from selfdraft.serve.metrics import Metrics
from selfdraft.serve.settings import LOOPBACK, Keys, Settings

_log = logging.getLogger("selfdraft.serve.access")
OPEN = frozenset({"/health", "/ready"})
"""Routes without a key."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}


class Guard:
    """Refuses requests without a key, or for another host; counts and logs every response. No text is ever logged."""

    def __init__(self, app: ASGIApp, *, settings: Settings, keys: Keys, metrics: Metrics) -> None:
        self.app, self.settings, self.keys, self.metrics = app, settings, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, seen = time.perf_counter(), {"status": 0}
        state = scope.setdefault("state", {})
        name = state.setdefault("request_id", uuid.uuid4().hex[:16])  # it is there where a proxy names requests

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                for key, value in HEADERS.items():
                    headers.setdefault(key, value)
            await send(message)

        try:
            refusal = self._refusal(scope)
            await (refusal.response() if refusal is not None else self.app)(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.responses.labels(route, str(seen["status"])).inc()
            took = (time.perf_counter() - began) * 1000
            _log.info('{"request":"%s","route":"%s","status":%d,"ms":%.1f}', name, route, seen["status"], took)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if not self._knows_host(headers.get("host", "")):
            return ApiError(400, "this Host header is not served here: see --allowed-host", code="unknown_host")
        if scope["path"] in OPEN:
            return None
        caller = self.keys.caller(_key_of(headers.get("authorization", "")))
        if caller is None:
            return _unknown_key(headers.get("authorization", ""))
        scope["state"]["caller"] = caller
        return None

    def _knows_host(self, host: str) -> bool:
        """A page of elsewhere that makes its own name point here (DNS rebinding) is not served."""
        allowed = self.settings.allowed_hosts
        if "*" in allowed or not self.settings.local:
            return True
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        return name.lower() in (*LOOPBACK, *allowed)


def _unknown_key(header: str) -> ApiError:
    """The refusal. A browser that has sent no bearer token is made to ask for the key, as a password."""
    refusal = ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key")
    if not header.lower().startswith("bearer "):
        refusal.challenge = 'Basic realm="selfdraft: any name, the API key as password", charset="UTF-8"'
    return refusal


def _key_of(header: str) -> str | None:
    """The key of an Authorization header: a bearer token, or the password that a browser asked for."""
    scheme, _, given = header.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return None
    return None
