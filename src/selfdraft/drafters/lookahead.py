"""Lookahead decoding: guess many positions ahead at once, keep the n-grams the model says, and verify those that fit.

Source: Fu et al., "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding" (arXiv 2402.02057).
Unlike the paper's code: candidates are verified from the first step on, a full match gets its bonus token, and the
window moves as far as the text did.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import takewhile
from weakref import WeakKeyDictionary

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.core.verify import Result
from selfdraft.errors import OptionError
from selfdraft.protocols import Target
from selfdraft.types import Budget, within

SOURCE = "lookahead"


class Pool:
    """What followed each token: at most `most` tuples of `size` - 1 tokens per key, the least recent goes first."""

    def __init__(self, size: int, most: int) -> None:
        self.size, self.most = size, most
        self._tuples: dict[int, dict[tuple[int, ...], None]] = {}

    def add(self, key: int, followers: tuple[int, ...]) -> None:
        """Note that `followers` came after `key`, as the most recent of its tuples."""
        known = self._tuples.setdefault(key, {})
        known.pop(followers, None)
        known[followers] = None
        if len(known) > self.most:
            del known[next(iter(known))]

    def feed(self, tokens: list[int], start: int) -> int:
        """Add every n-gram of `tokens` whose key is at `start` or later; returns where the next feed starts."""
        stop = max(len(tokens) - self.size + 1, start)
        for place in range(start, stop):
            self.add(tokens[place], tuple(tokens[place + 1 : place + self.size]))
        return stop

    def followers(self, key: int) -> list[tuple[int, ...]]:
        """The tuples of `key`, most recent first."""
        return list(reversed(self._tuples.get(key, ())))

    def latest(self, key: int) -> tuple[int, ...]:
        """The most recent tuple of `key`, or an empty one."""
        return next(reversed(self._tuples.get(key, {})), ())


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

    def restart(self, text: list[int]) -> None:
        """Stand under the end of `text` with guesses only."""
        self.columns, self.ages, self.base = [], [], len(text)
        self.fed = self.pool.feed(text, self.fed)
        self._fill(text)

    def learn(self, answers: list[int], text: list[int]) -> None:
        """Harvest, then move on to the end of `text`, which grew by at least one token.

        `answers` are the argmax after the deepest cell of the first columns; columns without one are given up.
        Shifting a column up by its answer moves it one position on; each further new token drops one at the left.
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


class Lookahead:
    """Candidates: the pool's n-grams behind the last token, as a trie. Probes: the window that keeps the pool fresh."""

    def __init__(
        self,
        target: Target,
        *,
        window_size: int = 5,
        ngram_size: int = 4,
        guess_set_size: int = 5,
        pool_from_prompt: bool = True,
    ) -> None:
        within("window_size", window_size, 1, 256)
        within("ngram_size", ngram_size, 3, 64)
        within("guess_set_size", guess_set_size, 1, 256)
        if not isinstance(pool_from_prompt, bool):
            raise OptionError(f"pool_from_prompt={pool_from_prompt!r} is neither True nor False")
        self.width, self.size, self.most = window_size, ngram_size, guess_set_size
        self.from_prompt = pool_from_prompt
        self._parents = window_parents(window_size, ngram_size - 1)
        self._deepest = window_size + ngram_size - 3
        self._notes: WeakKeyDictionary[Sequence, Window] = WeakKeyDictionary()

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return [self._one(sequence, budget) for sequence, budget in zip(sequences, budgets, strict=True)]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        for sequence, result in zip(sequences, results, strict=True):
            window = self._notes.get(sequence)
            if window is None or len(result.proposed) - result.proposed.candidates != len(self._parents):
                continue  # its window was not run
            if sequence.finished:
                del self._notes[sequence]
            else:
                window.learn(self._answers(result), sequence.tokens)

    def _one(self, sequence: Sequence, budget: Budget) -> Draft:
        if sequence.room <= 1:
            return EMPTY  # the next token is the last one: nothing to accept, nothing to learn for
        window = self._notes.get(sequence)
        if window is None:
            fed = 0 if self.from_prompt else sequence.prompt_length
            pool = Pool(self.size, self.most)
            window = self._notes[sequence] = Window(self.width, self.size - 1, pool, fed)
        if window.base != len(sequence.tokens):
            window.restart(sequence.tokens)
        draft = self._candidates(window.pool.followers(sequence.tokens[-1]), budget)
        if self._deepest > budget.reach:
            return draft
        return draft.with_probes(window.tokens(), self._parents, SOURCE)

    def _candidates(self, paths: list[tuple[int, ...]], budget: Budget) -> Draft:
        """The paths as a trie within the budget; where it is too large, the least recent ones go first."""
        depth, nodes = max(budget.depth, 0), max(budget.nodes, 0)
        draft = Draft.branches([path[:depth] for path in paths], SOURCE)
        if len(draft) <= nodes:
            return draft
        return Draft(draft.tokens[:nodes], draft.parents[:nodes], draft.sources[:nodes], nodes)

    def _answers(self, result: Result) -> list[int]:
        """Argmax after the deepest cells, column by column, up to the first that was clipped away."""
        first = result.proposed.candidates + len(self._parents) - self.width
        wanted = range(first, first + self.width)
        if len(result.draft) == len(result.proposed):
            return [result.answers[1 + node] for node in wanted]
        place = {old: new for new, old in enumerate(result.nodes)}
        kept = list(takewhile(lambda node: node in place, wanted))
        return [result.answers[1 + place[node]] for node in kept]
