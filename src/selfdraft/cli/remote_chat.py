"""A conversation with a model behind a server of OpenAI's API, for `chat --url`; no model and no torch is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from selfdraft.cli import terminal
from selfdraft.cli.answers import Clock, coloured
from selfdraft.errors import RequestError, ServerError
from selfdraft.remote import (
    REFUSALS,
    Address,
    Event,
    choose_model,
    clean,
    event_of,
    failure,
    json_of,
    need_httpx,
    number_of,
    read_key,
    refusal,
    url_of,
)
from selfdraft.types import JsonObject

if TYPE_CHECKING:
    import httpx

SILENCE = 600.0
"""Most seconds without a byte of an answer."""
LASTING = (401, 403, 404)
"""Refusals that another question would meet, too."""


@contextmanager
def remote_model(
    url: str, key_file: Path | None, model: str | None, fields: Mapping[str, object]
) -> Iterator[RemoteModel]:
    """The model at an address. `fields` go into every request. Errors: OptionError, ServerError."""
    need_httpx("chat --url")
    import httpx

    address = Address(url_of(url), read_key(key_file))
    with httpx.Client(**address.client_options(SILENCE)) as http:
        yield RemoteModel(http, address, model, fields)


class RemoteModel:
    """A model on a server, ready to answer. Errors: OptionError, ServerError when the server cannot be used."""

    def __init__(self, http: httpx.Client, address: Address, model: str | None, fields: Mapping[str, object]) -> None:
        self.http, self.url = http, address.url
        with self._failures():
            listed = http.get("models")
            if listed.status_code in REFUSALS:
                raise refusal(self.url, listed.status_code, listed.headers, listed.content)
            info = json_of(http.get("info")) or {}
        self.name, _ = choose_model(json_of(listed), model, self.url)
        drafter = info.get("drafter")
        self.drafter = drafter if isinstance(drafter, str) else None
        details = {"draft_details": True} if self.drafter is not None and info.get("details") is True else {}
        self.body: JsonObject = {
            "model": self.name,
            "stream": True,
            "stream_options": {"include_usage": True},
            **details,
            **fields,
        }

    def reply(self, messages: list[dict[str, str]]) -> str:
        """The answer, shown as it comes; after Ctrl-C, which also ends it on the server, the text so far.

        Errors: ServerError; RequestError for a conversation that does not fit into the context.
        """
        texts, counts, clock = list[str](), Counts(), Clock()
        try:
            for event in self._events(messages):
                counts.take(event, clock)
                texts.append(clean(event.text))
                show_event(event)
        except KeyboardInterrupt:
            terminal.write("\n")
            terminal.note("stopped; the text so far stays in the conversation")
        except ServerError as error:
            if texts:
                terminal.write("\n")
            if error.code == "context_length_exceeded":
                raise RequestError(str(error)) from error
            raise
        else:
            terminal.write("\n")
            terminal.show_dim(counts.line(clock, self.drafter))
            if counts.cut_short(self.body.get("max_tokens")):
                terminal.show_dim("the answer ended at the context of the model, or at a limit of the server")
        return "".join(texts)

    def _events(self, messages: list[dict[str, str]]) -> Iterator[Event]:
        ended = False
        with (
            self._failures(),
            self.http.stream("POST", "chat/completions", json={**self.body, "messages": messages}) as response,
        ):
            if response.status_code != 200:
                raise refusal(self.url, response.status_code, response.headers, response.read())
            for line in response.iter_lines():
                event = event_of(line, self.url)
                if event is not None:
                    ended |= event.ended or event.reason is not None
                    yield event
        if not ended:
            raise ServerError(f"{self.url} broke off the answer: the stream ended before its last event")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.HTTPError as error:
            raise failure(self.url, error, SILENCE) from error


class Counts:
    """Tokens of an answer as they come, and what the server counts itself."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens that were told one by one, or else chunks."""
        self.usage: JsonObject | None = None
        self.drafting: JsonObject | None = None
        self.reason: str | None = None
        """Why the answer ended."""

    def take(self, event: Event, clock: Clock) -> None:
        """Note an event."""
        self.tokens += len(event.sources) or bool(event.text or event.thought)
        clock.saw(self.tokens)
        self.usage, self.drafting = event.usage or self.usage, event.counts or self.drafting
        self.reason = event.reason or self.reason

    def cut_short(self, asked: object) -> bool:
        """Whether the answer ended for want of room before it had as many tokens as were `asked` for."""
        told = number_of(self.usage, "completion_tokens")
        return self.reason == "length" and told is not None and isinstance(asked, int) and told < asked

    def line(self, clock: Clock, drafter: str | None) -> str:
        """The line of figures that ends an answer."""
        told = number_of(self.usage, "completion_tokens")
        tokens = self.tokens if told is None else told
        steps, length = number_of(self.drafting, "num_steps"), (self.drafting or {}).get("mean_acceptance_length")
        line = terminal.counted(tokens, "token" if told is not None else "chunk")
        if steps is not None and isinstance(length, float | int):
            line += f" in {terminal.counted(steps, 'step')} ({length:.2f} a step)"
        if clock.first is not None:
            line += f", first token after {clock.first:.2f} s"
        if (speed := clock.speed(tokens)) is not None:
            line += f", then {speed:.1f} {'tokens' if told is not None else 'chunks'}/s"
        drafted, kept = (number_of(self.drafting, f"num_{kind}draft_tokens") for kind in ("", "accepted_"))
        if drafter is not None:
            line += f", {drafter}"
        return line + (f": {kept} of {drafted} draft tokens accepted" if drafter is not None and drafted else "")


def show_event(event: Event) -> None:
    """The text of an event; that of a reasoning model before its answer is dim."""
    if event.thought:
        terminal.write(terminal.dimmed(clean(event.thought)))
    if event.text:
        terminal.write(coloured(clean(event.text), event.sources))


def converse(
    ask: Callable[[], str | None], reply: Callable[[list[dict[str, str]]], str], opening: list[dict[str, str]]
) -> None:
    """Question after question. An error that the next one need not meet is shown, and its question forgotten.

    Errors: ServerError when the server cannot be reached, or does not take key or model.
    """
    messages = [*opening]
    while (said := ask()) is not None:
        messages.append({"role": "user", "content": said})
        try:
            messages.append({"role": "assistant", "content": reply(messages)})
        except RequestError as error:
            terminal.show_error(f"{error}; the conversation starts anew")
            messages = [*opening]
        except ServerError as error:
            if error.gone or error.status in LASTING:
                raise
            terminal.show_error(f"{error}; the question is forgotten, what was said before stays")
            messages.pop()
