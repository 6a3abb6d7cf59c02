"""What may follow the last token: paths from all sources, merged into one trie."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from selfdraft.core.tree import ROOT


@dataclass(frozen=True, slots=True)
class Guess:
    """A path that may follow the last token: its source, its rank among all of that step, and what it is worth."""

    tokens: tuple[int, ...]
    source: str
    rank: int
    matched: int = 0
    """Tokens before the last one that agree with where the path was seen."""
    from_window: bool = False
    """Without the window it would not have been guessed."""


@dataclass(slots=True)
class Node:
    """A node of the trie of all guesses, run or not: the text tells about every one of them how good it was."""

    token: int
    parent: int
    depth: int
    guess: Guess
    """Who said it first; rather one that needs no window."""
    chance: float = 1.0
    """Estimated probability that the whole path down to here is accepted."""

    @property
    def kind(self) -> tuple[str, int, int, int]:
        return self.guess.source, self.guess.matched, min(self.guess.rank, 3), self.depth


def trie(guesses: SequenceOf[Guess]) -> list[Node]:
    """All guesses with shared prefixes merged, in topological order; the first guess that says a node owns it."""
    nodes: list[Node] = []
    known: dict[tuple[int, int], int] = {}
    for guess in guesses:
        above = ROOT
        for depth, token in enumerate(guess.tokens, 1):
            node = known.get((above, token))
            if node is None:
                node = known[above, token] = len(nodes)
                nodes.append(Node(token, above, depth, guess))
            elif nodes[node].guess.from_window and not guess.from_window:
                nodes[node].guess = guess
            above = node
    return nodes


def cut(path: tuple[int, ...], ends: frozenset[int]) -> tuple[int, ...]:
    """The path up to its first end: nothing is accepted behind one."""
    stop = next((place for place, token in enumerate(path, 1) if token in ends), len(path))
    return path[:stop]
