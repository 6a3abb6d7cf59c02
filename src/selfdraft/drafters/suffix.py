"""Suffix matching: copy what followed the longest end of the text that stood in it before; longer match, longer draft.

Sources: SAM-Decoding (arXiv 2411.10666) for the index, SuffixDecoding (arXiv 2411.04975) for the length rule.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from weakref import WeakKeyDictionary

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.protocols import Target
from selfdraft.types import Budget, within

SOURCE = "suffix"
TOUCHED = 8
"""States whose latest end is renewed per token: a bound, so that "aaaa..." stays linear."""


class SuffixAutomaton:
    """All substrings of a growing token list; knows the longest suffix that occurred before.

    State 0 is the empty string. A state is a set of substrings with the same ends; its suffix link is the longest
    suffix with more ends. So the link of the whole text's state is the longest suffix that occurs twice. Time and
    space: constant per token, amortised (at most 2n states and 3n transitions; a transition is copied at most once).
    Source: Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985); its use for
    drafting: SAM-Decoding (arXiv 2411.10666).
    """

    def __init__(self) -> None:
        self.size = 0
        """Tokens read."""
        self._whole = 0
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._end = [0]

    def push(self, token: int) -> None:
        """Read the next token of the text."""
        self._touch()
        self.size += 1
        new = self._state({}, 0, self.size, self.size)
        state = self._whole
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        if state >= 0:
            child = self._next[state][token]
            whole = self._length[child] == self._length[state] + 1
            self._link[new] = child if whole else self._split(state, token, child)
        self._whole = new

    def match(self) -> tuple[int, int]:
        """Length of the longest suffix that occurred before, and where such an occurrence ended (exclusive, < size).

        (0, 0) when there is none. The end is the latest one among the recent, not always the latest of all.
        """
        state = max(self._link[self._whole], 0)
        return self._length[state], self._end[state]

    def _touch(self) -> None:
        """The current suffixes become history: from now on they ended here. Done late, so `match` looks back."""
        state = self._link[self._whole]
        for _ in range(TOUCHED):
            if state <= 0:
                break
            self._end[state] = self.size
            state = self._link[state]

    def _split(self, state: int, token: int, child: int) -> int:
        """Part the shorter substrings of `child`, which now have one end more, into a state of their own."""
        length = self._length[state] + 1
        short = self._state(dict(self._next[child]), self._link[child], length, self._end[child])
        self._link[child] = short
        while state >= 0 and self._next[state].get(token) == child:
            self._next[state][token] = short
            state = self._link[state]
        return short

    def _state(self, following: dict[int, int], link: int, length: int, end: int) -> int:
        self._next.append(following)
        self._link.append(link)
        self._length.append(length)
        self._end.append(end)
        return len(self._next) - 1


class Suffix:
    """A chain of at most `factor` x match length tokens, copied from behind the longest earlier match."""

    reads = "tokens"

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
        most = min(self.most, budget.depth, budget.nodes)
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
        copied = sequence.tokens[end : end + size]
        period = len(copied)
        return [copied[place % period] for place in range(size)]
