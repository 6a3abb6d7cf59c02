"""Load on servers: requests and times of arrival, the clock of every chunk, refusals, figures computed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from selfdraft.bench.load import arrivals
from selfdraft.bench.load.arrivals import Ask, Point
from selfdraft.bench.load.client import Answer
from selfdraft.bench.load.figures import Round, compare_texts, figures, is_good, parse_goodput, percentile
from selfdraft.bench.load.rows import Rows
from selfdraft.bench.load.run import Load, Wanted
from selfdraft.bench.tasks import Item
from selfdraft.errors import OptionError, ServerError
from selfdraft.remote import Address
from tests.fake_server import DONE, FakeTransport, Handler, Refusal, Reply, chunk, in_virtual_time, said, usage

ITEMS = [Item(f"q{number}", (f"question {number}",)) for number in range(4)]
ASKS = [Ask(number, f"q{number}", f"question {number}", 8, number) for number in range(4)]
OURS = {"drafter": "auto", "exactness": {"level": "bitwise"}, "version": "0"}


def loaded(
    servers: dict[str, Handler | FakeTransport],
    points: Sequence[Point] = (Point(concurrency=2),),
    asks: Sequence[Ask] = ASKS[:3],
    *,
    rounds: int = 1,
    rows: Rows | None = None,
    warm_ups: Sequence[Ask] = (),
    limits: dict[str, float] | None = None,
    options: dict[str, object] | None = None,
    retry: bool = False,
    fresh: bool = True,
) -> Load:
    """What was measured, in virtual time."""
    fakes = {name: one if isinstance(one, FakeTransport) else FakeTransport(one) for name, one in servers.items()}
    wanted = [Wanted(name, Address(f"http://{name}/v1"), None, options or {}) for name in fakes]
    load = Load(wanted, points, asks, warm_ups, rounds, 0, rows or Rows(None, "now"), retry=retry, fresh=fresh)
    load.limits, load.processor = limits or {}, lambda: 0.0
    load.transport = lambda address: fakes[address.host]

    def ready(found: object) -> None:
        load.rows.begin({})

    async def work(clock: Callable[[], float]) -> None:
        load.clock = clock
        await load.measure(ready, lambda: None)

    try:
        in_virtual_time(work)
    except ServerError as error:
        error.load = load  # type: ignore[attr-defined]
        raise
    return load


# --- figures ----------------------------------------------------------------------------------------------------


def test_the_figures_of_a_point_by_hand() -> None:
    """Three requests, two at a time: 0 from 0 to 1.25, 1 from 0 to 1.5, 2 from 1.25 to 3.0."""
    scripts = [
        said(0.5, 0.25, 0.25, 0.25, tokens=5),  # TTFT 0.5, TPOT 0.75/4
        said(0.25, 0.5, 0.75, tokens=6),  # TTFT 0.25, TPOT 1.25/5
        said(1.0, 0.75, tokens=4),  # TTFT 1.0, TPOT 0.75/3
    ]
    limits = {"ttft": 600.0, "tpot": 200.0}
    load = loaded({"a": lambda number, _: scripts[number]}, limits=limits)
    (record,) = load.report()["points"]
    assert (record["requests"], record["answered"], record["errors"], record["tokens"]) == (3, 3, {}, 15)
    assert (record["seconds"], record["tokens_per_second"], record["requests_per_second"]) == (3.0, 5.0, 1.0)
    assert record["ttft_ms"] == {"mean": 583.333, "p50": 500.0, "p95": 950.0, "p99": 990.0}
    assert record["tpot_ms"] == {"mean": 229.167, "p50": 250.0, "p95": 250.0, "p99": 250.0}
    assert record["latency_ms"] == {"mean": 1500.0, "p50": 1500.0, "p95": 1725.0, "p99": 1745.0}
    assert record["chunk_gap_ms"]["p50"] == 375.0  # 0.25 three times, 0.5, 0.75 twice
    assert record["goodput"] == {"share": 0.333333, "per_second": 0.333333}  # the first one alone
    assert record["tokens_per_chunk"] == round(15 / 9, 6)
    assert (record["prompt_tokens_p50"], record["cached_share"], record["late_ms_max"]) == (8.0, 0.0, None)
    assert record["finish_reasons"] == {"length": 3}


@pytest.mark.parametrize("per_cent", [0, 50, 95, 99, 100])
@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0], [float(n) for n in range(101)]])
def test_percentiles_are_those_of_numpy(values: list[float], per_cent: float) -> None:
    assert percentile(values, per_cent) == pytest.approx(float(np.percentile(values, per_cent)))


def test_no_values_no_percentile() -> None:
    assert percentile([], 50) is None


def answer_of(sent: float, chunks: Sequence[float], tokens: int, error: str | None = None) -> Answer:
    found = Answer(ASKS[0], sent=sent, chunks=[*chunks], end=chunks[-1] if chunks else sent, tokens=tokens)
    found.error = error
    return found


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (answer_of(1.0, [1.5, 2.5], 11), True),  # exactly at both limits
        (answer_of(1.0, [1.625, 2.5], 11), False),
        (answer_of(1.0, [1.5, 2.625], 11), False),
        (answer_of(1.0, [1.5], 1), True),  # no time per output token
        (answer_of(1.0, [1.5, 1.75], 11, "broken"), False),
        (answer_of(1.0, [], 0), False),
    ],
)
def test_goodput_of_one_answer(answer: Answer, good: bool) -> None:
    assert is_good(answer, {"ttft": 500.0, "tpot": 100.0}) == good


def test_goodput_limits_the_whole_request() -> None:
    assert is_good(answer_of(1.0, [1.5, 2.5], 11), {"e2el": 1500.0})
    assert not is_good(answer_of(1.0, [1.5, 2.5], 11), {"e2el": 1499.0})


def test_failed_requests_are_not_good_and_count() -> None:
    replies: list[Reply] = [said(0.5, tokens=1), Refusal(500), said(0.5, tokens=1), Refusal(429)]
    load = loaded({"a": lambda number, _: replies[number]}, asks=ASKS, limits={"ttft": 1000.0})
    (record,) = load.report()["points"]
    assert record["goodput"]["share"] == 0.5
    assert record["errors"] == {"429": 1, "500": 1}
    assert (record["requests"], record["answered"], record["tokens"]) == (4, 2, 2)


@pytest.mark.parametrize(
    "text", ["ttft", "ttft:x", "ttft:0", "ttft:-1", "itl:5", "ttft:5,ttft:6", "ttft:inf", "ttft:nan"]
)
def test_a_goodput_that_says_nothing(text: str) -> None:
    with pytest.raises(OptionError, match="--goodput"):
        parse_goodput(text)


def test_a_goodput() -> None:
    assert parse_goodput("ttft:500,tpot:50.5 e2el:2000") == {"ttft": 500.0, "tpot": 50.5, "e2el": 2000.0}
    assert parse_goodput(None) == {}


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    assert answer_of(0.0, [0.5], 1).per_token is None
    assert answer_of(0.0, [0.5], 1).first == 0.5


# --- requests and arrivals --------------------------------------------------------------------------------------


def test_the_plan_is_the_same_for_the_same_seed() -> None:
    def planned(seed: int) -> list[Ask]:
        return arrivals.plan(ITEMS, 10, [8, 16], [], seed)

    assert planned(1) == planned(1) != planned(2)
    asks = planned(1)
    assert sorted(ask.prompt for ask in asks[:4]) == [item.turns[0] for item in ITEMS]  # each once, then again
    assert [ask.prompt for ask in asks[4:8]] == [ask.prompt for ask in asks[:4]]
    assert {ask.max_tokens for ask in asks} == {8, 16}
    assert [ask.seed for ask in asks] == [1 + number for number in range(10)]
    assert len({ask.key for ask in asks}) == len({(ask.prompt, ask.max_tokens) for ask in asks})


def test_prompts_of_a_length() -> None:
    asks = arrivals.plan(ITEMS, 8, [8], [2, 30], 0)
    assert {len(ask.prompt) for ask in asks} == {2 * arrivals.LETTERS, 30 * arrivals.LETTERS}
    assert all("tokens" in ask.key for ask in asks)
    assert arrivals.sized("abc", ["def"], 2) == "abc\n\ndef"
    assert arrivals.sized("abc", [], 4) == "abc\n\nabc\n\nabc\n\na"
    assert arrivals.sized("abcdefgh", ["no"], 1) == "abcd"


def test_poisson_arrivals() -> None:
    asks = [Ask(number, "", "", 1, 0) for number in range(20_000)]
    timed = arrivals.poisson(asks, 4.0, 7)
    assert timed == arrivals.poisson(asks, 4.0, 7)
    assert timed != arrivals.poisson(asks, 4.0, 8)
    times = [ask.at or 0.0 for ask in timed]
    gaps = np.diff([0.0, *times])
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)  # of an exponential, the deviation is the mean


def test_requests_are_sent_when_they_are_due() -> None:
    """However long answers take: each of them takes longer than all arrivals together."""
    fake = FakeTransport(lambda *_: said(64.0, 64.0, tokens=2))
    load = loaded({"a": fake}, [Point(rate=8.0)], ASKS)
    (found,) = load.measured
    due = [ask.at or 0.0 for ask in arrivals.poisson(ASKS, 8.0, 0)]
    sent = [one.sent - found.began for one in sorted(found.answers, key=lambda one: one.ask.number)]
    assert sent == pytest.approx(due, abs=1e-9)
    assert load.report()["points"][0]["late_ms_max"] < 1e-3


@pytest.mark.parametrize("concurrency", [1, 2, 4])
def test_so_many_at_a_time(concurrency: int) -> None:
    load = loaded({"a": lambda *_: said(0.5, 0.5, tokens=2)}, [Point(concurrency=concurrency)], ASKS)
    assert load.measured[0].seconds == 4 / concurrency
    sent = sorted(one.sent for one in load.measured[0].answers)
    assert sent == [float(number // concurrency) for number in range(4)]


def test_servers_take_turns() -> None:
    load = loaded({"a": lambda *_: said(0.5, tokens=1), "b": lambda *_: said(0.25, tokens=1)}, rounds=3)
    assert [found.server for found in load.measured] == ["a", "b", "b", "a", "a", "b"]
    first, second = load.report()["points"]
    assert first["by_first"] is None
    assert second["by_first"]["tokens_per_second"] == {"median": 2.0, "lowest": 2.0, "highest": 2.0}
    assert second["by_first"]["ttft_p50"]["median"] == 0.5
    assert second["by_first"]["tpot_p50"]["median"] is None  # one token each


# --- what is sent -----------------------------------------------------------------------------------------------


def test_the_body() -> None:
    fake = FakeTransport(lambda *_: said(0.5, tokens=1))
    loaded({"a": fake}, asks=ASKS[1:2], options={"temperature": 0.0, "ignore_eos": True})
    assert fake.bodies == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "question 1"}],
            "max_tokens": 8,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.0,
            "ignore_eos": True,
        }
    ]


def test_a_seed_is_sent_where_it_matters() -> None:
    fake = FakeTransport(lambda *_: said(0.5, tokens=1))
    loaded({"a": fake}, asks=ASKS[1:2], options={"temperature": 0.5})
    assert fake.bodies[0]["seed"] == 1


@pytest.mark.parametrize(("engine", "field"), [("selfdraft", "cache_salt"), ("vllm", "cache_salt"), ("fake", None)])
def test_prompts_are_read_anew_where_the_engine_can_be_told(engine: str, field: str | None) -> None:
    models = {"data": [{"id": "m", "owned_by": engine}]}
    fake = FakeTransport(lambda *_: said(0.5, tokens=1), models=models)
    loaded({"a": fake}, rounds=2)
    salts = [body.get("cache_salt") for body in fake.bodies]
    assert len(set(salts)) == (len(fake.bodies) if field else 1)
    assert (salts[0] is None) == (field is None)
    reusing = FakeTransport(lambda *_: said(0.5, tokens=1), models=models)
    loaded({"a": reusing}, fresh=False)
    assert "cache_salt" not in reusing.bodies[0]


def test_llama_cpp_is_told_so_too_and_asked_for_its_version() -> None:
    fake = FakeTransport(lambda *_: said(0.5, tokens=1), models={"data": [{"id": "m", "owned_by": "llamacpp"}]})
    fake.others["/props"] = {"build_info": "b1\x1b234"}
    load = loaded({"a": fake})
    assert fake.bodies[0]["cache_prompt"] is False
    assert load.servers[0].about == {"engine": "llamacpp", "version": "b1234"}


# --- refusals and faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("headers", "wait"), [({"Retry-After": "2"}, 2.0), ({}, 1.0), ({"Retry-After": "soon"}, 1.0)])
def test_a_refused_request_is_asked_again_when_it_may(headers: dict[str, str], wait: float) -> None:
    replies: list[Reply] = [Refusal(429, headers), Refusal(503, headers), said(0.5, 0.5, tokens=2)]
    load = loaded({"a": lambda number, _: replies[number]}, asks=ASKS[:1], retry=True)
    (one,) = load.measured[0].answers
    assert (one.error, one.tries, one.first) == (None, 2, 2 * wait + 0.5)  # a user waits for all of it
    assert load.report()["points"][0]["asked_again"] == 2


def test_without_retry_a_refusal_is_counted() -> None:
    replies: list[Reply] = [Refusal(429, {"Retry-After": "2"}), said(0.5, tokens=1)]
    load = loaded({"a": lambda number, _: replies[number]}, [Point(concurrency=1)], asks=ASKS[:2])
    first, second = load.measured[0].answers
    assert (first.error, first.first, first.digest, second.error) == ("429", None, None, None)
    assert "a/v1 is busy (429): not now; ask again in 2 s" in first.words
    assert load.measured[0].seconds == 0.5


BROKEN = {
    "ends early": [(0.5, chunk("a")), (0.0, usage(1)), (0.0, DONE)],
    "is aborted": [(0.5, chunk("a")), (0.5, chunk("", "abort")), (0.0, usage(1)), (0.0, DONE)],
    "tells an error": [(0.5, chunk("a")), (0.0, 'data: {"error": {"message": "no room"}}'), (0.0, DONE)],
    "tells an error as llama.cpp did": [(0.5, chunk("a")), (0.0, 'error: {"message": "no room"}')],
    "is no JSON": [(0.5, chunk("a")), (0.0, "data: {")],
    "is cut": [(0.5, chunk("a", "length"))],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_stream_that_breaks_is_an_error(name: str) -> None:
    replies = [BROKEN[name], said(0.5, tokens=1)]
    load = loaded({"a": lambda number, _: replies[number]}, [Point(concurrency=1)], asks=ASKS[:2])
    broken, whole = load.measured[0].answers
    assert (broken.error, broken.digest, whole.error) == ("broken", None, None)
    assert load.report()["points"][0]["errors"] == {"broken": 1}


def test_a_server_that_dies_ends_the_run_with_the_rows_so_far(tmp_path: Path) -> None:
    place = tmp_path / "rows.jsonl"
    replies: list[Reply] = [
        said(0.5, tokens=1),
        said(0.5, tokens=1),
        httpx.ReadError("reset"),
        httpx.ConnectError("no"),
    ]
    with (
        Rows(place, "now") as rows,
        pytest.raises(ServerError, match=r"server a is gone after 3 of 4 .* round 1") as error,
    ):
        loaded({"a": lambda number, _: replies[number]}, [Point(concurrency=1)], ASKS, rows=rows)
    load: Load = error.value.load  # type: ignore[attr-defined]
    (record,) = load.report()["points"]
    assert (record["requests"], record["errors"], record["whole"]) == (3, {"broken": 1}, False)
    lines = [json.loads(line) for line in place.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "request", "request", "request"]
    assert [line.get("error") for line in lines[1:]] == [None, None, "broken"]


def test_a_server_that_answers_nothing_ends_the_run() -> None:
    with pytest.raises(ServerError, match=r"answered no request at concurrency 2: .* status 400: wrong"):
        loaded({"a": lambda *_: Refusal(400, body={"error": {"message": "wrong"}})})


def test_a_server_that_is_not_there() -> None:
    class Nobody(FakeTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

    with pytest.raises(ServerError, match=r"http://a/v1 cannot be reached: refused; is the server running\?"):
        loaded({"a": Nobody(lambda *_: [])})


# --- warm-up ----------------------------------------------------------------------------------------------------


def test_the_warm_up_is_not_counted() -> None:
    fake = FakeTransport(lambda *_: said(0.5, tokens=1))
    load = loaded({"a": fake}, asks=ASKS[:2], warm_ups=ASKS[2:])
    assert [body["messages"][0]["content"] for body in fake.bodies[:2]] == ["question 2", "question 3"]
    assert len(fake.bodies) == 4
    assert len(load.measured[0].answers) == 2


def test_a_server_without_stream_options_is_asked_without_them() -> None:
    def handle(number: int, body: dict[str, Any]) -> Any:
        if "stream_options" in body:
            return Refusal(422, body={"detail": "Unexpected fields: {'stream_options'}"})
        return [(0.5, chunk("a")), (0.5, chunk("b")), (0.5, chunk("c", "stop")), (0.0, DONE)]

    load = loaded({"a": handle}, asks=ASKS[:2], warm_ups=ASKS[2:3])
    assert not load.servers[0].tells_usage
    assert [one.tokens for one in load.measured[0].answers] == [3, 3]  # its chunks


def test_a_warm_up_that_is_refused_is_said_at_once() -> None:
    with pytest.raises(ServerError, match=r"does not take the API key \(401\)"):
        loaded({"a": lambda *_: Refusal(401)}, warm_ups=ASKS[:1])


# --- texts ------------------------------------------------------------------------------------------------------


def test_texts_of_one_server_over_rounds() -> None:
    """The second question gets another text in the second round."""
    words = ["same", "this", "same", "here"]
    fake = FakeTransport(lambda number, _: said(0.5, 0.5, tokens=2, words=words[number]), info=OURS)
    load = loaded({"a": fake}, [Point(concurrency=1)], ASKS[:2], rounds=2)
    texts = load.report()["texts"]["a"]
    assert texts["with_several_texts"] == ["q1"]
    assert (texts["questions"], texts["asked_more_than_once"]) == (2, 2)
    assert load.servers[0].exact


def test_texts_of_two_servers() -> None:
    def other(number: int, body: dict[str, Any]) -> Any:
        return said(0.5, 0.5, tokens=2, words="xy" if "2" in body["messages"][0]["content"] else "ab")

    load = loaded({"a": lambda *_: said(0.5, 0.5, tokens=2, words="ab"), "b": other}, asks=ASKS)
    texts = load.report()["texts"]["b"]
    assert (texts["compared_with_first"], texts["equal_to_first"], texts["with_several_texts"]) == (4, 3, [])


def test_a_text_that_ended_otherwise_is_another_text() -> None:
    found = Round("a", Point(concurrency=1), 0)
    for reason in ("stop", "length"):
        one = answer_of(0.0, [0.5], 1)
        one.digest, one.reason = "1234", reason
        found.answers.append(one)
    assert compare_texts([found], ["a"])["a"]["with_several_texts"] == ["q0"]


def test_figures_of_nothing() -> None:
    empty = figures([Round("a", Point(concurrency=1), 0)], {"ttft": 1.0})
    assert (empty["tokens_per_second"], empty["ttft_ms"]["p50"], empty["goodput"]["share"]) == (None, None, None)
