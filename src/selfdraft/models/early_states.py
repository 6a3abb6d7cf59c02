"""Hidden states that a layer-skip draft has computed already, kept for the verification that follows.

Blocks before the first skipped sublayer compute in a drafting pass just what the target computes (`methods.md` A1,
rule c). So their keys and values are in the cache already, and the rows need not run through these blocks again:
verification resumes at the first skipped block. Saves arithmetic, not memory traffic: the last draft token, which no
drafting pass has read, still runs through all blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from selfdraft.core.rows import Rows, Span
from selfdraft.core.tree import EMPTY


@dataclass(slots=True)
class _Trail:
    """Rows drafted behind one another in a slot, from place `start` on."""

    start: int
    tokens: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)


class EarlyStates:
    """Per slot, the rows drafted since the last full pass: token and hidden state [hidden] entering `block`."""

    def __init__(self) -> None:
        self.block = 0
        self.trails: dict[int, _Trail] = {}
        """By slot; empty where no drafting pass has left anything."""

    def note(self, rows: Rows, hidden: Tensor, block: int) -> None:
        """Remember the rows of a drafting pass; `hidden` [n, hidden] are their states entering `block`."""
        if block != self.block:
            self.trails.clear()
            self.block = block
        for span in rows.spans:
            trail = self.trails.setdefault(span.slot, _Trail(span.base))
            if span.size != 1 or span.base != trail.start + len(trail.tokens):
                trail = self.trails[span.slot] = _Trail(span.base)
            if span.size == 1:
                trail.tokens.append(rows.tokens[span.start])
                trail.hidden.append(hidden[span.start])

    def forget(self, rows: Rows) -> None:
        """Something else was written into the slots of these rows."""
        for span in rows.spans:
            self.trails.pop(span.slot, None)

    def drop(self, slot: int) -> None:
        """Another sequence has this slot now."""
        self.trails.pop(slot, None)

    def take(self, rows: Rows) -> dict[int, Tensor]:
        """Known hidden states by flat row index, for a full pass over `rows`; then all trails of its slots end.

        Only chains are resumed: there every row stands where the drafting pass wrote its keys and values.
        """
        known: dict[int, Tensor] = {}
        for span in rows.spans:
            trail = self.trails.pop(span.slot, None)
            if trail is None or trail.start != span.base or not _is_chain(span):
                continue
            for i in range(min(len(trail.tokens), span.size)):
                if trail.tokens[i] != rows.tokens[span.start + i]:
                    break
                known[span.start + i] = trail.hidden[i]
        return known


def _is_chain(span: Span) -> bool:
    return span.draft.parents == tuple(range(-1, len(span.draft) - 1))


def unknown_part(rows: Rows, known: dict[int, Tensor]) -> Rows | None:
    """The rows that still have to run through the first blocks, as a pass of its own without answers."""
    spans: list[Span] = []
    chosen: list[int] = []
    for span in rows.spans:
        done = sum(1 for row in range(span.start, span.start + span.size) if row in known)
        left = span.size - done
        if not left:
            continue
        start = len(chosen)
        chosen += range(span.start + done, span.start + span.size)
        if done:
            spans.append(Span(span.slot, span.base + done, start, left, EMPTY, 0))
        else:
            spans.append(Span(span.slot, span.base, start, span.pending, span.draft, 0))
    if not chosen:
        return None
    tokens, positions = (tuple(all_of[row] for row in chosen) for all_of in (rows.tokens, rows.positions))
    return Rows(tokens, positions, tuple(spans), ())
