"""Timing, memory, the file of results, and the figures made of them."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from selfdraft.bench import measure as measuring
from selfdraft.bench import rows as ledgers
from selfdraft.bench.measure import Gauge, Stopwatch, TimedDrafter, measure, settler, take, take_apart, weights_bytes
from selfdraft.bench.report import by_position, records, scores_of, stats_of
from selfdraft.bench.rows import Ledger
from selfdraft.bench.run import Footprint
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import Draft
from selfdraft.drafters import build
from selfdraft.engine.engine import Engine
from selfdraft.errors import RequestError
from selfdraft.models.target import HFTarget
from selfdraft.protocols import beside_of, needs_of
from selfdraft.types import SamplingParams, Stats
from tests import kept_rows
from tests.models import random_adapters, tiny_llama, tiny_target

CPU = torch.device("cpu")
TARGET = tiny_target()


def request(tokens: int = 24) -> Sequence:
    return open_sequence([3, 4, 5] * 6, SamplingParams(max_tokens=tokens), seed=0, eos=frozenset(), context=512)


def engines(*names: str) -> dict[str, Engine]:
    return {name: Engine(TARGET, build(name, TARGET)) for name in names}


def idle() -> None:
    pass


def test_measure() -> None:
    found = measure(engines("none", "lookup", "suffix"), request, 2, Gauge(CPU), idle)
    assert [*found] == ["none", "lookup", "suffix"]
    plain = found["none"].median
    assert (len(plain.tokens), plain.finish_reason, plain.stats.mean_acceptance_length) == (24, "length", 1.0)
    for measured in found.values():
        assert measured.equal
        assert measured.difference is None
        assert len(measured.takes) == 2
        assert measured.median.tokens == plain.tokens
        assert measured.median.seconds == min(run.seconds for run in measured.takes)
        assert 0 < measured.median.first_token_seconds < measured.median.seconds
    assert found["lookup"].median.stats.num_accepted_draft_tokens > 0


@pytest.mark.parametrize("backwards", [False, True])
def test_every_second_round_goes_backwards(backwards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Engine] = []

    def note(engine: Engine, *arguments: Any) -> Any:
        order.append(engine)
        return take(engine, *arguments)

    monkeypatch.setattr(measuring, "take", note)
    them = engines("none", "lookup", "suffix")
    measure(them, request, 2, Gauge(CPU), idle, backwards=backwards)
    names = [next((name for name, one in them.items() if one is engine), "apart") for engine in order]
    rounds = ["none", "lookup", "suffix", "suffix", "lookup", "none"]
    assert names == ["apart"] * 3 + (rounds[3:] + rounds[:3] if backwards else rounds)


class Bent:
    """A drafter that makes its request say something else from its second step on."""

    def draft(self, sequences: list[Sequence], budgets: object) -> list[Draft]:
        for sequence in sequences:
            if sequence.num_output_tokens == 5:
                sequence.tokens[-1] = (sequence.tokens[-1] + 1) % 61
        return [Draft() for _ in sequences]

    def observe(self, sequences: object, results: object) -> None:
        pass


def test_another_text_is_noticed() -> None:
    them = engines("none") | {"bent": Engine(TARGET, Bent())}  # type: ignore[arg-type]
    found = measure(them, request, 1, Gauge(CPU), idle)
    assert found["none"].equal
    assert (found["bent"].equal, found["bent"].difference) == (False, 4)


def test_the_split_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks once a look, every part is counted where it belongs."""
    (engine,) = engines("layer_skip").values()
    taken, split = take_apart(engine, request(), idle)
    whole = split.prefill + split.target + split.drafting + split.rest
    assert whole == pytest.approx(taken.seconds)
    assert min(split.target, split.drafting, split.rest, split.prefill) > 0
    assert taken.stats.num_draft_passes > 0
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    (plain,) = engines("none").values()
    taken, split = take_apart(plain, request(9), idle)
    # after the first token 8 steps, each: draft, forward, keep and observe, two looks each
    assert (split.target, split.drafting) == (16.0, 16.0)


@pytest.mark.parametrize("name", ["none", "merged", "space"])
def test_the_split_is_one_of_the_same_steps(name: str) -> None:
    """What a drafter needs of the rows comes with the answers on the stopwatch, too."""
    bare = build(name, HFTarget(tiny_llama(), adapters=random_adapters(tiny_llama())))
    timed = TimedDrafter(bare, Stopwatch(idle))
    assert needs_of(timed) == needs_of(bare)
    assert beside_of(timed) is beside_of(bare)


@pytest.mark.parametrize(
    ("name", "options", "needed"),
    [
        ("none", {}, (0, 0)),
        ("context", {}, (0, 0)),
        ("merged", {"masks": True}, (7, 0)),
        ("space", {}, (7, 0)),
        ("s3d", {}, (5, 0)),
        ("quantised", {"bits": 8}, (0, 300)),
        ("cascade", {}, (0, 200)),
        ("auto", {"bits": 4, "masks": True}, (7, 200)),
    ],
)
def test_what_a_drafter_needs_beside_the_model(name: str, options: dict[str, object], needed: tuple[int, int]) -> None:
    drafter = build(name, HFTarget(tiny_llama(), adapters=random_adapters(tiny_llama())), options)
    footprint = Footprint(1, lambda: 2, {"space": 7, "s3d": 5}, lambda: {4: 200, 8: 300})
    assert footprint.beside(drafter) == dict(zip(("adapter", "copy"), needed, strict=True))


def test_the_accelerator_is_waited_for() -> None:
    waits: list[int] = []
    (engine,) = engines("none").values()
    take_apart(engine, request(3), lambda: waits.append(1))
    # begin, first token, end; in each of 3 steps before and after 3 or 4 calls (nobody drafts while prefilling)
    assert len(waits) == 3 + 2 * (3 + 4 + 4)
    settler(CPU)()


def test_memory() -> None:
    """What is allocated while it runs is seen, and what was freed before it is not."""
    gauge = Gauge(CPU)
    gauge.start()
    if gauge.stop() is None:
        pytest.skip("no /proc/self/status here")
    bytearray(2**27)
    gauge.start()
    hoard = bytearray(2**26)
    seen = gauge.stop()
    assert seen is not None
    assert 2**26 <= seen < 2**26 + 2**25
    del hoard
    gauge.start()
    seen = gauge.stop()
    assert seen is not None
    assert seen < 2**24


def test_weights() -> None:
    model = tiny_llama(torch.float32)
    wanted = sum(p.numel() * 4 for p in model.parameters()) + sum(b.numel() * 4 for b in model.buffers())
    assert weights_bytes(model) == wanted
    tied = torch.nn.ModuleList([torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(4, 8, bias=False)])
    tied[1].weight = tied[0].weight
    assert weights_bytes(tied) == 4 * 8 * 4
    piece = torch.zeros(1000)  # packed weights lie beside one another in pieces that are larger
    views = torch.nn.Module()
    for name, view in {
        "left": piece[:10],
        "within": piece[2:5],
        "across": piece[8:12],
        "apart": piece[500:510:3],
    }.items():
        views.register_buffer(name, view)
    assert weights_bytes(views) == (12 + 10) * 4


def row(key: str = "a", drafter: str = "none", **more: Any) -> dict[str, Any]:
    return kept_rows.row(drafter, key, task="t", fingerprint="f", **more)


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Ledger(path) as ledger:
        ledger.append(row("a", text="añ\n🐕 \u2028 \ud800"))
        ledger.append(row("b"))
    with Ledger(path) as ledger:
        assert [r["key"] for r in ledger.rows.values()] == ["a", "b"]
        assert ledger.rows["t", "a", "none", "f"]["text"].startswith("añ\n🐕 \u2028")
        ledger.append(row("c"))
    assert len(path.read_text().split("\n")) == 4


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    """A kill at any byte of the last line loses that line only."""
    path = tmp_path / "rows.jsonl"
    with Ledger(path) as ledger:
        ledger.append(row("a"))
        ledger.append(row("b"))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        with Ledger(path) as ledger:
            assert [r["key"] for r in ledger.rows.values()] == ["a"]
            ledger.append(row("b"))
        assert path.read_bytes() == whole


FOREIGN = ['{"prompt": "a"}\n', "my notes", '{"selfdraft_bench": 0, "a": 1}\n', "\n"]


@pytest.mark.parametrize("text", FOREIGN)
def test_other_peoples_files_are_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text(text)
    with pytest.raises(RequestError, match="not written by this version of selfdraft bench; give another --output"):
        Ledger(path)
    assert path.read_text() == text


@pytest.mark.parametrize("rest", ["broken}\n", '"task": "t"}\n', '"task": ' + "[" * 100_000 + "\n"])
def test_a_broken_row_is_named(rest: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Ledger(path) as ledger:
        ledger.append(row("a"))
    with path.open("a") as file:
        file.write(ledgers.HEAD + rest)
    with pytest.raises(RequestError, match=rf"{path}:2: broken row: .*; take the line out"):
        Ledger(path)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"--output .* cannot be written: No such file or directory"):
        Ledger(tmp_path / "none" / "rows.jsonl")
    with pytest.raises(RequestError, match="cannot be written: Is a directory"):
        Ledger(tmp_path)


def test_nothing_is_left_of_an_empty_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Ledger(path):
        assert path.exists()
    assert not path.exists()
    path.touch()
    with Ledger(path):
        pass
    assert path.exists()


def test_two_benches_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Ledger(path) as ledger:
        with pytest.raises(RequestError, match="is in use by another bench"):
            Ledger(path)
        ledger.append(row())
    with Ledger(path):
        pass


@pytest.mark.parametrize("taken", [0, 1, 30])
def test_a_full_disk(taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of a line still found room is taken back."""
    path = tmp_path / "rows.jsonl"
    honest = os.write

    def write(file: int, data: bytes) -> Iterator[int]:
        if taken:
            yield honest(file, data[:taken])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Ledger(path) as ledger:
        ledger.append(row("a"))
        whole = path.read_bytes()
        steps: list[Iterator[int]] = []

        def full(file: int, data: bytes) -> int:
            steps.append(steps[0] if steps else write(file, data))
            return next(steps[0])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(RequestError, match="No space left on device; its 1 rows are whole: make room"):
            ledger.append(row("b"))
        monkeypatch.setattr(os, "write", honest)
        assert path.read_bytes() == whole
        assert len(ledger.rows) == 1
        ledger.append(row("b"))
    with Ledger(path) as ledger:
        assert len(ledger.rows) == 2


def test_by_position() -> None:
    stats = Stats(num_spec_steps=4, acceptance_histogram={0: 1, 1: 1, 3: 2})
    assert by_position(stats) == [0.75, 0.5, 0.5]
    assert by_position(Stats(num_spec_steps=2, acceptance_histogram={0: 2})) == []
    assert by_position(Stats()) == []


def test_stats_survive_json() -> None:
    stats = request().stats
    stats.count(5, 2, 3)
    stats.count(0, 0, 1)
    assert stats_of(json.loads(json.dumps(stats.as_dict()))) == stats


def measured_row(drafter: str, key: str, *, tokens: int, seconds: float, plain: float, **more: Any) -> dict[str, Any]:
    stats = Stats()
    stats.count(4, tokens - 1, tokens)
    base = {
        "group": "",
        "options": {},
        "tokens": tokens,
        "texts_equal": True,
        "seconds": seconds,
        "first_token_seconds": seconds / 4,
        "plain_seconds": plain,
        "plain_first_token_seconds": plain / 8,
        "stats": stats.as_dict(),
        "split": {"prefill": 1.0, "target": 2.0, "drafting": 0.5, "rest": 0.5},
        "memory": {"weights": 100, "cache": 20, "working": 30, "adapter": 0},
        "load_average": 0.5,
        "scores": {"accuracy": 1.0},
        "conditions": {},
    }
    return row(key, drafter, **(base | more))


def test_the_figures_of_a_record() -> None:
    memory = {"weights": 100, "cache": 20, "working": 40, "adapter": 20}
    rows = [
        measured_row("none", "a", tokens=4, seconds=4.0, plain=4.0),
        measured_row("none", "b", tokens=2, seconds=2.0, plain=2.0, scores={"accuracy": 0.0}),
        measured_row("x", "a", tokens=4, seconds=1.0, plain=4.0, memory=memory),
        measured_row("x", "b", tokens=2, seconds=2.0, plain=2.0),
    ]
    plain, drafted = records("t", rows, ["none", "x"])
    assert (plain["speedup_vs_plain"], plain["tokens_per_second"], plain["memory_vs_plain"]) == (1.0, 1.0, 1.0)
    assert drafted["tokens_per_second"] == 2.0
    assert drafted["speedup_vs_plain"] == 2.0
    assert (drafted["speedup_lowest"], drafted["speedup_highest"]) == (1.0, 4.0)
    assert drafted["decode_tokens_per_second"] == pytest.approx(4 / 2.25, abs=1e-3)
    assert drafted["decode_speedup_vs_plain"] == pytest.approx(5.25 / 2.25, abs=1e-4)
    assert drafted["tokens_per_pass"] == 3.0
    assert drafted["acceptance_by_position"] == [1.0, 0.5, 0.5]
    assert drafted["time_split"] == {"prefill": 0.25, "target": 0.5, "drafting": 0.125, "rest": 0.125}
    assert drafted["ms_per_step"] == {"target": 2000.0, "drafting": 500.0, "rest": 500.0}
    assert drafted["host_ms_per_step"] == 500.0
    assert (drafted["extra_bytes"], drafted["peak_bytes"], drafted["memory_vs_plain"]) == (30, 180, 1.2)
    assert drafted["speed_memory_ratio"] == pytest.approx(2 / 1.2, abs=1e-3)
    assert drafted["scores"] == plain["scores"] == {"accuracy": 0.5}


def test_no_speed_up_where_a_text_differs() -> None:
    rows = [
        measured_row("none", "a", tokens=4, seconds=4.0, plain=4.0),
        measured_row("x", "a", tokens=4, seconds=1.0, plain=4.0, texts_equal=False),
    ]
    _, drafted = records("t", rows, ["none", "x"])
    assert (drafted["texts_equal"], drafted["prompts_different"]) == (False, ["a"])
    ratios = [name for name in drafted if "speedup" in name] + ["speed_memory_ratio", "plain_tokens_per_second"]
    assert {name: drafted[name] for name in ratios} == dict.fromkeys(ratios)
    assert drafted["scores"] is None


def test_pass_at_k_over_prompts() -> None:
    passes = [[True, False, False], [False] * 3]
    scored = scores_of([row(scores={"passed": passed}) for passed in passes])
    assert scored == {"pass@1": pytest.approx(1 / 6, abs=1e-4), "pass@3": 0.5}
    many = scores_of([row(scores={"passed": [True] + [False] * 11})])
    assert [*many] == ["pass@1", "pass@10", "pass@12"]
    assert scores_of([row(scores={})]) == {}
