"""An order of a tree's rows in which every row sees at most two intervals of keys: what a fused kernel wants.

In depth-first order the ancestors of a node are one run of rows, broken at every ancestor that is not its parent's
first child. Visiting the child with the most breaks below it first keeps the worst row as good as depth-first order
can make it. For a lookahead window this gives the column-major layout of the FlashAttention fork that Fu et al.
published (arXiv 2402.02057): the first cells of all columns in a chain, then column by column. A chain and branches
that share nothing need one interval, the window two; a trie needs one more than its most breaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from selfdraft.core.tree import ROOT, Draft


@dataclass(frozen=True, slots=True)
class Intervals:
    """Rows of a draft in another order. Besides the known text, row r sees the two half-open intervals `sees[r]`."""

    order: tuple[int, ...]
    """`order[r]` is the draft's node in row r."""
    sees: tuple[tuple[int, int, int, int], ...]
    """(start1, stop1, start2, stop2) of each row, counted in the new order; the last ends behind the row itself.
    A row that needs one interval has an empty first one."""


def intervals(draft: Draft) -> Intervals | None:
    """Lay the nodes of `draft` out depth first; None when some node needs more than two intervals."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(draft.parents):
        children.setdefault(parent, []).append(node)
    breaks = [0] * len(draft)
    for node in reversed(range(len(draft))):  # children come behind their parents
        below = children.get(node, [])
        below.sort(key=lambda child: -breaks[child])
        breaks[node] = max((breaks[child] + (place > 0) for place, child in enumerate(below)), default=0)
    order: list[int] = []
    waiting = children.get(ROOT, [])[::-1]
    while waiting:
        order.append(waiting.pop())
        waiting += reversed(children.get(order[-1], []))
    row = {node: place for place, node in enumerate(order)}
    runs: dict[int, list[tuple[int, int]]] = {ROOT: []}
    for place, node in enumerate(order):
        above = runs[draft.parents[node]]
        if above and row[draft.parents[node]] == place - 1:
            runs[node] = [*above[:-1], (above[-1][0], place + 1)]
        else:
            runs[node] = [*above, (place, place + 1)]
        if len(runs[node]) > 2:
            return None
    sees = [runs[node] if len(runs[node]) == 2 else [(0, 0), *runs[node]] for node in order]
    return Intervals(tuple(order), tuple((*one, *two) for one, two in sees))
