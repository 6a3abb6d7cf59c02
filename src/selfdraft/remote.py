"""A server of OpenAI's API as its client sees it: address, key, models, events of a stream, errors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from selfdraft.errors import OptionError, ServerError
from selfdraft.files.api_keys import KEY_VARIABLE, keys_in, keys_of_environment
from selfdraft.types import JsonObject

if TYPE_CHECKING:
    import httpx

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONNECTING = 10.0
"""Most seconds until a server takes a connection."""
REFUSALS = (401, 403, 429, 503)
"""Statuses that every request of a client meets; a server without a list of models answers otherwise."""
LONGEST = 300
"""Most characters of a server's own words that are shown."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and the key for it. `url` ends with the API's root, as /v1."""

    url: str
    key: str | None = None

    @property
    def host(self) -> str:
        """Host and port."""
        return urlsplit(self.url).netloc

    def client_options(self, seconds: float) -> JsonObject:
        """The options of an httpx client. `seconds`: most that may pass without a byte of an answer."""
        import httpx

        local = urlsplit(self.url).hostname in LOOPBACK
        return {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {self.key}"} if self.key else {},
            "timeout": httpx.Timeout(seconds, connect=min(CONNECTING, seconds), pool=None),
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
            "trust_env": not local,  # a proxy of the environment does not lead to this machine
        }


def need_httpx(option: str) -> None:
    """Errors: OptionError when httpx is missing."""
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise OptionError(f"{option} needs httpx, which is missing: pip install 'selfdraft[bench]'") from error


def url_of(given: str) -> str:
    """The root of the API that a user gave; /v1 where it says no path. Errors: OptionError."""
    try:
        parts = urlsplit(given.strip())
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        fine = False
    if not fine or parts.query or parts.fragment:
        raise OptionError(f"--url {given!r} is no address of a server; give one such as http://127.0.0.1:8000/v1")
    if "@" in parts.netloc:
        raise OptionError("--url holds a password; leave it out, and give the key with --api-key-file")
    path = re.sub(r"/(chat/)?completions$", "", parts.path.rstrip("/"))
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def read_key(file: Path | None) -> str | None:
    """The first key of a file with one key a line, or of the environment; None without both. Errors: OptionError."""
    if file is None:
        return next(iter(keys_of_environment()), None)
    return checked_key(keys_in(file)[0])


def checked_key(key: str) -> str:
    """The key. Errors: OptionError where no HTTP header can carry it."""
    if not key.isascii() or not key.isprintable():
        raise OptionError("the API key holds a character that no HTTP header carries: give printable ASCII")
    return key


# What a server says of itself


def choose_model(listed: JsonObject | None, wanted: str | None, url: str) -> tuple[str, JsonObject]:
    """The model to ask for, and what the server says of it. `listed`: its answer to GET /models, if it has one.

    Errors: OptionError when the server does not leave one choice.
    """
    found = (listed or {}).get("data")
    cards = [card for card in found if isinstance(card, dict)] if isinstance(found, list) else []
    names = [name for card in cards if isinstance(name := card.get("id"), str)]
    if wanted is None and len(names) != 1:
        there = ", ".join(clean(name)[:60] for name in names[:5]) + (", ..." if len(names) > 5 else "")
        if not names:
            raise OptionError(f"--model is needed: {url} has no list of its models")
        raise OptionError(f"--model is needed: {url} has several: {there}")
    name = wanted if wanted is not None else names[0]
    return name, next((card for card in cards if card.get("id") == name), {})


def json_of(response: httpx.Response) -> JsonObject | None:
    """The JSON object in an answer; None where there is none."""
    try:
        found = response.json()
    except (ValueError, RecursionError):
        return None
    return found if response.status_code == 200 and isinstance(found, dict) else None


# A stream


@dataclass(frozen=True, slots=True)
class Event:
    """What one event of a stream brings."""

    text: str = ""
    thought: str = ""
    """Text of a reasoning model before its answer."""
    chosen: bool = False
    """It belongs to the answer; others carry the usage alone."""
    reason: str | None = None
    """Why the answer ended."""
    usage: JsonObject | None = None
    counts: JsonObject | None = None
    """Of a server of ours with --details: counts of speculative decoding."""
    sources: tuple[str, ...] = ()
    """Of a server of ours with --details: who drafted each new token."""
    ended: bool = False
    """The stream's last event."""


def event_of(line: str, url: str) -> Event | None:
    """The event in a line of a stream; None for lines between events. Errors: ServerError, also one that it tells."""
    field, _, data = line.partition(":")
    data = data.strip()
    if field not in ("data", "error") or not data:
        return None
    if data == "[DONE]":
        return Event(ended=True)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ServerError(f"{url} broke off the answer: an event is no JSON") from error
    if not isinstance(found, dict) or found.get("error") or field == "error":
        said, code = words_of(found)
        raise ServerError(f"{url} ended the answer with an error: {said}", code=code)
    choices = found.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    delta = _object(choice, "delta") or {}
    drafted = _object(found, "draft") or {}
    listed = drafted.get("tokens")
    tokens = listed if isinstance(listed, list) else []
    return Event(
        text=_text(delta, "content") or _text(choice or {}, "text"),
        thought=_text(delta, "reasoning_content") or _text(delta, "reasoning"),
        chosen=choice is not None,
        reason=_text(choice or {}, "finish_reason") or None,
        usage=_object(found, "usage"),
        counts=_object(_object(found, "metrics"), "speculative_decoding"),
        sources=tuple(_text(one, "source") for one in tokens if isinstance(one, dict)),
    )


def number_of(found: Mapping[str, object] | None, name: str) -> int | None:
    """A count in an object of a server; None where it is none."""
    value = (found or {}).get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _object(found: JsonObject | None, name: str) -> JsonObject | None:
    value = (found or {}).get(name)
    return value if isinstance(value, dict) else None


def _text(found: JsonObject, name: str) -> str:
    value = found.get(name)
    return value if isinstance(value, str) else ""


# Errors


def refusal(url: str, status: int, headers: Mapping[str, str], body: bytes) -> ServerError:
    """The error of an answer whose status is not 200."""
    said, code = words_of(_read(body))
    if status in (401, 403):
        message = f"{url} does not take the API key ({status}): {said}; --api-key-file or {KEY_VARIABLE} gives one"
        return ServerError(message, status=status, code=code)
    if status == 404:
        message = f"{url} has no such model or route (404): {said}; see --model and --url"
        return ServerError(message, status=status, code=code)
    if status in (429, 503):
        wait = _seconds(headers.get("retry-after"))
        message = f"{url} is busy ({status}): {said}" + (f"; ask again in {wait:g} s" if wait is not None else "")
        return ServerError(message, status=status, wait=wait, code=code)
    return ServerError(f"{url} answered with status {status}: {said}", status=status, code=code)


def failure(url: str, error: httpx.HTTPError, seconds: float) -> ServerError:
    """The error of a connection that fails."""
    import httpx

    why = clean(str(error)) or type(error).__name__
    if isinstance(error, httpx.ConnectTimeout):
        return ServerError(f"{url} cannot be reached: no connection within {CONNECTING:g} s", gone=True)
    if isinstance(error, httpx.ConnectError):
        return ServerError(f"{url} cannot be reached: {why}; is the server running?", gone=True)
    if isinstance(error, httpx.TimeoutException):
        return ServerError(f"{url} was silent for {seconds:g} s; --timeout gives it longer")
    return ServerError(f"{url} broke off the answer: {why}")


def words_of(found: object) -> tuple[str, str | None]:
    """(what a server says in an error document, its code)."""
    error = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(error, dict):
        said = error.get("message") or error.get("detail") or error
        code = error.get("code")
        return _short(said), code if isinstance(code, str) else None
    return _short(error), None


def _read(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")


def _short(said: object) -> str:
    text = " ".join(clean(said if isinstance(said, str) else json.dumps(said)).split()) or "it says nothing"
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def _seconds(header: str | None) -> float | None:
    """The seconds of Retry-After; None without one, or where it is a date."""
    text = (header or "").strip()
    return float(text) if re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text) else None


def clean(text: str) -> str:
    """A text of a server without what would steer a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
