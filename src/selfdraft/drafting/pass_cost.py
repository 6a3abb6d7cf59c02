"""What a pass of the target costs on this machine by its rows, and how many rows pay at that cost.

Source of the rule: renewal-reward. With rho tokens per second, a tree is best when the tokens that it is expected to
bring minus rho times the seconds of its pass are most; so a row pays iff its chance exceeds rho times what it adds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import lru_cache

BLOCK = 256
"""Remembered tokens are counted in blocks when rows are priced."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds of a pass: T(rows) + a(rows) * remembered tokens + s * (sequences - 1), and the host's work beside it.

    Between measured numbers of rows it is a straight line, behind the last one the last line goes on.
    """

    rows: tuple[int, ...]
    """Numbers of rows that were measured, ascending."""
    seconds: tuple[float, ...]
    """T: one pass behind an empty memory, for each of them."""
    per_token: tuple[float, ...]
    """a: seconds that each remembered token adds, for each of them."""
    per_sequence: float = 0.0
    """s: seconds that each further sequence adds to a pass of as many rows."""
    host: float = 0.0
    """Seconds of a plain step beside the pass."""
    spread: float = 1.0
    """How much passes of one row varied while this was measured: the slowest tenth by the quickest quarter."""

    def at(self, rows: int, tokens: int = 0, sequences: int = 1) -> float:
        """Seconds of a pass over `rows` rows of so many sequences that remember `tokens` tokens together.

        A row sees the tokens of its own sequence; those of the others are at least read.
        """
        right = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        low, high = self.rows[right - 1], self.rows[right]
        share = (rows - low) / (high - low)
        own = tokens / sequences
        remembered = _between(self.per_token, right, share) * own + self.per_token[0] * (tokens - own)
        return _between(self.seconds, right, share) + remembered + self.per_sequence * (sequences - 1)

    def on(self, rows: SequenceOf[int]) -> Profile:
        """The same line with other numbers of rows, ascending, as its corners."""
        seconds = tuple(self.at(count) for count in rows)
        return replace(
            self, rows=tuple(rows), seconds=seconds, per_token=tuple(self.at(n, 1) - self.at(n) for n in rows)
        )

    def step(self, rows: int, tokens: int = 0, sequences: int = 1) -> float:
        """Seconds of a step: the pass, and the host's work beside it."""
        return self.at(rows, tokens, sequences) + self.host

    def marginal(self, most: int, tokens: int = 0, sequences: int = 1) -> tuple[float, ...]:
        """Seconds that the first, second, ... further row of every sequence adds, shared out among the sequences.

        T may have steps (shapes are rounded up), so it is the slope of the convex line below T: these never fall,
        and taking rows as long as they are worth it stops where a step is full, not where it begins.
        """
        return _marginal(self, most, block_of(tokens), sequences)

    def further(self, most: int, tokens: int = 0, sequences: int = 1) -> tuple[float, ...]:
        """Seconds that 0, 1, ... `most` rows beside those of plain decoding add to a pass, its steps included."""
        return _further(self, most, block_of(tokens), sequences)


def _between(values: SequenceOf[float], right: int, share: float) -> float:
    return values[right - 1] + share * (values[right] - values[right - 1])


@lru_cache(256)
def _marginal(profile: Profile, most: int, tokens: int, sequences: int) -> tuple[float, ...]:
    seconds = [profile.at(sequences * (1 + n), tokens, sequences) for n in range(most + 1)]
    slopes: list[float] = []
    start = 0
    while start < most:
        ends = range(start + 1, most + 1)
        slope, end = min(((seconds[end] - seconds[start]) / (end - start), -end) for end in ends)
        slopes += [slope / sequences] * (-end - start)
        start = -end
    return tuple(slopes)


@lru_cache(256)
def _further(profile: Profile, most: int, tokens: int, sequences: int) -> tuple[float, ...]:
    plain = profile.at(sequences, tokens, sequences)
    return tuple(profile.at(sequences + n, tokens, sequences) - plain for n in range(most + 1))


def block_of(tokens: int) -> int:
    """The middle of the block that so many remembered tokens are in: prices hardly change from token to token."""
    return tokens // BLOCK * BLOCK + BLOCK // 2


def best_size(chances: SequenceOf[float], costs: SequenceOf[float]) -> int:
    """How many nodes bring most: their chances, which never rise, minus `costs[n]` tokens for n of them.

    A pass has steps: where the first rows are dear and the next ones free, a few likely nodes may not be worth it,
    though each is likelier than the slope of the line below T. Of equals the smallest; 0 where nothing pays.
    """
    best, most, gain = 0, -costs[0], 0.0
    for size, chance in enumerate(chances, 1):
        gain += chance
        if gain - costs[size] > most:
            best, most = size, gain - costs[size]
    return best
