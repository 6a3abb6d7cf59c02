"""What a drafter measures while it runs: the time of a step by its rows, and how often a kind of guess was right.

Pure: times are handed in, nothing is read from a clock. Old values fade, so that a change of machine load or of text
is followed. Source of the rules: renewal-reward; with rho tokens per second, rows pay iff the tokens that they add to
a step exceed rho times the seconds that they add.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

FADE = 0.98
"""What a measurement counts after one more step: a memory of about 50 steps."""
OUTLIER = 3.0
"""The time of a step is clipped to 3 times what was expected of it."""
TRUSTED = 8
"""Steps before an expectation is trusted."""


@dataclass(slots=True)
class StepTime:
    """T(n) = t0 + h n, the seconds of a step with n rows, by least squares over fading measurements.

    As long as the row counts hardly vary, h is drawn to 0: rows count as free until they were seen to cost.
    """

    steps: int = 0
    weight: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0
    variance: float = 0.0
    covariance: float = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Book a step of `rows` rows that took `seconds`."""
        if self.steps >= TRUSTED:
            seconds = min(seconds, OUTLIER * self.at(rows))
        self.steps += 1
        self.weight = FADE * self.weight + 1
        share = 1 / self.weight
        apart, late = rows - self.rows, seconds - self.seconds
        self.rows += share * apart
        self.seconds += share * late
        self.variance = (1 - share) * (self.variance + share * apart * apart)
        self.covariance = (1 - share) * (self.covariance + share * apart * late)

    @property
    def per_row(self) -> float:
        """h: seconds that one more row costs; never negative."""
        return max(self.covariance, 0.0) / (self.variance + 0.25)

    def at(self, rows: float) -> float:
        """Seconds expected of a step with `rows` rows."""
        return max(self.seconds + self.per_row * (rows - self.rows), 0.0)


@dataclass(slots=True)
class Mean:
    """A fading mean, with a guess that counts as `prior` measurements."""

    guess: float = 0.0
    prior: float = 0.0
    fade: float = FADE
    total: float = 0.0
    weight: float = 0.0

    def observe(self, value: float) -> None:
        self.total = self.fade * self.total + value
        self.weight = self.fade * self.weight + 1

    def after(self, value: float) -> float:
        """Observe, and say the value that is then held."""
        fade, prior = self.fade, self.prior
        self.total = total = fade * self.total + value
        self.weight = weight = fade * self.weight + 1.0
        return (total + self.guess * prior) / (weight + prior)

    @property
    def value(self) -> float:
        weight = self.weight + self.prior
        return (self.total + self.guess * self.prior) / weight if weight else self.guess


@dataclass(slots=True)
class Acceptance:
    """How often a guess of some kind was right, given that all above it were."""

    guess: float = 0.5
    prior: float = 2.0
    fade: float = 0.995
    _means: dict[Hashable, Mean] = field(default_factory=dict)

    def rate(self, kind: Hashable) -> float:
        """The measured rate; a kind never seen has the guess."""
        mean = self._means.get(kind)
        return mean.value if mean else self.guess

    def observe(self, kind: Hashable, right: bool) -> None:
        mean = self._means.get(kind)
        if mean is None:
            mean = self._means[kind] = Mean(self.guess, self.prior, self.fade)
        mean.observe(float(right))
