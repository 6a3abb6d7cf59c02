"""Keys, hosts, origins, logs, and what one caller may learn of another: nothing."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from selfdraft import SamplingParams
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY
from selfdraft.core.verify import Result
from selfdraft.errors import OptionError
from selfdraft.outputs import Piece, PieceReader
from selfdraft.serve.answers import Writer, padded
from selfdraft.serve.app import FRAME, Server
from selfdraft.serve.guard import OPEN
from selfdraft.serve.service import Job
from selfdraft.serve.settings import Keys, Settings, read_keys
from selfdraft.serve.worker import Call, Update, together
from tests.serving import Served, pocket, serving

KEYS = ("first-key-1234", "second-key-5678")
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    settings = Settings(model_name="pocket", keys=KEYS, details=True, cors_origins=("https://app.example",))
    with serving(pocket(max_num_seqs=8), settings) as found:
        yield found


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_every_route_but_health_wants_a_key(served: Served) -> None:
    routes = [
        (route.path, "POST" if "POST" in route.methods else "GET")  # type: ignore[attr-defined]
        for route in served.server.app.routes
    ]
    assert len(routes) > 10
    for path, method in routes:
        path = path.replace("{name:path}", "pocket").replace("{name}", "index.html")
        for headers in ({}, bearer("wrong-key-0000"), {"authorization": "Basic ###"}, {"authorization": KEYS[0]}):
            answer = httpx.request(method, served.url + path, headers=headers)
            assert (answer.status_code == 401) == (path not in OPEN), (path, headers)
            if answer.status_code == 401:
                assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_and_a_browser_may_send_it_as_a_password(served: Served, key: str) -> None:
    assert httpx.get(served.url + "/v1/models", headers=bearer(key)).status_code == 200
    basic = base64.b64encode(f"me:{key}".encode()).decode()
    assert httpx.get(served.url + "/v1/models", headers={"authorization": f"Basic {basic}"}).status_code == 200


def test_all_keys_are_compared_whichever_is_right() -> None:
    """The time tells nothing of the keys: each comparison is of digests, in constant time, and all are made."""
    keys = Keys.of(KEYS)
    names = {keys.caller(key) for key in KEYS}
    assert len(names - {None}) == 2
    assert not any(key in str(names) for key in KEYS)
    assert keys.caller("") is None
    assert keys.caller(None) is None
    assert keys.caller("\ud800") is None
    assert Keys.of(()).caller(None) == "anybody"


def test_keys_from_the_environment_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("one-long-key\n\n  two-long-key  \n")
    monkeypatch.setenv("SELFDRAFT_API_KEY", "three-long-key")
    assert read_keys(["zero-long-key"], file) == ("zero-long-key", "one-long-key", "two-long-key", "three-long-key")
    file.write_text("\n")
    with pytest.raises(OptionError, match="holds no key"):
        read_keys(None, file)
    with pytest.raises(OptionError, match="too easy to guess"):
        read_keys(["short"], None)
    with pytest.raises(OptionError, match="cannot be read"):
        read_keys(None, tmp_path / "missing")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_beyond_loopback_a_key_is_wanted(host: str) -> None:
    with pytest.raises(OptionError, match="say --no-auth"):
        Settings(host=host)
    assert not Settings(host=host, no_auth=True).reuses, "callers cannot be told apart"
    assert Settings(host=host, keys=KEYS).reuses


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost@evil"])
def test_another_host_name_is_not_served(served: Served, host: str) -> None:
    answer = httpx.get(served.url + "/v1/models", headers={"host": host, **bearer(KEYS[0])})
    assert answer.status_code == 400


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "LOCALHOST:1", "[::1]:8000"])
def test_names_of_this_machine_are_served(served: Served, host: str) -> None:
    assert httpx.get(served.url + "/v1/models", headers={"host": host, **bearer(KEYS[0])}).status_code == 200


def test_origins_are_closed_but_for_those_that_are_named(served: Served) -> None:
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin, allowed in (("https://app.example", True), ("https://evil.example", False), ("null", False)):
        answer = httpx.options(served.url + CHAT, headers={"origin": origin, **ask})
        assert (answer.headers.get("access-control-allow-origin") == origin) == allowed
        assert "access-control-allow-credentials" not in answer.headers
    with serving(pocket(max_num_seqs=1), Settings(model_name="pocket")) as closed:
        answer = httpx.get(closed.url + "/v1/models", headers={"origin": "https://app.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_headers_of_every_response(served: Served) -> None:
    for route in ("/health", "/v1/models", "/nothing"):
        headers = httpx.get(served.url + route).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-request-id"]
        assert "server" not in headers


def test_canaries_reach_no_other_request_and_no_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Sixteen clients with words of their own, some of whom go: no answer, no draft and no log holds another's word."""
    caplog.set_level(logging.DEBUG)
    names = [f"Zyx{number}qvw" for number in range(16)]

    def one(number: int) -> tuple[int, str]:
        draw, found = random.Random(number), ""
        for _ in range(4):
            prompt = f"Repeat the word {names[number]}. " * 3
            body = {
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": 24,
                "stream": True,
                "draft_details": True,
                "draft_tree": True,
                "speculative_config": {"method": draw.choice(["auto", "none"])},
            }
            with httpx.stream(
                "POST", served.url + CHAT, json=body, headers=bearer(KEYS[number % 2]), timeout=600
            ) as response:
                for line in response.iter_lines():
                    found += line + "\n"
                    if draw.random() < 0.05:
                        break
        return number, found

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(16)))
    for number, text in answers:
        words = "".join(_texts(text))
        for other in range(16):
            if other != number:
                assert names[other] not in text
                assert names[other] not in words
    assert not any(name in caplog.text for name in names)
    assert not any(key in caplog.text for key in KEYS)
    assert "status" in caplog.text


def _texts(stream: str) -> Iterator[str]:
    """Every text of a stream: what was said, and what was drafted."""
    for line in stream.splitlines():
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            yield "|"
            yield from chunk.get("draft_tree", {}).get("tokens", ())
            yield "|"
            for choice in chunk.get("choices", ()):
                yield choice["delta"].get("content") or ""


def test_the_prefix_of_another_caller_is_never_reused(served: Served) -> None:
    """What a caller could time is whether a prompt was prefilled: for another caller's prompt it never is."""
    prompt = {"messages": [{"role": "user", "content": "A long secret story about a dog. " * 20}], "max_tokens": 2}

    def cached(key: str) -> int:
        answer = httpx.post(served.url + CHAT, json=prompt, headers=bearer(key), timeout=600).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(KEYS[0]) == 0
    assert cached(KEYS[1]) == 0
    assert cached(KEYS[0]) > 100
    assert cached(KEYS[1]) > 100


def test_earlier_answers_are_no_drafts_of_others() -> None:
    """The same request the first time and later makes the same drafts: nothing was learned of the texts between."""
    body = {"messages": [{"role": "user", "content": "A story about a cat."}], "max_tokens": 40, "draft_details": True}
    body["speculative_config"] = {"method": "lookup"}

    def counts(served: Served, salt: str) -> object:
        given = {**body, "cache_salt": salt}
        answer = httpx.post(served.url + CHAT, json=given, headers=bearer(KEYS[0]), timeout=600).json()
        found = answer["metrics"]["speculative_decoding"]
        return {key: found[key] for key in ("num_draft_tokens", "num_accepted_draft_tokens", "num_steps")}

    settings = Settings(model_name="pocket", details=True, keys=KEYS)
    with serving(pocket("lookup", max_num_seqs=2), settings) as served:
        found = [counts(served, str(number)) for number in range(6)]
    assert all(one == found[0] for one in found)


def test_paced_streams_have_parts_of_equal_sizes() -> None:
    """With --stream-pace a part's size tells nothing of how many tokens a step brought."""
    settings = Settings(model_name="pocket", stream_pace=0.01)
    with serving(pocket(max_num_seqs=1), settings) as served:
        messages = [{"role": "user", "content": "A story."}]
        body = {"messages": messages, "max_tokens": 30, "stream": True}
        raw = httpx.post(served.url + CHAT, json=body, timeout=600).content
    assert len(raw) % FRAME == 0
    assert raw.count(b"data: ") > 3
    assert "".join(_texts(raw.decode())).replace("|", "") == pocket("none").chat(
        messages, SamplingParams(max_tokens=30)
    ).outputs[0].text.replace("|", "")


def pieces_of(count: int) -> tuple[Sequence, list[Piece]]:
    """A request of so many tokens, one a step, and what each step brought."""
    llm = pocket("none", max_num_seqs=1)
    (request,) = llm.requests("Once upon a time", SamplingParams(max_tokens=count))
    reader = PieceReader(request)
    pieces = [reader.read() for _ in llm.engine.generate([request]) if reader.moved]
    assert len(pieces) == count
    return request, pieces


def test_a_paced_part_is_one_event_whatever_steps_brought() -> None:
    """Between two parts drafts may bring one token or twenty, in as many steps: the part looks the same."""
    request, pieces = pieces_of(20)
    updates = [Update(0, piece) for piece in pieces]
    other = [Update(1, update.piece) for update in updates]
    found = together([each for pair in zip(updates, other, strict=True) for each in pair])
    assert [update.index for update in found] == [0, 1]
    for update in found:
        piece = update.piece
        assert piece.text == "".join(each.piece.text for each in updates) == piece.output.text
        assert piece.token_ids == tuple(request.output) == piece.output.token_ids
        assert (piece.sources, piece.finish_reason) == (("target",) * 20, "length")


@pytest.mark.parametrize("pace", [0.0, 1.0])
def test_only_a_paced_stream_puts_steps_together(pace: float) -> None:
    request, pieces = pieces_of(20)
    updates = [Update(0, piece) for piece in pieces]

    class Ready:
        """A call whose updates have all come when they are first asked for."""

        async def updates(self, wanted: float) -> AsyncGenerator[list[Update], None]:
            assert wanted == pace
            yield updates

    async def parts() -> list[bytes]:
        server = Server(pocket("none", max_num_seqs=1), Settings(model_name="pocket", stream_pace=pace))
        job = Job(
            Call([request]), "pocket", 1, stream=True, include_usage=False, logprobs=False, details=False, trees=False
        )
        events = server._events(Ready(), Writer(server.llm, job, chat=True))  # type: ignore[arg-type]
        return [part async for part in events]

    content, end = asyncio.run(parts())
    assert content.count(b"data: ") == (1 if pace else 20)
    assert end.startswith(b"data: [DONE]")


def test_steps_that_are_shown_stay_apart() -> None:
    _, pieces = pieces_of(3)
    shown = Result(EMPTY)
    updates = [Update(0, pieces[0]), Update(0, pieces[1], shown), Update(0, pieces[2])]
    assert together(updates) == updates


@pytest.mark.parametrize("events", [b"", b"data: {}\n\n", b"data: " + b"x" * 2000 + b"\n\n"])
def test_a_part_is_padded_to_a_multiple(events: bytes) -> None:
    assert len(padded(events, FRAME)) % FRAME == 0
    assert padded(events, FRAME).startswith(events)
    assert padded(events, 0) == events
