"""Which server it is: what it says of itself, which model it is asked for, and a first request that nobody measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from selfdraft.bench.load.arrivals import Ask
from selfdraft.bench.load.client import Answer, Client, Server
from selfdraft.errors import ServerError
from selfdraft.remote import REFUSALS, Address, choose_model, clean, failure, json_of, refusal
from selfdraft.types import JsonObject

if TYPE_CHECKING:
    import httpx

TOLD = (
    *("version", "drafter", "exactness", "runner", "max_model_len", "max_batch", "max_output_tokens"),
    *("prefix_reuse", "shared_memory", "details"),
)
"""What is kept of /v1/info of a server of ours."""


async def meet(
    name: str,
    address: Address,
    http: httpx.AsyncClient,
    model: str | None,
    options: Mapping[str, object],
    *,
    chat: bool,
    fresh: bool,
    seconds: float,
) -> Server:
    """The server at an address. Errors: ServerError when it cannot be reached or refuses; OptionError."""
    import httpx

    try:
        listed = await http.get("models")
        if listed.status_code in REFUSALS:
            raise refusal(address.url, listed.status_code, listed.headers, listed.content)
        told = await http.get("info")
        wanted, card = choose_model(json_of(listed), model, address.url)
        edition = await edition_of(str(card.get("owned_by")), address, http)
    except httpx.HTTPError as error:
        raise failure(address.url, error, seconds) from error
    about: JsonObject = {}
    if isinstance(owner := card.get("owned_by"), str):
        about["engine"] = clean(owner)[:60]
    if header := listed.headers.get("server"):
        about["server"] = clean(header)[:60]
    if edition is not None:
        about["version"] = edition
    info = json_of(told) or {}
    if "drafter" in info and "exactness" in info:
        about |= {field: info[field] for field in TOLD if field in info}
    return Server(name, address, wanted, chat, options=dict(options), about=about, fresh=fresh)


EDITIONS = {"vllm": ("/version", "version"), "llamacpp": ("/props", "build_info")}
"""Where other engines tell their version: route and field."""


async def edition_of(engine: str, address: Address, http: httpx.AsyncClient) -> str | None:
    """The version of another engine; None where it does not tell one. Errors: httpx.HTTPError."""
    route, field = EDITIONS.get(engine, ("", ""))
    found = json_of(await http.get(urljoin(address.url, route))) if route else None
    edition = (found or {}).get(field)
    return clean(edition)[:60] if isinstance(edition, str) else None


async def warm_up(client: Client, asks: list[Ask]) -> Server:
    """The server after some unmeasured requests; one that does not take stream_options is asked without.

    Errors: ServerError of the first request that is not answered.
    """
    for ask in asks:
        try:
            await client.stream(Answer(ask))
        except ServerError as error:
            if not client.server.tells_usage or error.status not in (400, 422) or "stream_options" not in str(error):
                raise
            client.server = replace(client.server, tells_usage=False)
            await client.stream(Answer(ask))
    return client.server
