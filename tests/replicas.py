"""Replicas on Ray Serve as real processes: starting them by the command line, asking them, killing one."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType

import httpx
import psutil

from selfdraft import SamplingParams
from tests.serving import pocket, wait_until

ROOT = Path(__file__).parent.parent
KEY = "a-key-of-the-tests"
WORDS = ("dog", "cat", "sea", "sun", "tree", "bird", "stone", "river")
TITLE = "ray::ServeReplica:selfdraft:replicas"
"""How Ray names the process of a replica, cut as the system cuts it."""
OPTIONS = ("--model", "pocket", "--dtype", "float32", "--max-batch", "4", "--max-queue", "400", "--threads", "1")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass(frozen=True)
class Asked:
    """One request, and what plain decoding in one process says to it."""

    number: int
    chat: bool
    stream: bool
    prompt: str
    seed: int
    temperature: float
    most: int

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def body(self) -> dict[str, object]:
        said = {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        sampling = {"seed": self.seed, "temperature": self.temperature, "max_tokens": self.most}
        return {**said, **sampling, "stream": self.stream}


def mixed(count: int, seed: int = 0, most: int = 24) -> list[Asked]:
    """Requests of every kind."""
    draw = random.Random(seed)
    return [
        Asked(
            number,
            chat=draw.random() < 0.5,
            stream=draw.random() < 0.5,
            prompt=f"Tell me about the {draw.choice(WORDS)} and the {draw.choice(WORDS)}.",
            seed=draw.randrange(4),
            temperature=draw.choice((0.0, 0.8)),
            most=draw.choice((most // 3, most)),
        )
        for number in range(count)
    ]


def plain(asked: Iterable[Asked]) -> dict[int, str]:
    """The texts of plain decoding in this process, by the number of the request."""
    llm = pocket("none")

    @cache
    def said(chat: bool, prompt: str, seed: int, temperature: float, most: int) -> str:
        sampling = SamplingParams(seed=seed, temperature=temperature, max_tokens=most)
        if chat:
            return llm.chat([{"role": "user", "content": prompt}], sampling).outputs[0].text
        return llm.generate(prompt, sampling)[0].outputs[0].text

    return {one.number: said(one.chat, one.prompt, one.seed, one.temperature, one.most) for one in asked}


@dataclass
class Outcome:
    """How one request ended: its text, or the error that its client was told, and whether that came in a stream."""

    status: int = 0
    text: str = ""
    error: str = ""
    whole: bool = False
    """It came to its proper end: a whole document, or a stream up to [DONE]."""
    ids: set[str] = field(default_factory=set)
    """The ids of the answers that its parts belong to."""


def read(response: httpx.Response, asked: Asked) -> Outcome:
    """The outcome of a response that is read as it comes."""
    found = Outcome(response.status_code)
    if not (asked.stream and response.status_code == 200):
        document = json.loads(response.read())
        found.whole = True
        if response.status_code != 200:
            found.error = document["error"]["code"]
            return found
        choice = document["choices"][0]
        found.ids.add(document["id"])
        found.text = choice["message"]["content"] if asked.chat else choice["text"]
        return found
    for line in response.iter_lines():
        if line == "data: [DONE]":
            found.whole = True
        elif line.startswith("data: "):
            part = json.loads(line.removeprefix("data: "))
            if "error" in part:
                found.error = part["error"]["code"]
                continue
            found.ids.add(part["id"])
            for choice in part["choices"]:
                found.text += (choice["delta"].get("content") or "") if asked.chat else choice["text"]
    return found


class Replicas:
    """`selfdraft serve --ray` in a process of its own; leaving the block ends it and all that it has started."""

    def __init__(self, *options: str, log: Path, replicas: int = 2, env: dict[str, str] | None = None) -> None:
        self.log, self.port = log, free_port()
        self.command = [sys.executable, "-m", "selfdraft", "serve", "--ray", "--replicas", str(replicas)]
        self.command += ["--port", str(self.port), *OPTIONS, *options]
        # Ray's own processes say to nobody how they are, and take the paths of this process
        self.env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "SELFDRAFT_API_KEY": KEY, **(env or {})}
        self.env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "src", ROOT)))
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=600,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    def __enter__(self) -> Replicas:
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(self.command, stdout=file, stderr=file, env=self.env)
        wait_until(lambda: self.says("Ctrl-C ends") or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.end()

    def end(self) -> int:
        """Ends it as an operator does; the exit status. Nothing that it has started is left."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(600)
        _, left = psutil.wait_procs(children, timeout=600)
        assert not left, left
        return status

    def says(self, words: str, times: int = 1) -> bool:
        return self.log.read_text().count(words) >= times

    def pids(self) -> list[int]:
        """Processes of replicas that live."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if " ".join(child.cmdline()).startswith(TITLE):
                    found.append(child.pid)
            except psutil.NoSuchProcess:
                continue
        return found

    def names(self) -> set[str]:
        """Names of replicas that are ready."""
        response = self.client.get("/ready")
        return {name for name, ready in response.json()["replicas"].items() if ready}

    def ask(self, asked: Asked) -> Outcome:
        """One request, to its end."""
        with self.client.stream("POST", asked.path, json=asked.body) as response:
            return read(response, asked)

    def ask_all(self, asked: Iterable[Asked], clients: int = 8) -> list[Outcome]:
        with ThreadPoolExecutor(clients) as pool:
            return [*pool.map(self.ask, asked)]

    def asking(
        self, asked: Iterable[Asked], until: Callable[[], bool], clients: int = 4
    ) -> list[tuple[Asked, Outcome]]:
        """Requests again and again, until a condition holds; each with its outcome."""
        over, waiting = threading.Event(), list(asked)
        found: list[tuple[Asked, Outcome]] = []

        def one(number: int) -> None:
            for place in range(number, 10**9, clients):
                if over.is_set():
                    return
                request = waiting[place % len(waiting)]
                found.append((request, self.ask(request)))

        with ThreadPoolExecutor(clients) as pool:
            threads = [pool.submit(one, number) for number in range(clients)]
            try:
                wait_until(lambda: until() or any(thread.done() for thread in threads))
            finally:
                over.set()
            for thread in threads:
                thread.result()
        return found
