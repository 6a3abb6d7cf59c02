"""Faults: clients that go at any moment, steps that fail, signals, kill -9. The others have their right text."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import httpx
import pytest
import torch

from selfdraft import SamplingParams
from selfdraft.core.rows import Rows
from selfdraft.serve.settings import Settings
from selfdraft.types import PassVariant
from tests.serving import Served, pocket, serving, wait_until

CLIENT = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))
CHAT = "/v1/chat/completions"
FAULTS = 300
PROMPTS = [f"Tell me about the {word}." for word in ("dog", "cat", "sea", "sun", "tree", "bird")]
LONG = "Once upon a time there was a dog. " * 60


@pytest.fixture
def served() -> Iterator[Served]:
    settings = Settings(model_name="pocket", details=True, max_queue=200)
    with serving(pocket(max_num_seqs=4), settings) as found:
        yield found


def body_of(prompt: str, most: int = 24, **options: object) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": most,
        "temperature": 0.8,
        "seed": 5,
        **options,
    }


@cache
def plain(prompt: str, most: int = 24) -> str:
    llm = pocket("none")
    message = {"role": "user", "content": prompt}
    return llm.chat([message], SamplingParams(max_tokens=most, temperature=0.8, seed=5)).outputs[0].text


def request_of(body: dict[str, object]) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


def connect(served: Served) -> socket.socket:
    host, _, port = served.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=600)


def leave(served: Served, draw: random.Random) -> None:
    """One client that goes: with half a body, before an answer, in its midst; quietly or with a reset."""
    long = draw.random() < 0.3
    request = request_of(body_of(LONG if long else draw.choice(PROMPTS), most=60, stream=draw.random() < 0.7))
    with connect(served) as sock:
        if draw.random() < 0.3:  # closing then sends a reset
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        sent = draw.randrange(len(request)) if draw.random() < 0.3 else len(request)
        sock.sendall(request[:sent])
        if sent == len(request) and draw.random() < 0.7:
            sock.recv(draw.choice([1, 100, 1000]))


def ask(served: Served, prompt: str, stream: bool) -> str:
    """The answer that a client who stays gets."""
    body = body_of(prompt, stream=stream)
    if not stream:
        return str(CLIENT.post(served.url + CHAT, json=body).json()["choices"][0]["message"]["content"])
    text = ""
    with CLIENT.stream("POST", served.url + CHAT, json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += "".join(one["delta"].get("content", "") for one in json.loads(line[6:])["choices"])
    return text


def test_three_hundred_clients_that_go_and_the_others_have_their_text(served: Served) -> None:
    draw = random.Random(2)
    with ThreadPoolExecutor(8) as pool:
        gone = [pool.submit(leave, served, random.Random(seed)) for seed in range(FAULTS)]
        stayed = [(prompt, pool.submit(ask, served, prompt, draw.random() < 0.5)) for prompt in PROMPTS * 8]
        for one in gone:
            one.result()
        for prompt, answer in stayed:
            assert answer.result() == plain(prompt)
    wait_until(lambda: served.quiet)
    assert served.server.worker.failed is None
    assert CLIENT.get(served.url + "/ready").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_request_streamed_or_not(
    served: Served, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is held after a few steps until the server has seen that the client has gone."""
    engine, worker = served.server.llm.engine, served.server.worker
    steps, free, advance = threading.Semaphore(6), threading.Event(), engine.advance

    def held() -> object:
        while not free.is_set() and not steps.acquire(timeout=0.05):
            pass
        return advance()

    monkeypatch.setattr(engine, "advance", held)
    with connect(served) as sock:
        sock.sendall(request_of(body_of(PROMPTS[0], most=3000, stream=stream, ignore_eos=True)))
        wait_until(lambda: len(engine.running) == 1 and engine.running[0].num_output_tokens > 0)
        (sequence,) = engine.running
    wait_until(lambda: bool(worker._cancelled) or not worker.busy)
    free.set()
    wait_until(lambda: served.quiet)
    assert sequence.finish_reason == "abort"
    assert sequence.num_output_tokens < 100


class Failing:
    """A target whose passes fail now and then: with an exception, or with NaN for one row."""

    def __init__(self, served: Served, chance: float) -> None:
        self.target, self.draw, self.chance = served.server.llm.target, random.Random(3), chance
        self.forward, self.count, self.failed = self.target.forward, 0, False

    def __call__(self, rows: Rows, short: PassVariant | None = None) -> torch.Tensor:
        luck = self.draw.random()
        if luck < self.chance / 2 and not self.failed:  # three in a row would be the end of the server
            self.count, self.failed = self.count + 1, True
            raise self.draw.choice([RuntimeError("planted"), MemoryError("planted"), ValueError("planted")])
        self.failed = False
        logits = self.forward(rows, short)
        if luck < self.chance and len(logits):
            self.count += 1
            logits = logits.clone()
            logits[self.draw.randrange(len(logits)), 7] = float("nan")
        return logits


def test_two_hundred_steps_that_fail_end_their_own_requests_and_no_others(served: Served) -> None:
    failing = Failing(served, 0.08)
    served.server.llm.target.forward = failing  # type: ignore[method-assign]
    answers: list[tuple[str, httpx.Response]] = []

    def one(number: int) -> None:
        prompt = PROMPTS[number % len(PROMPTS)]
        answers.append((prompt, CLIENT.post(served.url + CHAT, json=body_of(prompt))))

    with ThreadPoolExecutor(4) as pool:
        number = 0
        while failing.count < 200 and served.server.worker.failed is None:
            list(pool.map(one, range(number, number + 40)))
            number += 40
    served.server.llm.target.forward = failing.forward  # type: ignore[method-assign]
    assert served.server.worker.failed is None
    for prompt, answer in answers:
        assert answer.status_code in (200, 500)
        assert "planted" not in answer.text
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["message"]["content"] == plain(prompt)
    assert sum(answer.status_code == 200 for _, answer in answers) > 10
    wait_until(lambda: served.quiet)


def test_an_error_in_the_midst_of_a_stream_is_an_event_and_the_last_one(served: Served) -> None:
    target, forward, passes = served.server.llm.target, served.server.llm.target.forward, [0]

    def fails_later(rows: Rows, short: PassVariant | None = None) -> torch.Tensor:
        passes[0] += 1
        if passes[0] > 6:
            raise RuntimeError("planted")
        return forward(rows, short)

    target.forward = fails_later  # type: ignore[method-assign]
    with CLIENT.stream("POST", served.url + CHAT, json=body_of("Hi", 40, stream=True)) as response:
        lines = [line for line in response.iter_lines() if line]
    target.forward = forward  # type: ignore[method-assign]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["error"]["code"] == "internal_error"


def test_a_reader_that_reads_nothing_holds_nobody_up(served: Served) -> None:
    with connect(served) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.sendall(request_of(body_of(PROMPTS[0], most=2000, stream=True, ignore_eos=True, draft_details=True)))
        sock.recv(10)
        for prompt in PROMPTS:
            assert ask(served, prompt, True) == plain(prompt)
    wait_until(lambda: served.quiet)


def test_two_hundred_bodies_that_never_come_hold_nobody_up(served: Served) -> None:
    half = request_of(body_of(PROMPTS[0]))[:150]
    sockets = [connect(served) for _ in range(200)]
    for sock in sockets:
        sock.sendall(half)
    assert ask(served, PROMPTS[1], False) == plain(PROMPTS[1])
    for sock in sockets:
        sock.close()


def test_overload_is_429_and_nobody_hangs() -> None:
    with serving(pocket(max_num_seqs=2), Settings(model_name="pocket", max_queue=3)) as served:
        with ThreadPoolExecutor(32) as pool:
            answers = list(
                pool.map(
                    lambda number: CLIENT.post(served.url + CHAT, json=body_of(PROMPTS[number % 6])),
                    range(64),
                )
            )
        codes = {answer.status_code for answer in answers}
        assert codes == {200, 429}
        for number, answer in enumerate(answers):
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "server_overloaded"
            else:
                assert answer.json()["choices"][0]["message"]["content"] == plain(PROMPTS[number % 6])


# --- a process of its own ----------------------------------------------------------------------------------------


class Process:
    """`selfdraft serve` on the pocket model."""

    def __init__(self, *options: str, folder: Path) -> None:
        self.log = (folder / "log").open("wb")
        command = [sys.executable, "-m", "selfdraft", "serve", "--model", "pocket", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=self.log, env={**os.environ, "COLUMNS": "200"})
        wait_until(lambda: b"/v1 with" in self.text or self.process.poll() is not None)
        self.url = next(word for word in self.text.decode().split() if word.startswith("http://")).removesuffix("/v1")
        wait_until(lambda: self.answers("/ready"))

    @property
    def text(self) -> bytes:
        return Path(self.log.name).read_bytes()

    def answers(self, route: str) -> bool:
        try:
            return CLIENT.get(self.url + route).status_code == 200
        except httpx.TransportError:
            return False

    def end(self) -> int:
        self.log.close()
        return self.process.wait()


def test_sigterm_lets_requests_end_and_takes_no_new_ones(tmp_path: Path) -> None:
    server = Process(folder=tmp_path)
    texts: list[str] = []
    begun = threading.Event()

    def read() -> None:
        body = body_of(PROMPTS[0], most=400, stream=True, ignore_eos=True)
        with CLIENT.stream("POST", server.url + CHAT, json=body) as response:
            for line in response.iter_lines():
                texts.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    server.process.send_signal(signal.SIGTERM)
    refused: list[int] = []

    def refuses() -> bool:
        try:
            refused.append(CLIENT.post(server.url + CHAT, json=body_of("Hi", 2)).status_code)
        except httpx.TransportError:
            refused.append(0)
        return refused[-1] in (503, 0)

    wait_until(refuses)
    reader.join()
    assert server.end() == 0
    assert server.text.startswith(b"loading pocket ...\n"), "a log is not silent while kernels are built"
    assert "data: [DONE]" in texts
    assert not any('"error"' in text for text in texts)


def test_sigterm_ends_requests_that_take_too_long_with_an_error(tmp_path: Path) -> None:
    server = Process("--shutdown-timeout", "0", folder=tmp_path)
    with CLIENT.stream(
        "POST", server.url + CHAT, json=body_of(PROMPTS[0], most=3000, stream=True, ignore_eos=True)
    ) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert json.loads(rest[-2][6:])["error"]["code"] == "server_draining"
    assert rest[-1] == "data: [DONE]"
    assert server.end() == 0


def test_kill_and_start_again(tmp_path: Path) -> None:
    for _ in range(2):
        server = Process(folder=tmp_path)
        with CLIENT.stream("POST", server.url + CHAT, json=body_of("Hi", 500, stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.kill()
            with pytest.raises(httpx.TransportError):
                list(lines)
        assert server.end() == -signal.SIGKILL


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "selfdraft", "serve", "--model", "pocket", "--port", port],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "cannot be used: Address already in use" in done.stderr.replace("\n", " ")
