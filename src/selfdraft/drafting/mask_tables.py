"""What mask rows say, asked of a device at once: for each row the best tokens behind all that may come before it.

A tree asks its places node by node, and on a device each question is a wait. Here all of them are asked together,
before it is known where acceptance ends: behind a mask stands the token that the target says at an end of acceptance,
or one of the likeliest tokens of the mask before. The answers come with those of the step (`core/told.py`).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from selfdraft.core.one_row import apart
from selfdraft.core.rows import Rows, Span
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import ROOT
from selfdraft.drafting.mask_prediction import Ahead, Guess, Link, MaskTokens, Scored, places, scored

BEFORE = 32
"""Likeliest tokens of a mask that are thought to come before the next one; behind others its guesses have no link."""
ENDS = 32
"""Most ends of acceptance for which one row is asked."""
UNKNOWN = -1
"""Stands where there is no token."""


class KnownPlace:
    """What a row says of one place, on the host: its guesses behind each token that was thought to come before.

    `before` [b] are those tokens; `tokens` and `chances` [b + 1, k] the guesses, the last ones those without a link.
    """

    __slots__ = ("_columns", "before", "chances", "tokens")

    def __init__(self, before: Tensor, tokens: Tensor, chances: Tensor) -> None:
        self.before, self.tokens, self.chances = before, tokens, chances
        self._columns: dict[int, int] | None = None

    def after(self, token: int, link: Link, most: int) -> Guess:
        """The best `most` tokens, of those that were asked for, when `token` stands before this place."""
        if self._columns is None:
            found: list[int] = self.before.tolist()
            self._columns = {known: column for column, known in reversed([*enumerate(found)])}
        column = self._columns.get(token, -1)
        tokens: list[int] = self.tokens[column, :most].tolist()
        chances: list[float] = self.chances[column, :most].tolist()
        return Guess(tuple(tokens), tuple(chances))


@dataclass(frozen=True, slots=True)
class Question:
    """Rows that were asked about, and how to read the numbers that come back."""

    numbers: Tensor
    """int64, on the device: tokens before, guesses, and the bits of their chances."""
    rows: int
    before: int
    most: int

    def read(self, numbers: Tensor) -> list[KnownPlace]:
        """The places, row by row, out of `numbers` on the host."""
        guesses = self.rows * (self.before + 1) * self.most
        before, tokens, bits = torch.split(numbers, [self.rows * self.before, guesses, guesses])
        shape = self.rows, self.before + 1, self.most
        rows = zip(
            before.view(self.rows, self.before), tokens.view(shape), bits.view(torch.float64).view(shape), strict=True
        )
        return [KnownPlace(*row) for row in rows]


def ask(said: SequenceOf[Scored], above: Tensor, known: Tensor, masks: MaskTokens, most: int) -> Question:
    """Ask about all rows of `said`, laid end to end: the best `most` tokens behind each token that may come before.

    `above` [rows]: for each row the one whose likeliest tokens may come before, or ROOT; `known` [rows, e]: further
    tokens, or UNKNOWN.
    """
    ids, logits, noise = (torch.cat([getattr(part, name) for part in said]) for name in ("ids", "logits", "noise"))
    heat = torch.cat([logits.new_full((len(part.ids), 1, 1), part.temperature) for part in said])
    likely = ids[:, :BEFORE][above.clamp(min=0)].masked_fill((above < 0)[:, None], UNKNOWN)
    before = torch.cat([likely, known], 1)
    shift = masks.shifts(before.clamp(min=0), ids)
    scores = logits[:, None]
    if shift is None:
        before = before[:, :0]
    else:
        scores = torch.cat([scores + shift.to(logits.dtype) / heat, scores], 1)
    best = (scores + noise[:, None]).softmax(-1).topk(min(most, ids.shape[1]))
    tokens = ids[:, None].expand(-1, scores.shape[1], -1).gather(2, best.indices)
    parts = before, tokens, best.values.double().view(torch.int64)
    rows, columns = before.shape
    return Question(torch.cat([part.flatten() for part in parts]), rows, columns, best.values.shape[2])


def foresee(answers: SequenceOf[tuple[Tensor, Sequence]], masks: MaskTokens, most: int) -> list[list[Ahead]]:
    """What rows [n, vocab] of each sequence say of the places behind its last token, each row of the next one.

    On a device all sequences are asked in one wait, but for those whose sampling looks at more than the row.
    """
    together = [number for number, (logits, one) in enumerate(answers) if apart(logits) and one.sampling.local]
    found: list[list[Ahead]] = []
    for number, (logits, sequence) in enumerate(answers):
        found.append([] if number in together else [*places(logits, sequence)])
    if not together:
        return found
    said, parents, last = list[Scored](), list[int](), list[int]()
    for number in together:
        logits, sequence = answers[number]
        end = len(sequence.tokens)
        part = scored(logits[: sequence.remaining], sequence.sampling, sequence.seed, range(end, end + len(logits)))
        size, first = len(part.ids), len(parents)
        parents += [ROOT, *range(first, first + size - 1)][:size]
        last += [sequence.tokens[-1], *[UNKNOWN] * size][:size]
        said.append(part)
    sent = torch.tensor([parents, last], device=said[0].ids.device)
    question = ask(said, sent[0], sent[1][:, None], masks, most)
    rows = iter(question.read(question.numbers.cpu()))
    for number, part in zip(together, said, strict=True):
        found[number] = [next(rows) for _ in part.ids]
    return found


@dataclass(slots=True)
class MaskRows:
    """Mask rows of one sequence: their numbers among its rows, and what may come before each."""

    rows: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    """For each of them the one before it in its group, or ROOT."""
    ends: list[list[int]] = field(default_factory=list)
    """For each of them the rows behind whose token it may be read first."""


def mask_rows(span: Span, ids: range) -> MaskRows:
    """The mask rows of a draft. Acceptance may end at any candidate: the rows that are read then are those of its own
    group, or the later ones of a group above it (`read_group`)."""
    draft, found = span.draft, MaskRows()
    groups: dict[int, list[int]] = {}
    group_of: dict[int, list[int]] = {}
    for node in range(draft.num_candidates, len(draft)):
        if draft.tokens[node] in ids:
            parent = draft.parents[node]
            if parent not in group_of:  # a group begins here
                groups[parent] = group_of[parent] = []
            group = group_of[node] = group_of[parent]
            found.parents.append(group[-1] if group else ROOT)
            group.append(len(found.rows))
            found.rows.append(1 + node)
            found.ends.append([])
    for point in (ROOT, *range(draft.num_candidates)):
        above, ahead = point, 0
        while above not in groups and above != ROOT:
            above, ahead = draft.parents[above], ahead + 1
        group = groups.get(above, [])
        if ahead < len(group) and len(found.ends[group[ahead]]) < ENDS:
            found.ends[group[ahead]].append(1 + point)
    return found


class MaskTables:
    """Asks about the mask rows of every step of a drafter; see `selfdraft.core.verify.Beside`."""

    def __init__(self, masks: MaskTokens, most: int) -> None:
        self.masks, self.most = masks, most
        self._asked: list[tuple[Sequence, list[int]]] = []
        """Whose rows were asked about."""
        self._question: Question | None = None
        self._known: WeakKeyDictionary[Sequence, dict[int, KnownPlace]] = WeakKeyDictionary()

    def ask(self, rows: Rows, sequences: SequenceOf[Sequence], logits: Tensor, said: Tensor) -> Tensor | None:
        """What is to be fetched with the answers: nothing where no request has mask rows."""
        self._asked, self._question, self._known = [], None, WeakKeyDictionary()
        parts, parents, ends, first = list[Scored](), list[int](), list[list[int]](), 0
        for span, sequence in zip(rows.spans, sequences, strict=True):
            found = mask_rows(span, self.masks.ids) if sequence.sampling.local and span.num_logits else MaskRows()
            if found.rows:
                last = len(sequence.tokens)
                positions = [last + span.draft.depths[row - 1] for row in found.rows]
                start, stop = first + found.rows[0], first + found.rows[-1] + 1
                own = logits[start:stop]
                assert len(own) == len(positions), "whoever hangs groups has no other probes"
                parts.append(scored(own, sequence.sampling, sequence.seed, positions))
                parents += [parent if parent == ROOT else len(ends) + parent for parent in found.parents]
                ends += [[first + row for row in some] for some in found.ends]
                self._asked.append((sequence, found.rows))
            first += span.num_logits
        if not parts:
            return None
        wide = max(map(len, ends))
        lines = [[above, *some, *[UNKNOWN] * (wide - len(some))] for above, some in zip(parents, ends, strict=True)]
        sent = torch.tensor(lines, device=said.device)
        known = said[sent[:, 1:].clamp(min=0)].masked_fill(sent[:, 1:] < 0, UNKNOWN)
        self._question = ask(parts, sent[:, 0], known, self.masks, self.most)
        return self._question.numbers

    def take(self, numbers: Tensor) -> None:
        """What was asked for has come to the host."""
        assert self._question is not None, "it was asked for"
        places = iter(self._question.read(numbers))
        for sequence, rows in self._asked:
            self._known[sequence] = {row: next(places) for row in rows}

    def places(self, sequence: Sequence, rows: SequenceOf[int]) -> list[Ahead] | None:
        """What these rows of a sequence's last step say; None where they were not asked about."""
        known = self._known.get(sequence)
        return None if known is None else [known[row] for row in rows]
