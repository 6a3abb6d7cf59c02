"""Proof by comparison: every drafter's tokens against plain decoding, or against transformers' own greedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from selfdraft.core.sequence import Sequence
from selfdraft.engine.engine import Engine
from selfdraft.models.reference import Model, greedy, logit_gap
from selfdraft.prove.record import Record, decode, first_difference

Reference = Callable[[Sequence], Record]
"""What a fresh sequence should say."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first place where a drafter's text leaves the reference."""

    prompt: int
    drafter: str
    position: int
    """Index of the output token."""
    expected: int | None
    """Token id of the reference; None where it had ended."""
    got: int | None
    gap: float | None
    """Logit of the expected minus logit of the other token, by the stock model on the common prefix."""


@dataclass(slots=True)
class Report:
    """Counts of a whole run."""

    tokens_compared: int = 0
    logit_rows_compared: int = 0
    logit_rows_equal: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        mismatches = [{name: getattr(m, name) for name in Mismatch.__slots__} for m in self.mismatches]
        return {
            "tokens_compared": self.tokens_compared,
            "logit_rows_compared": self.logit_rows_compared,
            "logit_rows_equal": self.logit_rows_equal,
            "mismatches": mismatches,
        }


def plainly(engine: Engine) -> Reference:
    """Our own plain decoding; `engine` drafts nothing. Its logits are compared too."""
    return lambda sequence: decode(engine, sequence, bits=True)


def stock_greedy(model: Model) -> Reference:
    """transformers' own greedy decoding, for sequences whose sampling is plain."""

    def refer(sequence: Sequence) -> Record:
        tokens = greedy(model, sequence.tokens, sequence.remaining, sequence.stop_ids)
        return Record(tuple(tokens), (), (), sequence.stats, 0.0)

    return refer


def verify(
    model: Model,
    reference: Reference,
    engines: dict[str, Engine],
    requests: SequenceOf[Callable[[], Sequence]],
    report: Report,
) -> Iterator[tuple[int, str]]:
    """Compare every engine, by its drafter's name, on every request with the reference and book it in `report`.

    `requests` make fresh sequences; `model` tells the logit gap of a mismatch. Yields (request, drafter) after each.
    """
    for number, request in enumerate(requests):
        wanted = reference(request())
        for name, engine in engines.items():
            record = decode(engine, request(), bits=bool(wanted.digests))
            _compare(report, model, number, name, wanted, record, request())
            yield number, name


def _compare(
    report: Report,
    model: Model,
    number: int,
    name: str,
    reference: Record,
    record: Record,
    fresh: Sequence,
) -> None:
    report.tokens_compared += max(len(reference.tokens), len(record.tokens))
    place = first_difference(reference.tokens, record.tokens)
    same = len(record.tokens) if place is None else place
    pairs = list(zip(reference.digests[:same], record.digests[:same], strict=False))
    report.logit_rows_compared += len(pairs)
    report.logit_rows_equal += sum(one == other for one, other in pairs)
    if place is None:
        return
    expected = reference.tokens[place] if place < len(reference.tokens) else None
    got = record.tokens[place] if place < len(record.tokens) else None
    gap = None
    if expected is not None and got is not None:
        gap = logit_gap(model, [*fresh.tokens, *record.tokens[:place]], expected, got)
    report.mismatches.append(Mismatch(number, name, place, expected, got, gap))
