"""Test doubles for drafters: a target without a network, drafters that try to break the text, and the oracle.

A drafter from another package is proved in three lines:

    from selfdraft.testing import check_drafter

    def test_my_drafter():
        check_drafter(MyDrafter)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selfdraft.core.rows import Rows, Span
from selfdraft.core.sampler import choose, process
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import Draft
from selfdraft.core.verify import Result
from selfdraft.engine.engine import Engine
from selfdraft.protocols import Drafter, DraftExtras, Target
from selfdraft.types import Budget, PassVariant, SamplingParams

VOCAB = 48
CONTEXT = 160
TABLE = 4096
"""Distributions that `markov` knows; a text picks one of them by its last two tokens."""
PROMPTS = ([3], [1, 2, 3, 1, 2, 3, 1, 2], list(range(20)), [7, 7, 7, 7, 9], [5, 4, 3, 2, 1] * 5)
SAMPLINGS = (
    SamplingParams(max_tokens=40),
    SamplingParams(max_tokens=40, temperature=0.8, seed=1),
    SamplingParams(max_tokens=33, temperature=1.2, top_k=20, top_p=0.9, seed=2),
    SamplingParams(max_tokens=29, repetition_penalty=1.3, presence_penalty=0.4),
)
Logits = Callable[[SequenceOf[int]], Tensor]
"""Tokens of a path -> logits [vocab] of what follows."""


def markov(seed: int = 0, sharpness: float = 3.0) -> Logits:
    """Logits that depend on the last two tokens of a path: a language in which drafters find something to learn."""
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn(TABLE, VOCAB, generator=draw) * sharpness

    def logits(path: SequenceOf[int]) -> Tensor:
        before = path[-2] if len(path) > 1 else 0
        return table[(path[-1] * 31 + before * 1009) % TABLE]

    return logits


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of a slot: what the row that was run there saw, itself last."""

    path: tuple[int, ...]
    cheap: bool
    """It was run by a pass that was made cheaper, so no text may rest on it."""


class FakeTarget:
    """A `Target` without a network: `logits` say what follows a path. It refuses rows that do not fit its memory.

    A pass that is made cheaper (`short`) answers with logits that are a little off, as a real one does.
    Errors: AssertionError for rows that no real target could run.
    """

    num_mask_ids = 0

    def __init__(
        self,
        logits: Logits | None = None,
        *,
        slots: int = 1,
        vocab: int = VOCAB,
        context: int = CONTEXT,
        bucket: int = 16,
        extras: DraftExtras | None = None,
    ) -> None:
        self.logits, self.vocab, self.max_length, self.bucket = logits or markov(), vocab, context, bucket
        self.extras = extras or DraftExtras(num_layers=4)
        self.cells: list[list[Cell]] = [[] for _ in range(slots)]
        """What lies in each slot, place by place: rows of the last pass behind what was kept."""
        self.memory: list[list[int]] = [[] for _ in range(slots)]
        """Tokens that were kept in each slot."""
        self.sizes: list[int] = []
        """Rows of every pass."""
        self.fails = False
        """Whether the next pass raises."""

    def next_boundary(self, position: int) -> int:
        return (position // self.bucket + 1) * self.bucket

    def forward(self, rows: Rows, short: PassVariant | None = None) -> Tensor:
        if self.fails:
            raise RuntimeError("planted")
        self.sizes.append(len(rows))
        slots, seen = set[int](), list[tuple[int, ...]]()
        for span in rows.spans:
            assert span.slot not in slots, "two sequences share a slot"
            assert span.start == len(seen), "spans do not lie end to end"
            slots.add(span.slot)
            before = self._prefix(span, short is not None)
            paths: list[tuple[int, ...]] = []
            for row in range(span.size):
                node = row - span.pending
                parent = row - 1 if node < 0 else span.row(span.draft.parents[node])
                paths.append((*(before if parent < 0 else paths[parent]), rows.tokens[span.start + row]))
                assert rows.positions[span.start + row] == len(paths[-1]) - 1, "a position is a depth"
                assert len(paths[-1]) <= self.max_length, "a row behind the context"
            self.cells[span.slot][span.base :] = [Cell(path, short is not None) for path in paths]
            seen += paths
        answers = torch.zeros(len(rows.logit_rows), self.vocab)
        for i, row in enumerate(rows.logit_rows):
            answers[i] = self.logits(seen[row])
            if short is not None:  # a little of what followed one token earlier
                answers[i] += 0.3 * self.logits(seen[row][:-1] or seen[row])
        return answers

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        cells = self.cells[slot]
        cells[base:] = [cells[base + row] for row in order]
        tokens = tuple(cell.path[-1] for cell in cells)
        for place in range(base, len(cells)):
            assert cells[place].path == tokens[: place + 1], "a kept row saw something else than what is kept"
        self.memory[slot] = list(tokens)

    def reuse(self, slot: int, source: int, count: int) -> None:
        assert count <= len(self.cells[source]), "what is reused is not there"
        self.cells[slot] = self.cells[source][:count]
        self.memory[slot] = self.memory[source][:count]

    def _prefix(self, span: Span, cheap: bool) -> tuple[int, ...]:
        """The tokens that a span stands behind."""
        cells = self.cells[span.slot]
        assert span.base <= len(cells), "rows do not follow what is remembered"
        assert cheap or not any(cell.cheap for cell in cells[: span.base]), "text rests on a cheaper pass"
        tokens = tuple(cell.path[-1] for cell in cells[: span.base])
        assert not tokens or cells[span.base - 1].path == tokens, "rows stand behind a branch that was not taken"
        return tokens


class Adversary:
    """A drafter that proposes random trees: right ones, wrong ones, ids out of range, too many and too deep ones."""

    def __init__(self, target: Target, *, seed: int = 0) -> None:
        self.vocab, self.random = target.vocab, random.Random(seed)

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return [self._tree(self.random.randrange(12)) for _ in sequences]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        pass

    def _tree(self, size: int) -> Draft:
        tokens = tuple(self.random.randrange(-1, self.vocab + 2) for _ in range(size))
        parents = tuple(self.random.randrange(-1, node) if node else -1 for node in range(size))
        return Draft(tokens, parents, ("adversary",) * size, size)


def plain_tokens(logits: Logits, prompt: SequenceOf[int], sampling: SamplingParams, ends: frozenset[int]) -> list[int]:
    """Plain decoding, written out: one token after another, with no engine, no tree and no cache."""
    sequence = _opened(prompt, sampling, ends)
    path = list(prompt)
    while len(path) < sequence.max_length:
        scores = process(logits(path), sampling, path, len(prompt), ends)
        path.append(choose(scores, sampling, sequence.seed, len(path)))
        if path[-1] in ends:
            break
    return path[len(prompt) :]


def check_drafter(make: Callable[..., Drafter], *, extras: DraftExtras | None = None, **options: object) -> None:
    """The oracle: whatever the sampling and the batch, the text is that of plain decoding, token for token.

    `make(target, **options)` is called as `selfdraft` calls it. `extras`: what the target has beside its passes, such
    as a measured cost. Errors: AssertionError with the first answer that differs; whatever the drafter raises.
    """
    logits = markov()
    for slots in (1, 3):
        for ends in (frozenset[int](), frozenset({11, 30})):
            target = FakeTarget(logits, slots=slots, extras=extras)
            drafter = make(target, **options)
            for sampling in SAMPLINGS:
                wanted = [plain_tokens(logits, prompt, sampling, ends) for prompt in PROMPTS]
                found = [list(one.output) for one in _run(target, drafter, sampling, ends, slots)]
                for prompt, one, other in zip(PROMPTS, wanted, found, strict=True):
                    assert one == other, f"{sampling}, {slots} at once, prompt {prompt}: {other}, plain is {one}"


def _run(
    target: FakeTarget, drafter: Drafter, sampling: SamplingParams, ends: frozenset[int], slots: int
) -> list[Sequence]:
    sequences = [_opened(prompt, sampling, ends) for prompt in PROMPTS]
    engine = Engine(target, drafter, slots=slots)
    for _ in _limited(engine.generate(sequences)):
        pass
    return sequences


def _limited(steps: Iterator[object], most: int = 10_000) -> Iterator[object]:
    """The steps; a drafter that makes no progress is told so instead of running for ever."""
    for count, step in enumerate(steps):
        assert count < most, "the engine makes no progress"
        yield step


def _opened(prompt: SequenceOf[int], sampling: SamplingParams, ends: frozenset[int]) -> Sequence:
    return open_sequence(list(prompt), replace(sampling), seed=sampling.seed or 0, eos=ends, context=CONTEXT)
