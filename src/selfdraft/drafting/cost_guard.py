"""Drafting as large as this machine's passes make worth while, and plain decoding where nothing pays.

What a pass costs by its rows was measured (`drafting/pass_cost.py`); where nothing was, the cost of a row is learned
while decoding. What was gained and lost is booked by the clock: on text where nothing is accepted it stands aside and
tries again later (`drafting/loss_budget.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft, chances_of
from selfdraft.core.verify import Result
from selfdraft.drafting.estimators import Mean, StepTime
from selfdraft.drafting.live_cost import StepCost
from selfdraft.drafting.loss_budget import Watch
from selfdraft.drafting.output_memory import Memory
from selfdraft.drafting.pass_cost import Profile, best_size
from selfdraft.drafting.source_tree import Drafting, Note, Sources
from selfdraft.errors import OptionError
from selfdraft.types import Budget, Clock

REST_EVERY = 16
"""Of so many steps while standing aside one is timed."""
PLAIN_EVERY = 256
"""Steps after which one is plain, when none was: else nobody would know what drafting saves."""


class Guarded(Drafting):
    """`Drafting` over everything that costs no pass, with trees cut and pauses made where that pays.

    The model's runners-up (`recycling`) are a source as long as what they alone brought is worth their cost.
    Errors: OptionError for values out of range.
    """

    predicts = True
    profiled = True
    """It asks for the target's profile."""
    logit_options = ("recycling",)
    """Options that make it read logits."""

    def __init__(self, profile: Profile | None, nodes: int, memory: int, recycling: bool, clock: Clock) -> None:
        if not isinstance(recycling, bool):
            raise OptionError(f"recycling={recycling!r} is neither True nor False")
        sources = Sources(request=True, prediction=True, recycling=recycling)
        super().__init__(sources, nodes, None, clock, Memory(memory) if memory else None)
        self.cost = None if profile is None else StepCost(profile)
        self.watch, self.recycled = Watch(), Watch()
        self.seconds = Mean()
        """Of a step, drafting included."""
        self.node_time = StepTime()
        """Seconds of making trees by their nodes."""
        self._start = self._drafting = self._recycling = 0.0
        self._aside = False
        self._since_plain = self._rested = 0

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        if self.watch.aside and any(sequence.written == 1 for sequence in sequences):
            self.watch.begin()
        self._aside = self.watch.aside
        self._start = self._began = self.clock()
        self._drafted = len(sequences)
        if self._aside:
            self.watch.rest()
            return [EMPTY] * len(sequences)
        drafts = self._worth(sequences, self._make(sequences, budgets))
        self._since_plain += 1
        if self._since_plain > PLAIN_EVERY:
            drafts = [EMPTY] * len(sequences)
        self._drafting = self.clock() - self._start
        return drafts

    def _make(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        """The trees of this step."""
        began = self.clock()
        drafts = super().draft(sequences, budgets)
        self.node_time.observe(sum(map(len, drafts)), self.clock() - began)
        return drafts

    def _worth(self, sequences: SequenceOf[Sequence], drafts: list[Draft]) -> list[Draft]:
        """The part of the trees that brings most for the whole step's cost; none at all where none pays."""
        if self.cost is None:
            return drafts
        chances = [chances_of(draft) for draft in drafts]
        order = sorted((-own, tree, node) for tree, each in enumerate(chances) for node, own in enumerate(each))
        rho, remembered = self._rate(sequences), sum(s.cached for s in sequences)
        seconds = self.cost.added(len(order), len(sequences), remembered)
        size = best_size([-first[0] for first in order], [rho * each for each in seconds])  # making them is paid
        if size == len(order):
            return drafts
        kept = Counter(tree for _, tree, _ in order[:size])
        return [draft.first(kept[tree]) for tree, draft in enumerate(drafts)]

    def _rate(self, sequences: SequenceOf[Sequence]) -> float:
        """Tokens per second now."""
        assert self.cost is not None, "where nothing was measured, rows are priced otherwise"
        count = len(sequences)
        seconds = self.seconds.value or self.cost.at(count, count, sum(s.cached for s in sequences))
        return max(self.pace.tokens.value, float(count)) / seconds

    def _learn(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        """What a step said about the sources."""
        super().observe(sequences, results)

    def _ready(self, sequence: Sequence) -> Note:
        note = self._note(sequence)
        note.catch_up(sequence)  # what was said while nothing was read
        if note.successors is not None:
            note.successors.awake = not self.recycled.aside
        return note

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        steps = len(sequences) == self._drafted and all(result.tokens for result in results)
        if self._aside:
            self._rested += 1
            if steps and self._rested % REST_EVERY == 0:
                self._rest(sequences)
            self._drafted = 0
            self._forget(sequences)
            return
        began = self.clock()
        self._learn(sequences, results)
        if steps:
            self._judge(sequences, results, began)

    def _rest(self, sequences: SequenceOf[Sequence]) -> None:
        """Now and then a step while standing aside tells what plain decoding takes."""
        self._since_plain = 0
        if self.cost is not None:
            took = self.clock() - self._start
            self.cost.observe(len(sequences), len(sequences), sum(s.cached for s in sequences), took)

    def _judge(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result], began: float) -> None:
        """What this step brought, counted in plain steps, and what it took. Learning began at `began`."""
        count, remembered = len(sequences), sum(s.cached for s in sequences)
        rows = sum(1 + len(result.draft) for result in results)
        ended = self.clock()
        drafting = self._drafting + ended - began
        took = ended - self._start - drafting
        if self.cost is None:
            plain = self.pace.time.at(count) or took
        else:
            self.cost.observe(rows, count, remembered, took)
            plain, took = self.cost.at(count, count, remembered), self.cost.at(rows, count, remembered)
        if rows == count:
            self._since_plain = 0
        self.seconds.observe(took + drafting)
        if plain > 0:
            if self._recycling:
                self.recycled.book(sum(map(only_recycled, results)) / count - self._recycling / plain)
            brought = sum(len(result.tokens) for result in results) / count
            self.watch.book(brought - (took + drafting) / plain)
        self._recycling = 0.0

    def _recycle(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        if self.recycled.aside:
            self.recycled.rest()
            return
        began = self.clock()
        super()._recycle(sequences, results)
        self._recycling = self.clock() - began

    def _prices(self, sequences: SequenceOf[Sequence], most: int) -> SequenceOf[float]:
        if self.cost is None:
            return super()._prices(sequences, most)
        remembered, count = sum(s.cached for s in sequences), len(sequences)
        rho, own = self._rate(sequences), self.node_time.per_row
        return [rho * (each + own) for each in self.cost.prices(most, count, remembered)]

    def _room(self) -> int:
        return self.most if self.cost is not None else super()._room()


def only_recycled(result: Result) -> int:
    """Accepted tokens that would not have been there without the runners-up: from the first of them on."""
    sources = [result.draft.sources[node] for node in result.path]
    return len(sources) - sources.index("recycling") if "recycling" in sources else 0
