"""What followed the last one to six tokens before: a context tree that grows with a text, constant time per token.

The tree holds every n-gram of at most ORDER + 1 tokens that occurred twice or more; an n-gram that occurred once is
only the place where it ended, so that a token costs a few dictionary entries and most of the text costs none.
Sources: prediction by partial matching (Cleary and Witten 1984) for contexts of several orders; SuffixDecoding
(arXiv 2411.04975) for frequency-weighted trees over request and earlier outputs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf

ORDER = 6
"""Longest context."""
WIDEST = 8
"""Continuations of one context that are looked at: the most frequent ones and the latest."""
ENOUGH = 6
"""Continuations of all orders together behind which no shorter context is asked."""
BREAK = -1
"""Stands between the outputs of a memory; no token."""
SHARES = (0.03, 0.06, 0.12, 0.25, 0.5, 0.8, 0.95)
"""Classes of a continuation's share among all that followed a context."""
_STEPS = 256
_CLASS = [sum(step / _STEPS >= share for share in SHARES) for step in range(_STEPS + 1)]
_KINDS = 2 * (len(SHARES) + 3)
"""Kinds of one order: a unique occurrence, one that was followed once, then share and latest."""
SINGLE = (0.0, 0.35, 0.55, 0.6, 0.65, 0.7, 0.8)
"""Prior acceptance of the only continuation of a context that was followed once, by order."""


def _beliefs() -> tuple[float, ...]:
    found: list[float] = []
    for single in SINGLE:
        found += [single, single]
        for low, high in zip((0.0, *SHARES), (*SHARES, 1.0), strict=True):
            found += [0.4 * (low + high) / 2, 0.6 * (low + high) / 2]
        found += [0.9 * single, min(single + 0.1, 1.0)]
    return tuple(found)


BELIEFS = _beliefs()
"""First beliefs by kind of evidence: order of the context, share of the continuation, whether it was the latest."""


Guesses = Mapping[int, int]
"""Token -> kind of evidence, for what may follow a place. Never changed once they were handed out."""
SILENCE: Guesses = {}


class Node:
    """An n-gram that occurred at least twice, as a context of what follows it."""

    __slots__ = ("after", "best", "guessed_at", "guesses", "last", "ranked", "seen", "total", "whole", "whole_at")

    def __init__(self, after: dict[int, Node | int], total: int, last: int) -> None:
        self.after = after
        """Token -> the n-gram with it: a node, or, while that occurred only once, the place behind its end."""
        self.seen = 2
        """Occurrences."""
        self.total = total
        """Occurrences that something followed."""
        self.last = last
        """Place of the token that followed latest."""
        self.best: SequenceOf[int] = ()
        """The most frequent continuations when `total` was `ranked`."""
        self.ranked = 0
        self.guesses: Guesses = SILENCE
        """Continuations and their kinds when `total` was `guessed_at`."""
        self.guessed_at = -1
        self.whole: Guesses = SILENCE
        """The guesses of this context and all shorter ones when the text had `whole_at` tokens."""
        self.whole_at = -1


State = list[Node | int]
"""The contexts at one place by order, shortest first; at most one unique occurrence, and then as the last."""


class ContextTree:
    """Counts of all n-grams of a growing text. `text[i]` is the token at place i."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.text: list[int] = []
        self.state: State = []
        """The contexts at the end of the text."""
        self._root = Node({}, 0, 0)
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Read the next token: one dictionary entry for each context of the end."""
        text, place = self.text, len(self.text)
        text.append(token)
        longer: State = []
        for node in (self._root, *self.state):
            if not isinstance(node, Node):
                continue
            node.total += 1
            node.last = place
            child = node.after.get(token)
            if child is None:
                node.after[token] = place + 1
                continue
            if isinstance(child, Node):
                child.seen += 1
            else:  # the second occurrence: what followed the first is a continuation
                follower = text[child]
                known = follower != BREAK
                child = node.after[token] = Node({follower: child + 1} if known else {}, int(known), child)
            longer.append(child)
        self.state = longer[:ORDER]

    def separate(self) -> None:
        """End a text here: no n-gram reaches over this place."""
        self.text.append(BREAK)
        self.state = []

    def step(self, state: State, token: int) -> State:
        """The contexts one token on; empty when the token is new."""
        child = self._root.after.get(token)
        if child is None:
            return []
        found: State = [child]
        if not isinstance(child, Node):
            return found
        for node in state[: ORDER - 1]:
            if isinstance(node, Node):
                child = node.after.get(token)
                if child is None:
                    break
                found.append(child)
                if isinstance(child, Node):
                    continue
            elif node < len(self.text) and self.text[node] == token:
                found.append(node + 1)
            break
        return found

    def guess(self, state: State) -> Guesses:
        """What may follow: each token with the kind of the longest context that it followed."""
        text, found = self.text, SILENCE
        last = state[-1] if state else None
        if isinstance(last, Node) and last.whole_at == len(text):
            return last.whole
        for order in range(len(state), 0, -1):
            node = state[order - 1]
            if isinstance(node, Node):
                guesses = node.guesses if node.guessed_at == node.total else self._continuations(node, order)
            elif node < len(text) and text[node] != BREAK:
                guesses = {text[node]: order * _KINDS}
            else:
                continue
            found = {**guesses, **found} if found else guesses
            if len(found) >= ENOUGH:
                break
        if isinstance(last, Node):
            last.whole, last.whole_at = found, len(text)
        return found

    def latest(self, state: State) -> int:
        """Place behind the latest earlier occurrence of the longest context."""
        node = state[-1]
        return node.last if isinstance(node, Node) else node

    def _continuations(self, node: Node, order: int) -> Guesses:
        """Continuations of a context of that order with their kinds; kept until it is followed again."""
        after, total, base = node.after, node.total, order * _KINDS
        latest = self.text[node.last]
        node.guessed_at = total
        if total == 1:
            node.guesses = {latest: base + 1}
            return node.guesses
        guesses: dict[int, int] = {}
        for token in after if len(after) <= WIDEST else self._most(node, latest):
            child = after[token]
            seen = child.seen if isinstance(child, Node) else 1
            size = _CLASS[_STEPS * seen // total] if seen < total else len(SHARES) + 1
            guesses[token] = base + 2 * size + 2 + (token == latest)
        node.guesses = guesses
        return guesses

    def _most(self, node: Node, latest: int) -> SequenceOf[int]:
        """The most frequent continuations, ranked anew whenever the node has grown by an eighth, and the latest."""
        if 8 * node.total >= 9 * node.ranked:
            after = node.after

            def seen(token: int) -> int:
                child = after[token]
                return child.seen if isinstance(child, Node) else 1

            node.best, node.ranked = heapq.nlargest(WIDEST, after, key=seen), node.total
        return node.best if latest in node.best else [*node.best, latest]
