"""A limit on what drafting may lose: below zero, drafting is paused until a part of the loss has been forgiven."""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.004
"""What is forgiven in each step, in plain steps: 0.4 % of the time may be lost to trials that fail."""
START, MOST = 12.0, 32.0
"""Plain steps that may be lost at first, and after any success."""
TRIAL = 4.0
"""Plain steps that must be there again before drafting is tried again, and what a new request is given for a trial."""
RAREST = 4
"""At least every fourth request is given a trial."""


@dataclass(slots=True)
class LossBudget:
    """What drafting may still lose, counted in steps of plain decoding. Below zero it is paused.

    Each step adds its gain or loss, and SHARE. So what fails costs at most START steps, and SHARE of the rest.
    """

    balance: float = START
    paused: bool = False
    patience: int = 1
    """Requests until one is tried again though the budget is empty; doubled each time that fails."""
    waited: int = 0

    def rest(self) -> None:
        """Book a step during a pause."""
        self.balance += SHARE
        if self.balance >= TRIAL:
            self.paused = False

    def begin(self) -> None:
        """Book the begin of a request during a pause: its text may be of another kind."""
        self.waited += 1
        if self.waited >= self.patience:
            self.paused, self.waited, self.patience = False, 0, min(2 * self.patience, RAREST)
            self.balance = max(self.balance, TRIAL)

    def book(self, gain: float) -> None:
        """Book a step that brought `gain` plain steps more than it took; less than 0 when it lost."""
        self.balance = min(self.balance + gain + SHARE, MOST)
        if self.balance < 0:
            self.paused = True
        elif self.balance > START:
            self.patience = 1
