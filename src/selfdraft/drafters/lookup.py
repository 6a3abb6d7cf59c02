"""Prompt lookup: repeat what followed the last tokens when they stood in the text before.

Source: Saxena, "Prompt Lookup Decoding" (2023); option names as in vLLM's n-gram method.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import ClassVar
from weakref import WeakKeyDictionary

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.errors import OptionError
from selfdraft.protocols import Needs, Target
from selfdraft.types import Budget, within

SOURCE = "lookup"


class NgramIndex:
    """Where each n-gram of one sequence's tokens ended last: constant time per new token and length."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.sizes = range(longest, shortest - 1, -1)
        self.ends: dict[tuple[int, ...], int] = {}
        self.read = 0
        """Tokens before this one have their n-grams in `ends`."""

    def continuation(self, tokens: list[int], most: int) -> list[int]:
        """At most `most` tokens that followed the longest, latest earlier match of the end of `tokens`."""
        for stop in range(max(self.read, 1), len(tokens)):  # all but the suffix at the very end
            for size in self.sizes:
                if size <= stop:
                    self.ends[tuple(tokens[stop - size : stop])] = stop
        self.read = max(len(tokens), 1)
        for size in self.sizes:
            end = self.ends.get(tuple(tokens[-size:])) if size < len(tokens) else None
            if end is not None:
                return tokens[end : end + most]
        return []


class Lookup:
    """A chain copied from the request's own text: the longest match wins, of equals the latest."""

    needs: ClassVar[Needs] = Needs(tokens_only=True)

    def __init__(
        self,
        target: Target,
        *,
        num_speculative_tokens: int = 10,
        prompt_lookup_min: int = 1,
        prompt_lookup_max: int = 5,
    ) -> None:
        within("num_speculative_tokens", num_speculative_tokens, 1, 256)
        within("prompt_lookup_min", prompt_lookup_min, 1, 64)
        within("prompt_lookup_max", prompt_lookup_max, 1, 64)
        if prompt_lookup_min > prompt_lookup_max:
            raise OptionError(f"prompt_lookup_min={prompt_lookup_min} is above prompt_lookup_max={prompt_lookup_max}")
        self.most = num_speculative_tokens
        self.shortest, self.longest = prompt_lookup_min, prompt_lookup_max
        self._notes: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return [self._one(sequence, budget) for sequence, budget in zip(sequences, budgets, strict=True)]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        pass  # everything it needs is in the sequence's tokens

    def _one(self, sequence: Sequence, budget: Budget) -> Draft:
        most = min(self.most, budget.max_depth, budget.max_nodes)
        if most <= 0:
            return EMPTY
        index = self._notes.setdefault(sequence, NgramIndex(self.shortest, self.longest))
        return Draft.chain(index.continuation(sequence.tokens, most), SOURCE)
