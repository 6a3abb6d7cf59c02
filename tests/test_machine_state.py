"""The state of the machine: its shape, what follows from given figures, and what is said without kernels. No value."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch

from selfdraft import LLM, SamplingParams
from selfdraft.cli.options import keep_on_cores
from selfdraft.drafting.cost_model import Profile
from selfdraft.errors import OptionError, RunnerUnavailable
from selfdraft.models import machine_state
from selfdraft.models.machine_state import (
    BUSY_FROM,
    FAR_FROM,
    Latency,
    MachineState,
    Span,
    Watch,
    flip,
    latency_now,
    state_now,
)
from selfdraft.models.runner import kernel_build
from selfdraft.tune import machine as profiles
from tests.models import tiny_llama, tiny_target, unavailable
from tests.terminal import Done, typed

needs_kernels = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


def state(farthest: float = 50.0, one: float = 30e9, large: bool = True) -> MachineState:
    return MachineState(Latency(40.0, farthest, 2), one, 2 * one, 2**28, large)


@pytest.mark.parametrize(
    ("latency", "distance"),
    [
        (Latency(50, 50, 2), "near"),
        (Latency(250, 250, 2), "far"),
        (Latency(40, FAR_FROM, 4), "far"),  # the pass waits for its slowest thread
        (Latency(40, FAR_FROM - 0.1, 4), "near"),
        (Latency(40, BUSY_FROM, 4), "busy"),  # half a millisecond is another process, and no distance
        (Latency(0, 0, 1), "one core"),
    ],
)
def test_near_and_far_follow_from_the_latency(latency: Latency, distance: str) -> None:
    assert latency.distance == distance
    assert MachineState(latency, 1.0, 1.0, 1, False).distance == distance


@needs_kernels
def test_a_state_is_measured() -> None:
    found, why = state_now()
    assert found is not None, why
    assert (found.read_one > 0, found.read_all > 0) == (True, True)
    assert found.buffer % 2**21 == 0
    assert found.buffer >= 2**21
    cores = len(os.sched_getaffinity(0))
    assert found.latency.cores == cores
    if cores > 1:
        assert 0 < found.latency.nearest <= found.latency.farthest
    assert json.loads(json.dumps(found.as_dict()))["distance"] == found.distance


@needs_kernels
def test_measuring_leaves_the_process_on_all_its_cores() -> None:
    before = os.sched_getaffinity(0)
    Watch().span()
    latency_now()
    assert os.sched_getaffinity(0) == before


@needs_kernels
def test_a_process_with_one_core_has_no_distance() -> None:
    before, found = os.sched_getaffinity(0), list[MachineState | None]()

    def alone() -> None:
        os.sched_setaffinity(0, {min(before)})  # of this thread only
        found.append(state_now()[0])

    thread = threading.Thread(target=alone)
    thread.start()
    thread.join()
    assert found[0] is not None
    assert (found[0].distance, found[0].latency) == ("one core", Latency(0.0, 0.0, 1))
    assert "ns apart" not in str(Span(found[0], None))


def test_cores_are_spread_evenly() -> None:
    assert machine_state._spread([3, 4]) == [3, 4]
    assert machine_state._spread(range(64)) == [0, 15, 31, 47, 63]


def test_a_flip_is_seen() -> None:
    assert flip(["near"]) == flip(["near", "near"]) == "near"
    assert str(Span(state(250.0), state(50.0, one=36e9, large=False))) == (
        "cores far -> near, 250 -> 50 ns apart, reading 30.0 -> 36.0 GB/s with one thread, 60.0 -> 72.0 with 2, "
        "in large -> small pages"
    )
    assert str(Span(state(), state())) == (
        "cores near, 50 ns apart, reading 30.0 GB/s with one thread, 60.0 with 2, in large pages"
    )


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RunnerUnavailable("there is no C++ compiler")

    monkeypatch.setattr(kernel_build, "_compiler", missing)
    kernel_build.machine_library.cache_clear()


def test_without_kernels_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch)
    assert state_now() == (None, "there is no C++ compiler")
    assert latency_now() is None
    span = Watch().span()
    assert str(span) == "state of the machine unknown: there is no C++ compiler"
    assert span.as_dict()["why"] == "there is no C++ compiler"


@needs_kernels
def test_threads_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    library = kernel_build.machine_library()
    assert library.selfdraft_ping(0, 100_000, 1, 0.001) == 0.0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1000})
    assert state_now() == (None, "the system lets no thread be pinned to a core")


@needs_kernels
def test_the_kernels_do_not_depend_on_what_measures_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change in machine.cpp proves no model anew; one in a header that the kernels share does."""
    source = kernel_build.SOURCE
    for path in source.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(kernel_build, "SOURCE", tmp_path / source.name)
    compiler = kernel_build._compiler()
    marks = []
    for changed in (None, "machine.cpp", "tape.h"):
        if changed is not None:
            with (tmp_path / changed).open("a") as file:
                file.write("// changed\n")
        kernel_build._named.cache_clear()
        marks.append(kernel_build._fingerprint(compiler))
    kernel_build._named.cache_clear()
    assert marks[0] == marks[1] != marks[2]


# Where it is shown


def test_a_profile_file_tells_the_state_and_older_ones_are_read(tmp_path: Path) -> None:
    target, profile = tiny_target(), Profile((1, 2), (0.1, 0.2), (0.0, 0.0))
    place = profiles.save(profile, target, tmp_path, Span(state(), state(250.0)))
    told = json.loads(place.read_text("utf-8"))["machine_state"]
    assert (told["before"]["distance"], told["after"]["distance"]) == ("near", "far")
    assert profiles.load(target, tmp_path) == (profile, "")
    record = json.loads(place.read_text("utf-8"))
    del record["machine_state"]
    place.write_text(json.dumps(record), "utf-8")
    assert profiles.load(target, tmp_path) == (profile, "")


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    states = cycle([(state(250.0), ""), (state(50.0), "")])
    monkeypatch.setattr(machine_state, "state_now", lambda: next(states))
    return lambda *arguments: typed(monkeypatch, capsys, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor", "--model", "pocket", "--max-new-tokens", 2),
        ("bench", "--model", "pocket", "--drafters", "none", "--limit", 1, "--max-new-tokens", 2, "--runs", 1),
    ],
)
def test_a_flip_is_shown_beside_timings(arguments: tuple[object, ...], verb: Callable[..., Done]) -> None:
    done = verb(*arguments)
    assert "cores far -> near, 250 -> 50 ns apart, reading 30.0 GB/s with one thread" in done.out


def test_rows_of_a_bench_say_how_far_the_cores_were(
    verb: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distances = iter([Latency(50, 50, 2), Latency(250, 250, 2)])
    monkeypatch.setattr(machine_state, "latency_now", lambda: next(distances))
    (tmp_path / "one.jsonl").write_text('{"prompt": "Once upon a time"}\n', "utf-8")
    rows = tmp_path / "rows.jsonl"
    asked = ("bench", "--model", "pocket", "--tasks", tmp_path / "one.jsonl", "--drafters", "none", "--runs", 1)
    done = verb(*asked, "--max-new-tokens", 2, "--output", rows, "--json")
    (record,) = done.said
    assert record["cores"] == ["near -> far"]
    assert record["machine_state"]["after"]["distance"] == "near"
    assert record["resident_bytes"] is None or record["resident_bytes"] > record["weights_bytes"]
    assert json.loads(rows.read_text("utf-8"))["cores"] == "near -> far"
    (again,) = verb(*asked, "--max-new-tokens", 2, "--output", rows, "--json").said  # nothing is measured anew
    assert (again["cores"], again["machine_state"]) == (["near -> far"], None)


# Threads of passes


@needs_kernels
def test_pinned_threads_change_no_text_and_leave_the_caller_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many threads as cores, with more, and in two threads at once."""
    llm = LLM(tiny_llama(torch.float32), drafter="none")
    asked, sampling = [3, 4, 5, 6], SamplingParams(max_tokens=12)
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    wanted = llm.generate(asked, sampling)[0].outputs[0].token_ids
    found = []
    try:
        keep_on_cores(llm)
        for count in (1, 2, len(cores), len(cores) + 1):
            torch.set_num_threads(count)
            found.append(llm.generate(asked, sampling)[0].outputs[0].token_ids)
            assert os.sched_getaffinity(0) == cores
        others = [LLM(tiny_llama(torch.float32), drafter="none") for _ in range(2)]
        torch.set_num_threads(min(2, len(cores)))

        def run(one: LLM) -> None:
            found.append(one.generate(asked, sampling)[0].outputs[0].token_ids)
            assert os.sched_getaffinity(0) == cores

        running = [threading.Thread(target=run, args=(one,)) for one in others]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    finally:
        kernel_build.pin_threads(False)
        torch.set_num_threads(threads)
    found.append(llm.generate(asked, sampling)[0].outputs[0].token_ids)
    assert found == [wanted] * 7


def test_pinning_needs_the_fast_runner() -> None:
    llm = LLM(tiny_llama(torch.float32), drafter="none", runner="plain")
    with pytest.raises(OptionError, match="--pin-threads needs the fast runner; this model runs plain: asked for"):
        keep_on_cores(llm)
