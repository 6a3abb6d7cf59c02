"""What steps cost here and now: the measured profile, corrected by the steps that were run since.

Two things are learned: how fast the machine is now against the time of the measurement, which concerns all steps
alike, and what passes of each number of rows take beside that. A coarse or disturbed measurement is mended so.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from selfdraft.drafting.estimators import Mean
from selfdraft.drafting.pass_cost import Profile

GRID = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)
"""Numbers of rows for which it is learned apart; a step counts for the nearest of them."""
OUTLIER = 2.0
"""A step that took more than so many times what was expected, or less than that part, is counted as if it took that."""
DEAREST = 8.0
"""A pass counts as at most so many times, and at least so many parts, of what the profile says."""
PRIOR, FADE = 4.0, 0.99
"""What the profile says of a number of rows counts as so many steps; what a step counts after one more of its kind."""
EVERY = 16
"""Steps between two corrections of the profile: prices hold still in between."""


@dataclass(slots=True)
class StepCost:
    """Seconds of steps by rows, sequences, and the tokens they remember together; drafting not included."""

    profile: Profile
    """As it was measured."""
    speed: Mean = field(default_factory=lambda: Mean(guess=1.0, prior=1.0))
    """Seconds of steps, in what the corrected profile says of them."""
    corrected: Profile = field(init=False)
    """The profile at GRID, as steps were since."""
    _grid: Profile = field(init=False)
    _shapes: list[Mean] = field(init=False)
    """Of each number of rows in GRID: what passes take beside `speed`, in what the measured profile says."""
    _steps: int = 0

    def __post_init__(self) -> None:
        self._grid = self.corrected = self.profile.on(GRID)
        self._shapes = [Mean(guess=1.0, prior=PRIOR, fade=FADE) for _ in GRID]

    def observe(self, rows: int, sequences: int, tokens: int, seconds: float) -> None:
        """Book a step: its pass and the work beside it, without drafting."""
        place = _nearest(rows)
        shape = self._shapes[place].value
        ratio = seconds / (self._grid.step(rows, tokens, sequences) * shape)
        speed = self.speed.value
        ratio = min(max(ratio, speed / OUTLIER), speed * OUTLIER)
        self.speed.observe(ratio)
        self._shapes[place].observe(shape * ratio / speed)
        self._steps += 1
        if self._steps % EVERY == 0:
            self._correct()

    def _correct(self) -> None:
        shapes = [min(max(mean.value, 1 / DEAREST), DEAREST) for mean in self._shapes]
        seconds = [a * b for a, b in zip(self._grid.seconds, shapes, strict=True)]
        weights = [mean.prior + mean.weight for mean in self._shapes]
        per_token = tuple(a * b for a, b in zip(self._grid.per_token, shapes, strict=True))
        self.corrected = replace(self._grid, seconds=tuple(rising(seconds, weights)), per_token=per_token)

    def at(self, rows: int, sequences: int, tokens: int) -> float:
        """Seconds expected of a step."""
        return self.corrected.step(rows, tokens, sequences) * self.speed.value

    def prices(self, most: int, sequences: int, tokens: int) -> list[float]:
        """Seconds that the first, second, ... further row of every sequence adds; they never fall."""
        scale = self.speed.value
        return [scale * each for each in self.corrected.marginal(most, tokens, sequences)]

    def added(self, most: int, sequences: int, tokens: int) -> list[float]:
        """Seconds that 0, 1, ... `most` further rows add to a step, all sequences together."""
        scale = self.speed.value
        return [scale * each for each in self.corrected.further(most, tokens, sequences)]


def rising(values: SequenceOf[float], weights: SequenceOf[float]) -> list[float]:
    """The nearest line that never falls, by weighted squares (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        count = 1
        while pools and pools[-1][0] > value:
            before, heavy, more = pools.pop()
            value = (before * heavy + value * weight) / (heavy + weight)
            weight, count = heavy + weight, count + more
        pools.append((value, weight, count))
    return [value for value, _, count in pools for _ in range(count)]


def _nearest(rows: int) -> int:
    """The place in GRID that a step of so many rows counts for."""
    place = min(bisect_left(GRID, rows), len(GRID) - 1)
    return place - 1 if place and rows - GRID[place - 1] < GRID[place] - rows else place
