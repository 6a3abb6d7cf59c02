"""`auto`: trees as large as measured passes make worth while, and plain decoding where nothing pays."""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfdraft import LLM
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.drafters.auto import Auto
from selfdraft.drafting.cost_guard import MOST, RAREST, SHARE, START, TRIAL, LossBudget
from selfdraft.drafting.cost_model import LiveCost, Profile, best_size
from selfdraft.drafting.mask_prediction import Guess, expand
from selfdraft.engine.engine import Engine
from selfdraft.errors import OptionError
from selfdraft.files.token_log import Logged, read_logs
from selfdraft.models.target import HFTarget
from selfdraft.protocols import Drafter
from selfdraft.replay.replay import LogTarget, open_drafter, replay, time_of
from selfdraft.tune import machine as profiles
from selfdraft.types import Budget, SamplingParams
from tests.clocks import Ticking
from tests.models import run, tiny_llama, tiny_target

STEPS = Profile((1, 4, 8, 16), (1.0, 1.0, 2.0, 4.0), (0.0, 0.0, 0.0, 0.01), per_sequence=0.5, host=0.1)


def test_between_and_behind_what_was_measured() -> None:
    assert [STEPS.at(rows) for rows in (1, 2, 4, 6, 8, 12, 16, 24)] == [1, 1, 1, 1.5, 2, 3, 4, 6]
    assert STEPS.at(16, tokens=100) == pytest.approx(5.0)
    assert STEPS.at(4, sequences=3) == pytest.approx(2.0)


@pytest.mark.parametrize("rho", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("seconds", [(1.0, 1.0, 2.0, 4.0), (1.0, 1.3, 2.1, 3.7), (1.0, 2.5, 2.6, 2.7)])
@pytest.mark.parametrize("chances", [[0.9, 0.5, 0.2, 0.1, 0.05], [0.9] * 15, [0.3 - n / 100 for n in range(15)]])
def test_no_other_size_is_worth_much_more(rho: float, seconds: tuple[float, ...], chances: list[float]) -> None:
    """Nodes as long as they are worth their price, against all sizes: no worse than all of them on the line below T."""
    profile = Profile((1, 4, 8, 16), seconds, (0.0,) * 4)
    prices = [rho * each for each in profile.marginal(len(chances))]
    size = next((n for n, (own, price) in enumerate(zip(chances, prices, strict=True)) if own < price), len(chances))
    worth = [sum(chances[:n]) - sum(prices[:n]) for n in range(len(chances) + 1)]
    assert worth[size] == pytest.approx(max(worth))


def test_a_price_never_falls_and_adds_up_to_the_pass() -> None:
    flat = Profile(STEPS.rows, STEPS.seconds, (0.0,) * 4)
    assert flat.marginal(15) == pytest.approx((0.0,) * 3 + (0.25,) * 12)
    assert sum(STEPS.marginal(15, tokens=300)) == pytest.approx(3.0 + 0.01 * 384), "priced in the middle of its block"
    rising = Profile((1, 2, 4, 8), (1.0, 3.0, 3.2, 3.4), (0.0,) * 4)
    assert rising.marginal(7) == pytest.approx((2.4 / 7,) * 7), "the second row alone would cost 2"


def test_sequences_share_the_rows() -> None:
    """Two sequences with one node each are a pass of four rows; each pays half of what the two more cost."""
    line = Profile((1, 101), (1.0, 11.0), (0.0, 0.0))
    assert line.marginal(3, sequences=2) == pytest.approx((0.1,) * 3)
    full = Profile((1, 4, 5), (1.0, 1.0, 9.0), (0.0,) * 3)
    assert full.marginal(1, sequences=2) == (0.0,)
    assert full.marginal(3, sequences=4)[0] > 0


def test_a_row_is_priced_by_its_own_sequence() -> None:
    profile = Profile((1, 2), (1.0, 1.0), (0.01, 0.02))
    assert profile.at(2, tokens=100) == pytest.approx(3.0)
    assert profile.at(2, tokens=100, sequences=2) == pytest.approx(1.0 + 0.02 * 50 + 0.01 * 50)


def test_beside_a_prompt_a_row_costs_what_it_adds_to_that_pass() -> None:
    profile = Profile((1, 8, 16), (1.0, 1.0, 5.0), (0.0,) * 3)
    for cost in (profile.marginal, profile.further):
        assert max(cost(7)) == 0.0, "up to eight rows are free"
    assert profile.marginal(7, prefill=100) == pytest.approx((0.5,) * 7)
    assert profile.further(3, sequences=2, prefill=6) == pytest.approx((0.0, 0.5, 1.0, 1.5))


def test_steps_that_read_a_prompt_draft_where_that_pays_there() -> None:
    """Sixteen rows are free, each further one takes half a step: drafts pay, but not beside 32 rows of a prompt."""
    target = tiny_target(slots=2)
    target.profile = Profile((1, 16, 48), (1.0, 1.0, 17.0), (0.0,) * 3)
    drafter = Auto(target)
    engine = Engine(target, drafter, slots=2, chunk=32)
    sampling = SamplingParams(max_tokens=150)
    loops, long = (
        open_sequence(prompt, sampling, seed=0, eos=frozenset(), context=target.max_length)
        for prompt in ([1, 2, 3], [*range(4, 60)] * 2)
    )
    engine.submit(loops)
    while loops.num_output_tokens < 60:
        ((_, result),) = engine.advance()
    assert len(result.draft) > 0, "the text repeats itself by then"
    engine.submit(long)
    beside: list[int] = []
    while not long.num_output_tokens:
        beside += [len(result.draft) for sequence, result in engine.advance() if sequence is loops]
    assert len(beside) == 4
    assert sum(beside) == 0
    assert sum(len(result.draft) for _ in range(3) for _, result in engine.advance()) > 0


def test_chances_fall_along_the_tree() -> None:
    """What is cut by a price that rises: the nodes that are likely enough, however many there are."""
    guess = Guess((1, 2, 3), (0.6, 0.3, 0.05))
    draft = expand(guess, lambda *_: guess, lambda _d, _r, raw: raw, Budget(4, 9, 9), [0.0, 0.3, 0.35, 0.9], "x")
    assert draft.tokens == (1, 1)


def test_trials_that_fail_cost_a_small_share() -> None:
    """Every drafted step loses half a plain step: at most what was there at first, and SHARE of the rest."""
    budget, lost = LossBudget(), 0.0
    for _ in range(10_000):
        if budget.paused:
            budget.rest()
        else:
            budget.book(-0.5)
            lost += 0.5
    assert START < lost < START + SHARE * 10_000 + TRIAL


def test_trials_of_a_batch_are_shorter_and_cost_the_same_share() -> None:
    """A step of 16 requests shows 16 times as much text: a quarter of the steps tells as surely."""

    def told(count: int, steps: int = 20_000) -> tuple[int, float]:
        """Steps until it is paused, and the share of the time that was lost behind that."""
        budget, lost, first = LossBudget(), 0.0, 0
        while not budget.paused:
            budget.book(-0.5, count)
            first += 1
        for _ in range(steps):
            if budget.paused:
                budget.rest(count)
            else:
                budget.book(-0.5, count)
                lost += 0.5
        return first, lost / steps

    (alone, share), (together, same) = told(1), told(16)
    assert together == pytest.approx(alone / 4, abs=1)
    assert [share, same] == pytest.approx([SHARE, SHARE], rel=0.2)


def test_what_pays_is_never_put_aside() -> None:
    budget = LossBudget()
    for step in range(1000):
        budget.book(1.5 if step % 2 else -1.0)
        assert not budget.paused
    assert budget.balance <= MOST


def test_it_comes_back() -> None:
    budget = LossBudget()
    while not budget.paused:
        budget.book(-1.0)
    steps = 0
    while budget.paused:
        budget.rest()
        steps += 1
    assert steps <= (TRIAL + 1) / SHARE + 1


def test_a_new_request_is_a_new_chance_that_gets_rarer() -> None:
    budget, tried = LossBudget(), 0
    for _ in range(100):
        if budget.paused:
            budget.begin()
        if not budget.paused:
            tried += 1
        while not budget.paused:
            budget.book(-0.5)
    assert 100 / RAREST <= tried <= 100 / RAREST + 3
    budget.paused, budget.balance = False, START
    budget.book(1.0)
    assert budget.patience == 1


@pytest.mark.parametrize("together", [1, 7, 16])
def test_in_a_batch_a_new_request_is_a_part_of_the_text(together: int) -> None:
    """With 16 at a time there is one new request every few steps: to try again for each would lose as often."""
    budget = LossBudget()
    while not budget.paused:
        budget.book(-1.0)
    old = [Sequence([1, 2, 3], 1, SamplingParams(), seed=0) for _ in range(together - 1)]
    new = Sequence([1, 2], 1, SamplingParams(), seed=0)
    for _ in range(together - 1):
        assert budget.rests([*old, new])
    assert not budget.rests([*old, new]), "as many have begun as run"


@pytest.mark.parametrize("rho", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("seconds", [(1.0, 1.4, 1.4, 2.0), (1.0, 1.0, 2.0, 4.0), (1.0, 2.5, 2.6, 2.7)])
@pytest.mark.parametrize("chances", [[0.9, 0.5, 0.2, 0.1, 0.05], [0.9] * 15, [0.3 - n / 100 for n in range(15)]])
def test_the_best_size_is_the_best_of_all(rho: float, seconds: tuple[float, ...], chances: list[float]) -> None:
    profile = Profile((1, 2, 8, 16), seconds, (0.0,) * 4)
    costs = [rho * each for each in profile.further(len(chances))]
    worth = [sum(chances[:n]) - costs[n] for n in range(len(chances) + 1)]
    assert best_size(chances, costs) == worth.index(max(worth))


def test_a_first_row_that_is_dear_is_not_run_for_one_small_chance() -> None:
    """The second row costs 0.4 of a pass, the next six nothing: the slope of the line below is 0.06."""
    profile = Profile((1, 2, 8, 9), (1.0, 1.4, 1.4, 3.0), (0.0,) * 4)
    costs = profile.further(7)
    assert profile.marginal(7)[0] == pytest.approx(0.4 / 7)
    assert best_size([0.2], costs) == 0
    assert best_size([0.2] * 3, costs) == 3


PASSES = Profile(
    (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64),
    (0.0145, 0.0195, 0.0195, 0.0195, 0.0216, 0.0216, 0.027, 0.0329, 0.0503, 0.0665, 0.0997, 0.1285),
    (0.0,) * 12,
)
"""SmolLM2-135M in bfloat16 on two cores, as it was measured."""
SMOL = Path(__file__).parent / "smollm2.jsonl"
"""Greedy answers of SmolLM2-135M-Instruct to questions, code and requests to edit a text."""


def seconds_of(name: str, requests: list[Logged], opened: dict[str, tuple[LogTarget, Drafter]]) -> float:
    """Of the decode steps by a made-up clock on which a pass takes what PASSES says."""
    times = dict(zip(PASSES.rows, PASSES.seconds, strict=True))
    if name not in opened:
        target = LogTarget(times, PASSES)
        opened[name] = target, open_drafter(name, target=target)
    target, drafter = opened[name]
    found = replay(requests, drafter, 64, target=target)
    return sum(steps * time_of(times, rows) for rows, steps in found.rows.items())


def test_on_recorded_answers_it_is_not_behind_its_parts() -> None:
    """By kind of text, what was learned on one going on to the next; recycling needs logits, a log has none."""
    kinds = [json.loads(line)["group"] for line in SMOL.read_text().splitlines()]
    logs = read_logs([SMOL])
    opened: dict[str, tuple[LogTarget, Drafter]] = {}
    for kind in dict.fromkeys(kinds):
        group = [log for log, own in zip(logs, kinds, strict=True) if own == kind]
        plain = PASSES.at(1) * sum(len(log.output) - 1 for log in group)
        took = {name: seconds_of(name, group, opened) for name in ("auto", "merged", "context")}
        best = min(took["merged"], took["context"])
        assert took["auto"] <= 1.03 * best, (kind, {name: plain / each for name, each in took.items()})
        assert took["auto"] < plain, kind


class Useless(Auto):
    """Every draft is wrong."""

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return [
            Draft.branches([[60, 60, 60]], "wrong") if not self.guard.budget.paused else EMPTY
            for _ in super().draft(sequences, budgets)
        ]


@pytest.mark.parametrize("kind", [Auto, Useless])
@pytest.mark.parametrize("measured", [True, False])
def test_the_text_is_plain_through_every_pause(kind: type[Auto], measured: bool) -> None:
    target = tiny_target(slots=2)
    target.profile = STEPS if measured else None
    prompts = [[1, 2, 3], [9, 8, 7, 6], [4] * 5]
    for sampling in (SamplingParams(max_tokens=150), SamplingParams(max_tokens=150, temperature=1.0, seed=3)):
        plain = run(target, "none", prompts, sampling, slots=2)
        drafted = run(target, kind(target), prompts, sampling, slots=2)
        assert [s.output for s in drafted] == [s.output for s in plain]


@pytest.mark.parametrize("unit", [1.0, 1e-3])
def test_useless_drafts_make_it_stand_aside(unit: float) -> None:
    """Whatever unit the profile has: the clock is compared with it, not read."""
    target = tiny_target()
    target.profile = Profile((1, 2, 4, 8), (unit, 1.5 * unit, 2.5 * unit, 4.5 * unit), (0.0,) * 4)
    drafter = Useless(target)
    (sequence,) = run(target, drafter, [[1, 2, 3]], SamplingParams(max_tokens=200))
    assert sequence.stats.num_accepted_draft_tokens <= 3
    assert drafter.guard.budget.paused
    assert 4 <= sequence.stats.num_spec_steps <= START + 4


def measured(target: HFTarget) -> Profile:
    *_, found = profiles.measure(target, seconds=0.0)
    assert isinstance(found, Profile)
    return found


def test_what_a_token_adds_is_right_for_few_rows() -> None:
    """They are the most frequent ones; a line through large passes would be 60 % off there (figures of SmolLM2)."""
    per_token = {1: 1.77, 2: 2.08, 4: 3.45, 8: 6.69, 16: 11.62, 32: 20.91, 64: 35.55, 128: 66.82}
    times = {(0, rows): 1e4 + each * 32 for rows, each in per_token.items()}
    times |= {(1, rows): 1e4 + each * 1024 for rows, each in per_token.items()}
    found = profiles._profile([*per_token], times, [32, 1024], several=0.0, beside=0.0)
    assert found.per_token[:3] == pytest.approx((1.77, 2.08, 3.45), rel=0.2)


def test_several_texts_may_be_quicker_than_as_many_rows_of_one() -> None:
    times = {(far, rows): seconds for far in (0, 1) for rows, seconds in ((1, 10.0), (4, 14.0))}
    found = profiles._profile([1, 4], times, [32, 1024], several=12.5, beside=0.0)
    assert found.per_sequence == pytest.approx(-0.5)
    assert found.at(4, sequences=4) == pytest.approx(12.5)
    assert found.at(2, sequences=2) == pytest.approx(10.833, abs=1e-3)
    assert replace(found, per_sequence=-9.0).at(4, sequences=4) == 10.0, "never less than one row"
    profiles._check(found)


def test_a_profile_is_measured_kept_and_read(tmp_path: Path) -> None:
    target = tiny_target()
    found = measured(target)
    assert found.rows[0] == 1
    assert list(found.seconds) == sorted(found.seconds)
    assert profiles.load(target, tmp_path) == (None, "")
    place = profiles.save(found, target, tmp_path)
    assert profiles.load(target, tmp_path) == (found, "")
    assert profiles.profile_of(target, folder=tmp_path) == found
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_the_first_measurement_is_brief() -> None:
    target = tiny_target()
    clock = Ticking(profiles.BRIEFLY / 40)  # three readings a pass: warm-up, then one round and a part
    found = profiles.measure_briefly(target, now=clock)
    assert found is not None
    assert found.rows == (1, 2, 4, 5, 8, 16, 32)
    assert clock.now < 1.1 * profiles.BRIEFLY
    assert profiles.measure_briefly(target, now=Ticking(1e-6)) is not None, "a quick model: all rounds, then it ends"


def test_what_was_timed_by_then_is_enough_if_it_tells_the_price_of_rows_and_text() -> None:
    found = profiles.measure_briefly(tiny_target(), now=Ticking(profiles.BRIEFLY / 25.5))
    assert found is not None
    assert found.rows == (1, 2, 4, 5, 8)
    assert found.spread > profiles.STEADY, "not kept"


def test_a_model_too_slow_to_measure_is_not_waited_for() -> None:
    clock = Ticking(profiles.BRIEFLY / 5)
    assert profiles.measure_briefly(tiny_target(), now=clock) is None
    assert clock.now <= 2 * profiles.BRIEFLY


@pytest.mark.parametrize(("spread", "kept"), [(1.2, True), (profiles.STEADY + 0.1, False)])
def test_only_a_steady_first_measurement_is_kept(
    spread: float, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, notes = tiny_target(), list[str]()
    monkeypatch.setattr(profiles, "measure_briefly", lambda _: replace(STEPS, spread=spread))
    assert profiles.profile_of(target, folder=tmp_path, note=notes.append) == replace(STEPS, spread=spread)
    assert profiles.place_of(target, tmp_path).exists() == kept
    assert notes == [], "nobody asked for a measurement"


def test_a_first_start_waits_for_the_brief_measurement_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(profiles, "measure", lambda *_: pytest.fail("the whole measurement takes 15 s"))
    asked: list[HFTarget] = []

    def brief(target: HFTarget) -> Profile:
        asked.append(target)
        return STEPS

    monkeypatch.setattr(profiles, "measure_briefly", brief)
    first = LLM(tiny_llama(torch.float32), runner="plain", clock=Ticking(0.001))
    second = LLM(tiny_llama(torch.float32), runner="plain", clock=Ticking(0.001))
    assert first.target.profile == second.target.profile == STEPS
    assert asked == [first.target], "the second start reads what the first one kept"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record["identity"].update(threads=99), "is of another model or machine: measuring again"),
        (lambda record: record["profile"].update(seconds=[1.0]), "its lists do not fit together"),
        (lambda record: record["profile"].update(host=-1.0), "a number in it is out of range"),
        (lambda record: record.pop("profile"), "cannot be used"),
    ],
)
def test_a_foreign_or_broken_profile_is_ignored_with_a_note(change: object, words: str, tmp_path: Path) -> None:
    target = tiny_target()
    place = profiles.save(STEPS, target, tmp_path)
    record = json.loads(place.read_text())
    change(record)  # type: ignore[operator]
    place.write_text(json.dumps(record))
    found, note = profiles.load(target, tmp_path)
    assert found is None
    assert words in note
    assert "\n" not in note


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"cannot be written: .*it is used now and will be measured again"):
        profiles.save(STEPS, tiny_target(), tmp_path / "file")


LINE = Profile((1, 2, 4, 8), (1.0, 1.2, 1.6, 2.4), (0.001, 0.001, 0.001, 0.001), host=0.1)


def test_a_profile_that_was_measured_wrongly_is_mended_by_the_steps() -> None:
    """Two rows were timed while something else ran: steps say that they cost what the first row costs."""
    cost = LiveCost(Profile(LINE.rows, (1.0, 1.9, 1.95, 2.4), (0.0,) * 4))
    for _ in range(100):
        for rows, seconds in ((1, 1.0), (2, 1.05), (4, 1.2)):
            cost.observe(rows, 1, 0, seconds)
    assert cost.at(1, 1, 0) == pytest.approx(1.0, rel=0.05)
    assert cost.at(2, 1, 0) == pytest.approx(1.05, rel=0.05)
    assert cost.added(3, 1, 0)[1:] == pytest.approx([0.05, 0.2, 0.2], abs=0.06)
    assert cost.at(5, 1, 0) > cost.at(4, 1, 0), "where no step was, the measurement still counts"


@pytest.mark.parametrize("speed", [0.5, 3.0])
def test_a_machine_of_another_speed_has_the_same_prices_in_plain_steps(speed: float) -> None:
    cost = LiveCost(LINE)
    for step in range(400):
        rows = (1, 2, 4, 8)[step % 4]
        cost.observe(rows, 1, 300, speed * LINE.step(rows, 300))
    assert cost.at(1, 1, 300) == pytest.approx(speed * LINE.step(1, 300), rel=0.05)
    wanted = [LINE.at(rows, 300) - LINE.at(1, 300) for rows in (1, 2, 4, 8)]
    added = cost.added(7, 1, 300)
    assert [added[n] for n in (0, 1, 3, 7)] == pytest.approx(
        [speed * each for each in wanted], rel=0.1, abs=0.05 * speed
    )


def test_prices_never_fall_and_one_odd_step_moves_little() -> None:
    cost = LiveCost(LINE)
    for step in range(64):
        cost.observe((1, 4)[step % 2], 1, 0, LINE.step((1, 4)[step % 2]))
    before = cost.at(4, 1, 0)
    cost.observe(4, 1, 0, 1000.0)
    assert cost.at(4, 1, 0) < 1.1 * before
    for rows in (3, 7, 9):
        cost.observe(rows, 1, 0, 0.0)
    prices = cost.prices(16, 1, 0)
    assert prices == sorted(prices)
    assert prices[0] >= 0
