"""The shipped test doubles: what they prove of our own drafters, and that they can fail."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import pytest

from selfdraft.core.rows import chain_rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.core.verify import Result
from selfdraft.drafters import NAMES
from selfdraft.drafting.cost_model import Profile
from selfdraft.protocols import DraftExtras, Target
from selfdraft.testing import Adversary, FakeTarget, check_drafter
from selfdraft.types import Budget
from tests.clocks import Ticking

OURS = [name for name in NAMES if name not in ("s3d", "space")]
"""Drafters that need no trained mask tokens."""
QUICK = Profile((1, 2, 8, 64), (1.0, 1.0, 1.0, 1.1), (0.0,) * 4)
SLOW = Profile((1, 2, 8, 64), (1.0, 1.9, 7.0, 60.0), (0.0,) * 4)


@pytest.mark.parametrize("cost", [None, QUICK, SLOW])
@pytest.mark.parametrize("name", OURS)
def test_the_oracle_holds_for_every_drafter(name: str, cost: Profile | None) -> None:
    check_drafter(NAMES[name], extras=DraftExtras(Ticking(0.01), cost, num_layers=4))


def test_the_oracle_holds_for_an_adversary() -> None:
    for seed in range(5):
        check_drafter(Adversary, seed=seed)


class Meddler:
    """Changes the text behind the engine's back."""

    def __init__(self, target: Target) -> None:
        pass

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return [Draft() for _ in sequences]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        for sequence in sequences:
            if sequence.num_output_tokens == 5:
                sequence.tokens[-1] = (sequence.tokens[-1] + 1) % 48


class Keeper(Meddler):
    """Lets the target remember a token that is not in the text."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        for sequence in sequences:
            self.target.forward(
                chain_rows([(sequence.slot, sequence.num_cached, 1), (sequence.slot, sequence.num_cached, 2)])
            )
        return [Draft() for _ in sequences]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None: ...


@pytest.mark.parametrize(("make", "words"), [(Meddler, "something else|plain is"), (Keeper, "two sequences share")])
def test_the_oracle_can_fail(make: type[Meddler], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_drafter(make)


def test_a_row_behind_the_context_is_refused() -> None:
    with pytest.raises(AssertionError, match="a row behind the context"):
        FakeTarget(context=0).forward(chain_rows([(0, 0, 1)]))
