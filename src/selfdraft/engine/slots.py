"""Slots of the KV cache: which are free, and what a free one still holds of the request that left it.

A request whose prompt begins with what a slot holds takes this slot, and only the rest of its prompt is prefilled.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal

Reuse = Literal["all", "chunks"]
"""How much of a slot's tokens may be reused: 'all', where a row has the same bits in a pass of any size; 'chunks', only
whole chunks of an earlier prompt, which were prefilled in just the shape in which they would be again."""
LEAST = 8
"""Fewer tokens than these are not worth choosing a slot by."""


@dataclass(frozen=True, slots=True)
class Held:
    """Tokens that a free slot holds, in order; the first `prompt` of them were a prompt. `owner` may reuse them."""

    tokens: tuple[int, ...]
    prompt: int
    owner: str


class Slots:
    """The free slots of an engine, the one that was used last at the end. `chunk`: tokens of a piece of a prefill."""

    def __init__(self, count: int, chunk: int, reuse: Reuse = "chunks") -> None:
        self.free = list(range(count))[::-1]
        self.chunk, self.reuse = chunk, reuse
        self.held: dict[int, Held] = {}
        """By free slot."""

    def take(self, tokens: SequenceOf[int], owner: str | None) -> tuple[int, int]:
        """A free slot for a request, and how many of its first `tokens` the slot holds; at least one is left to run.

        `owner` None, or another owner, reuses nothing. There must be a free slot.
        """
        found = {slot: self._known(slot, tokens, owner) for slot in self.free}
        best = max(self.free, key=found.__getitem__)
        if found[best] < LEAST:
            # the one used last first: its memory is the system's no longer
            best = next((slot for slot in reversed(self.free) if slot not in self.held), self.free[0])
        self.free.remove(best)
        self.held.pop(best, None)
        return best, found[best]

    def give(self, slot: int, held: Held | None) -> None:
        """A slot is free again, and holds this."""
        self.free.append(slot)
        if held is not None and held.tokens:
            self.held[slot] = held

    def forget(self, owner: str | None = None) -> None:
        """Reuse nothing of what this owner's requests left; None: of anybody's."""
        self.held = {slot: held for slot, held in self.held.items() if owner is not None and held.owner != owner}

    def _known(self, slot: int, tokens: SequenceOf[int], owner: str | None) -> int:
        held = self.held.get(slot)
        if owner is None or held is None or held.owner != owner:
            return 0
        most = min(len(tokens) - 1, len(held.tokens))
        if self.reuse == "chunks":
            most = min(most, held.prompt)
        same = next((i for i in range(most) if held.tokens[i] != tokens[i]), most)
        same = same if self.reuse == "all" else same // self.chunk * self.chunk
        return same if same >= LEAST else 0
