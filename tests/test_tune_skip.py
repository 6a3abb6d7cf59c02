"""The search for skip sets: formulas, costs, what is booked, what survives a kill, what is written."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from selfdraft.core.rows import chain_rows
from selfdraft.errors import OptionError, RequestError
from selfdraft.files.skip_sets import lists_of, load_sets, save_set, write_json
from selfdraft.models.target import HFTarget
from selfdraft.tune import speedup
from selfdraft.tune.layer_skip import search, study, tuner
from selfdraft.tune.layer_skip.search import flipped, frontier, neighbours, singles_of, swaps
from selfdraft.tune.layer_skip.simulate import Replay
from selfdraft.tune.layer_skip.study import Scored, Study, skip_from, switches
from selfdraft.tune.layer_skip.tuner import (
    Options,
    Subject,
    Tuning,
    check_sets,
    own_texts,
    request_of,
)
from selfdraft.tune.passes import Costs, costs_from, measure_costs, measure_round
from selfdraft.tune.sublayer_times import SublayerClock
from selfdraft.types import SamplingParams, Skip
from tests.models import tiny_llama

LAYERS = 4
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7], [2, 7]]
COSTS = Costs(20, (1.0, 1.1, 1.2, 1.3, 1.4), (0.1, 0.1, 0.12, 0.1), (0.08,) * 4, (0.2,) * 4, 1.1, 0.02).as_dict()


def subject(model: Any = None, prompts: Any = PROMPTS) -> Subject:
    model = model or tiny_llama(torch.float32)
    return Subject(model, HFTarget(model), prompts, facts={"machine": "test"})


def options(path: Path, **changed: Any) -> Options:
    settings = {"trials": 30, "max_new_tokens": 16, "num_speculative_tokens": 4, "confirm": 0, **changed}
    return Options(study=path / "study.db", **settings)


def booked(path: Path) -> list[tuple[str, Skip, float]]:
    return [(one.stage, one.skip, one.value) for one in Study(path, LAYERS).scored]


# formulas


def test_expected_tokens() -> None:
    assert speedup.expected_tokens(0.9, 3) == pytest.approx((1 - 0.9**4) / 0.1)
    assert speedup.expected_tokens(1.0, 5) == 6
    assert speedup.expected_by_depth([0.5, 0.5]) == 1.75
    assert speedup.expected_by_depth([0.9] * 3) == pytest.approx(speedup.expected_tokens(0.9, 3))


def test_the_optimum_of_the_paper() -> None:
    """methods.md A2: at a = 0.9 and c = 0.5 the optimum is 3 draft tokens and 1.376x."""
    best = speedup.best_length(lambda m: speedup.expected_tokens(0.9, m), 0.5, [1.0] * 13, 12)
    assert best[0] == 3
    assert best[1] == pytest.approx(1.3756, abs=1e-4)
    assert speedup.draft_speed(3.0, 4, 0.5, verify=1.2) == pytest.approx(3 / 3.2)
    assert speedup.single_pass_speed(3.0, 0.5, verify=1.1) == pytest.approx(3 / 1.6)
    dear = speedup.best_length(lambda m: speedup.expected_tokens(0.9, m), 0.5, [1.0, 1.0, 5.0, 5.0], 3)
    assert dear[0] == 1, "dear verification keeps drafts short"


def test_costs_of_a_set() -> None:
    costs = costs_from(COSTS, LAYERS, 4, "here")
    assert costs.c(Skip()) == 1
    assert costs.c(Skip(frozenset({2}))) == pytest.approx(1 - 0.12)
    assert costs.c(Skip(frozenset({1, 2}), frozenset({2, 3}))) == pytest.approx(1 - 0.1 - 0.2 - 0.08)
    assert costs.draft(Skip(frozenset({2}))) == pytest.approx((0.88 + 0.02) / 1.1)
    assert costs.verify(0) == 1
    assert costs.verify(4) == pytest.approx(1 + 0.4 / 1.1)
    with pytest.raises(OptionError, match="4 blocks; the model has 5"):
        costs_from(COSTS, 5, 4, "here")
    with pytest.raises(OptionError, match="4 draft tokens"):
        costs_from(COSTS, LAYERS, 5, "here")
    for wrong in ({}, None, {**COSTS, "step": "x"}):
        with pytest.raises(OptionError, match="here holds no measured costs"):
            costs_from(wrong, LAYERS, 4, "here")


# measuring


def test_costs_are_measured_through_the_target() -> None:
    """Every sublayer was timed, and the blocks fit into the pass."""
    one = subject()
    texts = own_texts(one, SamplingParams(max_tokens=16))
    costs = measure_costs(one.target, texts[0].tokens, request_of(one, texts[0], SamplingParams(max_tokens=16)), 4, 5)
    assert len(costs.passes) == 5
    assert len(costs.block) == LAYERS
    assert min(costs.attention + costs.mlp + costs.block) > 0
    assert len({*costs.attention, *costs.mlp}) > LAYERS, "each was timed on its own"
    assert 0 < sum(costs.block) < costs.passes[0] <= costs.step
    assert costs_from(json.loads(json.dumps(costs.as_dict())), LAYERS, 4, "json") == costs
    parts = measure_round(one.target, texts[0].tokens, costs, Skip(frozenset({2, 3}), frozenset({2, 3})), [1, 3], 5)
    assert set(parts.verify) == {1, 3}
    assert min(parts.c, parts.draft, *parts.verify.values()) > 0


def test_the_timed_pass_is_the_targets_own() -> None:
    target = HFTarget(tiny_llama(torch.float32))
    rows = chain_rows([(0, 0, 5)])
    plain = target.forward(rows)
    watch = SublayerClock(target)
    with torch.inference_mode():
        logits, _ = target._run(watch._model, rows)
    assert torch.equal(plain, logits)
    times = watch.measure(rows)
    again = watch.measure(rows)
    assert len(times.attention) == LAYERS
    assert min(times.attention + times.mlp + times.block + again.block) > 0


def test_replayed_speed() -> None:
    run = Replay(tokens=10, accepted=6, drafted={0: 1, 2: 3})
    assert (run.rounds, run.links, run.acceptance) == (4, 6, 1.0)
    assert run.speed(0.5, lambda m: 1 + 0.1 * m) == pytest.approx(10 / (3 + 1 + 3 * 1.2))


# sets


def test_switches_and_neighbours() -> None:
    skip = Skip(frozenset({0, 3}), frozenset({1}))
    assert skip_from(switches(skip, LAYERS)) == skip
    assert len(singles_of(LAYERS)) == len(set(singles_of(LAYERS))) == 2 * LAYERS
    assert flipped(flipped(skip, 5, LAYERS), 5, LAYERS) == skip
    assert flipped(Skip(), 5, LAYERS) == Skip(frozenset(), frozenset({1}))
    sizes = [len(s.attention) + len(s.mlp) for s in neighbours(skip, LAYERS)]
    assert sorted(sizes) == [2] * 3 + [4] * 5
    assert {len(s.attention) + len(s.mlp) for s in swaps(skip, LAYERS)} == {3}
    assert len({*swaps(skip, LAYERS)}) == 3 * 5


def test_the_frontier_falls() -> None:
    rows = [(0.9, 0.9), (0.8, 0.95), (0.7, 0.8), (0.6, 0.85), (0.5, 0.5)]
    scored = [Scored(Skip(), "seed", agreement, c, 1, 1.0, 1.0) for c, agreement in rows]
    assert [(one.c, one.agreement) for one in frontier(scored)] == [(0.8, 0.95), (0.6, 0.85), (0.5, 0.5)]


# the search


def test_a_search_and_its_evidence(tmp_path: Path) -> None:
    tuning = Tuning(subject(), options(tmp_path), COSTS)
    found = list(tuning.search.run())
    assert len(found) == tuning.search.total == 8 + 30
    stages = [one.stage for one in found]
    assert stages[:8] == ["single"] * 8
    assert set(stages) == {"single", "seed", "sampler", "neighbour"}
    tried = [one.skip for one in tuning.search.tried()]
    assert len(set(tried)) == len(tried) == 30, "no set is tried twice"
    for one in found:
        direct = tuning.forcing.draft(one.skip).agreement
        assert one.agreement == direct
        assert one.c == tuning.costs.c(one.skip)
        assert one.value == one.speed
    pairs = list(tuning.search.pairs())
    assert len({one.skip for one in pairs}) == 8 * 7 // 2
    assert list(tuning.search.run()) == found, "pairs are no part of the search"
    evidence = tuning.evidence(least_agreement=0.5, most_cost=0.9)
    assert (len(evidence["single"]), len(evidence["pairs"])) == (8, 28)
    assert evidence["sets_evaluated"] == len({one.skip for one in (*found, *pairs)})
    assert evidence["sets_of_the_search"] == 30
    everything = {one.skip: one for one in (*found, *pairs)}.values()
    reached = [one for one in everything if one.agreement >= 0.5 and one.c <= 0.9]
    assert len(evidence["reached"]) == len(reached) > 0
    best = max(one.agreement for one in everything if one.c <= 0.9)
    assert evidence["best_agreement_at_that_cost"][0]["agreement"] == round(best, 4)


def test_the_search_beats_its_seeds(tmp_path: Path) -> None:
    """In a space of 256 sets nearly the best of all is found with a quarter of them."""
    tuning = Tuning(subject(), options(tmp_path, trials=64), COSTS)
    list(tuning.search.run())
    every = [Skip()]
    for switch in range(8):
        every += [flipped(skip, switch, LAYERS) for skip in every]
    best = max(tuning.scorer.score(skip, "x").value for skip in every if skip != Skip())
    assert tuning.search.best()[0].value >= 0.97 * best


def test_the_best_agreement_at_a_cost(tmp_path: Path) -> None:
    tuning = Tuning(subject(), options(tmp_path, max_cost=0.8), COSTS)
    list(tuning.search.run())
    best = tuning.search.best()[0]
    assert best.c <= 0.8
    assert best.value == best.agreement == max(one.agreement for one in tuning.study.scored if one.c <= 0.8)
    first = tuning.finalists()[0]
    assert first["agreement"] == best.agreement


def test_finalists_are_predicted_by_replay(tmp_path: Path) -> None:
    tuning = Tuning(subject(), options(tmp_path), COSTS)
    list(tuning.search.run())
    found = tuning.finalists()
    assert len(found) == tuner.FINALISTS
    assert [record["predicted"] for record in found] == sorted((r["predicted"] for r in found), reverse=True)
    first = tuning.record(found[0])
    assert 1 <= first["num_speculative_tokens"] <= 4
    assert first["confidence_threshold"] in tuner.THRESHOLDS
    assert first["sets_tried"] == 38
    again = Tuning(subject(), options(tmp_path))
    assert again.record(again.finalists()[0]) == first


def test_confirmation_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = Tuning(subject(), options(tmp_path, trials=10, confirm=2, runs=1), COSTS)
    list(tuning.search.run())
    found = list(tuning.confirmed(tuning.finalists()[:2]))
    assert all(record["measured"] > 0 and 0 < record["c_measured"] for record in found)
    monkeypatch.setattr(tuner, "confirm", lambda *_: pytest.fail("measured twice"))
    again = Tuning(subject(), options(tmp_path, trials=10, confirm=2, runs=1))
    assert list(again.confirmed(again.finalists()[:2])) == found


def test_predicted_beside_measured() -> None:
    """The acceptance of fixed settings is predicted exactly; times are this machine's."""
    sets = {"half": Skip(frozenset({2, 3}), frozenset({2, 3})), "one": Skip(frozenset({1}))}
    rows = list(check_sets(subject(tiny_llama()), sets, [1, 3], SamplingParams(max_tokens=30), runs=1))
    assert [(row.name, row.num_speculative_tokens) for row in rows] == [
        ("half", 1),
        ("half", 3),
        ("one", 1),
        ("one", 3),
    ]
    for row in rows:
        assert row.predicted_acceptance == pytest.approx(row.measured_acceptance)
        assert row.error == row.predicted / row.measured - 1


# going on


def killed(work: Callable[[], object], seconds: float) -> bool:
    """Run `work` in a process of its own and kill it with SIGKILL after so long; whether it was still at it."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    """Killed ten times at random moments: nothing booked is lost, and it ends as one that was left alone."""
    places = [tmp_path / "calm", tmp_path / "killed"]
    for place in places:
        place.mkdir()
    one = subject()

    def search(place: Path) -> dict[str, Any]:
        tuning = Tuning(one, options(place, trials=60), COSTS)
        list(tuning.search.run())
        return tuning.record(tuning.finalists()[0])

    began = time.perf_counter()
    wanted = search(places[0])
    whole = time.perf_counter() - began
    draw = random.Random(os.getpid())
    kills, lengths = 0, [0]
    before: list[tuple[str, Skip, float]] = []
    while kills < 10 or not max(lengths):
        kills += killed(lambda: search(places[1]), draw.uniform(0.02, 0.25) * whole)
        whole *= 1.1  # on a machine that got busier nothing would be booked in that time
        if (places[1] / "study.db").is_file():
            now = booked(places[1] / "study.db")
            assert now[: len(before)] == before, "something booked was lost"
            lengths.append(len(now))
            before = now
        if len(before) == 68:
            (places[1] / "study.db").unlink()  # it was too fast: begin anew, the kills still count
            before = []
    assert search(places[1]) == wanted
    assert booked(places[1] / "study.db") == booked(places[0] / "study.db")


def test_more_trials_go_on(tmp_path: Path) -> None:
    list(Tuning(subject(), options(tmp_path, trials=10), COSTS).search.run())
    first = booked(tmp_path / "study.db")
    list(Tuning(subject(), options(tmp_path, trials=20)).search.run())
    assert booked(tmp_path / "study.db")[: len(first)] == first
    assert len(booked(tmp_path / "study.db")) == 28


# mistakes


def test_a_study_belongs_to_its_model_and_settings(tmp_path: Path) -> None:
    Tuning(subject(), options(tmp_path), COSTS)
    for other in (tiny_llama(torch.float32, 1), tiny_llama()):
        with pytest.raises(OptionError, match=r"study\.db is of another model or dtype"):
            Tuning(subject(other), options(tmp_path))
    with pytest.raises(OptionError, match="begun with seed=0, not 1"):
        Tuning(subject(), options(tmp_path, seed=1))
    with pytest.raises(OptionError, match="other prompts"):
        Tuning(subject(prompts=PROMPTS[:2]), options(tmp_path))
    with pytest.raises(OptionError, match="costs of its own"):
        Tuning(subject(), options(tmp_path), {**COSTS, "step": 2.0})


@pytest.mark.parametrize("content", [b"", b"no database at all, but long enough to look like one" * 30])
def test_a_file_that_is_no_study(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.db").write_bytes(content)
    with pytest.raises(OptionError, match=r"study\.db is no study of 'selfdraft tune'") as caught:
        Tuning(subject(), options(tmp_path), COSTS)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "study.db").read_bytes() == content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trials": 0}, "trials=0"),
        ({"confirm": -1}, "confirm=-1"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens=0"),
        ({"max_cost": 0.0}, "max_cost=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_options_have_limits(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        options(tmp_path, **change)


def test_an_unknown_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="'cmaes' is unknown; there are tpe and gp"):
        Tuning(subject(), options(tmp_path, sampler="cmaes"), COSTS)
    monkeypatch.setattr(search, "find_spec", lambda _: None)
    with pytest.raises(OptionError, match="gp needs scipy"):
        Tuning(subject(), options(tmp_path, sampler="gp"), COSTS)
    assert not list(tmp_path.iterdir())


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(OptionError, match=r"pip install 'selfdraft\[tune\]'"):
        study.needs_optuna()


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="too short"):
        Tuning(subject(prompts=[[1, 2]]), options(tmp_path, max_new_tokens=4), COSTS)
    assert not list(tmp_path.iterdir())


def limited(work: Callable[[], object], size: int) -> str:
    """What `work` says in a process that may write files of at most `size` bytes: a full disk, simulated."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            work()
            os.write(write, b"done")
        except OptionError as error:
            os.write(write, str(error).encode())
        except BaseException as error:
            os.write(write, f"{type(error)}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_full_disk(tmp_path: Path) -> None:
    """One line, nothing half-written; with space the search goes on."""
    one = subject()
    said = limited(lambda: Tuning(one, options(tmp_path), COSTS), 4096)
    assert "study.db cannot be written: the disk is full" in said
    assert "\n" not in said
    assert not list(tmp_path.iterdir())
    Tuning(one, options(tmp_path), COSTS)
    size = (tmp_path / "study.db").stat().st_size
    said = limited(lambda: list(Tuning(one, options(tmp_path)).search.run()), size + 8192)
    assert "the disk is full; what was booked before stays" in said
    found = list(Tuning(one, options(tmp_path)).search.run())
    assert len(found) == 38

    output = tmp_path / "out.json"
    save_set(output, "a", {"attention": [1], "mlp": []})
    said = limited(lambda: write_json(output, {"x": list(range(5000))}), 4096)
    assert "out.json cannot be written: File too large" in said
    assert load_sets(output) == {"a": {"attention": [1], "mlp": []}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "study.db"]


# files


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    """A device such as /dev/full would be gone."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (lambda: write_json(pipe, {}), lambda: Study.create(pipe, LAYERS, {})):
        with pytest.raises(OptionError, match="pipe is no regular file; give the path of a file"):
            write()
    assert [path.name for path in tmp_path.iterdir() if path.is_fifo()] == ["pipe"]
    with pytest.raises(OptionError, match="cannot be used"):
        Study(tmp_path / "absent.db", LAYERS)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_sets_live_together_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sets.json"
    skip = Skip(frozenset({3, 1}), frozenset({0}))
    save_set(path, "mine", {**lists_of(skip), "c": 0.5, "finalists": [{"a": 1}, {"b": [1, 2]}]})
    save_set(path, "other", {"attention": [], "mlp": [2]})
    sets = load_sets(path)
    assert sets["mine"] == {"attention": [1, 3], "mlp": [0], "c": 0.5, "finalists": [{"a": 1}, {"b": [1, 2]}]}
    assert list(sets) == ["mine", "other"]
