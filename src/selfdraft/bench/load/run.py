"""A run: every server at every point, in rounds whose order of servers alternates."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from selfdraft.bench.load.arrivals import Ask, Point, Sleep, poisson, run_point
from selfdraft.bench.load.client import Client, Server
from selfdraft.bench.load.figures import Round, compare_texts, figures, ratios
from selfdraft.bench.load.rows import Rows
from selfdraft.bench.load.servers import meet, warm_up
from selfdraft.errors import ServerError
from selfdraft.remote import Address
from selfdraft.types import Clock, JsonObject

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True)
class Wanted:
    """A server that is to be asked: its name in the tables, where it is, model (None: the one it has), fields."""

    name: str
    address: Address
    model: str | None
    options: Mapping[str, object]


@dataclass(slots=True)
class Load:
    """What is to be measured, and what was. `clock` tells the times; `transport` is what the HTTP goes over."""

    wanted: SequenceOf[Wanted]
    points: SequenceOf[Point]
    asks: SequenceOf[Ask]
    warm_ups: SequenceOf[Ask]
    rounds: int
    seed: int
    rows: Rows
    chat: bool = True
    fresh: bool = True
    """Every prompt is read anew by servers that can be told so."""
    greedy: bool = True
    retry: bool = False
    seconds: float = 600.0
    """Most seconds without a byte of an answer."""
    limits: Mapping[str, float] = field(default_factory=dict)
    clock: Clock = time.perf_counter
    processor: Clock = time.process_time
    sleep: Sleep = asyncio.sleep
    transport: Callable[[Address], httpx.AsyncBaseTransport] | None = None
    servers: list[Server] = field(default_factory=list)
    """Those that were met."""
    measured: list[Round] = field(default_factory=list)

    async def measure(self, ready: Callable[[list[Server]], None], advance: Callable[[], None]) -> None:
        """Meet the servers, warm them up, and measure. `ready` is called before the first request that counts,
        `advance` after each. Errors: ServerError; what was measured until then is in `measured`.
        """
        async with AsyncExitStack() as stack:
            clients = [await self._client(stack, one) for one in self.wanted]
            for client in clients:
                self.servers.append(await warm_up(client, [*self.warm_ups]))
            ready(self.servers)
            for point in self.points:
                for number in range(self.rounds):
                    for client in clients if number % 2 == 0 else reversed(clients):
                        await self._round(client, point, number, advance)

    async def _client(self, stack: AsyncExitStack, wanted: Wanted) -> Client:
        import httpx

        transport = self.transport(wanted.address) if self.transport is not None else None
        http = await stack.enter_async_context(
            httpx.AsyncClient(**wanted.address.client_options(self.seconds), transport=transport)
        )
        how: JsonObject = {"chat": self.chat, "fresh": self.fresh, "seconds": self.seconds}
        server = await meet(wanted.name, wanted.address, http, wanted.model, wanted.options, **how)
        return Client(server, http, self.clock, self.sleep, retry=self.retry, seconds=self.seconds)

    async def _round(self, client: Client, point: Point, number: int, advance: Callable[[], None]) -> None:
        """One round of one server. Errors: ServerError when it is gone, or answers no request at all."""
        asks = self.asks if point.rate is None else poisson(self.asks, point.rate, self.seed)
        found = Round(client.server.name, point, number, began=self.clock())
        self.measured.append(found)
        used = self.processor()

        async def answer(ask: Ask) -> None:
            done = await client.ask(ask)
            found.answers.append(done)
            self.rows.append(found, done)
            advance()

        try:
            await run_point(point, asks, answer, self.clock, self.sleep)
        except ServerError as error:
            where = f"after {len(found.answers)} of {len(asks)} requests in round {number + 1} of {point.label}"
            raise ServerError(f"server {client.server.name} is gone {where}: {error}", gone=True) from error
        finally:
            found.processor_seconds = self.processor() - used
        found.whole = True
        if all(one.error is not None for one in found.answers):
            words = found.answers[0].words
            raise ServerError(f"server {client.server.name} answered no request at {point.label}: {words}")

    def report(self) -> JsonObject:
        """The figures of all points, as far as they were measured, and what is known of the texts."""
        points: list[JsonObject] = []
        for point in self.points:
            rounds = {
                one.name: [found for found in self.measured if (found.server, found.point) == (one.name, point)]
                for one in self.servers
            }
            for one in self.servers:
                if not any(found.answers for found in rounds[one.name]):
                    continue
                record: JsonObject = {"server": one.name, "concurrency": point.concurrency, "rate": point.rate}
                record |= figures(rounds[one.name], self.limits)
                record["by_round"] = [figures([found], {})["tokens_per_second"] for found in rounds[one.name]]
                first = self.servers[0].name
                record["by_first"] = None if one.name == first else ratios(rounds[one.name], rounds[first])
                points.append(record)
        names = [one.name for one in self.servers]
        return {"points": points, "texts": compare_texts(self.measured, names) if self.greedy and names else None}
