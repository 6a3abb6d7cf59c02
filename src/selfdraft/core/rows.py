"""Packed rows: pending tokens, candidates and probes of many sequences, laid end to end for one forward pass."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one sequence: first `pending` known tokens in a chain, then the nodes of `draft`.

    The target remembers `base` tokens of slot `slot`; row i stands tentatively at place base + i of the slot.
    """

    slot: int
    base: int
    start: int
    """Index of its first row among all rows."""
    pending: int
    draft: Draft
    num_logits: int
    """How many of its last rows the target shall answer with logits."""

    @property
    def size(self) -> int:
        return self.pending + len(self.draft)

    @property
    def positions(self) -> list[int]:
        """Position of every row: one behind its parent's."""
        last = self.base + self.pending - 1
        return [*range(self.base, last + 1), *(last + depth for depth in self.draft.depths)]

    def row(self, node: int) -> int:
        """Row of a draft node within the span; ROOT is the last known token."""
        return self.pending + node if node != ROOT else self.pending - 1


@dataclass(frozen=True, slots=True)
class Rows:
    """All rows of a pass, as plain numbers: nothing here has to be asked of a device.

    `tokens` and `positions` have one entry for each row; `logit_rows` are the rows that are answered with logits.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    spans: tuple[Span, ...]
    logit_rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def probing(self) -> bool:
        """Whether there are probes among them: only these may be mask ids."""
        return any(len(span.draft) > span.draft.num_candidates for span in self.spans)


def pack(work: SequenceOf[tuple[Sequence, int, Draft]]) -> Rows:
    """Lay out (sequence, how many pending tokens, draft) end to end.

    A sequence whose pending tokens do not all fit into its share is only being prefilled: it gets no answers,
    and its draft must be empty.
    """
    spans: list[Span] = []
    tokens: list[int] = []
    answers: list[int] = []
    for sequence, share, draft in work:
        whole = share == len(sequence.tokens) - sequence.num_cached
        assert whole or not len(draft), "a draft hangs under the last known token"
        asked = 1 + len(draft) if whole else 0
        span = Span(sequence.slot, sequence.num_cached, len(tokens), share, draft, asked)
        tokens += sequence.tokens[sequence.num_cached : sequence.num_cached + share]
        tokens += draft.tokens
        answers += range(len(tokens) - asked, len(tokens))
        spans.append(span)
    return laid_out(tokens, spans, answers)


def text_rows(slot: int, base: int, tokens: SequenceOf[int]) -> Rows:
    """A piece of a known text behind the `base` tokens that the slot has: one row for each token, all answered."""
    size = len(tokens)
    span = Span(slot, base, 0, size, EMPTY, size)
    return laid_out(tokens, (span,), range(size))


def chain_rows(items: SequenceOf[tuple[int, int, int]]) -> Rows:
    """One row for each (slot, base, token): how a drafter walks its own chains, one pass per link."""
    spans = tuple(Span(slot, base, i, 1, EMPTY, 1) for i, (slot, base, _) in enumerate(items))
    return laid_out([token for _, _, token in items], spans, range(len(items)))


def group_rows(items: SequenceOf[tuple[int, int, int, SequenceOf[int]]], source: str) -> Rows:
    """For each (slot, base, last token, masks): the token and a chain of mask probes, all of them answered."""
    groups = [
        (slot, base, token, EMPTY.with_probes(masks, range(-1, len(masks) - 1), source))
        for slot, base, token, masks in items
    ]
    return tree_rows(groups)


def tree_rows(items: SequenceOf[tuple[int, int, int, Draft]]) -> Rows:
    """For each (slot, base, last token, tree): the token and the tree under it, all of them answered."""
    spans: list[Span] = []
    tokens: list[int] = []
    for slot, base, token, draft in items:
        spans.append(Span(slot, base, len(tokens), 1, draft, 1 + len(draft)))
        tokens += [token, *draft.tokens]
    return laid_out(tokens, spans, range(len(tokens)))


def laid_out(tokens: SequenceOf[int], spans: SequenceOf[Span], answered: SequenceOf[int]) -> Rows:
    """Rows of these tokens, each at the position that its span says."""
    positions = (position for span in spans for position in span.positions)
    return Rows(tuple(tokens), tuple(positions), tuple(spans), tuple(answered))
