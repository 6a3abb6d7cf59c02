"""Window and guess set, sized by what their rows bring and cost on this machine."""

from __future__ import annotations

from math import log1p

from selfdraft.drafting.cost_model import tokens_meanwhile
from selfdraft.drafting.estimators import TRUSTED, Acceptance, Mean, StepTime

TRIAL = 32
"""Steps with a window before its width moves."""
MOVE = 8
"""Steps between two moves of a size."""
COLUMNS = 64
"""Widest window that adaptation goes to."""


class Sizes:
    """W and G, moved by what rows bring and what they cost on this machine.

    The price of a row is rho dT/dn: tokens per second now, times the seconds one more row takes. What a window brings
    is counted, not tried out: accepted tokens that no guess from another source would have given. Between sizes the
    paper's scaling law speaks, gain(W) = c log(1 + W), so one measured gain tells what one column more would bring.
    """

    def __init__(self, width: int, size: int, guesses: int) -> None:
        self.width, self.size, self.guesses, self.most = width, size, guesses, 4 * guesses
        self.given = width, guesses
        """W and G as they were given."""
        self.running = True
        """Whether this step has a window whose width may move."""
        self.time, self.own, self.tokens = StepTime(), Mean(), Mean()
        self.gain = Mean()
        """Accepted tokens of a sequence's step that only the window gave."""
        self.acceptance, self.ranks = Acceptance(), Acceptance()
        self._since = self._windows = 0

    @property
    def price(self) -> float:
        """Tokens that a row has to bring; 0 until steps were measured."""
        if self.time.steps < TRUSTED:
            return 0.0
        return tokens_meanwhile(self.time.per_row, self.tokens.value, self.time.seconds + self.own.value)

    def step(self, tokens: int) -> None:
        """Book a step that emitted `tokens` tokens, of all sequences together; move what is due."""
        self.tokens.observe(tokens)
        self._since += 1
        self._windows += self.running
        if self.running and self._windows >= TRIAL and self._windows % MOVE == 0:
            self._move_window()
        if self._since % MOVE == 0 and self.price:
            pays = self.ranks.rate(self.guesses - 1) >= self.price
            self.guesses = min(max(self.guesses + (1 if pays else -1), 1), self.most)

    def _move_window(self) -> None:
        height, price = self.size - 1, self.price
        if not price:
            return
        wanted = self.gain.value / log1p(self.width) / (price * height) - 1  # where one column more just pays
        if abs(wanted - self.width) >= 1:
            self.width = min(max(self.width + (1 if wanted > self.width else -1), 1), COLUMNS)
