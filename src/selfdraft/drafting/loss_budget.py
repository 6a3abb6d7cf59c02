"""Lets drafting spend what it earns and a small share of the time beside, so that it can never cost more than that."""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.004
"""Of the time, what may be lost to trials that fail."""
START, MOST = 12.0, 32.0
"""Plain steps that may be lost at first, and after any success."""
TRIAL = 4.0
"""Plain steps that must be there again before something is tried again, and what a new request is given for a trial."""
RAREST = 4
"""At least one of so many requests is given a trial."""


@dataclass(slots=True)
class Watch:
    """A purse, counted in steps of plain decoding. Who has emptied it stands aside until it has filled up again.

    Whatever fails costs at most START steps, and SHARE of the rest; there is no verdict to be wrong about.
    """

    balance: float = START
    aside: bool = False
    patience: int = 1
    """Requests until one is tried again though the purse is empty; doubled each time that fails."""
    waited: int = 0

    def rest(self) -> None:
        """A step while standing aside."""
        self.balance += SHARE
        if self.balance >= TRIAL:
            self.aside = False

    def begin(self) -> None:
        """A request begins while standing aside: its text may be of another kind."""
        self.waited += 1
        if self.waited >= self.patience:
            self.aside, self.waited, self.patience = False, 0, min(2 * self.patience, RAREST)
            self.balance = max(self.balance, TRIAL)

    def book(self, gain: float) -> None:
        """A step that brought `gain` plain steps more than it took; less than 0 when it lost."""
        self.balance = min(self.balance + gain + SHARE, MOST)
        if self.balance < 0:
            self.aside = True
        elif self.balance > START:
            self.patience = 1
