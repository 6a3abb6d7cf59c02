"""The default: one tree from everything that costs no pass, as large as this machine's passes make worth while.

What a pass costs by its rows was measured (`core/profile.py`); where nothing was, the cost of a row is learned while
decoding, as in `merged`. On text where nothing is accepted it stands aside and tries again later (`core/watch.py`).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from weakref import WeakSet

from selfdraft.core.drafting import Drafting, Sources
from selfdraft.core.memory import Memory
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.core.verify import Result
from selfdraft.core.watch import Watch
from selfdraft.errors import OptionError
from selfdraft.protocols import Target
from selfdraft.types import Budget


class Auto(Drafting):
    """`merged`, with trees cut where the measured cost of the pass says so, and plain decoding where that is best."""

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
        self.profile = target.profile
        self.watch = Watch()
        self._drafting = self._learning = 0.0
        self._stands_aside = False
        self._rested: WeakSet[Sequence] = WeakSet()
        """Sequences that went on while nothing was read."""

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        self._stands_aside = self.watch.aside
        if self._stands_aside:
            self.watch.rest()
            self._rested.update(sequences)
            return [EMPTY] * len(sequences)
        began = self.clock()
        for sequence in [s for s in sequences if s in self._rested]:
            self._rested.discard(sequence)
            self._note(sequence).catch_up(sequence)
        drafts = super().draft(sequences, budgets)
        if self.profile is not None:
            drafts = self._cut(drafts, sequences)
        self._drafting = self.clock() - began
        return drafts

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        if self._stands_aside:  # what is said meanwhile is read at the next draft
            self._forget(sequences)
            return
        whole = len(sequences) == self._drafted and all(result.tokens for result in results)
        began = self.clock()
        super().observe(sequences, results)
        self._learning = self.clock() - began
        if whole:
            self._judge(sequences, results)

    def _room(self) -> int:
        return self.most if self.profile is not None else super()._room()

    def _cut(self, drafts: list[Draft], sequences: SequenceOf[Sequence]) -> list[Draft]:
        """Of each tree the first nodes, as many as pay in one pass with all the others. Nodes come likeliest first."""
        assert self.profile is not None
        tokens, count, others = sum(s.cached for s in sequences), len(sequences), 0
        seconds = self.pace.time.seconds or self.profile.at(count, tokens, count) + self.profile.host
        rho = max(self.pace.tokens.value, float(count)) / seconds
        found = []
        for draft in drafts:
            size = self.profile.best_size(chances_of(draft), rho, tokens, count, others)
            others += size
            found.append(draft.first(size))
        return found

    def _judge(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        rows, count = sum(1 + len(result.draft) for result in results), len(results)
        more = sum(len(result.tokens) - 1 for result in results)
        if self.profile is not None:
            tokens = sum(sequence.cached for sequence in sequences)
            plain = self.profile.at(count, tokens, count) + self.profile.host
            dear = self.profile.at(rows, tokens, count) + self.profile.host - plain
        else:
            plain, dear = self.pace.time.at(count), self.pace.time.per_row * (rows - count)
        self.watch.book(more * plain / count, dear + self._drafting + self._learning)


def chances_of(draft: Draft) -> list[float]:
    """The chance of every node's whole path, out of the chances of each node behind its parent."""
    reached: list[float] = []
    for parent, own in zip(draft.parents[: draft.candidates], draft.scores, strict=False):
        reached.append(own * (reached[parent] if parent != ROOT else 1.0))
    return reached
