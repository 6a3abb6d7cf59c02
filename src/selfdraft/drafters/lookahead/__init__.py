"""Lookahead decoding: n-grams out of a window of guesses that the same pass verifies."""

from selfdraft.drafters.lookahead.drafter import Lookahead as Lookahead
