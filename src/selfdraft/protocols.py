"""The two seams of the house: the model whose words count, and whoever guesses them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from torch import Tensor

from selfdraft.core.rows import Rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.core.verify import Result
from selfdraft.drafting.cost_model import Profile
from selfdraft.types import Budget, Clock, Short


class Target(Protocol):
    """The model whose words count, together with its memory of every slot.

    It keeps no length of its own: every span of `rows` says how many tokens of its slot are remembered, so a
    drafter may scribble behind that and need not clean up, even when it raises.
    """

    @property
    def vocab(self) -> int:
        """Token ids it can say are 0 <= id < vocab."""

    @property
    def masks(self) -> int:
        """Learned placeholder ids vocab <= id < vocab + masks: input only; 0 for a stock model."""

    def masks_of(self, method: str) -> range:
        """Those mask ids that were trained for a method, nearest first; an empty range when there are none."""

    def link(self, method: str, token: int, ids: Tensor) -> Tensor | None:
        """What to add to a method's logits of `ids` [k] when `token` stands before them; None when nothing is known."""

    def advice(self, method: str) -> Mapping[str, object]:
        """Options found best for a method on this model; they came with the checkpoint. Empty when unknown."""

    @property
    def profile(self) -> Profile | None:
        """What a pass costs by its rows on this machine; None when it was not measured."""

    @property
    def clock(self) -> Clock:
        """Seconds on the machine that runs the passes: what drafters measure passes and their own work with."""

    @property
    def layers(self) -> int:
        """Number of blocks, each with two sublayers that can be skipped."""

    @property
    def context(self) -> int:
        """Most tokens of a slot."""

    def forward(self, rows: Rows, short: Short | None = None) -> Tensor:
        """Logits [len(rows.answers), vocab]. Rows are tentative: nothing is remembered until `keep`.

        `short`: how a drafting pass is made cheaper; None is the whole model.
        """

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        """Of the last forward's rows of this slot, remember these (in order) behind the first `base` tokens."""

    def edge(self, position: int) -> int:
        """First position behind `position` where the shape of attention changes; drafts end before it.

        A target without canonical shapes returns its context.
        """


class Drafter(Protocol):
    """Whoever guesses. Notes about a sequence live with the drafter and die with the sequence."""

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        """A tree for each sequence; each has exactly one pending token."""

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        """What the target said at every row: learn from all of it. Called after the tokens were committed."""
