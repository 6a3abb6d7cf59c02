"""Drafted against plain decoding in one process: warm-up, several runs in alternation, medians, equal texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from selfdraft.bench.record import Record, decode
from selfdraft.core.sequence import Sequence
from selfdraft.engine.loop import Engine


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians over `runs`; a speed-up is only given when the texts are equal."""

    texts_equal: bool
    plain_tokens_per_second: float
    drafted_tokens_per_second: float
    runs: int

    @property
    def speedup(self) -> float | None:
        if not self.texts_equal or not self.plain_tokens_per_second:
            return None
        return self.drafted_tokens_per_second / self.plain_tokens_per_second

    def as_dict(self) -> dict[str, object]:
        return {
            "texts_equal": self.texts_equal,
            "plain_tokens_per_second": round(self.plain_tokens_per_second, 2),
            "drafted_tokens_per_second": round(self.drafted_tokens_per_second, 2),
            "speedup_vs_plain": round(self.speedup, 3) if self.speedup else None,
            "runs": self.runs,
        }


def compare(plain: Engine, drafted: Engine, request: Callable[[], Sequence], runs: int = 3) -> Comparison:
    """Run `request` through both engines, once to warm up and `runs` times in alternation."""
    plains, drafts = [decode(plain, request())], [decode(drafted, request())]
    for _ in range(runs):
        plains.append(decode(plain, request()))
        drafts.append(decode(drafted, request()))
    equal = all(record.tokens == plains[0].tokens for record in (*plains, *drafts))
    return Comparison(equal, _speed(plains[1:]), _speed(drafts[1:]), runs)


def _speed(records: list[Record]) -> float:
    return len(records[0].tokens) / median(record.seconds for record in records)
