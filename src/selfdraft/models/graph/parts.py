"""A pass in parts: all rows that decode together, and every prefill by itself: its shape is its prompt's matter."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selfdraft.core.rows import Rows, Span


@dataclass(frozen=True, slots=True)
class RowsPart:
    """Some spans of a pass as a pass of their own."""

    rows: Rows
    answers: tuple[int, ...]
    """Which of the answers of the whole pass its own are."""
    decodes: bool
    """Whether no span in it has more than one pending token."""


def parts_of(rows: Rows) -> Iterator[RowsPart]:
    """The spans that decode as one part, then each of the others alone."""
    decoding = [span for span in rows.spans if span.pending == 1]
    if len(decoding) == len(rows.spans):
        yield RowsPart(rows, tuple(range(len(rows.logit_rows))), True)
        return
    if decoding:
        yield _part(rows, decoding, True)
    for span in rows.spans:
        if span.pending != 1:
            yield _part(rows, [span], False)


def _part(rows: Rows, spans: SequenceOf[Span], decodes: bool) -> RowsPart:
    own: list[Span] = []
    chosen: list[int] = []
    for span in spans:
        own.append(replace(span, start=len(chosen)))
        chosen += range(span.start, span.start + span.size)
    place = {row: i for i, row in enumerate(chosen)}
    answered = [(i, place[row]) for i, row in enumerate(rows.logit_rows) if row in place]
    tokens, positions = (tuple(column[row] for row in chosen) for column in (rows.tokens, rows.positions))
    part = Rows(tokens, positions, tuple(own), tuple(row for _, row in answered))
    return RowsPart(part, tuple(i for i, _ in answered), decodes)


def joined(parts: SequenceOf[tuple[RowsPart, Tensor]]) -> Tensor:
    """The answers [answers, vocab] of the whole pass out of those of its parts."""
    if len(parts) == 1:
        return parts[0][1]
    order = [i for part, _ in parts for i in part.answers]
    said = torch.cat([logits for _, logits in parts])
    if order == sorted(order):
        return said
    back = sorted(range(len(order)), key=order.__getitem__)
    return said[torch.tensor(back, device=said.device)]
