"""The two seams of the house: `Target`, the model that decides, and `Drafter`, which proposes tokens to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from selfdraft.core.one_row import BY_NUMPY, Search
from selfdraft.core.rows import Rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.core.verify import Beside, Result
from selfdraft.drafting.cost_model import Profile
from selfdraft.drafting.mask_prediction import MaskTokens
from selfdraft.errors import MissingMasks, RunnerUnavailable
from selfdraft.types import Budget, Clock, JsonObject, PassVariant, Rounded

UNASKED_BITS = 4
"""Bits of a weight of a rounded copy that nobody asked for."""


def standstill() -> float:
    """A clock that stands still."""
    return 0.0


def unknown_copy() -> str:
    """For a target that cannot say what a copy takes."""
    return "what it takes is not known here"


def nothing_to_prepare(short: PassVariant) -> None:
    """For a target that needs nothing made for a drafting pass."""


@dataclass(frozen=True, slots=True)
class DraftExtras:
    """What only some drafters ask of a target; the defaults are those of a target that has none of it."""

    clock: Clock = standstill
    """Seconds on the machine that runs the passes: what drafters time passes and their own work with."""
    pass_cost: Profile | None = None
    """What a pass costs by its rows on this machine; None when it was not measured."""
    num_layers: int = 1
    """Blocks of the model, each with two sublayers that can be skipped."""
    mask_tokens: Mapping[str, MaskTokens] = field(default_factory=dict)
    """By the method that they were trained for."""
    tuned_options: Mapping[str, JsonObject] = field(default_factory=dict)
    """By method, options found best on this model; they came with the checkpoint."""
    unrounded: str = ""
    """Why no copy with rounded weights can be made here; nothing where one can."""
    why_no_copy: Callable[[], str] = unknown_copy
    """Why no copy of UNASKED_BITS is made unasked, by the time and memory that it takes; nothing where one may be."""
    prepare: Callable[[PassVariant], None] = nothing_to_prepare
    """Makes what drafting passes of a kind need, so that no answer waits for it."""

    def rounded(self, method: str, bits: int) -> Rounded:
        """Passes with weights of `bits` bits for `method`; the copy is made now.

        Errors: RunnerUnavailable where there can be none; OptionError for other bits.
        """
        short = Rounded(bits)
        if self.unrounded:
            raise RunnerUnavailable(f"{method} drafts with rounded weights, and {self.unrounded}: use another drafter")
        self.prepare(short)
        return short

    def num_masks(self, method: str) -> int:
        """How many mask tokens a method has here."""
        found = self.mask_tokens.get(method)
        return len(found.ids) if found else 0

    def masks_for(self, method: str) -> MaskTokens:
        """The mask tokens of a method. Errors: MissingMasks says how they are trained."""
        found = self.mask_tokens.get(method)
        if found is None:
            raise MissingMasks(
                f"{method} needs mask tokens trained for this model: selfdraft train --recipe {method} --model MODEL "
                "--data FILE --output DIR, then give that folder as adapter"
            )
        return found


class Target(Protocol):
    """The model that decides, together with its KV cache of every slot.

    It keeps no length of its own: every span of `rows` says how many tokens of its slot are cached, so a
    drafter may write behind that and need not clean up, even when it raises. One whose machine looks rows
    through quicker than numpy has an attribute `search` (`selfdraft.core.one_row.Search`).
    """

    @property
    def vocab(self) -> int:
        """Token ids it can choose are 0 <= id < vocab."""

    @property
    def num_mask_ids(self) -> int:
        """Learned placeholder ids vocab <= id < vocab + masks: input only; 0 for a stock model."""

    @property
    def max_length(self) -> int:
        """Most tokens of a slot."""

    @property
    def extras(self) -> DraftExtras:
        """What only some drafters ask for. Read when a drafter is made."""

    def forward(self, rows: Rows, short: PassVariant | None = None) -> Tensor:
        """Logits [len(rows.logit_rows), vocab]. Rows are tentative: nothing is cached until `keep`.

        `short`: how a drafting pass is made cheaper; None is the whole model.
        """

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        """Of the last forward's rows of this slot, cache these (in order) behind the first `base` tokens."""

    def reuse(self, slot: int, source: int, count: int) -> None:
        """A new sequence of `slot` begins with the first `count` tokens that `source`, often the same, has cached."""

    def next_boundary(self, position: int) -> int:
        """First position behind `position` where the shape of attention changes; drafts end before it.

        A target without canonical shapes returns its context.
        """


@dataclass(frozen=True, slots=True)
class Needs:
    """What a drafter reads beside tokens; a class says so in `needs`, and by default it reads what it likes."""

    tokens_only: bool = False
    """It looks at tokens alone, so `selfdraft replay` can run it over recorded answers."""
    logits_options: tuple[str, ...] = ()
    """Options that break that promise when they are on."""
    prediction: bool = False
    """It reads `sequence.sampling.prediction`."""
    pass_cost: bool = False
    """It asks for `extras.pass_cost`: a start measures the machine for it."""
    runners_up: int = 0
    """Likeliest tokens that it reads of every row: `Result.top` has as many, where it has any."""


class Drafter(Protocol):
    """Proposes a token tree for each sequence. Notes about a sequence live with the drafter and die with the sequence.

    A class may declare `needs: ClassVar[Needs]`; without it the defaults of `Needs` hold. A drafter that wants more of
    the rows of a step than likeliest tokens has an attribute `beside` (`selfdraft.core.verify.Beside`).
    """

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        """A tree for each sequence; each has exactly one pending token."""

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        """Learn from what the target answered at every row. Called after the tokens were committed."""


def search_of(target: object) -> Search:
    """How rows are looked through on a CPU: as a target does it, or by numpy."""
    search: Search | None = getattr(target, "search", None)
    return search or BY_NUMPY


def needs_of(drafter: object) -> Needs:
    """What a drafter, or its class, declares to read; the defaults where it declares nothing."""
    needs = getattr(drafter, "needs", None)
    return needs if isinstance(needs, Needs) else Needs()


def beside_of(drafter: object) -> Beside | None:
    """What a drafter asks of the rows of every step; None where it has no such attribute."""
    found = getattr(drafter, "beside", None)
    return found if isinstance(found, Beside) else None
