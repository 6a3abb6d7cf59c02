"""The simulation of many replicas where the right answer is known: alone, in a queue, drafts that bring nothing."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

pytest.importorskip("simpy", reason="SimPy is not installed: pip install 'selfdraft[fleet]'")

import simpy
from recipes.fleet import kinds_from, kinds_of, profile_from
from recipes.fleet_costs import Passes, Spent, between, host_from, processes
from recipes.fleet_host import Cost, Host, Processors, Waiting, as_json, read_host
from recipes.fleet_simulation import Fleet, Kind, Serving, chats, kind_of, steady_speed

from selfdraft.bench.load.arrivals import Ask
from selfdraft.drafting.cost_model import Profile
from selfdraft.integrations.ray.conversation import preferred
from tests.kept_rows import row, write

LINE = Profile((1, 128), (0.010, 0.137), (1e-6, 1e-6), per_sequence=0.0005, host=0.001)
"""A pass takes 9 ms and 1 ms a row."""
FLAT = Profile((1, 128), (0.010, 0.010), (0.0, 0.0))
"""Rows are free."""
HALF = Kind(8, 9, 1.0, {0: 1, 1: 1}, 1.0)
"""Every step has a draft; each second one has a token that is accepted."""


def run(fleet: Fleet, kinds: list[Kind], clients: int = 1) -> Fleet:
    fleet.closed((("", kind) for kind in kinds), clients)
    return fleet


def test_one_request_alone_takes_its_prompt_and_its_steps() -> None:
    (answer,) = run(Fleet(1, Serving(LINE)), [Kind(300, 4)]).answers
    pieces = LINE.step(256) + LINE.step(44, 256)
    assert answer.first == pytest.approx(pieces)
    steps = sum(LINE.step(1, tokens) for tokens in (300, 301, 302))
    assert answer.end - answer.sent == pytest.approx(pieces + steps)
    assert (answer.tokens, answer.prompt_tokens, answer.cached_tokens) == (4, 300, 0)


def test_answers_that_run_together_share_their_steps() -> None:
    fleet = run(Fleet(1, Serving(LINE)), [Kind(10, 3)] * 4, clients=4)
    first, then = LINE.step(40, 0, 4), [LINE.step(4, 4 * tokens, 4) for tokens in (10, 11)]
    assert [one.end for one in fleet.answers] == pytest.approx([first + sum(then)] * 4)
    later = Fleet(1, Serving(LINE))
    later.closed((("", Kind(10, 1)) for _ in range(2)), 2, apart=0.001)
    assert [one.end for one in later.answers] == pytest.approx([LINE.step(10), 2 * LINE.step(10)])
    one_slot = run(Fleet(1, Serving(LINE, slots=1)), [Kind(10, 1)] * 4, clients=4)
    assert [one.end for one in one_slot.answers] == pytest.approx([n * LINE.step(10) for n in (1, 2, 3, 4)])


def test_waiting_is_that_of_a_queue_with_one_server() -> None:
    """M/D/1: one slot, one step for each request, random arrivals. Waiting: rho D / (2 (1 - rho)) on average."""
    serving, draw, at, asked = Serving(FLAT, slots=1, queue=10**6), random.Random(1), 0.0, []
    for _ in range(8_000):
        at += draw.expovariate(0.5 / 0.010)
        asked.append((at, [(0.0, Kind(4, 1))]))
    fleet = Fleet(1, serving)
    fleet.arriving(asked)
    waited = mean(one.end - one.sent for one in fleet.answers) - 0.010
    assert waited == pytest.approx(0.5 * 0.010 / (2 * 0.5), rel=0.05)


@pytest.mark.parametrize("policy", ["none", "always", "pays"])
@pytest.mark.parametrize("routing", ["conversation", "round-robin", "fewest"])
def test_every_request_ends_once_and_a_seed_says_all(policy: str, routing: str) -> None:
    asked = chats([HALF, Kind(30, 5)], 40.0, 10.0, seed=3, turns=3, think=0.5, most=200)
    wanted = sum(len(turns) for _, turns in asked)

    def once() -> list[tuple[float, float, int, str | None]]:
        fleet = Fleet(3, Serving(LINE, slots=2, queue=2, policy=policy), routing=routing, seed=7)
        fleet.arriving(asked)
        assert not any(replica.load or replica.running or replica.waiting for replica in fleet.replicas.values())
        assert all(len(replica.slots.free) == 2 for replica in fleet.replicas.values())
        return [(one.sent, one.end, one.tokens, one.error) for one in fleet.answers]

    found = once()
    assert len(found) == wanted > 200
    assert all(tokens in (5, 9) for _, _, tokens, error in found if error is None)
    assert any(error == "429" for *_, error in found)  # the load is meant to be too high
    assert found == once()


def test_drafts_that_are_never_accepted_in_rows_that_cost_nothing_change_nothing() -> None:
    useless = Kind(8, 9, 1.0, {0: 1}, 3.0)
    asked = chats([useless], 100.0, 5.0, seed=3, turns=3, think=0.1, most=200)
    ends = []
    for policy in ("none", "always", "pays"):
        fleet = Fleet(2, Serving(FLAT, policy=policy))
        fleet.arriving(asked)
        ends.append([one.end for one in fleet.answers])
    assert ends[0] == ends[1] == ends[2]
    priced = [run(Fleet(1, Serving(LINE, policy=policy)), [useless]).env.now for policy in ("none", "always", "pays")]
    assert priced[1] == pytest.approx(priced[0] + 8 * 0.003 - 0.003 - 0.002 - 0.001)  # the last steps have less room
    assert priced[2] == priced[0]


def test_accepted_drafts_come_as_often_as_in_the_kept_row() -> None:
    fleet = run(Fleet(1, Serving(FLAT, policy="always")), [replace(HALF, output=2000)] * 4)
    (replica,) = fleet.replicas.values()
    assert replica.steps == pytest.approx(4 * 2000 / 1.5, rel=0.03)
    row = {"num_spec_steps": 28, "num_steps": 58, "num_draft_tokens": 36, "num_accepted_draft_tokens": 6}
    kind = kind_of(
        {"prompt_tokens": 53, "tokens": 64, "stats": {**row, "acceptance_histogram": {"0": 23, "1": 4, "2": 1}}}
    )
    assert 57 * kind.gain == pytest.approx(6)
    assert 57 * kind.rows == pytest.approx(36)


def test_drafting_pays_while_its_rows_are_cheap() -> None:
    steps = Profile((1, 16, 17, 128), (0.010, 0.010, 0.040, 0.400), (0.0, 0.0, 0.0, 0.0))
    speeds = {
        (policy, count): steady_speed(Serving(steps, policy=policy), [HALF], count, 0)
        for policy in ("none", "always", "pays")
        for count in (2, 6, 16)
    }
    assert speeds["always", 2] == pytest.approx(1.5 * speeds["none", 2])
    assert speeds["always", 16] < speeds["none", 16] == speeds["pays", 16]
    assert speeds["pays", 6] == pytest.approx(speeds["none", 6] * 1.5)  # 15 rows still fit


def test_a_conversation_finds_its_prompt_where_it_went_before_and_reads_only_what_is_new() -> None:
    turns = [(0.0, Kind(100, 10)), (0.0, Kind(150, 10)), (0.0, Kind(200, 10))]
    found = {}
    for routing in ("conversation", "round-robin"):
        fleet = Fleet(2, Serving(LINE), routing=routing)
        fleet.arriving([(0.0, turns)])
        found[routing] = fleet.answers
    assert [one.cached_tokens for one in found["conversation"]] == [0, 109, 159]
    assert [one.cached_tokens for one in found["round-robin"]] == [0, 0, 109]
    assert found["conversation"][1].first == pytest.approx(LINE.step(150 - 109, 109))
    assert found["round-robin"][1].first == pytest.approx(LINE.step(150))


def test_a_conversation_goes_where_the_router_sends_it() -> None:
    fleet, draw = Fleet(40, Serving(LINE, slots=2)), random.Random(2)
    for number in range(400):
        loads = {name: replica.load for name, replica in fleet.replicas.items()}
        groups = preferred(str(number), loads, 2)
        request = fleet.ask(Kind(4, 4), number)
        (placed,) = (one for one in fleet.replicas.values() if request.sequence in one.requests)
        assert placed.name == min(groups[0], key=loads.__getitem__)
        if draw.random() < 0.5:
            fleet.env.run(fleet.env.now + 0.02)


def test_neighbours_on_one_processor_slow_one_another() -> None:
    slow = replace(LINE, seconds=(0.020, 0.274))
    for count, profile in ((1, LINE), (2, slow)):
        fleet = Fleet(2, Serving(LINE, beside=slow, slots=1), routing="round-robin")
        fleet.pair_up()
        fleet.closed((("", Kind(10, 50)) for _ in range(count)), count)
        steps = profile.step(10) + sum(profile.step(1, tokens) for tokens in range(10, 59))
        # the first step of two begins while the other has none yet
        assert fleet.env.now == pytest.approx(steps, rel=0.05)


def answered(drafter: str, tokens: int) -> dict[str, Any]:
    """A row of an answer under a token limit that no other one had."""
    drafts = 10 if drafter != "none" else 0
    counts = {"num_spec_steps": drafts, "num_steps": 20, "num_draft_tokens": 3 * drafts, "mean_acceptance_length": 2.0}
    counts |= {"num_accepted_draft_tokens": 3 * drafts // 2}
    stats = counts | {"acceptance_histogram": {"0": 5, "3": 5} if drafts else {}}
    named: dict[str, Any] = {"task": "spec-bench", "group": "mt-bench", "fingerprint": str(tokens)}
    return row(drafter, "81", prompt_tokens=53, tokens=tokens, stats=stats, **named)


def test_files_of_tune_and_bench_are_read(tmp_path: Path) -> None:
    place = tmp_path / "profile.json"
    place.write_text(json.dumps({"profile": {"rows": [1, 2], "seconds": [0.1, 0.2], "per_token": [0, 0], "host": 0.5}}))
    assert profile_from(place).step(2) == pytest.approx(0.7)
    with pytest.raises(SystemExit, match="is no profile"):
        profile_from(tmp_path / "missing.json")
    rows = [answered(*one) for one in [("auto", 16), ("auto", 64), ("none", 64), ("auto", 32)]]
    kept = write(tmp_path / "rows.jsonl", *rows)
    kinds = kinds_from([kept], "auto")
    assert kinds.keys() == {"spec-bench/mt-bench 81"}
    assert kinds["spec-bench/mt-bench 81"] == Kind(53, 64, 10 / 19, {0: 5, 3: 5}, 1.5), "the longest answer"
    assert {kind.rows for kind in kinds_from([kept], "none").values()} == {0.0}
    with pytest.raises(SystemExit, match="no rows of the drafter 'nobody'"):
        kinds_from([kept], "nobody")
    asks = [Ask(0, f"spec-bench/mt-bench 81, at most {most}", "", most, 0) for most in (16, 9999)]
    assert [(key, kind.output) for key, kind in kinds_of(asks, kinds, "spec-bench")] == [
        ("spec-bench/mt-bench 81", 16),
        ("spec-bench/mt-bench 81", 64),
    ]
    with pytest.raises(SystemExit, match="'nothing' is not in the rows: run 'selfdraft bench --tasks quick'"):
        kinds_of([Ask(0, "nothing, at most 8", "", 8, 0)], kinds, "quick")


MACHINE = Host(2.0, Cost(0.010, 0.002), (("gateway", Cost(0.020, 0.003)), ("client", Cost(0.030, 0.001))))
"""Two cores; a request takes 60 ms to its replica, and each part of an answer 6 ms to the client."""


def ends(cores: float, jobs: list[tuple[float, float]]) -> list[float]:
    """When jobs (begin, seconds of a core) end."""
    env, found = simpy.Environment(), dict[int, float]()
    processors = Processors(env, cores)

    def one(number: int, begins: float, seconds: float) -> Waiting:
        yield env.timeout(begins)
        yield processors.run(seconds)
        found[number] = env.now

    for number, (begins, seconds) in enumerate(jobs):
        env.process(one(number, begins, seconds))
    env.run()
    return [found[number] for number in range(len(jobs))]


def test_cores_are_shared_evenly_and_nobody_has_more_than_one() -> None:
    assert ends(2.0, [(0, 1)]) == [1]
    assert ends(2.0, [(0, 1), (0, 3)]) == [1, 3]
    assert ends(2.0, [(0, 1), (0, 1), (0, 2)]) == pytest.approx([1.5, 1.5, 2.5])  # alone again for the last second
    assert ends(1.0, [(0, 2), (1, 0.5)]) == pytest.approx([2.5, 2.0])
    assert ends(1.5, [(0, 1), (0, 1)]) == pytest.approx([4 / 3, 4 / 3])
    assert ends(2.0, [(0, 0), (5, 1)]) == [0, 6]
    draw = random.Random(4)
    jobs = [(draw.random(), draw.random()) for _ in range(200)]
    assert max(ends(2.0, jobs)) == pytest.approx(sum(seconds for _, seconds in jobs) / 2, abs=1.0)


def test_one_answer_goes_through_all_processes_beside_the_passes() -> None:
    (answer,) = run(Fleet(1, Serving(LINE, host=MACHINE)), [Kind(10, 3)]).answers
    first = 0.060 + LINE.step(10) + 0.006
    assert answer.first == pytest.approx(first)
    # the way back of one part is shorter than a step, and has a core of its own
    assert answer.end - answer.sent == pytest.approx(first + LINE.step(1, 10) + LINE.step(1, 11))
    assert (answer.tokens, answer.prompt_tokens) == (3, 10)
    slower = run(Fleet(1, Serving(LINE, host=replace(MACHINE, per_answer=0.002))), [Kind(10, 3)]).answers[0]
    assert slower.end == pytest.approx(answer.end + 3 * 0.002)
    prompt = run(Fleet(1, Serving(LINE, host=replace(MACHINE, unasked=0.0005))), [Kind(10, 3)]).answers[0]
    assert prompt.end == pytest.approx(answer.end - 9 * 0.0005)
    busy = run(Fleet(1, Serving(LINE, host=replace(MACHINE, always=1.0))), [Kind(10, 3)]).answers[0]
    assert busy.end > answer.end + 2 * 0.005  # one core: parts take their time from the next step


def test_work_beside_the_passes_takes_their_cores() -> None:
    """Four cores' worth of passes and parts on two cores take twice as long, whoever waits for whom."""
    kinds = [Kind(10, 100)] * 2
    alone = run(Fleet(2, Serving(FLAT), routing="round-robin"), kinds, clients=2).env.now
    for part, times in ((0.0, 1.0), (0.010, 2.0)):
        host = Host(2.0, beside=Cost(0.0, part))
        both = run(Fleet(2, Serving(FLAT, host=host), routing="round-robin"), kinds, clients=2)
        assert both.env.now == pytest.approx(times * alone, rel=0.03)


def test_the_slowest_process_bounds_a_stream_and_parts_that_wait_for_a_replica_become_one() -> None:
    slow = Host(8.0, way=(("gateway", Cost(0.0, 0.025)),))
    fleet = run(Fleet(1, Serving(FLAT, host=slow)), [Kind(10, 100)])
    assert fleet.env.now == pytest.approx(100 * 0.025, rel=0.02)
    (replica,) = fleet.replicas.values()
    assert replica.busy == pytest.approx(100 * 0.010)
    joined = run(Fleet(1, Serving(FLAT, host=Host(8.0, replica=Cost(0.0, 0.025)))), [Kind(10, 100)])
    assert joined.env.now == pytest.approx(100 * 0.010 + 2 * 0.025, abs=0.026)
    assert joined.answers[0].tokens == 100


def test_a_paced_stream_has_a_part_for_each_pace_and_not_for_each_step() -> None:
    host = Host(8.0, way=(("gateway", Cost(0.0, 0.025)),))
    fleet = run(Fleet(1, Serving(FLAT, host=host, pace=0.1)), [Kind(10, 100)])
    (answer,) = fleet.answers
    assert answer.first == pytest.approx(0.125)
    assert answer.end == pytest.approx(1.0 + 0.025, abs=0.11)
    without = run(Fleet(1, Serving(FLAT, pace=0.1)), [Kind(10, 100)]).answers[0]
    assert (without.first, without.end) == pytest.approx((0.1, 1.0), abs=0.11)


def test_costs_are_solved_from_two_loads_less_what_is_taken_always() -> None:
    rest = Spent(wall=10.0, beside={"gateway": 1.0, "beside": 2.0})

    def load(requests: int, parts: int, wall: float) -> Spent:
        beside = {"replica": 0.01 * requests + 0.002 * parts, "gateway": 0.1 * wall + 0.02 * requests + 0.003 * parts}
        beside |= {"client": 0.03 * requests + 0.001 * parts, "beside": 0.2 * wall}
        steps = 0.011 * (parts - requests)  # 1 ms longer than in the profile
        return Spent(requests, parts, wall=wall, passes=0.8 * requests + steps, beside=beside)

    passes = Passes(10 * 1.0 + 0.010 * 10, 10 * 1.0 + 0.010 * 590, 10 * 1.0, 1000)  # prompts take 1 s by the profile
    host = host_from(rest, load(10, 20, 3.0), load(10, 600, 9.0), 2.0, passes)
    assert [name for name, _ in host.way] == ["gateway", "client"]
    found = [host.replica, *(cost for _, cost in host.way), host.beside]
    wanted = [MACHINE.replica, *(cost for _, cost in MACHINE.way), Cost()]
    assert [one.request for one in found] == pytest.approx([one.request for one in wanted])
    assert [one.part for one in found] == pytest.approx([one.part for one in wanted])
    assert (host.always, host.per_answer, host.unasked) == pytest.approx((0.3, 0.001, 2.0 / 1000))
    with pytest.raises(SystemExit, match="as many parts in a request"):
        host_from(rest, load(10, 20, 3.0), load(20, 40, 9.0), 2.0, passes)


def test_costs_are_read_as_they_were_written(tmp_path: Path) -> None:
    place = tmp_path / "host.json"
    place.write_text(json.dumps({"host": as_json(MACHINE)}))
    assert read_host(place) == MACHINE
    with pytest.raises(SystemExit, match="has no costs"):
        read_host(tmp_path / "missing.json")


def test_processes_are_told_apart_by_their_titles_and_the_busiest_thread_runs_the_passes(tmp_path: Path) -> None:
    def process(number: int, parent: int, title: str, threads: dict[int, int]) -> None:
        place = tmp_path / str(number)
        for folder, ticks in ((".", sum(threads.values())), *((f"task/{one}", had) for one, had in threads.items())):
            (place / folder).mkdir(parents=True, exist_ok=True)
            (place / folder / "stat").write_text(f"{number} (a) b) S {parent} " + "0 " * 9 + f"{ticks - 1} 1 0 0")
        (place / "cmdline").write_text(title.replace(" ", "\0"))

    tick = 1 / os.sysconf("SC_CLK_TCK")
    process(10, 1, "python selfdraft serve", {10: 5})
    assert {one.role for one in processes(10, tmp_path).values()} == {"replica"}
    process(11, 10, "raylet --x", {11: 7})
    process(12, 11, "ray::ServeReplica:selfdraft:replicas", {12: 10, 13: 100})
    process(14, 11, "ray::ServeReplica:selfdraft:gateway", {14: 20})
    process(15, 11, "ray::ProxyActor", {15: 30})
    process(16, 1, "ray::ServeReplica:selfdraft:replicas of another server", {16: 9})
    before = processes(10, tmp_path)
    process(12, 11, "ray::ServeReplica:selfdraft:replicas", {12: 40, 13: 400})
    process(14, 11, "ray::ServeReplica:selfdraft:gateway", {14: 70})
    spent = between(before, processes(10, tmp_path))
    assert spent.passes == pytest.approx(300 * tick)
    wanted = {"replica": 30 * tick, "gateway": 50 * tick, "proxy": 0.0, "beside": 0.0}
    assert spent.beside == pytest.approx(wanted)
