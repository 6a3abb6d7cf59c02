"""What steps cost here and now: the profile, corrected by the clock.

What disturbs the machine now and then disturbs all kinds of steps; so steps are not compared by their own times but by
those of their kind, with drafts and without, against what the profile says of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from selfdraft.core.adapt import Mean
from selfdraft.core.profile import Profile

OUTLIER = 2.0
"""A step that took more than so many times what such steps take, or less, is counted as if it took that."""
DEAREST = 8.0
"""A row counts as at most so many times, and at least so many parts, of what the profile says."""
SEEN = 0.02
"""Rows that should add less than this share to a plain step say nothing about what a row costs."""


@dataclass(slots=True)
class StepCost:
    """Seconds of steps by rows, sequences, and the tokens they remember together; drafting not included."""

    profile: Profile
    drafted: Mean = field(default_factory=lambda: Mean(guess=1.0, prior=1.0))
    """Steps with drafts by the clock, in what the profile says of them."""
    plainly: Mean = field(default_factory=lambda: Mean(guess=1.0, prior=4.0))
    """Steps without."""
    told: Mean = field(default_factory=Mean)
    """What the profile said of the steps with drafts, in plain steps."""

    def observe(self, rows: int, sequences: int, tokens: int, seconds: float) -> None:
        """Book a step: its pass and the work beside it, without drafting."""
        expected = self.profile.step(rows, tokens, sequences)
        kind = self.plainly if rows == sequences else self.drafted
        kind.observe(min(max(seconds / expected, kind.value / OUTLIER), OUTLIER * kind.value))
        self.plainly.guess = self.drafted.value
        if rows != sequences:
            self.told.observe(expected / self.profile.step(sequences, tokens, sequences))

    def at(self, rows: int, sequences: int, tokens: int) -> float:
        """Seconds expected of a step."""
        kind = self.plainly if rows == sequences else self.drafted
        return self.profile.step(rows, tokens, sequences) * kind.value

    def prices(self, most: int, sequences: int, tokens: int) -> list[float]:
        """Seconds that the first, second, ... further row of every sequence adds; they never fall."""
        scale = self.plainly.value * self.dearness
        return [scale * each for each in self.profile.marginal(most, tokens, sequences)]

    def added(self, most: int, sequences: int, tokens: int) -> list[float]:
        """Seconds that 0, 1, ... `most` further rows add to a step, all sequences together."""
        scale = self.plainly.value * self.dearness
        return [scale * each for each in self.profile.further(most, tokens, sequences)]

    @property
    def dearness(self) -> float:
        """What a row costs, in plain steps, against what the profile says of it."""
        told = self.told.value - 1
        if told < SEEN:
            return 1.0
        real = self.told.value * self.drafted.value / self.plainly.value - 1
        return min(max(real / told, 1 / DEAREST), DEAREST)
