"""The default: one tree from everything that costs no pass, as large as this machine's passes make worth while.

What a pass costs by its rows was measured (`core/profile.py`); where nothing was, the cost of a row is learned while
decoding, as in `merged`. What was gained and lost is booked by the clock: on text where nothing is accepted it stands
aside and tries again later (`core/watch.py`).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from selfdraft.core.adapt import Mean, StepTime
from selfdraft.core.copying import Copying
from selfdraft.core.drafting import Drafting, Note, Sources
from selfdraft.core.memory import Memory
from selfdraft.core.sequence import Sequence
from selfdraft.core.stepcost import StepCost
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.core.watch import Watch
from selfdraft.errors import OptionError
from selfdraft.protocols import Target
from selfdraft.types import Budget

TREE_FROM = 0.004
"""Seconds of a plain step from which on the tree of all sources is made: its work is then small beside it."""
PLAIN_EVERY = 256
"""Steps after which one is plain, when none was: else nobody would know what drafting saves."""


class Auto(Drafting):
    """`merged`, with trees cut where the measured cost of the pass says so, and plain decoding where that is best.

    The model's runners-up (`recycling`) are a source as long as what they alone brought is worth their cost. On a model
    whose plain step takes hardly longer than making the tree, the tree is a copied chain (`core/copying.py`).
    """

    reads = "tokens"
    predicts = True
    logit_options = ("recycling",)
    """Options that make it read logits."""

    def __init__(
        self, target: Target, *, num_speculative_tokens: int = 64, memory: int = 0, recycling: bool = True
    ) -> None:
        if not isinstance(recycling, bool):
            raise OptionError(f"recycling={recycling!r} is neither True nor False")
        past = Memory(memory) if memory else None
        sources = Sources(request=True, prediction=True, recycling=recycling)
        super().__init__(sources, num_speculative_tokens, None, past)
        profile = target.profile
        self.cost = None if profile is None else StepCost(profile)
        self.copying = Copying()
        self._trees = True
        """Whether the tree of all sources is made, or copies."""
        self.watch, self.recycled = Watch(), Watch()
        self.seconds = Mean()
        """Of a step, drafting included."""
        self.node_time = StepTime()
        """Seconds of drafting by the nodes of the trees."""
        self._drafting = self._recycling = 0.0
        self._aside = False
        self._since_plain = 0

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        self._aside = self.watch.aside
        if self._aside:
            self.watch.rest()
            self._began, self._drafted = self.clock(), len(sequences)
            return [EMPTY] * len(sequences)
        drafts = self._guess(sequences, budgets)
        self._since_plain += 1
        if self._since_plain > PLAIN_EVERY:
            drafts = [EMPTY] * len(sequences)
        self._drafting = self.clock() - self._began
        self.node_time.observe(sum(map(len, drafts)), self._drafting)
        return drafts

    def _guess(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        if any(not self.copying.knows(s) and s not in self._notes for s in sequences):
            self._trees = self._brings_trees()
        if not self._trees:
            self._began, self._drafted = self.clock(), len(sequences)
            return self.copying.draft(sequences, budgets, self._prices(sequences, self.most))
        return super().draft(sequences, budgets)

    def _ready(self, sequence: Sequence) -> Note:
        note = self._note(sequence)
        note.catch_up(sequence)  # what was said while nothing was read
        if note.successors is not None:
            note.successors.awake = not self.recycled.aside
        return note

    def _brings_trees(self) -> bool:
        """Asked when a request begins: by the clock, for the profile may have been measured on a busier machine."""
        return self.cost is None or self.memory is not None or self.cost.at(1, 1, 0) >= TREE_FROM

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        steps = len(sequences) == self._drafted and all(result.tokens for result in results)
        if self._aside:
            if steps:
                self._rest(sequences)
            self._drafted = 0
            self._forget(sequences)
            return
        began = self.clock()
        if not self._trees:
            self.copying.observe(sequences)
            self._drafted = 0
            if steps:
                self.pace.tokens.observe(sum(len(result.tokens) for result in results))
        else:
            super().observe(sequences, results)
        if steps:
            self._judge(sequences, results, began)

    def _rest(self, sequences: SequenceOf[Sequence]) -> None:
        """Now and then a step while standing aside tells what plain decoding takes."""
        self._since_plain = 0
        if self.cost is not None:
            took = self.clock() - self._began
            self.cost.observe(len(sequences), len(sequences), sum(s.cached for s in sequences), took)

    def _judge(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result], began: float) -> None:
        """What this step brought, counted in plain steps, and what it took. Learning began at `began`."""
        count, remembered = len(sequences), sum(s.cached for s in sequences)
        rows = sum(1 + len(result.draft) for result in results)
        ended = self.clock()
        drafting = self._drafting + ended - began
        took = ended - self._began - drafting
        if self.cost is None:
            plain = self.pace.time.at(count) or took
        else:
            self.cost.observe(rows, count, remembered, took)
            plain, took = self.cost.at(count, count, remembered), self.cost.at(rows, count, remembered)
        if rows == count:
            self._since_plain = 0
        self.seconds.observe(took + drafting)
        if self._trees and not self.recycled.aside:
            self.recycled.book(sum(map(only_recycled, results)) / count - self._recycling / plain)
        brought = sum(len(result.tokens) for result in results) / count
        self.watch.book(brought - (took + drafting) / plain)

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
        seconds = self.seconds.value or self.cost.at(count, count, remembered)
        rho, own = max(self.pace.tokens.value, float(count)) / seconds, self.node_time.per_row
        return [rho * (each + own) for each in self.cost.prices(most, count, remembered)]

    def _room(self) -> int:
        return self.most if self.cost is not None else super()._room()


def only_recycled(result: Result) -> int:
    """Accepted tokens that would not have been there without the runners-up: from the first of them on."""
    sources = [result.draft.sources[node] for node in result.path]
    return len(sources) - sources.index("recycling") if "recycling" in sources else 0
