"""Which of several ways to run a step is the quickest, found by short trials that are judged by time alone.

Pure: seconds are handed in. The best way so far runs; each other way is tried now and then. A trial ends as soon as it
is clearly too slow, so one that loses much ends after a few steps, and one that runs long loses little.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from selfdraft.drafting.estimators import OUTLIER, Mean

FIRST = 8
"""Steps of the best way before the first trial and between two trials."""
SHORTEST, LONGEST = 2, 96
"""Steps of a trial."""
DOUBT = 2.0
"""A trial of k steps is lost when its time per token is more than 1 + DOUBT / sqrt(k) times that of the best way."""
PAUSES = (64, 2048)
"""Steps until a way that lost is tried again: at least, doubled each time, and at most."""
SHARE = 0.005
"""Of the time, what the trials of one way may lose: one that lost more is tried again later."""
WORSE = 1.25
"""When the best way takes 1.25 times longer per token than at its last trial, the others are tried again soon."""
MEMORY = 0.99
"""What a step counts after one more: a memory of about 100 steps."""
STILL = 1e-9
"""Seconds added to each step, so that a clock that stands still leaves the number of steps to judge by."""


@dataclass(slots=True)
class Speed:
    """Seconds per token of one way, over fading steps."""

    steps: int = 0
    tokens: Mean = field(default_factory=lambda: Mean(fade=MEMORY))
    seconds: Mean = field(default_factory=lambda: Mean(fade=MEMORY))

    def observe(self, tokens: int, seconds: float) -> None:
        """Book a step; one that took much longer than the others counts as `OUTLIER` times their mean."""
        seconds += STILL
        if self.steps >= SHORTEST:
            seconds = min(seconds, OUTLIER * self.seconds.value)
        self.steps += 1
        self.tokens.observe(tokens)
        self.seconds.observe(seconds)

    @property
    def cost(self) -> float:
        """Seconds per token; only after a step with tokens."""
        return self.seconds.value / self.tokens.value


@dataclass(slots=True)
class _Rest:
    """A way that does not run: the step of the best way at which it is tried, and its rest when it loses again."""

    due: int = 0
    pause: int = PAUSES[0]


class Trials:
    """The way of the next step out of `ways`, which are numbered from 0; way 0 is the first best one."""

    def __init__(self, ways: int) -> None:
        self.best = self.way = 0
        self.speed = Speed()
        """Of the best way."""
        self.steps = [0] * ways
        """Steps that each way has run."""
        self._tried = Speed()
        self._ran = 0
        """Steps of whichever way was the best."""
        self._next = FIRST
        """The one of them at which the next trial may begin."""
        self._reference = 0.0
        self._rests = [_Rest() for _ in range(ways)]

    def step(self, tokens: int, seconds: float) -> None:
        """A step of `self.way` emitted `tokens` (at least 1) and took `seconds`: choose the way of the next one."""
        self.steps[self.way] += 1
        if self.way != self.best:
            self._tried.observe(tokens, seconds)
            self._judge()
            return
        self.speed.observe(tokens, seconds)
        self._ran += 1
        if self._reference and self.speed.cost > WORSE * self._reference:
            self._doubt()
        if self._ran >= self._next:
            due = [way for way, rest in enumerate(self._rests) if way != self.best and rest.due <= self._ran]
            if due:
                self.way, self._tried = due[0], Speed()

    def _judge(self) -> None:
        """End the trial when it is lost, or when it is long enough."""
        count, rest = self._tried.steps, self._rests[self.way]
        ratio = self._tried.cost / self.speed.cost
        if count >= LONGEST and ratio < 1:
            self._rests[self.best] = _Rest(self._ran + PAUSES[0])
            self.best, self.speed = self.way, self._tried
            rest.pause = PAUSES[0]
        elif count >= LONGEST or (count >= SHORTEST and ratio > 1 + DOUBT / count**0.5):
            lost = count * (self._tried.seconds.value - self._tried.tokens.value * self.speed.cost)
            owed = int(lost / (SHARE * self.speed.seconds.value))
            rest.due = self._ran + min(max(rest.pause, owed), PAUSES[1])
            rest.pause = min(2 * rest.pause, PAUSES[1])
            self.way = self.best
        else:
            return
        self._reference = self.speed.cost
        self._plan()

    def _plan(self) -> None:
        soonest = min(rest.due for way, rest in enumerate(self._rests) if way != self.best)
        self._next = max(soonest, self._ran + FIRST)

    def _doubt(self) -> None:
        """The best way became much slower: what was learned about the others is old."""
        self._reference = self.speed.cost
        for rest in self._rests:
            rest.due, rest.pause = min(rest.due, self._ran + PAUSES[0]), PAUSES[0]
        self._plan()
