"""Alignment of a copied text: where the copy stands, how long it was right, where it goes on after a difference.

The longest match is a pointer that moves on with the text; when it breaks, the longest context says where to go on
(the match model of context-mixing compressors). Unlike n-gram lookup, an alignment outlives a difference: behind a
changed, added or dropped token it stays in the neighbourhood. That is what edits of a given text need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from selfdraft.drafting.context_tree import BREAK, ContextTree, State

LONGEST = 32
"""Tokens that are compared backwards when a match is new."""
LENGTHS = (1, 2, 3, 4, 5, 7, 10, 16, 32, 64, 128)
"""Classes of match lengths begin here."""
_CLASS = [sum(length >= start for start in LENGTHS) for length in range(LENGTHS[-1] + 1)]
COPIED = (0.0, 0.35, 0.5, 0.55, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.97)
"""Prior acceptance of a copied token by class of its match length."""
WINDOW = 10
"""How far behind a difference the text is looked for."""
PATIENCE = 16
"""Differences in a row after which an alignment is given up."""
RUN = 12
MISSES = 8
KINDS = (RUN + 1) * (MISSES + 1)
"""Kinds of evidence of an alignment: tokens right since the last difference, and recent differences."""


def _beliefs() -> tuple[float, ...]:
    first = [0.5 if not misses else 0.02 for misses in range(MISSES + 1)]
    for run in range(1, RUN + 1):
        first += [min(0.25 + 0.1 * run, 0.9)] * (MISSES + 1)
    second = [0.1] * (MISSES + 1) + [0.02] * (KINDS - MISSES - 1)
    return (*first, *second)


FOLLOWED = _beliefs()
"""First beliefs in the token where an alignment stands, by kind, then in the one behind it."""


@dataclass(slots=True)
class Match:
    """The longest match of the end of a text in the text of a tree: `length` tokens, the copy goes on at `place`."""

    tree: ContextTree
    place: int = 0
    length: int = 0

    def push(self, text: list[int], state: State) -> None:
        """`text` got a token; `state` are the contexts of its end in the tree."""
        original = self.tree.text
        if self.length and self.place < len(original) and original[self.place] == text[-1]:
            self.place += 1
            self.length += 1
        else:
            self.length = 0
        if self.length < len(state):
            self.place, self.length = self.tree.latest(state), len(state)
            most = min(LONGEST, len(text), self.place)
            while self.length < most and original[self.place - self.length - 1] == text[-self.length - 1]:
                self.length += 1


def kind_of_match(length: int) -> int:
    """The class of a match length."""
    return _CLASS[length] if length < len(_CLASS) else len(LENGTHS)


class Aligned(NamedTuple):
    """A place in an original: `run` tokens were right since the last of the recent `misses`."""

    place: int
    run: int = 0
    misses: int = 0

    @property
    def kind(self) -> int:
        _, run, misses = self
        return (run if run < RUN else RUN) * (MISSES + 1) + (misses if misses < MISSES else MISSES)


def realign(original: list[int], at: Aligned, token: int) -> Aligned | None:
    """Where the original goes on behind `token`: there if it agrees, else behind the next such token near by, else
    at the same place. None after too many differences."""
    place, run, misses = at
    if place < len(original) and original[place] == token:
        fewer = 0 if run >= 30 else misses - 1 if run >= 4 and misses else misses
        return Aligned(place + 1, run + 1, fewer)
    if misses >= PATIENCE:
        return None
    near = original[place + 1 : place + WINDOW]
    if token in near:
        ahead = near.index(token)
        if BREAK not in near[:ahead]:
            return Aligned(place + ahead + 2, 1, misses + 1)
    return Aligned(place, 0, misses + 1)
