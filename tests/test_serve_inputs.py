"""Malformed requests: no 5xx, no crash, and nothing that a client sent is sent back whole."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from selfdraft.serve.body import parse
from selfdraft.serve.errors import ApiError
from selfdraft.serve.requests import TokenizeRequest
from selfdraft.serve.settings import Settings
from tests.serving import Served, pocket, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
MOST_BODY = 200_000
CASES = 2000


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    settings = Settings(model_name="pocket", details=True, max_body=MOST_BODY, max_output_tokens=64)
    with serving(pocket(max_num_seqs=4), settings) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=600) as found:
        yield found


def chat(**options: object) -> bytes:
    return json.dumps({"messages": MESSAGES, "max_tokens": 2, **options}).encode()


def check(answer: httpx.Response, canary: str = "\0nothing") -> None:
    assert answer.status_code < 500, answer.text[:300]
    assert canary not in answer.text
    assert "Traceback" not in answer.text
    assert "/work" not in answer.text
    assert len(answer.content) < 20_000
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]


BROKEN = {
    "NaN": b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}',
    "Infinity": b'{"messages":[{"role":"user","content":"x"}],"temperature":Infinity}',
    "minus Infinity": b'{"messages":[{"role":"user","content":"x"}],"top_p":-Infinity}',
    "1e999": b'{"messages":[{"role":"user","content":"x"}],"temperature":1e999}',
    "half a character": b'{"messages":[{"role":"user","content":"a\\ud800b"}]}',
    "half a character as a key": b'{"messages":[{"role":"user","content":"x"}],"\\udfff":1}',
    "half a character in a stop": b'{"messages":[{"role":"user","content":"x"}],"stop":["\\ud83d"]}',
    "half a character in a model": b'{"model":"\\ud83d","messages":[{"role":"user","content":"x"}]}',
    "5,000 digits": b'{"messages":[{"role":"user","content":"x"}],"seed":' + b"9" * 5000 + b"}",
    "5,000 digits behind the point": b'{"messages":[{"role":"user","content":"x"}],"top_p":0.' + b"9" * 5000 + b"}",
    "bad UTF-8": b'{"messages":[{"role":"user","content":"\xff\xfe"}]}',
    "UTF-16": '{"messages":[]}'.encode("utf-16"),
    "empty": b"",
    "blank": b"   ",
    "a list": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "trailing junk": chat() + b"x",
    "two objects": chat() + chat(),
    "cut": chat()[:-9],
    "100,000 lists": b"[" * 100_000,
    "50,000 objects": b'{"a":' * 50_000,
    "deep options": b'{"messages":[],"metadata":' + b'{"a":' * 200 + b"1" + b"}" * 201,
    "deep schema": chat(
        response_format={
            "type": "json_schema",
            "json_schema": {"schema": json.loads('{"items":' * 60 + "{}" + "}" * 60)},
        }
    ),
    "too long": chat(messages=[{"role": "user", "content": "CANARY" * 50_000}]),
    "no messages": b'{"model":"pocket"}',
    "empty messages": chat(messages=[]),
    "2,000 messages": chat(messages=MESSAGES * 2000),
    "an image": chat(
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}]}]
    ),
    "a number as content": chat(messages=[{"role": "user", "content": 7}]),
    "no content": chat(messages=[{"role": "user"}]),
    "a role with line ends": chat(messages=[{"role": "us\r\ner", "content": "x"}]),
    "an unknown option": chat(temprature=0.3),
    "n = 10^20": chat(n=10**20),
    "n = 0": chat(n=0),
    "n = true": chat(n=True),
    "n as a text": chat(n="2"),
    "max_tokens 0": chat(max_tokens=0),
    "max_tokens -1": chat(max_tokens=-1),
    "max_tokens 10^9": chat(max_tokens=10**9),
    "temperature 999999": chat(temperature=999999),
    "temperature -1": chat(temperature=-1),
    "top_p 0": chat(top_p=0),
    "top_p 2": chat(top_p=2),
    "top_k -7": chat(top_k=-7),
    "an empty stop": chat(stop=""),
    "1,000 stops": chat(stop=["x"] * 1000),
    "a huge stop": chat(stop="CANARY" * 1000),
    "a bias of an unknown token": chat(logit_bias={"123456789": 1}),
    "a bias that is no number": chat(logit_bias={"1": "x"}),
    "a bias of a word": chat(logit_bias={"dog": 1}),
    "a huge seed": chat(seed=2**70),
    "every token banned": chat(allowed_token_ids=[5], logit_bias={"5": -100}, bad_words=["\u0000"]),
    "an id outside": chat(stop_token_ids=[10**9]),
    "top_logprobs 99": chat(logprobs=True, top_logprobs=99),
    "a schema that matches nothing": chat(
        response_format={"type": "json_schema", "json_schema": {"schema": {"enum": []}}}
    ),
    "a schema that is wrong": chat(
        response_format={"type": "json_schema", "json_schema": {"schema": {"type": "CANARY" * 3000}}}
    ),
    "a schema that refers to itself": chat(
        response_format={"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}
    ),
    "a schema with a reference outside": chat(
        response_format={"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1:9/x"}}}
    ),
    "a pattern that takes for ever": chat(
        response_format={
            "type": "json_schema",
            "json_schema": {"schema": {"type": "string", "pattern": "^(a+)+$", "maxLength": 10**6}},
        }
    ),
    "a template": chat(chat_template_kwargs={"chat_template": "{% for i in range(10**9) %}x{% endfor %}"}),
    "an option of the call as a variable": chat(chat_template_kwargs={"tokenize": False}),
    "a tool without a name": chat(tools=[{"type": "function", "function": {}}]),
    "a tool with a wrong schema": chat(
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}], tool_choice="required"
    ),
    "an unknown drafter": chat(speculative_config={"method": "CANARY" * 30}),
    "a drafter's own option": chat(speculative_config={"method": "merged", "memory": 10**9}),
    "continue and generate": chat(continue_final_message=True, add_generation_prompt=True),
    "a prediction that is no text": chat(prediction={"type": "content", "content": [{"type": "image_url"}]}),
}


WORKS = ("every token banned", "a schema that refers to itself", "deep schema", "a pattern that takes for ever")
"""What may be answered with 200, too; what counts is that it does no harm."""


@pytest.mark.parametrize("name", [*BROKEN])
def test_a_broken_body(client: httpx.Client, name: str) -> None:
    answer = client.post(CHAT, content=BROKEN[name], headers={"content-type": "application/json"})
    check(answer, "CANARY" * 100)
    if name not in WORKS:
        assert 400 <= answer.status_code < 500, (name, answer.text[:200])


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_form_of_a_web_page_is_no_request(client: httpx.Client, kind: str) -> None:
    assert client.post(CHAT, content=chat(), headers={"content-type": kind}).status_code == 415


def test_wrong_methods_and_routes(client: httpx.Client) -> None:
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        check(client.request(method, CHAT))
    for route in (
        "/v2",
        "/v1/",
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page/%00",
        "//etc/passwd",
        "/v1/models/a/b",
    ):
        answer = client.get(route)
        check(answer)
        assert answer.status_code in (404, 307, 400)


def mutated(draw: random.Random, value: Any) -> Any:
    """A value with one thing in it made odd."""
    odd: list[Any] = [
        None,
        True,
        -1,
        0,
        2**63,
        -(2**70),
        1e308,
        "",
        "x" * 300,
        "\x00",
        "🐕",
        [],
        {},
        [[]],
        {"a": []},
        "NaN",
        [None],
    ]
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice([*value])
        if draw.random() < 0.1:
            return {**value, draw.choice(["x", "", key + "_"]): draw.choice(odd)}
        return {**value, key: mutated(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], mutated(draw, value[place]), *value[place + 1 :]]
    return draw.choice(odd)


FULL: dict[str, dict[str, Any]] = {
    CHAT: {
        "model": "pocket", "messages": [{"role": "system", "content": "a"}, *MESSAGES], "max_tokens": 2,
        "temperature": 0.5, "top_p": 0.9,
        "top_k": 5, "min_p": 0.1, "n": 1, "stop": ["x"], "seed": 1, "logprobs": True, "top_logprobs": 2,
        "logit_bias": {"5": 1.0}, "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": "auto",
        "prediction": {"type": "content", "content": "abc"}, "speculative_config": {"method": "none"},
        "stream": False, "user": "u", "metadata": {"a": "b"}, "min_tokens": 1, "bad_words": ["dog"],
        "draft_details": True,
    },
    TEXT: {"prompt": ["a", "b"], "max_tokens": 2, "echo": True, "logprobs": 2, "n": 2, "seed": 3, "stop": "q"},
    "/tokenize": {"prompt": "abc", "return_token_strs": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}  # fmt: skip


def test_two_thousand_mutated_requests(client: httpx.Client, served: Served) -> None:
    draw = random.Random(0)
    seen: dict[int, int] = {}
    for number in range(CASES):
        route = draw.choice([CHAT, CHAT, CHAT, TEXT, "/tokenize", "/detokenize"])
        body = FULL[route]
        for _ in range(draw.choice([1, 1, 2, 3])):
            body = mutated(draw, body)
        raw = json.dumps(body).encode()
        if number % 10 == 0 and raw:
            place = draw.randrange(len(raw))
            raw = raw[:place] + bytes([draw.randrange(256)]) + raw[place + 1 :]
        answer = client.post(route, content=raw, headers={"content-type": "application/json"})
        check(answer)
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
    assert seen.get(200, 0) > CASES // 50, seen
    assert seen.get(400, 0) > CASES // 4, seen
    assert client.get("/health").status_code == 200


def raw_answer(served: Served, request: bytes) -> bytes:
    """What comes back on a socket of our own."""
    host, _, port = served.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=600) as sock:
        found = b""
        with suppress(ConnectionError, OSError):  # the server may close while we still send
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(65536):
                found += part
        return found


SMUGGLED = {
    "two lengths": b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}{}{}",
    "length and chunks": b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /",
    "a negative length": b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "a length that is no number": b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    "no host": b"POST %b HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "a line end in a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n",
    "a space before the colon": b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a huge header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 3_000_000 + b"\r\n\r\n",
    "a body that never comes": b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{",
}


@pytest.mark.parametrize("name", [*SMUGGLED])
def test_smuggled_headers(served: Served, name: str) -> None:
    found = raw_answer(served, SMUGGLED[name].replace(b"%b", CHAT.encode()))
    status = int(found.split()[1]) if found else 0
    assert status < 500, found[:300]
    assert status != 200
    assert found.count(b"HTTP/1.1 ") <= 1, "what was smuggled is no second request"
    assert httpx.get(served.url + "/health").status_code == 200


@pytest.mark.parametrize("body", ['{"prompt":"\\ud800"}', '{"\\udfff":1}', '{"prompt":"a","model":"x\\ud83d"}'])
def test_half_a_character_is_refused_wherever_it_stands(body: str) -> None:
    with pytest.raises(ApiError, match="half a character"):
        parse(body.encode(), TokenizeRequest)


def test_a_body_that_does_not_come_in_time_is_given_up() -> None:
    request = SMUGGLED["a body that never comes"].replace(b"%b", CHAT.encode())
    with serving(pocket(max_num_seqs=1), Settings(model_name="pocket", body_timeout=0.0)) as served:
        host, _, port = served.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=600) as sock:
            sock.sendall(request)
            assert sock.recv(65536).split()[1] == b"408"


def test_nothing_is_ever_fetched(client: httpx.Client) -> None:
    """A listener that a client names in every place that might be read as an address: nobody connects."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "file", "file": {"url": url}}]
        schema = {"type": "json_schema", "json_schema": {"schema": {"$ref": url}}}
        for options in (
            {"messages": [{"role": "user", "content": parts}]},
            {"messages": [{"role": "user", "content": url}]},
            {"response_format": schema},
            {"model": url},
            {"chat_template_kwargs": {"documents": url}},
        ):
            check(client.post(CHAT, content=chat(**options), headers={"content-type": "application/json"}))
        with pytest.raises(BlockingIOError):
            listener.accept()
