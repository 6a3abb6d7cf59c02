"""`selfdraft chat --url`: the same conversation, against servers on sockets."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selfdraft.cli import remote_chat, terminal
from selfdraft.files.api_keys import KEY_VARIABLE
from tests.fake_server import DONE, Document, Refusal, Reply, Script, chunk, listening, said, usage
from tests.terminal import Done, one_line, typed

NOBODY = "http://127.0.0.1:1/v1"
OURS = {"drafter": "auto", "exactness": {"level": "bitwise"}, "details": True}


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `selfdraft chat --url` with what is typed."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)

    def call(url: str, lines: str, *arguments: object) -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return typed(monkeypatch, capsys, "chat", "--url", url, *arguments)

    return call


def answers(number: int, body: Document) -> Reply:
    return said(0, 0, 0, tokens=6, words="abc" if number == 0 else "xyz", reason="stop")


def test_a_conversation(chat: Callable[..., Done]) -> None:
    with listening(answers) as server:
        done = chat(server.url, "first\nsecond\n\nnever\n", "--system", "Be brief.", "--max-new-tokens", 9)
    assert done.code == 0
    assert done.out == "> abc\n> xyz\n> "
    first, second = server.bodies
    opening = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "first"}]
    assert first == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "temperature": 0.0,
        "messages": opening,
    }
    assert second["messages"] == [
        *opening,
        {"role": "assistant", "content": "abc"},
        {"role": "user", "content": "second"},
    ]
    lines = done.err.splitlines()
    assert lines[0] == f"m at {server.url}"
    assert all(line.startswith("6 tokens, first token after ") and line.endswith(" tokens/s") for line in lines[1:])
    assert len(lines) == 3


@pytest.mark.parametrize(("reason", "most", "told"), [("length", 9, True), ("length", 6, False), ("stop", 9, False)])
def test_an_answer_that_ends_for_want_of_room_says_so(
    chat: Callable[..., Done], reason: str, most: int, told: bool
) -> None:
    with listening(lambda number, body: said(0, 0, 0, tokens=6, reason=reason)) as server:
        done = chat(server.url, "first\n", "--max-new-tokens", most)
    assert ("the answer ended at the context of the model, or at a limit of the server" in done.err) == told


def test_options_go_to_the_server(chat: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("key-of-eight\n")
    sampling = ("--temperature", 0.5, "--top-p", 0.9, "--seed", 7, "--drafter", "lookup", "--model", "other")
    with listening(answers) as server:
        chat(server.url, "hi\n", *sampling, "--api-key-file", tmp_path / "key")
        chat(server.url, "hi\n", "--speculative-config", '{"method": "none"}')
    first, second = server.bodies
    wanted = {"model": "other", "temperature": 0.5, "top_p": 0.9, "seed": 7, "speculative_config": {"method": "lookup"}}
    assert wanted.items() <= first.items()
    assert second["speculative_config"] == {"method": "none"}
    assert [found.get("authorization") for found in server.headers] == ["Bearer key-of-eight", None]


def drafted(words: str, *sources: str, reason: str | None = None) -> tuple[float, str]:
    tokens = [{"text": word, "source": source} for word, source in zip(words, sources, strict=True)]
    return 0, chunk(words, reason, draft={"tokens": tokens})


def with_details(number: int, body: Document) -> Reply:
    counts = {
        "num_steps": 2,
        "mean_acceptance_length": 2.5,
        "num_draft_tokens": 4,
        "num_accepted_draft_tokens": 3,
    }
    metrics = {"choices": [], "metrics": {"speculative_decoding": counts}}
    last = f"data: {json.dumps(metrics)}"
    begun = [drafted("ab", "target", "target"), drafted("cde", "lookup", "lookup", "target", reason="stop")]
    return [*begun, (0, usage(5)), (0, last), (0, DONE)]


def test_figures_and_colours_of_a_server_that_tells_details(
    chat: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(with_details, info=OURS) as server:
        done = chat(server.url, "hi\n")
        monkeypatch.setattr(terminal, "out", Console(force_terminal=True, color_system="standard", highlight=False))
        coloured = chat(server.url, "hi\n")
    assert done.out == "> abcde\n> \n"
    assert "ab\x1b[32mcde\x1b[0m" in coloured.out
    assert server.bodies[0]["draft_details"] is True
    assert "5 tokens in 2 steps (2.50 a step), first token after " in done.err
    assert done.err.endswith(", auto: 3 of 4 draft tokens accepted\n")


def test_details_are_not_asked_of_a_server_that_refuses_them(chat: Callable[..., Done]) -> None:
    with listening(answers, info={**OURS, "details": False}) as server:
        chat(server.url, "hi\n")
    assert "draft_details" not in server.bodies[0]


def test_ctrl_c_ends_the_answer_on_the_server_too(chat: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = remote_chat.show_event
    seen: list[Any] = []

    def show(event: Any) -> None:
        shown(event)
        seen.append(event)
        if len(seen) == 3:
            raise KeyboardInterrupt

    def endless(number: int, body: Document) -> Reply:
        return [(0, "...")] if number == 0 else said(0, tokens=1)

    monkeypatch.setattr(remote_chat, "show_event", show)
    with listening(endless) as server:
        done = chat(server.url, "first\nsecond\n")
        assert server.left.wait(600)
    assert done.code == 0
    assert done.out == "> moremoremore\n> a\n> \n"
    assert "stopped; the text so far stays in the conversation" in done.err
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "moremoremore"}


def test_no_text_of_a_server_steers_the_terminal(chat: Callable[..., Done]) -> None:
    nasty: Script = [(0, chunk("a\x1b[2Jb\x9bc\td\ne", "stop")), (0, usage(1)), (0, DONE)]
    with listening(lambda *_: nasty) as server:
        assert chat(server.url, "hi\n").out == "> a[2Jbc\td\ne\n> \n"
    refusing = Refusal(500, body={"error": {"message": "\x1b]0;x\x07bad"}})
    with listening(lambda *_: refusing) as server:
        done = chat(server.url, "hi\n")
    assert "\x1b" not in done.err
    assert "answered with status 500: ]0;xbad" in done.err


PASSING: dict[str, tuple[Reply, str]] = {
    "429": (Refusal(429, {"Retry-After": "7"}), "is busy (429): not now; ask again in 7 s; the question is forgotten"),
    "503": (Refusal(503), "is busy (503): not now; the question is forgotten, what was said before stays"),
    "400": (Refusal(400, body={"error": {"message": "top_k"}}), "answered with status 400: top_k; the question"),
    "html": (Refusal(502, body={"detail": "no upstream"}), "answered with status 502: no upstream"),
    "broken": ([(0, chunk("half"))], "broke off the answer: the stream ended before its last event; the question"),
    "error": ([(0, 'data: {"error": {"message": "full"}}')], "ended the answer with an error: full"),
}


@pytest.mark.parametrize("name", PASSING)
def test_the_conversation_goes_on_after_an_error(chat: Callable[..., Done], name: str) -> None:
    reply, words = PASSING[name]
    with listening(lambda number, _: reply if number == 1 else said(0, tokens=1)) as server:
        done = chat(server.url, "one\ntwo\nthree\n")
    assert done.code == 0
    assert f"error: {server.url} {words}" in done.err
    said_last = [message["content"] for message in server.bodies[2]["messages"]]
    assert said_last == ["one", "a", "three"]


def test_a_conversation_that_has_become_too_long_starts_anew(chat: Callable[..., Done]) -> None:
    long = Refusal(400, body={"error": {"message": "too long", "code": "context_length_exceeded"}})
    with listening(lambda number, _: long if number == 1 else said(0, tokens=1)) as server:
        done = chat(server.url, "one\ntwo\nthree\n")
    assert "too long; the conversation starts anew" in done.err
    assert [message["content"] for message in server.bodies[2]["messages"]] == ["three"]


LASTING: dict[str, tuple[Reply, str]] = {
    "401": (Refusal(401), "does not take the API key (401): not now; --api-key-file or SELFDRAFT_API_KEY gives one"),
    "404": (Refusal(404), "has no such model or route (404): not now; see --model and --url"),
}


@pytest.mark.parametrize("name", LASTING)
def test_an_error_that_stays_ends_the_conversation(chat: Callable[..., Done], name: str) -> None:
    reply, words = LASTING[name]
    with listening(lambda *_: reply) as server:
        done = chat(server.url, "one\ntwo\n")
    assert done.code == 2
    assert done.err.splitlines()[-1] == f"error: {server.url} {words}"
    assert len(server.bodies) == 1


def test_a_server_that_dies_between_two_questions(chat: Callable[..., Done]) -> None:
    def mortal(number: int, body: Document) -> Reply:
        return said(0, tokens=1) if number == 0 else OSError("dead")

    with listening(mortal) as server:
        done = chat(server.url, "one\ntwo\nthree\n")
    assert "broke off the answer: " in done.err
    assert "cannot be reached: " in done.err.splitlines()[-1]
    assert done.code == 2


MISTAKES: dict[str, tuple[tuple[object, ...], str]] = {
    "nobody": (("--url", NOBODY), f"{NOBODY} cannot be reached: "),
    "no address": (("--url", "localhost"), "is no address of a server"),
    "dtype": (("--url", NOBODY, "--dtype", "float32"), "--dtype has no use with --url"),
    "no cache": (("--url", NOBODY, "--no-cache"), "--no-cache has no use with --url"),
    "lora": (("--url", NOBODY, "--lora", "x"), "--lora has no use with --url"),
    "both": (("--url", NOBODY, "--drafter", "none", "--speculative-config", "{}"), "say the same to a server"),
    "temperature": (("--url", NOBODY, "--temperature", -1), "temperature=-1.0 is out of range"),
    "key without url": (("--api-key-file", "x"), "--api-key-file has no use without --url"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str) -> None:
    arguments, words = MISTAKES[name]
    one_line(typed(monkeypatch, capsys, "chat", *arguments), words)


def test_without_httpx(chat: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    one_line(chat(NOBODY, ""), "chat --url needs httpx, which is missing: pip install 'selfdraft[bench]'")


def test_neither_torch_nor_transformers_is_loaded() -> None:
    code = (
        "import sys; from selfdraft import cli\n"
        "try: cli.main()\n"
        "finally: print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    with listening(answers) as server:
        for verb in (["chat"], ["bench", "serve", "--requests", "16", "--concurrency", "1", "--rounds", "1"]):
            command = [sys.executable, "-c", code, *verb, "--url", server.url]
            done = subprocess.run(command, input="hi\n", capture_output=True, text=True, check=True)
            assert done.stdout.splitlines()[-1].endswith("[]"), done.stderr
