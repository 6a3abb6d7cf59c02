"""Drafting that stands aside on text where nothing is accepted, and tries again later (`core/watch.py`)."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from weakref import WeakSet

from selfdraft.core.drafting import Drafting, Sources
from selfdraft.core.memory import Memory
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.core.watch import Watch
from selfdraft.types import Budget


class Guarded(Drafting):
    """`Drafting` over everything that costs no pass, with plain decoding where that is best."""

    def __init__(self, nodes: int, memory: int, recycling: bool) -> None:
        sources = Sources(request=True, prediction=True, recycling=recycling)
        super().__init__(sources, nodes, None, Memory(memory) if memory else None)
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
        drafts = self._trees(sequences, budgets)
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
            count, rows = len(results), sum(1 + len(result.draft) for result in results)
            plain, dear = self._seconds(sequences, rows)
            more = sum(len(result.tokens) - 1 for result in results)
            self.watch.book(more * plain / count, dear + self._drafting + self._learning)

    def _trees(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return super().draft(sequences, budgets)

    def _seconds(self, sequences: SequenceOf[Sequence], rows: int) -> tuple[float, float]:
        """Of a plain step of these sequences, and what a step of `rows` rows takes more."""
        count = len(sequences)
        return self.pace.time.at(count), self.pace.time.per_row * (rows - count)
