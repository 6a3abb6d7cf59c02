"""Slots of the KV cache: which are free, and what a free one still holds of the request that left it.

A request whose prompt begins with what a slot holds takes this slot, or a copy, and only the rest is prefilled.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal

Reuse = Literal["all", "chunks"]
"""How much of a slot's tokens may be reused: 'all', where a row has the same bits in a pass of any size; 'chunks', only
whole chunks of an earlier prompt, which were prefilled in just the shape in which they would be again."""
ONE_PROMPT = "the answers to one prompt: "
"""How the owner of all answers to one prompt begins; what they leave is forgotten with the last of them."""
LEAST = 8
"""Fewer tokens than these are not worth choosing a slot by."""


@dataclass(frozen=True, slots=True)
class Held:
    """Tokens that a slot holds, in order; the first `prompt` of them were a prompt. `owner` may reuse them."""

    tokens: SequenceOf[int]
    prompt: int
    owner: str
    slot: int = -1


@dataclass(frozen=True, slots=True)
class Taken:
    """A slot that a request was given: its first `count` tokens lie in the slot `source`."""

    slot: int
    source: int
    count: int


class Slots:
    """The free slots of an engine, the one that was used last at the end. `chunk`: tokens of a piece of a prefill."""

    def __init__(self, count: int, chunk: int, reuse: Reuse = "chunks") -> None:
        self.free = list(range(count))[::-1]
        self.chunk, self.reuse = chunk, reuse
        self.held: dict[int, Held] = {}
        """By free slot."""

    def take(self, tokens: SequenceOf[int], owner: str | None, running: SequenceOf[Held] = ()) -> Taken:
        """A free slot for a request, and where the first of its `tokens` lie already; at least one is left to run.

        `owner` None, or another owner, reuses nothing. `running` requests are looked at, too: what they have prefilled
        can be copied. A slot whose request goes on is taken as it is; of another one the common beginning is copied,
        so that the beginning that all chats share does not cost one of them its slot. There must be a free slot.
        """
        known = {slot: self._common(held, tokens, owner) for slot, held in self.held.items()}
        best = max(known, key=known.__getitem__, default=-1)
        count = known.get(best, 0)
        if count and 2 * count >= len(self.held[best].tokens):
            return self._taken(best, best, count)
        others = {held.slot: self._common(held, tokens, owner) for held in running}
        copied = max(others, key=others.__getitem__, default=-1)
        if others.get(copied, 0) > count:
            best, count = copied, others[copied]
        # the one used last first: its memory is the system's no longer
        slot = next((slot for slot in reversed(self.free) if slot not in self.held), self.free[0])
        return self._taken(slot, best if count else slot, count)

    def gains(
        self, tokens: SequenceOf[int], owner: str | None, running: SequenceOf[Held], coming: SequenceOf[Held]
    ) -> bool:
        """Whether a request finds more of its tokens in a slot when the `coming` prompts have been read than now."""
        if owner is None or not coming:
            return False
        then = max(self._common(held, tokens, owner) for held in coming)
        now = max((self._common(held, tokens, owner) for held in (*self.held.values(), *running)), default=0)
        return then - now >= LEAST

    def _taken(self, slot: int, source: int, count: int) -> Taken:
        self.free.remove(slot)
        self.held.pop(slot, None)
        return Taken(slot, source, count)

    def give(self, slot: int, held: Held | None) -> None:
        """A slot is free again, and holds this."""
        self.free.append(slot)
        if held is not None and held.tokens:
            self.held[slot] = held

    def forget(self, owner: str) -> None:
        """Nothing that this owner has left is reused any more."""
        self.held = {slot: held for slot, held in self.held.items() if held.owner != owner}

    def _common(self, held: Held, tokens: SequenceOf[int], owner: str | None) -> int:
        """How many first tokens of a request may be taken from there."""
        if owner is None or held.owner != owner:
            return 0
        most = min(len(tokens) - 1, len(held.tokens))
        if self.reuse == "chunks":
            most = min(most, held.prompt)
        same = next((i for i in range(most) if held.tokens[i] != tokens[i]), most)
        same = same if self.reuse == "all" else same // self.chunk * self.chunk
        return same if same >= LEAST else 0
