"""The window of lookahead decoding: columns of guesses far ahead, moved on by what the model says after them."""

from __future__ import annotations

from selfdraft.core.tree import ROOT
from selfdraft.drafters.lookahead.pool import Pool
from selfdraft.drafting.suffix_automaton import repeated


class Window:
    """W columns of N - 1 cells. Column i is a Jacobi trajectory: its cell on level l stands at position last + l + i.

    Cell (0, 0) is the last known token, so the window is W (N - 1) - 1 probes, level by level: level 0 is a chain
    under that token, and cell (l, i) hangs under cell (l - 1, i). Source: section 3.1 and figure 3 of the paper.
    """

    def __init__(self, width: int, height: int, pool: Pool, fed: int) -> None:
        self.width, self.height, self.pool = width, height, pool
        self.columns: list[list[int]] = []
        self.ages: list[int] = []
        """How many of a column's cells, counted from the deepest, are answers of the model or text."""
        self.base = -1
        """Length of the text under which the window stands."""
        self.fed = fed
        """The first token that is not yet the key of an n-gram in the pool."""
        self._guesses = 0

    def tokens(self) -> list[int]:
        """Tokens of the probes, in the order of `window_parents`."""
        return [column[level] for level in range(self.height) for column in self.columns][1:]

    def restart(self, text: list[int], *, filled: bool = True) -> None:
        """Stand under the end of `text` with guesses only, or without any cell where it is not run."""
        self.columns, self.ages, self.base = [], [], len(text)
        self.fed = self.pool.feed(text, self.fed)
        if filled:
            self._fill(text)

    def resize(self, width: int, text: list[int]) -> None:
        """Give up columns at the right end, or add some."""
        self.width = width
        del self.columns[width:], self.ages[width:]
        self._fill(text)

    def learn(self, answers: list[int], text: list[int]) -> None:
        """Harvest, then move on to the end of `text`, which grew by at least one token.

        `answers` are what the model says after the deepest cell of the first columns; columns without one are given
        up. Shifting a column up by its answer moves it one position on; each further new token drops one at the left.
        """
        columns, ages = [], []
        for column, age, answer in zip(self.columns, self.ages, answers, strict=False):
            if age >= self.height - 1:
                self.pool.add(column[0], (*column[1:], answer))
            columns.append([*column[1:], answer])
            ages.append(age + 1)
        dropped = len(text) - self.base - 1
        self.columns, self.ages, self.base = columns[dropped:], ages[dropped:], len(text)
        if self.columns:
            self.columns[0][0] = text[-1]
        self.fed = self.pool.feed(text, self.fed)
        self._fill(text)

    def copies(self, text: list[int]) -> list[tuple[int, ...]]:
        """What followed the last token in n-grams of the text that are not complete yet; the copy repeats itself."""
        for place in range(len(text) - 2, self.fed - 1, -1):
            if text[place] == text[-1]:
                return [tuple(repeated(text[place + 1 :], self.height))]
        return []

    def _fill(self, text: list[int]) -> None:
        """Add columns at the right end: what the pool has behind the last one, else tokens of the text."""
        while len(self.columns) < self.width:
            first = text[-1]
            if self.columns:
                behind = self.pool.latest(self.columns[-1][0])
                first = behind[0] if behind else self._guess(text)
            cells = self.pool.latest(first)[: self.height - 1]
            self.ages.append(self.height - 1 if cells else 0)
            self.columns.append([first, *(cells or [self._guess(text) for _ in range(self.height - 1)])])

    def _guess(self, text: list[int]) -> int:
        """A token of the text; which one is a hash of how many were guessed so far (Fibonacci hashing)."""
        self._guesses += 1
        return text[(self._guesses * 2654435769 % 2**32) * len(text) >> 32]


def window_parents(width: int, height: int) -> list[int]:
    """Parents of a window's probes, as `Draft.with_probes` counts them; probe l * width + i - 1 is cell (l, i)."""
    first = list(range(ROOT, width - 2))  # level 0 without cell (0, 0), which is ROOT
    return first + [probe - width for probe in range(width - 1, width * height - 1)]
