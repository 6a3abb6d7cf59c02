"""Whether an inner pass pays: a cheap copy of the model that verifies guesses before the model itself does.

Source of the rule: renewal-reward. With rho tokens per second, an inner pass pays iff the tokens that it adds to what
the model will accept exceed rho times its seconds. Source of the idea: the cascades of ML-SpecQD (arXiv 2503.13565).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from selfdraft.drafting.draft_length import Confidence
from selfdraft.drafting.estimators import TRUSTED, Mean, StepTime

PAUSES = (32, 1024)
"""Steps until a pass that did not pay is tried again: at first, and at most; doubled each time."""
HOPE = 3.0
"""A pass that costs so many times what it is worth is not tried until its time is known."""


@dataclass(slots=True)
class Rounds:
    """What inner passes cost by their rows, and how often the model says what they said."""

    time: StepTime = field(default_factory=StepTime)
    confidence: Confidence = field(default_factory=Confidence)
    tokens: Mean = field(default_factory=Mean)
    seconds: Mean = field(default_factory=Mean)
    """Tokens and seconds of whole steps; their ratio is rho."""
    guessed: Mean = field(default_factory=Mean)
    """Tokens that are expected to be right of what hangs under a chain after a pass."""
    left: int = 0
    """Steps until a pass is tried again, though it did not pay."""
    pause: int = PAUSES[0]

    def worth(self, scores: SequenceOf[float], guessed: float) -> float:
        """Tokens that one more inner pass is expected to add to a chain of tokens with these confidences.

        `guessed` tokens of what hangs under the chain are expected to be right: without the pass they are accepted
        all the same; with it they, and one more, are part of the chain, and the usual number hangs under its new end.
        """
        rate = self.confidence.acceptance.value
        survives: float = rate ** (1 + guessed)
        gained = rate * (1 - survives) / (1 - rate) if rate < 1 else 1 + guessed
        return self.confidence.path(scores) * (gained + survives * self.guessed.value - guessed)

    def pays(self, worth: float, rows: int, rho: float) -> bool:
        """Whether a pass of `rows` rows that adds `worth` tokens pays at `rho` tokens per second."""
        return worth > rho * self.time.at(rows)

    def tries(self, worth: float, rows: int, rho: float) -> bool:
        """Asked once a step in which no pass paid: whether to run one all the same, to measure it.

        At first, until its time is known or beyond hope; then after pauses that double as long as it does not pay.
        """
        if self.time.steps < TRUSTED and HOPE * worth >= rho * self.time.at(rows):
            return True
        self.left -= 1
        if self.left > 0:
            return False
        self.left, self.pause = self.pause, min(2 * self.pause, PAUSES[1])
        return True

    def paid(self) -> None:
        """A pass was run because it pays."""
        self.pause, self.left = PAUSES[0], PAUSES[0]

    def rho(self, plain: float) -> float:
        """Tokens per second now, or `plain`, those of plain decoding, if that is more."""
        return max(self.tokens.value / self.seconds.value if self.seconds.value else 0.0, plain)
