"""The n-gram pool: what followed each token in the prompt, in the output, and in the window."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import takewhile

PROMPT, TEXT, WINDOW, ANSWERS = "prompt", "text", "window", "answers"
"""Where a guess comes from: an n-gram of the prompt, of the output, of the window, or runners-up of answered rows."""
CONTEXT = 4
"""Tokens before its key by which a tuple is ranked."""


class Pool:
    """What followed each token: at most `most` tuples of `size` - 1 tokens per key, the least recent goes first.

    Each tuple knows its source (what the text itself has said is never the window's merit) and what stood before its
    key when it was last seen. Keys before `prompt` belong to the prompt.
    """

    def __init__(self, size: int, most: int, prompt: int = 0) -> None:
        self.size, self.most, self.prompt = size, most, prompt
        self._tuples: dict[int, dict[tuple[int, ...], tuple[str, tuple[int, ...]]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._tuples.values()))

    def add(self, key: int, followers: tuple[int, ...], source: str = WINDOW, before: SequenceOf[int] = ()) -> None:
        """Note that `followers` came after `before` and `key`, as the most recent of the key's tuples."""
        known = self._tuples.setdefault(key, {})
        entry = known.pop(followers, None)
        known[followers] = entry if entry and source == WINDOW else (source, tuple(before))
        if len(known) > self.most:
            del known[next(iter(known))]

    def feed(self, tokens: list[int], start: int) -> int:
        """Add every n-gram of `tokens` whose key is at `start` or later; returns where the next feed starts."""
        stop = max(len(tokens) - self.size + 1, start)
        for place in range(start, stop):
            source = PROMPT if place < self.prompt else TEXT
            before = tokens[max(place - CONTEXT, 0) : place]
            self.add(tokens[place], tuple(tokens[place + 1 : place + self.size]), source, before)
        return stop

    def followers(self, key: int) -> list[tuple[int, ...]]:
        """The tuples of `key`, most recent first."""
        return list(reversed(self._tuples.get(key, ())))

    def ranked(self, text: list[int]) -> list[tuple[tuple[int, ...], str, int]]:
        """The last token's (tuple, source, how many tokens before it agree): longest agreement first, then recency."""
        found = []
        for followers in self.followers(text[-1]):
            source, before = self._tuples[text[-1]][followers]
            pairs = zip(reversed(before), reversed(text[-CONTEXT - 1 : -1]), strict=False)
            found.append((followers, source, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))))
        return sorted(found, key=lambda one: -one[2])

    def latest(self, key: int) -> tuple[int, ...]:
        """The most recent tuple of `key`, or an empty one."""
        return next(reversed(self._tuples.get(key, {})), ())
