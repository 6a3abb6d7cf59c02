"""Drafting as large as this machine's passes make worth while, and plain decoding where nothing pays.

What a pass costs by its rows was measured (`core/profile.py`); where nothing was, the cost of a row is learned while
decoding. On text where nothing is accepted it stands aside and tries again later (`core/watch.py`).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from weakref import WeakSet

from selfdraft.core.drafting import Drafting, Sources
from selfdraft.core.memory import Memory
from selfdraft.core.profile import Profile
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft, chances_of
from selfdraft.core.verify import Result
from selfdraft.core.watch import Watch
from selfdraft.errors import OptionError
from selfdraft.types import Budget


class Guarded(Drafting):
    """`Drafting` over everything that costs no pass, with trees cut and pauses made where that pays.

    Errors: OptionError for values out of range.
    """

    predicts = True
    profiled = True
    """It asks for the target's profile."""

    def __init__(self, profile: Profile | None, nodes: int, memory: int, recycling: bool) -> None:
        if not isinstance(recycling, bool):
            raise OptionError(f"recycling={recycling!r} is neither True nor False")
        sources = Sources(request=True, prediction=True, recycling=recycling)
        super().__init__(sources, nodes, None, Memory(memory) if memory else None)
        self.profile = profile
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
        drafts = super().draft(sequences, budgets)
        if self.profile is None:
            return drafts
        rho, others, found = self._rho(sequences), 0, []
        for draft in drafts:
            found.append(self._cut(draft, chances_of(draft), sequences, rho, others))
            others += len(found[-1])
        return found

    def _room(self) -> int:
        return self.most if self.profile is not None else super()._room()

    def _rho(self, sequences: SequenceOf[Sequence]) -> float:
        """Tokens per second now, plain decoding at least."""
        count = float(len(sequences))
        seconds = self.pace.time.seconds or self._seconds(sequences, len(sequences))[0]
        return max(self.pace.tokens.value, count) / seconds if seconds else 0.0

    def _cut(
        self, draft: Draft, chances: SequenceOf[float], sequences: SequenceOf[Sequence], rho: float, others: int
    ) -> Draft:
        """Of a tree the first nodes, as many as pay in one pass with `others`. Nodes come likeliest first."""
        assert self.profile is not None
        tokens = sum(sequence.cached for sequence in sequences)
        return draft.first(self.profile.best_size(chances, rho, tokens, len(sequences), others))

    def _seconds(self, sequences: SequenceOf[Sequence], rows: int) -> tuple[float, float]:
        """Of a plain step of these sequences, and what a step of `rows` rows takes more."""
        count = len(sequences)
        if self.profile is None:
            return self.pace.time.at(count), self.pace.time.per_row * (rows - count)
        tokens = sum(sequence.cached for sequence in sequences)
        plain = self.profile.at(count, tokens, count)
        return plain + self.profile.host, self.profile.at(rows, tokens, count) - plain
