"""The cheap tier of `auto`: chains copied from behind the longest earlier match, cut where such copies do not hold."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import pytest

from selfdraft.core.sequence import Sequence
from selfdraft.drafters.auto import TREE_FROM, Auto
from selfdraft.drafting.context_tree import BREAK
from selfdraft.drafting.cost_model import Profile
from selfdraft.drafting.suffix_copy import AHEAD, SuffixCopy
from selfdraft.types import Budget, SamplingParams
from tests.clocks import Passes, on_passes
from tests.models import run, tiny_target

FREE = [0.0] * AHEAD
ROOM = Budget(64, 64, 64)
BRIEF = Profile((1, 4, 16, 64), (0.001, 0.001, 0.002, 0.006), (0.0,) * 4, host=0.0001)


def opened(tokens: SequenceOf[int], prediction: tuple[int, ...] = ()) -> Sequence:
    return Sequence(list(tokens), len(tokens), SamplingParams(max_tokens=999, prediction=prediction))


def drafted(
    tokens: SequenceOf[int], prices: SequenceOf[float] = FREE, prediction: tuple[int, ...] = ()
) -> tuple[int, ...]:
    return SuffixCopy().draft([opened(tokens, prediction)], [ROOM], prices)[0].tokens


def test_the_longest_match_goes_on() -> None:
    assert drafted([1, 2, 3, 4, 9, 2, 7, 1, 2])[:3] == (3, 4, 9)
    assert drafted([1, 2, 3]) == ()


def test_a_copy_that_runs_into_its_own_end_repeats() -> None:
    assert drafted([8, 5, 6, 5, 6]) == (5, 6) * (AHEAD // 2)


def test_a_prediction_is_copied_and_nothing_reaches_over_its_end() -> None:
    assert drafted([1, 2], prediction=(1, 2, 3, 4)) == (3, 4)
    assert BREAK not in drafted([3, 4], prediction=(1, 2, 3, 4))


def test_within_budget_and_price() -> None:
    sequence = opened([1, 2, 3, 4, 5, 6, 7, 8] * 3)
    assert len(SuffixCopy().draft([sequence], [Budget(3, 64, 64)], FREE)[0]) == 3
    assert len(SuffixCopy().draft([sequence], [Budget(64, 2, 64)], FREE)[0]) == 2
    assert len(SuffixCopy().draft([sequence], [ROOM], [0.0, 0.0, 1.1])[0]) == 2
    assert not SuffixCopy().draft([sequence], [Budget(0, 0, 0)], FREE)[0]


def test_a_token_counts_with_all_before_it() -> None:
    """Nine in ten each: the chance of seven is below a half, and such a price ends the copy there."""
    copying = SuffixCopy()
    copying._chances = [[0.9] * len(chances) for chances in copying._chances]
    assert len(copying.draft([opened([1, 2, 3, 4, 5, 6, 7, 8] * 3)], [ROOM], [0.5] * AHEAD)[0]) == 6


@pytest.mark.parametrize("right", [True, False])
def test_it_learns_what_copies_are_worth(right: bool) -> None:
    """Copies that always held are drafted at a high price; those that never did at none but the lowest."""
    copying = SuffixCopy()
    sequence = opened([1, 2, 3])
    for turn in range(200):
        (draft,) = copying.draft([sequence], [ROOM], FREE)
        said = draft.tokens[0] if draft.tokens and right else 1 + (turn * turn) % 7
        sequence.tokens.append(said if right or not draft.tokens or said != draft.tokens[0] else 9)
        copying.observe([sequence])
    (dear,) = copying.draft([sequence], [ROOM], [0.5] * AHEAD)
    assert bool(dear) == right


def test_what_was_not_drafted_is_scored_too() -> None:
    copying = SuffixCopy()
    sequence = opened([1, 2, 3, 1, 2])
    copying.draft([sequence], [Budget(0, 0, 0)], FREE)
    sequence.tokens += [3, 1]
    copying.observe([sequence])
    assert sum(mean.weight for means in copying._means for mean in means) == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_auto_with_copies_says_what_plain_decoding_says(temperature: float) -> None:
    target = on_passes(tiny_target(slots=3), Passes(whole=BRIEF.step(1), row=0.0))
    target.profile = BRIEF
    assert BRIEF.step(1) < TREE_FROM
    prompts = [[1, 2, 3], [9, 8, 7, 6] * 4, [4] * 5]
    sampling = SamplingParams(max_tokens=120, temperature=temperature, seed=5)
    drafter = Auto(target)
    plain = run(target, "none", prompts, sampling, slots=3)
    texts = run(target, drafter, prompts, sampling, slots=3)
    assert [s.output for s in texts] == [s.output for s in plain]
    assert sum(s.stats.num_draft_tokens for s in texts) > 0
    # copies of greedy text hold; of a random model's text at temperature 1 they hold by chance only
    assert temperature or any("copy" in source for s in texts for source in s.sources)
    assert not len(drafter.tree), "no tree was made"
