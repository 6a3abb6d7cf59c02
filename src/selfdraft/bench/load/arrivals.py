"""What is asked and when: the requests of a point, the same for every server and round, and how many run at a time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from selfdraft.bench.tasks import Item
from selfdraft.types import Clock

Sleep = Callable[[float], Awaitable[None]]
LETTERS = 4
"""Characters that a token of English text has, about; what --prompt-tokens counts by."""


@dataclass(frozen=True, slots=True)
class Point:
    """How many requests a server gets: so many at a time, or so many a second on average (Poisson arrivals)."""

    concurrency: int | None = None
    rate: float | None = None

    @property
    def label(self) -> str:
        """The point in words."""
        return f"concurrency {self.concurrency}" if self.rate is None else f"{self.rate:g} requests per second"

    @property
    def load(self) -> float:
        """The number that the point is drawn at."""
        return float(self.concurrency or 0) if self.rate is None else self.rate


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a point."""

    number: int
    key: str
    """Names prompt and limit: answers to the same key are answers to the same question."""
    prompt: str
    max_tokens: int
    seed: int
    at: float | None = None
    """Seconds from the beginning of the round until it is sent; None: as soon as there is room."""


def plan(
    items: SequenceOf[Item],
    requests: int,
    max_tokens: SequenceOf[int],
    prompt_tokens: SequenceOf[int],
    seed: int,
) -> list[Ask]:
    """The requests of a point: prompts in a shuffled order, begun again where there are more requests than prompts.

    Each gets a limit drawn from `max_tokens` and, where `prompt_tokens` holds any, a length drawn from it.
    """
    drawn = random.Random(seed)
    order = drawn.sample(range(len(items)), len(items))
    asks = []
    for number in range(requests):
        place = number % len(order)
        most, size = drawn.choice(max_tokens), drawn.choice(prompt_tokens) if prompt_tokens else None
        key, prompt = items[order[place]].key, items[order[place]].turns[0]
        if size is not None:
            followers = (items[order[(place + step) % len(order)]].turns[0] for step in range(1, len(order)))
            prompt, key = sized(prompt, list(followers), size), f"{key}, {size} tokens"
        asks.append(Ask(number, f"{key}, at most {most}", prompt, most, seed + number))
    return asks


def sized(prompt: str, followers: SequenceOf[str], tokens: int) -> str:
    """A prompt of about so many tokens: cut, or with other prompts behind it (a text of its own twice would be easy to
    guess); where all of them are too short, they begin again.
    """
    wanted = LETTERS * tokens
    texts, size, place = [prompt], len(prompt), 0
    others = [*followers, prompt]
    while size < wanted:
        texts.append(others[place % len(others)])
        size += len(texts[-1]) + 2
        place += 1
    return "\n\n".join(texts)[:wanted]


def poisson(asks: SequenceOf[Ask], rate: float, seed: int) -> list[Ask]:
    """The requests with times of arrival: gaps are exponential with mean 1 / rate, the same for the same seed."""
    drawn, at, timed = random.Random(f"arrivals {seed}"), 0.0, []
    for ask in asks:
        at += drawn.expovariate(rate)
        timed.append(Ask(ask.number, ask.key, ask.prompt, ask.max_tokens, ask.seed, at))
    return timed


async def run_point(
    point: Point,
    asks: SequenceOf[Ask],
    answer: Callable[[Ask], Awaitable[None]],
    clock: Clock,
    sleep: Sleep,
) -> None:
    """All requests of a round, answered. The first error ends it; requests on their way are given up then."""
    try:
        async with asyncio.TaskGroup() as group:
            if point.rate is None:
                waiting = iter(asks)

                async def keep_asking() -> None:
                    for ask in waiting:
                        await answer(ask)

                for _ in range(point.concurrency or 1):
                    group.create_task(keep_asking())
                return
            began = clock()
            for ask in asks:
                left = began + (ask.at or 0.0) - clock()
                if left > 0:
                    await sleep(left)
                group.create_task(_one(answer, ask))
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from None


async def _one(answer: Callable[[Ask], Awaitable[None]], ask: Ask) -> None:
    await answer(ask)
