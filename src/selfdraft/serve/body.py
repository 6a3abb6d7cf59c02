"""Reads the body of a request: bounded, UTF-8, finite, not too deep. Every fault is a 400 or 413 that echoes nothing.

A stock framework answers NaN, Infinity and half characters with 500, and sends a rejected prompt of 5 MB back.
"""

from __future__ import annotations

import asyncio
import json
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from selfdraft.serve.errors import ApiError
from selfdraft.serve.settings import Settings

DEPTH = 64
"""Deepest nesting of a body; JSON schemas are the deepest things that clients send."""
DIGITS = 300
"""Longest number; Python refuses to print longer ones."""
Body = TypeVar("Body", bound=BaseModel)
JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


async def read_body(request: Request, model: type[Body], settings: Settings) -> Body:
    """The body as `model`. Errors: ApiError 400, 408, 413, 415."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
    raw = await read_bytes(request, settings)
    if len(raw) > 100_000:
        return await run_in_threadpool(parse, raw, model)
    return parse(raw, model)


async def read_bytes(request: Request, settings: Settings) -> bytes:
    """The body as it came. Errors: ApiError 400, 408, 413."""
    raw = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for part in request.stream():
                raw += part
                if len(raw) > settings.max_body:
                    raise ApiError(413, f"the body is longer than {settings.max_body} bytes", code="body_too_large")
    except ClientDisconnect as error:
        raise ApiError(400, "the client has gone before the body was whole") from error
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come within {settings.body_timeout:g} seconds") from error
    return bytes(raw)


def parse(raw: bytes, model: type[Body]) -> Body:
    """A body as `model`. Errors: ApiError."""
    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=_refuse, parse_int=_whole, parse_float=_real)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except RecursionError as error:
        raise ApiError(400, f"the body is nested deeper than {DEPTH} levels") from error
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object")
    check_values(data)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ApiError(400, *_first_fault(error)) from error
    except RecursionError as error:
        raise ApiError(400, f"the body is nested deeper than {DEPTH} levels") from error


def check_values(data: JSON) -> None:
    """Errors: ApiError for nesting that is too deep, and for half characters, which no tokenizer takes."""
    level = [data]
    for _ in range(DEPTH):
        below: list[JSON] = []
        for value in level:
            if isinstance(value, str):
                _check_text(value)
            elif isinstance(value, list):
                below += value
            elif isinstance(value, dict):
                for key in value:
                    _check_text(key)
                below += value.values()
        level = below
        if not level:
            return
    raise ApiError(400, f"the body is nested deeper than {DEPTH} levels")


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ApiError(400, "a text holds half a character (a lone surrogate): send whole UTF-8") from error


def _refuse(name: str) -> NoReturn:
    raise ApiError(400, f"{name} is no JSON number: leave the option out, or give a finite number")


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ApiError(400, f"a number has more than {DIGITS} digits")
    return int(digits)


def _real(text: str) -> float:
    number = float(text) if len(text) <= DIGITS else float("inf")
    if number in (float("inf"), float("-inf")):
        raise ApiError(400, "a number is too large: give a finite one")
    return number


def _first_fault(error: ValidationError) -> tuple[str, str | None]:
    """What is wrong first, without the value that was given, and where."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part)[:40] for part in fault["loc"] if not str(part).startswith("function-"))[:120]
    if fault["type"] == "extra_forbidden":
        return f"{where!a} is not an option of this server", where
    return f"{where or 'the body'}: {fault['msg'].removeprefix('Value error, ')[:300]}", where or None
