"""`selfdraft bench serve` as a user meets it, against servers on sockets."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfdraft.cli import bench_serve
from selfdraft.files.api_keys import KEY_VARIABLE
from tests.fake_server import Document, Refusal, Reply, listening, said
from tests.terminal import Done, one_line, typed

OURS = {"version": "0.1", "drafter": "auto", "exactness": {"level": "bitwise", "why": "tried"}, "max_batch": 4}
CHEAP = ("--concurrency", 2, "--requests", 4, "--rounds", 2, "--warmup", 1)
NOBODY = "http://127.0.0.1:1/v1"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `selfdraft bench serve`; later options win."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    return lambda *arguments: typed(monkeypatch, capsys, "bench", "serve", *CHEAP, *arguments)


def answers(number: int, body: Document) -> Reply:
    return said(0, 0, 0, tokens=6)


def test_one_server(load: Callable[..., Done], tmp_path: Path) -> None:
    document, rows, picture = tmp_path / "load.json", tmp_path / "rows.jsonl", tmp_path / "load.png"
    with listening(answers, info=OURS) as server:
        files = ("--json", document, "--save", rows, "--plot", picture)
        done = load("--url", server.url, "--goodput", "e2el:999999", *files)
    assert done.code == 0
    name = server.url.split("/")[2]
    assert f"{name}  {server.url}, model m, engine fake, server BaseHTTP" in done.out
    assert "version 0.1, drafter auto, max batch 4, exactness bitwise" in done.out
    assert "4 requests a point and round, 2 rounds, quick, chat, at most 64 tokens, temperature 0, seed 0" in done.out
    assert re.search(rf"^{name} +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +100 % +0$", done.out, re.MULTILINE)
    assert f"{name}: the same text to the same question each time: yes" in done.out
    found = json.loads(document.read_text())
    (point,) = found["points"]
    assert (point["requests"], point["tokens"], point["rounds"]) == (8, 48, 2)
    assert found["conditions"]["servers"][0]["about"]["exactness"]["level"] == "bitwise"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run"] + ["request"] * 8
    begun, ended = lines[0]["conditions"].pop("machine_state"), found["conditions"].pop("machine_state")
    assert begun["before"] == ended["before"]
    assert begun["after"] is None
    assert lines[0]["conditions"] == found["conditions"]
    assert {line["run"] for line in lines} == {found["conditions"]["date"]}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {document}" in done.err
    assert f"{rows} has 8 rows more" in done.err
    assert len(server.bodies) == 9


def test_rows_are_appended(load: Callable[..., Done], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    with listening(answers) as server:
        assert load("--url", server.url, "--save", rows).code == 0
    assert len(rows.read_text().splitlines()) == 1 + 1 + 8


def test_two_servers(load: Callable[..., Done]) -> None:
    def other(number: int, body: Document) -> Reply:
        return said(0, 0, 0, tokens=6, words="xyz")

    with listening(answers) as one, listening(other) as two:
        named = ("--url", f"one={one.url}", "--url", f"two={two.url}/chat/completions")
        private = ("--model", "two=other", "--api-key", "one=secret-key-1", "--body", 'two={"top_k": 3}')
        done = load(*named, *private, "--max-tokens", "8,16")
    assert done.code == 0
    assert re.search(r"^two by one: tok/s [\d.]+x \([\d.]+ to [\d.]+\), TTFT p50 [\d.]+x", done.out, re.MULTILINE)
    assert "two: texts equal to those of one: 0 of 4" in done.out
    assert {body["model"] for body in two.bodies} == {"other"}
    assert {body["model"] for body in one.bodies} == {"m"}
    assert {body.get("top_k") for body in two.bodies} == {3}
    assert {found.get("authorization") for found in one.headers} == {"Bearer secret-key-1"}
    assert {found.get("authorization") for found in two.headers} == {None}  # a key goes to its own server alone
    assert {body["max_tokens"] for body in one.bodies} == {8, 16}
    assert "secret" not in done.out + done.err


def test_the_key_of_the_environment_and_of_a_file(
    load: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("\nfile-key-1\nfile-key-2\n")
    with listening(answers) as server:
        load("--url", server.url, "--api-key-file", file)
        monkeypatch.setenv(KEY_VARIABLE, "env-key-1,env-key-2")
        load("--url", server.url)
    assert [found["authorization"] for found in server.headers][::9] == ["Bearer file-key-1", "Bearer env-key-1"]


def test_speculative_config_and_ignore_eos_are_sent(load: Callable[..., Done]) -> None:
    with listening(answers) as server:
        done = load("--url", server.url, "--speculative-config", '{"method": "none"}', "--ignore-eos")
    assert {json.dumps(body["speculative_config"]) for body in server.bodies} == {'{"method": "none"}'}
    assert all(body["ignore_eos"] for body in server.bodies)
    assert 'sent: {"speculative_config": {"method": "none"}}' in done.out


def test_completions_of_a_prompts_file(load: Callable[..., Done], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one two three"}\n')
    with listening(answers) as server:
        done = load("--url", server.url, "--dataset", prompts, "--endpoint", "completions", "--prompt-tokens", "2")
    assert done.code == 0
    assert {body["prompt"] for body in server.bodies} == {"one two "}


def test_ours_with_two_texts_to_one_question_is_a_fault(load: Callable[..., Done]) -> None:
    def moody(number: int, body: Document) -> Reply:
        return said(0, 0, tokens=6, words="ab" if number < 5 else "cd")

    with listening(moody, info=OURS) as server:
        done = load("--url", f"ours={server.url}")
    assert done.code == 1
    assert "ours: the same text to the same question each time: no: 4 of 4 differ, such as 'quick " in done.out
    assert "texts of ours DIFFER" in done.err
    with listening(moody) as server:  # of other engines it is told only
        done = load("--url", f"other={server.url}")
    assert done.code == 0
    assert "no: 4 of 4 differ" in done.out


def test_sampled_texts_are_not_compared(load: Callable[..., Done]) -> None:
    with listening(answers, info=OURS) as server:
        done = load("--url", server.url, "--temperature", 0.8)
    assert done.code == 0
    assert "same text" not in done.out


def test_refusals_are_counted(load: Callable[..., Done]) -> None:
    def busy(number: int, body: Document) -> Reply:
        return Refusal(429, {"Retry-After": "0"}) if number % 2 else answers(number, body)

    with listening(busy) as server:
        done = load("--url", server.url, "--warmup", 0, "--rounds", 1)
    assert (done.code, "2 x 429" in done.out) == (0, True)
    with listening(busy) as server:
        done = load("--url", server.url, "--warmup", 0, "--rounds", 1, "--retry")
    assert (done.code, "x 429" in done.out, len(server.bodies) > 4) == (0, False, True)


def test_a_server_that_dies(load: Callable[..., Done], tmp_path: Path) -> None:
    """The figures and rows of what was answered, then one line that says who is gone and when; exit code 2."""
    rows = tmp_path / "rows.jsonl"

    def mortal(number: int, body: Document) -> Reply:
        return answers(number, body) if number < 6 else OSError("dead")

    with listening(mortal) as server:
        done = load("--url", f"it={server.url}", "--save", rows, "--concurrency", 1)
    assert done.code == 2
    assert re.search(r"^it .* 1 x broken$", done.out, re.MULTILINE)
    last = done.err.splitlines()[-1]
    assert re.match(r"error: server it is gone after 2 of 4 requests in round 2 of concurrency 1: .* cannot be", last)
    assert "the run ended early" in done.err
    assert len(rows.read_text().splitlines()) == 1 + 6


def test_ctrl_c_keeps_what_was_answered(load: Callable[..., Done], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"

    def interrupting(number: int, body: Document) -> Reply:
        if number == 6:
            signal.raise_signal(signal.SIGINT)
            return [*answers(number, body)[:1], (0, "...")]  # type: ignore[index]
        return answers(number, body)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with listening(interrupting) as server:
        try:
            done = load("--url", f"it={server.url}", "--save", rows, "--concurrency", 1)
        finally:
            signal.signal(signal.SIGINT, before)
        assert server.left.wait(600)  # and the server is told that nobody waits any more
    assert done.code == 130
    assert re.search(r"^it .* 0$", done.out, re.MULTILINE)
    assert done.err.splitlines()[-1] == "interrupted"
    assert len(rows.read_text().splitlines()) == 1 + 5


MISTAKES: dict[str, tuple[tuple[object, ...], str]] = {
    "no server": (("--url", NOBODY), f"{NOBODY} cannot be reached: "),
    "no address": (("--url", "127.0.0.1:8000"), "'127.0.0.1:8000' is no address of a server; give one such as http"),
    "a port that is none": (("--url", "http://h:99999/v1"), "is no address of a server"),
    "a password": (("--url", "http://me:secret@h/v1"), "--url holds a password"),
    "two names": (("--url", f"a={NOBODY}", "--url", f"a={NOBODY}"), "two servers are called 'a'"),
    "two models": (("--url", NOBODY, "--model", "a", "--model", "b"), "--model is given twice for one server"),
    "rate and concurrency": (("--rate", 2), "--rate and --concurrency are two ways"),
    "no numbers": (("--concurrency", "1,x"), "--concurrency '1,x' must be whole numbers with commas between"),
    "zero": (("--max-tokens", "0"), "--max-tokens '0' must be whole numbers with commas between, each at least 1"),
    "too few": (("--requests", 1), "--requests 1 are fewer than --concurrency 2: give 2 or more"),
    "no task": (("--dataset", "quik"), "there is no task and no file 'quik'; did you mean 'quick'?"),
    "goodput": (("--goodput", "fast"), "--goodput 'fast' is not like ttft:500,tpot:50"),
    "body": (("--body", '{"stream": false}'), "--body: 'stream' is what bench serve sets itself"),
    "body without object": (("--body", "3"), "--body must be a JSON object"),
    "key": (("--api-key", "schlüssel"), "the API key holds a character that no HTTP header carries"),
    "key file": (("--api-key-file", "/nowhere/at/all"), "--api-key-file /nowhere/at/all cannot be read"),
    "json": (("--json", "/nowhere/at/all"), "--json /nowhere/at/all cannot be written: give a file in a folder"),
    "save": (("--save", "/nowhere/at/all"), "--save /nowhere/at/all cannot be written: No such file"),
    "temperature": (("--temperature", -1), "'--temperature'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(load: Callable[..., Done], name: str) -> None:
    arguments, words = MISTAKES[name]
    one_line(load(*arguments), words)


def test_a_file_of_keys_without_a_key(load: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n")
    one_line(load("--api-key-file", tmp_path / "keys"), "holds no key: write one key a line")


def test_a_server_with_several_models(load: Callable[..., Done]) -> None:
    with listening(answers, models={"data": [{"id": "a"}, {"id": "b\x1b[2J"}]}) as server:
        one_line(load("--url", server.url), "--model is needed: ")
        assert "several: a, b[2J" in load("--url", server.url).err
        assert load("--url", server.url, "--model", "b").code == 0


def test_without_httpx(load: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    one_line(load("--url", NOBODY), "bench serve needs httpx, which is missing: pip install 'selfdraft[bench]'")


def test_options_of_bench_stand_with_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one_line(typed(monkeypatch, capsys, "bench", "--limit", 1, "serve"), "--limit belongs to 'bench' alone")


def test_what_reused_prompts_and_a_busy_client_mean_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    point: dict[str, Any] = {"server": "a", "cached_share": 0.5, "client_processor_share": 0.9, "late_ms_max": 75.0}

    measured = SimpleNamespace(servers=[SimpleNamespace(name="a", exact=False)])
    bench_serve.show_notes({"points": [point], "texts": None}, measured)  # type: ignore[arg-type]
    words = capsys.readouterr().err
    assert "a had read up to 50 % of the prompt tokens before (prefix reuse)" in words
    assert "the load generator itself used 90 % of a core" in words
    assert "requests were sent up to 75 ms late" in words
