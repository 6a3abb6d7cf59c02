"""`auto`: trees as large as measured passes make worth while, and plain decoding where nothing pays."""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path

import pytest

from selfdraft.core.profile import Profile
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft, chances_of
from selfdraft.core.watch import PAUSES, TRIAL, Watch
from selfdraft.drafters.auto import Auto
from selfdraft.errors import OptionError
from selfdraft.models.adapter import HFTarget
from selfdraft.tune import profile as profiles
from selfdraft.types import Budget, SamplingParams
from tests.models import run, tiny_target

STEPS = Profile((1, 4, 8, 16), (1.0, 1.0, 2.0, 4.0), (0.0, 0.0, 0.0, 0.01), per_sequence=0.5, host=0.1)


def test_between_and_behind_what_was_measured() -> None:
    assert [STEPS.at(rows) for rows in (1, 2, 4, 6, 8, 12, 16, 24)] == [1, 1, 1, 1.5, 2, 3, 4, 6]
    assert STEPS.at(16, tokens=100) == pytest.approx(5.0)
    assert STEPS.at(4, sequences=3) == pytest.approx(2.0)


@pytest.mark.parametrize("rho", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "chances", [[], [0.9, 0.5, 0.2, 0.1, 0.05], [0.99] * 15, [0.3, 0.29, 0.28, 0.27, 0.26, 0.25, 0.24]]
)
def test_no_other_size_is_worth_more(rho: float, chances: SequenceOf[float]) -> None:
    """Against all sizes tried one by one: T has steps, so the first row that does not pay is not the end."""
    worth = [sum(chances[:n]) - rho * STEPS.at(1 + n) for n in range(len(chances) + 1)]
    assert worth[STEPS.best_size(chances, rho)] == max(worth)


def test_free_rows_are_taken_and_dear_ones_left() -> None:
    assert STEPS.best_size([0.01] * 3, rho=5.0) == 3, "up to 4 rows a pass costs the same"
    assert STEPS.best_size([0.2] * 7, rho=1.0) == 3, "a row behind that costs a quarter of a token"
    assert STEPS.best_size([0.2] * 7, rho=1.0, others=3) == 0


def test_chances_are_those_of_whole_paths() -> None:
    draft = Draft((5, 6, 7), (-1, 0, -1), ("x",) * 3, 3, (0.5, 0.5, 0.25))
    assert chances_of(draft) == [0.5, 0.25, 0.25]
    assert draft.first(2) == Draft((5, 6), (-1, 0), ("x",) * 2, 2, (0.5, 0.5))


def test_the_watch_stands_aside_longer_and_longer() -> None:
    """On text where nothing is ever accepted the trials become a vanishing share of the steps."""
    watch, drafted = Watch(), 0
    for _ in range(4096):
        if watch.aside:
            watch.rest()
        else:
            drafted += 1
            watch.book(gained=0.0, spent=1.0)
    assert drafted <= 8 * TRIAL
    assert watch.pause == PAUSES[1]


def test_the_watch_comes_back_when_it_pays() -> None:
    watch = Watch()
    for _ in range(TRIAL):
        watch.book(0.0, 1.0)
    assert watch.left == PAUSES[0]
    for _ in range(PAUSES[0]):
        watch.rest()
    for _ in range(10 * TRIAL):
        assert not watch.aside
        watch.book(2.0, 1.0)
    assert watch.pause == PAUSES[0]


class Useless(Auto):
    """Every draft is wrong."""

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return [replace(draft, tokens=(60,) * len(draft)) for draft in super().draft(sequences, budgets)]


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


def test_useless_drafts_make_it_stand_aside() -> None:
    target = tiny_target()
    target.profile = STEPS
    drafter = Useless(target)
    (sequence,) = run(target, drafter, [[1, 2, 3]], SamplingParams(max_tokens=200))
    assert sequence.stats.num_accepted_draft_tokens <= 3
    assert drafter.watch.pause > PAUSES[0]


def measured(target: HFTarget) -> Profile:
    *_, found = profiles.measure(target, seconds=0.0)
    assert isinstance(found, Profile)
    return found


def test_a_profile_is_measured_kept_and_read(tmp_path: Path) -> None:
    target = tiny_target()
    found = measured(target)
    assert found.rows[0] == 1
    assert list(found.seconds) == sorted(found.seconds)
    assert profiles.load(target, tmp_path) == (None, "")
    place = profiles.save(found, target, tmp_path)
    assert profiles.load(target, tmp_path) == (found, "")
    assert list(profiles.profile_of(target, folder=tmp_path)) == [found]
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


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
