"""Whether drafting brought more than it cost lately, and when to try it again."""

from __future__ import annotations

from dataclasses import dataclass, field

from selfdraft.core.adapt import Mean

TRIAL = 32
"""Steps before a verdict."""
PAUSES = (32, 1024)
"""Steps of plain decoding after a verdict against drafting: at first, and at most; doubled each time."""


@dataclass(slots=True)
class Watch:
    """Books what drafting gained and spent in each step; stands aside while it does not pay.

    Standing aside costs nothing: nothing is drafted and nothing is read. Pauses double as long as the trials between
    them fail, so that on text where nothing is ever accepted the trials are a vanishing share of the steps.
    """

    gained: Mean = field(default_factory=Mean)
    """Seconds that accepted tokens would have taken plainly."""
    spent: Mean = field(default_factory=Mean)
    """Seconds of drafting, and of rows beyond the plain one."""
    steps: int = 0
    """Steps of this trial."""
    left: int = 0
    """Steps of the pause that are still to come."""
    pause: int = PAUSES[0]

    @property
    def aside(self) -> bool:
        return self.left > 0

    def rest(self) -> None:
        """A plain step while standing aside."""
        self.left -= 1

    def book(self, gained: float, spent: float) -> None:
        """A step with drafting: seconds that it saved, and that it cost."""
        self.gained.observe(gained)
        self.spent.observe(spent)
        self.steps += 1
        if self.steps < TRIAL:
            return
        if self.gained.value >= self.spent.value:
            self.pause = PAUSES[0]
        else:
            self.left, self.pause = self.pause, min(2 * self.pause, PAUSES[1])
            self.gained, self.spent, self.steps = Mean(), Mean(), 0
