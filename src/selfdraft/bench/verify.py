"""Proof by comparison: every drafter's tokens against plain decoding, or against transformers' own greedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Literal

from selfdraft.bench.record import Record, decode, first_difference
from selfdraft.core.sequence import Sequence
from selfdraft.engine.loop import Engine
from selfdraft.errors import OptionError
from selfdraft.models import stock

Against = Literal["plain", "hf"]


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

    def as_dict(self) -> dict[str, Any]:
        mismatches = [{name: getattr(m, name) for name in Mismatch.__slots__} for m in self.mismatches]
        return {
            "tokens_compared": self.tokens_compared,
            "logit_rows_compared": self.logit_rows_compared,
            "logit_rows_equal": self.logit_rows_equal,
            "mismatches": mismatches,
        }


def verify(
    model: stock.Model,
    engines: dict[str, Engine],
    requests: SequenceOf[Callable[[], Sequence]],
    against: Against,
    report: Report,
) -> Iterator[tuple[int, str]]:
    """Compare every engine on every request and book it in `report`; yields (request, drafter) after each.

    `engines` by drafter name, "none" among them (it is the reference of 'plain'); `requests` make fresh sequences.
    Errors: OptionError when 'hf' is asked to sample: transformers' sampling is not seeded per position.
    """
    for number, request in enumerate(requests):
        if against == "hf":
            reference = _hf(model, request())
        else:
            reference = decode(engines["none"], request(), bits=True)
        for name, engine in engines.items():
            if against == "plain" and name == "none":
                continue
            record = decode(engine, request(), bits=against == "plain")
            _compare(report, model, number, name, reference, record, request())
            yield number, name


def _compare(
    report: Report,
    model: stock.Model,
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
        gap = stock.logit_gap(model, [*fresh.tokens, *record.tokens[:place]], expected, got)
    report.mismatches.append(Mismatch(number, name, place, expected, got, gap))


def _hf(model: stock.Model, sequence: Sequence) -> Record:
    if not sequence.sampling.plain:
        raise OptionError("against hf compares plain greedy decoding only: leave temperature and penalties out")
    tokens = stock.greedy(model, sequence.tokens, sequence.room, sequence.ends)
    return Record(tuple(tokens), (), (), sequence.stats, 0.0)
