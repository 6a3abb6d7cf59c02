"""One request to a server: its body, its stream with the time of every chunk, refusals that are asked again."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from selfdraft.bench.load.arrivals import Ask, Sleep
from selfdraft.errors import ServerError
from selfdraft.remote import Address, Event, event_of, failure, number_of, refusal
from selfdraft.types import Clock, JsonObject

if TYPE_CHECKING:
    import httpx

REFUSED = (429, 503)
TRIES = 100
"""Most times that a refused request is asked again."""
WAIT = 1.0
"""Seconds until then where the server does not say how long."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server under load, and how it is asked."""

    name: str
    address: Address
    model: str
    chat: bool = True
    tells_usage: bool = True
    """It takes stream_options; of others the chunks are counted."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Further fields of every body."""
    about: Mapping[str, object] = field(default_factory=dict)
    """What it says of itself."""

    fresh: bool = True
    """Every prompt is read anew, where the server's engine knows how."""

    @property
    def exact(self) -> bool:
        """A server of ours whose texts do not depend on what else runs."""
        exactness = self.about.get("exactness")
        return isinstance(exactness, dict) and exactness.get("level") == "bitwise"

    def body_of(self, ask: Ask, salt: str) -> JsonObject:
        """The body of a request. `salt` is another one in every request: prompts of one salt may be reused."""
        prompt = {"messages": [{"role": "user", "content": ask.prompt}]} if self.chat else {"prompt": ask.prompt}
        usage = {"stream_options": {"include_usage": True}} if self.tells_usage else {}
        seed = {"seed": ask.seed} if self.options.get("temperature") else {}
        reuse = no_reuse(self.about.get("engine"), salt) if self.fresh else {}
        body = {"model": self.model, **prompt, "max_tokens": ask.max_tokens, "stream": True}
        return {**body, **usage, **seed, **reuse, **self.options}


def no_reuse(engine: object, salt: str) -> JsonObject:
    """What tells an engine to read a prompt that it has read before once more; nothing for one that is not known."""
    if engine in ("selfdraft", "vllm"):
        return {"cache_salt": salt}
    return {"cache_prompt": False} if engine == "llamacpp" else {}


@dataclass(slots=True)
class Answer:
    """What became of one request. All times in seconds of the clock that was handed in."""

    ask: Ask
    sent: float = 0.0
    """When it was sent first."""
    chunks: list[float] = field(default_factory=list)
    """When each chunk with text came."""
    end: float = 0.0
    """When the last chunk of the answer came, or the error."""
    tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """Prompt tokens that the server had read before."""
    reason: str | None = None
    digest: str | None = None
    """Of the text; None unless it is whole."""
    counts: JsonObject | None = None
    tries: int = 0
    error: str | None = None
    """'429', '503' or another status; 'broken', where the stream ended early."""
    words: str = ""
    """The error in words."""

    @property
    def first(self) -> float | None:
        """Seconds from sending to the first chunk with text (TTFT)."""
        return self.chunks[0] - self.sent if self.chunks and self.error is None else None

    @property
    def per_token(self) -> float | None:
        """Seconds of each token after the first chunk (TPOT); None of an answer of one token."""
        if self.error is not None or self.tokens < 2 or not self.chunks:
            return None
        return (self.end - self.chunks[0]) / (self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between two chunks (ITL)."""
        return [after - before for before, after in zip(self.chunks, self.chunks[1:], strict=False)]

    def take(self, event: Event, now: float) -> str:
        """Note an event of the stream; returns its text."""
        text = event.thought + event.text
        if text:
            self.chunks.append(now)
        if event.chosen:
            self.end = now
        self.reason = event.reason or self.reason
        if event.usage is not None:
            self.tokens = number_of(event.usage, "completion_tokens") or 0
            self.prompt_tokens = number_of(event.usage, "prompt_tokens")
            details = event.usage.get("prompt_tokens_details")
            self.cached_tokens = number_of(details if isinstance(details, dict) else None, "cached_tokens")
        self.counts = event.counts or self.counts
        return text


class Client:
    """Asks one server over one httpx client. `retry`: a refused request is asked again after its Retry-After."""

    def __init__(
        self, server: Server, http: httpx.AsyncClient, clock: Clock, sleep: Sleep, *, retry: bool, seconds: float
    ) -> None:
        self.server, self.http, self.clock, self.sleep = server, http, clock, sleep
        self.retry, self.seconds = retry, seconds
        self._began, self._count = secrets.token_hex(6), 0

    async def ask(self, ask: Ask) -> Answer:
        """The answer, or what became of the request. Errors: ServerError when the server takes no connection."""
        answer = Answer(ask, sent=self.clock())
        while True:
            try:
                await self.stream(answer)
            except ServerError as error:
                if error.gone:
                    raise
                if self.retry and error.status in REFUSED and answer.tries < TRIES:
                    answer.tries += 1
                    await self.sleep(WAIT if error.wait is None else error.wait)
                    continue
                answer.error = str(error.status) if error.status is not None else "broken"
                answer.words, answer.end = str(error), self.clock()
            return answer

    async def stream(self, answer: Answer) -> None:
        """Fill in one answer. Errors: ServerError."""
        import httpx

        server, url, texts = self.server, self.server.address.url, list[str]()
        path = "/chat/completions" if server.chat else "/completions"
        ended = False
        self._count += 1
        body = server.body_of(answer.ask, f"{self._began}-{self._count}")
        try:
            async with self.http.stream("POST", path.lstrip("/"), json=body) as response:
                if response.status_code != 200:
                    raise refusal(url, response.status_code, response.headers, await response.aread())
                async for line in response.aiter_lines():
                    event = event_of(line, url)
                    if event is None:
                        continue
                    ended |= event.ended
                    texts.append(answer.take(event, self.clock()))
        except httpx.HTTPError as error:
            raise failure(url, error, self.seconds) from error
        if answer.reason in (None, "abort") or not (ended or answer.tokens):
            raise ServerError(f"{url} broke off the answer: the stream ended before its last event")
        answer.tokens = answer.tokens or len(answer.chunks)
        answer.digest = hashlib.blake2b("".join(texts).encode("utf-8", "replace"), digest_size=8).hexdigest()
