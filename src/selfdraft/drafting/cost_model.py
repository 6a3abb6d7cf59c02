"""What a pass costs by its rows, and the one rule about it: a row pays if it brings at least what its time is worth.

Source of the rule: renewal-reward. With rho tokens per second, a tree is best when the tokens that it is expected to
bring minus rho times the seconds of its pass are most. So a row pays iff its probability to be accepted is at least
rho times the seconds that it adds (`tokens_meanwhile`). Everything that decides about rows asks this file:

- `Profile`: seconds of a pass, measured before decoding (`selfdraft tune`, or the first start).
- `LiveCost`: a profile, corrected by the steps that are run. `LearnedCost`: the same where nothing was measured.
- `Throughput`: tokens per second of the last steps, and what seconds cost in tokens.
- `RowCost`: what one more row must bring, for drafters without a profile.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

from selfdraft.drafting.estimators import TRUSTED, Mean, StepTime
from selfdraft.types import within

GRID = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)
"""Numbers of rows whose time is corrected apart; a step counts for the nearest of them."""
OUTLIER = 2.0
"""The time of a step is clipped to 1/2 to 2 times what was expected of it."""
MOST_APART = 8.0
"""The corrected seconds of a pass are clipped to 1/8 to 8 times those of the profile."""
PRIOR, FADE = 4.0, 0.99
"""The profile counts as 4 steps of each number of rows; a step counts 0.99 as much after the next of its kind."""
EVERY = 16
"""Steps between two corrections of the profile: prices hold still in between."""
BLOCK = 256
"""Remembered tokens are counted in blocks when rows are priced."""
UNLIMITED = 2**31
"""Nodes of a tree that has no limit."""


def tokens_meanwhile(seconds: float, tokens: float, step_seconds: float) -> float:
    """THE rule: tokens that come anyway in `seconds`, so that what takes these seconds must bring them.

    A step of `step_seconds` brings `tokens`; 0 before any step was seen.
    """
    return tokens / step_seconds * seconds if step_seconds else 0.0


def first_sizes(time: StepTime) -> int:
    """Most nodes of a tree while the time of a row is learned: 1, 2, 4, ...

    The first steps differ in size: what a row costs is not seen in steps of one size.
    """
    return UNLIMITED if time.steps >= TRUSTED else 2**time.steps


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
    """s: seconds that each further sequence adds to a pass of as many rows; below 0 where it takes some off."""
    host: float = 0.0
    """Seconds of a plain step beside the pass."""
    spread: float = 1.0
    """How much passes of one row varied while this was measured: the slowest tenth by the quickest quarter."""

    def at(self, rows: int, tokens: int = 0, sequences: int = 1) -> float:
        """Seconds of a pass over `rows` rows of `sequences` sequences that have `tokens` cached tokens together.

        A row sees the tokens of its own sequence; those of the others are at least read. Never less than T(1).
        """
        right = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        low, high = self.rows[right - 1], self.rows[right]
        share = (rows - low) / (high - low)
        own = tokens / sequences
        remembered = _between(self.per_token, right, share) * own + self.per_token[0] * (tokens - own)
        passed = _between(self.seconds, right, share) + self.per_sequence * (sequences - 1)
        return max(passed, self.seconds[0]) + remembered

    def on(self, rows: SequenceOf[int]) -> Profile:
        """The same line with other numbers of rows, ascending, as its corners."""
        seconds = tuple(self.at(count) for count in rows)
        return replace(
            self, rows=tuple(rows), seconds=seconds, per_token=tuple(self.at(n, 1) - self.at(n) for n in rows)
        )

    def step(self, rows: int, tokens: int = 0, sequences: int = 1) -> float:
        """Seconds of a step: the pass, and the host's work beside it."""
        return self.at(rows, tokens, sequences) + self.host

    def marginal(self, most: int, tokens: int = 0, sequences: int = 1, prefill: int = 0) -> tuple[float, ...]:
        """Seconds that the first, second, ... further row of every sequence adds, shared out among the sequences.

        T may have steps (shapes are rounded up), so it is the slope of the convex line below T: these never fall,
        and taking rows as long as they are worth it stops where a step is full, not where it begins.
        `prefill`: rows of prompts that are read in the same pass.
        """
        return _marginal(self, most, block_of(tokens), sequences, prefill)

    def further(self, most: int, tokens: int = 0, sequences: int = 1, prefill: int = 0) -> tuple[float, ...]:
        """Seconds that 0, 1, ... `most` rows beside those of plain decoding add to a pass, its steps included."""
        return _further(self, most, block_of(tokens), sequences, prefill)


def _between(values: SequenceOf[float], right: int, share: float) -> float:
    return values[right - 1] + share * (values[right] - values[right - 1])


@lru_cache(256)
def _marginal(profile: Profile, most: int, tokens: int, sequences: int, prefill: int) -> tuple[float, ...]:
    seconds = [profile.at(prefill + sequences * (1 + n), tokens, sequences) for n in range(most + 1)]
    slopes: list[float] = []
    start = 0
    while start < most:
        ends = range(start + 1, most + 1)
        slope, end = min(((seconds[end] - seconds[start]) / (end - start), -end) for end in ends)
        slopes += [slope / sequences] * (-end - start)
        start = -end
    return tuple(slopes)


@lru_cache(256)
def _further(profile: Profile, most: int, tokens: int, sequences: int, prefill: int) -> tuple[float, ...]:
    plain = profile.at(prefill + sequences, tokens, sequences)
    return tuple(profile.at(prefill + sequences + n, tokens, sequences) - plain for n in range(most + 1))


def block_of(tokens: int) -> int:
    """The middle of the block that `tokens` is in: prices hardly change from token to token."""
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


class StepCost(Protocol):
    """Seconds of steps by rows, sequences, and the tokens they remember together; drafting not included."""

    @property
    def most_rows(self) -> int:
        """Most nodes of a tree while costs are being learned."""

    def observe(self, rows: int, sequences: int, tokens: int, seconds: float) -> None:
        """Book a step: its pass and the work beside it, without drafting."""

    def at(self, rows: int, sequences: int, tokens: int) -> float:
        """Seconds expected of a step; 0 before any was seen."""

    def prices(self, most: int, sequences: int, tokens: int, prefill: int = 0) -> list[float]:
        """Seconds that the first, second, ... further row of every sequence adds; they never fall.

        `prefill`: rows of prompts that are read in the same pass.
        """

    def added(self, most: int, sequences: int, tokens: int, prefill: int = 0) -> list[float]:
        """Seconds that 0, 1, ... `most` further rows add to a step, all sequences together."""


@dataclass(slots=True)
class LearnedCost:
    """`StepCost` where nothing was measured before: every further row costs the same, learned while decoding."""

    time: StepTime = field(default_factory=StepTime)

    @property
    def most_rows(self) -> int:
        return first_sizes(self.time)

    def observe(self, rows: int, sequences: int, tokens: int, seconds: float) -> None:
        self.time.observe(rows, seconds)

    def at(self, rows: int, sequences: int, tokens: int) -> float:
        return self.time.at(rows) if self.time.steps else 0.0

    def prices(self, most: int, sequences: int, tokens: int, prefill: int = 0) -> list[float]:
        return [self.time.per_row] * most

    def added(self, most: int, sequences: int, tokens: int, prefill: int = 0) -> list[float]:
        return [self.time.per_row * rows for rows in range(most + 1)]


@dataclass(slots=True)
class Throughput:
    """Tokens per second of the last steps, all sequences together, and what time costs at that speed."""

    tokens: Mean = field(default_factory=Mean)
    seconds: Mean = field(default_factory=Mean)
    """Tokens and seconds of whole steps."""

    def observe(self, tokens: int, seconds: float) -> None:
        """Book a step."""
        self.tokens.observe(tokens)
        self.seconds.observe(seconds)

    def cost(self, seconds: float, least: float = 0.0) -> float:
        """Tokens that must be brought by what takes `seconds` more, at this speed or at `least` tokens per second."""
        return max(tokens_meanwhile(seconds, self.tokens.value, self.seconds.value), least * seconds)


@dataclass(slots=True)
class RowCost:
    """What one more row must bring, in tokens: tokens per second, times the seconds that a row adds to a step.

    Tokens per second are those of now, and never less than one in a step of one row, as plain decoding has them: steps
    whose rows do not pay are slow, and would make rows look cheap. It is 0 until rows were seen to cost. A `fixed` cost
    (the option `min_probability`) is never changed.
    Errors: OptionError when that is no probability.
    """

    fixed: float | None = None
    time: StepTime = field(default_factory=StepTime)
    emitted: Mean = field(default_factory=Mean)
    """Tokens of a step."""

    def __post_init__(self) -> None:
        if self.fixed is not None:
            within("min_probability", self.fixed, 0.0, 1.0)

    def observe(self, rows: int, seconds: float, tokens: int) -> None:
        """Book a step of `rows` rows that took `seconds` and brought `tokens`."""
        self.time.observe(rows, seconds)
        self.emitted.observe(tokens)

    @property
    def tokens(self) -> float:
        """The cost of a row, in tokens."""
        if self.fixed is not None:
            return self.fixed
        time = self.time
        now = tokens_meanwhile(time.per_row, self.emitted.value, time.seconds)
        # a line through large steps may leave nothing for one row, but that is at least its part of a large step
        plain = max(time.at(1), time.seconds / time.rows) if time.rows else 0.0
        return max(now, tokens_meanwhile(time.per_row, 1.0, plain))

    @property
    def most_rows(self) -> int:
        """Most nodes of a tree."""
        return UNLIMITED if self.fixed is not None else first_sizes(self.time)


@dataclass(slots=True)
class LiveCost:
    """Seconds of steps by rows, sequences, and the tokens they remember together; drafting not included.

    Two things are learned: how fast the machine is now against the time of the measurement, which concerns all steps
    alike, and what passes of each number of rows take beside that. A coarse or disturbed measurement is mended so.
    """

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

    @property
    def most_rows(self) -> int:
        return UNLIMITED

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
        shapes = [min(max(mean.value, 1 / MOST_APART), MOST_APART) for mean in self._shapes]
        seconds = [a * b for a, b in zip(self._grid.seconds, shapes, strict=True)]
        weights = [mean.prior + mean.weight for mean in self._shapes]
        per_token = tuple(a * b for a, b in zip(self._grid.per_token, shapes, strict=True))
        self.corrected = replace(self._grid, seconds=tuple(rising(seconds, weights)), per_token=per_token)

    def at(self, rows: int, sequences: int, tokens: int) -> float:
        """Seconds expected of a step."""
        return self.corrected.step(rows, tokens, sequences) * self.speed.value

    def prices(self, most: int, sequences: int, tokens: int, prefill: int = 0) -> list[float]:
        """Seconds that the first, second, ... further row of every sequence adds; they never fall."""
        scale = self.speed.value
        return [scale * each for each in self.corrected.marginal(most, tokens, sequences, prefill)]

    def added(self, most: int, sequences: int, tokens: int, prefill: int = 0) -> list[float]:
        """Seconds that 0, 1, ... `most` further rows add to a step, all sequences together."""
        scale = self.speed.value
        return [scale * each for each in self.corrected.further(most, tokens, sequences, prefill)]


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
    """The place in GRID that a step of `rows` rows counts for."""
    place = min(bisect_left(GRID, rows), len(GRID) - 1)
    return place - 1 if place and rows - GRID[place - 1] < GRID[place] - rows else place
