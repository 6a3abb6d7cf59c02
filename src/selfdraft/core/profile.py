"""What a pass of the target costs on this machine by its rows, and how many rows pay at that cost.

Source of the rule: renewal-reward. With rho tokens per second, a tree is best when the tokens that it is expected to
bring minus rho times the seconds of its pass are most; so a row pays iff its chance exceeds rho times what it adds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate


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

    def at(self, rows: int, tokens: int = 0, sequences: int = 1) -> float:
        """Seconds of a pass over `rows` rows of so many sequences that remember `tokens` tokens together."""
        right = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        low, high = self.rows[right - 1], self.rows[right]
        share = (rows - low) / (high - low)

        def between(values: SequenceOf[float]) -> float:
            return values[right - 1] + share * (values[right] - values[right - 1])

        return between(self.seconds) + between(self.per_token) * tokens + self.per_sequence * (sequences - 1)

    def best_size(
        self, chances: SequenceOf[float], rho: float, tokens: int = 0, sequences: int = 1, others: int = 0
    ) -> int:
        """How many nodes to run: of `chances`, falling, the first so many.

        `others` are rows that run anyway beside the sequences' own; `rho` is in tokens per second. T may have steps
        (shapes are rounded up), so all sizes are looked at, not the first row that does not pay.
        """
        base = sequences + others
        brought = accumulate(chances, initial=0.0)
        worth = [tokens_ - rho * self.at(base + n, tokens, sequences) for n, tokens_ in enumerate(brought)]
        return worth.index(max(worth))
