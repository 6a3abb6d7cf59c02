"""Suffix matching: copy what followed the longest end of the text that stood in it before; longer match, longer draft.

Sources: SAM-Decoding (arXiv 2411.10666) for the index, SuffixDecoding (arXiv 2411.04975) for the length rule.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import ClassVar
from weakref import WeakKeyDictionary

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.drafting.suffix_automaton import SuffixAutomaton, repeated
from selfdraft.protocols import Needs, Target
from selfdraft.types import Budget, within

SOURCE = "suffix"


class Suffix:
    """A chain of at most `factor` x match length tokens, copied from behind the longest earlier match."""

    needs: ClassVar[Needs] = Needs(tokens_only=True)

    def __init__(
        self, target: Target, *, num_speculative_tokens: int = 32, suffix_min: int = 1, factor: float = 4.0
    ) -> None:
        within("num_speculative_tokens", num_speculative_tokens, 1, 256)
        within("suffix_min", suffix_min, 1, 2**31)
        within("factor", factor, 0.0, 256.0, open_low=True)
        self.most, self.shortest, self.factor = num_speculative_tokens, suffix_min, factor
        self._notes: WeakKeyDictionary[Sequence, SuffixAutomaton] = WeakKeyDictionary()

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return [self._one(sequence, budget) for sequence, budget in zip(sequences, budgets, strict=True)]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        pass  # everything it needs is in the sequence's tokens

    def _one(self, sequence: Sequence, budget: Budget) -> Draft:
        most = min(self.most, budget.max_depth, budget.max_nodes)
        if most <= 0:
            return EMPTY
        return Draft.chain(self._continuation(sequence, most), SOURCE)

    def _continuation(self, sequence: Sequence, most: int) -> list[int]:
        """At most `most` tokens; where the copied text runs into the end of the text, the copy repeats itself."""
        index = self._notes.get(sequence)
        if index is None:
            index = self._notes[sequence] = SuffixAutomaton()
        for place in range(index.size, len(sequence.tokens)):
            index.push(sequence.tokens[place])
        length, end = index.match()
        if length < self.shortest:
            return []
        size = min(most, max(1, int(self.factor * length)))
        return repeated(sequence.tokens[end : end + size], size)
