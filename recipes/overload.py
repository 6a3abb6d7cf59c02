"""Many more clients than a server takes, for some minutes: `python recipes/overload.py URL MINUTES CLIENTS`.

Every request must end with 200, or with 429 or 503 and Retry-After; every text must be the first one of its prompt.
Prints counts, latency and the server's memory twice a minute. Start the server with a small queue:

    selfdraft serve --max-batch 4 --max-queue 12
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

WORDS = [
    "dog",
    "cat",
    "sea",
    "sun",
    "tree",
    "bird",
    "stone",
    "river",
    "house",
    "road",
    "letter",
    "clock",
    "garden",
    "winter",
    "bread",
    "music",
]


def resident(port: int) -> float:
    """Megabytes of the process that listens at a port; 0 where that cannot be read."""
    import psutil

    for process in psutil.process_iter(["name"]):
        try:
            if any(one.laddr.port == port for one in process.net_connections() if one.status == "LISTEN"):
                return float(process.memory_info().rss) / 2**20
        except psutil.Error:
            continue
    return 0.0


class Load:
    """What all clients share."""

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.end = url, time.monotonic() + seconds
        self.codes: Counter[str] = Counter()
        self.texts: dict[str, str] = {}
        self.wrong = 0
        self.times: list[float] = []

    async def client(self, number: int) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(timeout=600) as http:
            while time.monotonic() < self.end:
                await self.ask(http, draw)

    async def ask(self, http: httpx.AsyncClient, draw: random.Random) -> None:
        prompt = f"Write about the {draw.choice(WORDS)} and the {draw.choice(WORDS)}."
        most, sampled = draw.choice([16, 32, 64]), draw.random() < 0.3
        body: dict[str, object] = {"messages": [{"role": "user", "content": prompt}], "max_tokens": most, "seed": 1}
        body["temperature"] = 0.8 if sampled else 0.0
        began = time.monotonic()
        try:
            if draw.random() < 0.1:  # one that does not wait
                await asyncio.wait_for(http.post(self.url, json=body), draw.random())
            answer = await http.post(self.url, json=body)
        except TimeoutError:
            self.codes["left"] += 1
            return
        except httpx.TransportError as error:
            self.codes[type(error).__name__] += 1
            return
        name = str(answer.status_code)
        if answer.status_code in (429, 503) and "retry-after" not in answer.headers:
            name += " without Retry-After"
        self.codes[name] += 1
        if answer.status_code != 200:
            await asyncio.sleep(draw.random() * 0.5)
            return
        self.times.append(time.monotonic() - began)
        text = answer.json()["choices"][0]["message"]["content"]
        key = f"{prompt} {most} {sampled}"
        self.wrong += self.texts.setdefault(key, text) != text


async def main(url: str, minutes: float, clients: int) -> None:
    load = Load(f"{url}/v1/chat/completions", minutes * 60)
    port = int(url.rpartition(":")[2])
    running = [asyncio.create_task(load.client(number)) for number in range(clients)]
    while not all(task.done() for task in running):
        await asyncio.wait(running, timeout=30)
        times = sorted(load.times)
        middle = times[len(times) // 2] if times else 0.0
        print(f"{sum(load.codes.values())} requests {dict(load.codes)}, wrong texts {load.wrong}, p50 {middle:.2f} s, "
              f"server {resident(port):.0f} MB", flush=True)  # fmt: skip
    await asyncio.gather(*running)


if __name__ == "__main__":
    print(Path(sys.argv[0]).name, *sys.argv[1:])
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
