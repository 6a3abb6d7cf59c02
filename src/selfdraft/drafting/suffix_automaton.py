"""An index of all substrings of a growing text, and the longest end of it that stood in it before."""

from __future__ import annotations

TOUCHED = 8
"""States whose latest end is renewed per token: a bound, so that "aaaa..." stays linear."""


def repeated(copied: list[int], size: int) -> list[int]:
    """`size` tokens of a copy; one that ran into the end of the text goes on with what it has just said."""
    return (copied * -(-size // len(copied)))[:size]


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
