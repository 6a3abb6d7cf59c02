"""Drafted against plain decoding in one process: warm-up, several runs in alternation, medians, equal texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from selfdraft.core.sequence import Sequence
from selfdraft.engine.engine import Engine
from selfdraft.prove.record import Record, decode


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians over `runs`; a speed-up is only given when the texts are equal."""

    texts_equal: bool
    plain_tokens_per_second: float
    drafted_tokens_per_second: float
    runs: int
    tokens_per_step: float = 1.0
    """Mean acceptance length of the drafted runs, the bonus token counted."""

    @property
    def reason(self) -> str:
        """Why drafting was slower here; empty when it was not."""
        if self.speedup is None or self.speedup >= 1:
            return ""
        accepted = f"only {self.tokens_per_step:.2f} tokens a step"
        if self.tokens_per_step < 1.1:
            return f"slower by what the trial of drafting cost: the answer repeats hardly anything ({accepted})"
        return f"slower because passes over drafts cost more here than the accepted tokens save ({accepted})"

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
            "mean_acceptance_length": round(self.tokens_per_step, 3),
            "reason": self.reason,
            "runs": self.runs,
        }


def compare(plain: Engine, drafted: Engine, request: Callable[[], Sequence], runs: int = 3) -> Comparison:
    """Run `request` through both engines, once to warm up and `runs` times in alternation."""
    plains, drafts = [decode(plain, request())], [decode(drafted, request())]
    for _ in range(runs):
        plains.append(decode(plain, request()))
        drafts.append(decode(drafted, request()))
    equal = all(record.tokens == plains[0].tokens for record in (*plains, *drafts))
    length = drafts[-1].stats.mean_acceptance_length
    return Comparison(equal, _speed(plains[1:]), _speed(drafts[1:]), runs, length)


def _speed(records: list[Record]) -> float:
    return len(records[0].tokens) / median(record.seconds for record in records)
