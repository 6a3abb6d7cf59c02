"""Decides whether a step drafts, what a row of its trees may cost, and books what drafting gained or lost.

What a pass costs by its rows was measured, or is learned while decoding (`drafting/cost_model.py`). On text where
drafting loses, it is paused and tried again later (`LossBudget`). A drafter has a guard and calls, in
each step: `drafts`, `row_costs`, `cut`, `book`; what it does itself runs inside `timed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft, chances_of
from selfdraft.core.verify import Result
from selfdraft.drafting.cost_model import LearnedCost, LiveCost, Profile, StepCost, Throughput, best_size
from selfdraft.drafting.estimators import StepTime
from selfdraft.types import Budget, Clock

REST_EVERY = 16
"""During a pause one step of 16 is timed."""
PLAIN_EVERY = 256
"""After 256 steps without a plain one the next is plain: else nobody would know what drafting saves."""

SHARE = 0.004
"""What is forgiven in each step, in plain steps: 0.4 % of the time may be lost to trials that fail."""
START, MOST = 12.0, 32.0
"""Plain steps that may be lost at first, and after any success."""
TRIAL = 4.0
"""Plain steps that must be there again before drafting is tried again, and what a new request is given for a trial."""
RAREST = 4
"""At least every fourth request is given a trial."""


@dataclass(slots=True)
class LossBudget:
    """What drafting may still lose, counted in steps of plain decoding. Below zero it is paused.

    Each step adds its gain or loss, and SHARE. So what fails costs at most START steps, and SHARE of the rest. A step
    of n requests counts as sqrt(n) steps: it shows n times as much text, so fewer of them tell as surely.
    """

    balance: float = START
    paused: bool = False
    patience: int = 1
    """Requests until one is tried again though the budget is empty; doubled each time that fails."""
    waited: float = 0.0

    def rests(self, sequences: SequenceOf[Sequence]) -> bool:
        """Begin a step of these sequences: whether it is one of a pause. A new request may end one.

        In a batch a request is a part of the text: all of it is new when as many have begun as run at once.
        """
        new = sum(sequence.num_output_tokens == 1 for sequence in sequences)
        if self.paused and new:
            self.begin(new / len(sequences))
        resting = self.paused
        if resting:
            self.rest(len(sequences))
        return resting

    def rest(self, count: int = 1) -> None:
        """Book a step of `count` requests during a pause."""
        self.balance += SHARE * count**0.5
        if self.balance >= TRIAL:
            self.paused = False

    def begin(self, share: float = 1.0) -> None:
        """Book the begin of a request during a pause, which is `share` of the text: it may be of another kind."""
        self.waited += share
        if self.waited > self.patience - 1e-6:  # shares do not add up to the last bit
            self.paused, self.waited, self.patience = False, 0.0, min(2 * self.patience, RAREST)
            self.balance = max(self.balance, TRIAL)

    def book(self, gain: float, count: int = 1) -> None:
        """Book a step of `count` requests that brought `gain` plain steps more than it took; less than 0: it lost."""
        self.balance = min(self.balance + (gain + SHARE) * count**0.5, MOST)
        if self.balance < 0:
            self.paused = True
        elif self.balance > START:
            self.patience = 1


class CostGuard:
    """Plain step or draft, and at what cost of a row? `profile`: seconds of passes, None where they are learned."""

    def __init__(self, profile: Profile | None, clock: Clock) -> None:
        self.clock = clock
        self.measured = profile is not None
        self.cost: StepCost = LearnedCost() if profile is None else LiveCost(profile)
        self.budget = LossBudget()
        self.throughput = Throughput()
        """Of whole steps, drafting included."""
        self.node_time = StepTime()
        """Seconds of making trees by their nodes."""
        self.drafting = True
        """Whether this step drafts. A step that nobody drafts for (a prefill) leaves it as it is."""
        self._began = self._own = 0.0
        """When this step began, and the seconds of it that drafting took."""
        self._count = self._since_plain = self._rested = self._prefill = 0

    def drafts(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> bool:
        """Begin a step: whether it drafts. It does not during a pause, nor when a plain step is due."""
        self._began, self._own, self._count = self.clock(), 0.0, len(sequences)
        self._prefill = budgets[0].prefill_rows  # all of them say the same
        if self.budget.rests(sequences):
            self.drafting = False
        else:
            self._since_plain += 1
            self.drafting = self._since_plain <= PLAIN_EVERY
        return self.drafting

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time that is spent inside is drafting's, not the step's own."""
        began = self.clock()
        try:
            yield
        finally:
            self._own += self.clock() - began

    def row_costs(self, sequences: SequenceOf[Sequence], most: int) -> SequenceOf[float]:
        """What the first, second, ... node of a tree must bring, in tokens; at most `most` nodes, and never falling."""
        remembered, count, most = sum(s.num_cached for s in sequences), len(sequences), min(most, self.cost.most_rows)
        rate, own = self.tokens_per_second(sequences), self.node_time.per_row
        return [rate * (each + own) for each in self.cost.prices(most, count, remembered, self._prefill)]

    def cut(self, sequences: SequenceOf[Sequence], drafts: list[Draft]) -> list[Draft]:
        """The part of the trees that brings most for the whole step's cost; none at all where none pays.

        Where costs are learned every row costs the same: `row_costs` has said all there is to say.
        """
        if not self.measured:
            return drafts
        chances = [chances_of(draft) for draft in drafts]
        order = sorted((-own, tree, node) for tree, each in enumerate(chances) for node, own in enumerate(each))
        rate, remembered = self.tokens_per_second(sequences), sum(s.num_cached for s in sequences)
        seconds = self.cost.added(len(order), len(sequences), remembered, self._prefill)
        size = best_size([-first[0] for first in order], [rate * each for each in seconds])  # making them is paid
        if size == len(order):
            return drafts
        kept = Counter(tree for _, tree, _ in order[:size])
        return [draft.first(kept[tree]) for tree, draft in enumerate(drafts)]

    def tokens_per_second(self, sequences: SequenceOf[Sequence]) -> float:
        """Tokens per second now, at least those of plain decoding; 0 before any step was seen."""
        count = len(sequences)
        seconds = self.throughput.seconds.value or self.plain_seconds(sequences)
        return max(self.throughput.tokens.value, float(count)) / seconds if seconds else 0.0

    def plain_seconds(self, sequences: SequenceOf[Sequence]) -> float:
        """Seconds expected of a plain step of these sequences; 0 before any step was seen."""
        return self.cost.at(len(sequences), len(sequences), sum(s.num_cached for s in sequences))

    def book(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> float:
        """End a step: learn what it took and what it brought. Returns the seconds of a plain step, 0 if not known.

        A step with a prefill in it teaches nothing.
        """
        whole = len(sequences) == self._count and all(result.tokens for result in results)
        self._count = 0
        if not whole:
            return 0.0
        if self.budget.paused and not self.drafting:
            self._rest(sequences)
            return 0.0
        count, remembered = len(sequences), sum(s.num_cached for s in sequences)
        rows = sum(1 + len(result.draft) for result in results)
        self.cost.observe(rows, count, remembered, self._pass_seconds())
        if rows == count:
            self._since_plain = 0
        plain, took = self.plain_seconds(sequences), self.cost.at(rows, count, remembered) + self._own
        tokens = sum(len(result.tokens) for result in results)
        self.throughput.observe(tokens, took)
        if plain > 0:
            self.budget.book(tokens / count - took / plain, count)
        return plain

    def tokens_in(
        self, sequences: SequenceOf[Sequence], results: SequenceOf[Result], rows: int, seconds: float
    ) -> float:
        """Tokens that come anyway in the time that `rows` of the last step's rows added to it, and in `seconds`."""
        count, remembered = len(sequences), sum(s.num_cached for s in sequences)
        every = sum(1 + len(result.draft) for result in results)
        added = self.cost.at(every, count, remembered) - self.cost.at(every - rows, count, remembered)
        return self.tokens_per_second(sequences) * (added + seconds)

    def _rest(self, sequences: SequenceOf[Sequence]) -> None:
        """Now and then a step during a pause tells what plain decoding takes."""
        self._rested += 1
        if self._rested % REST_EVERY == 0:
            self._since_plain = 0
            count = len(sequences)
            self.cost.observe(count, count, sum(s.num_cached for s in sequences), self._pass_seconds())

    def _pass_seconds(self) -> float:
        """Seconds of this step without drafting."""
        return self.clock() - self._began - self._own
