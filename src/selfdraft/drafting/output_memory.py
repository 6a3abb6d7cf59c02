"""What a caller's earlier requests were answered, as a text to guess from. Off unless asked for; never shared."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf

from selfdraft.drafting.context_tree import ContextTree
from selfdraft.types import within

MOST = 2**18
"""Tokens of a memory when nothing else is said."""


class Memory:
    """At most `most` tokens of outputs, the latest ones. Errors: OptionError."""

    def __init__(self, most: int = MOST) -> None:
        within("memory", most, 0, 2**24)
        self.most = most
        self.outputs: deque[tuple[int, ...]] = deque()
        self.size = 0
        """Tokens of all outputs."""
        self.tree = ContextTree()
        """What readers read; requests that are running keep theirs when it is made anew."""

    def add(self, output: SequenceOf[int]) -> None:
        """Remember an output; of one that is too long the end. Constant time per token, amortised: when the memory
        is full its older half goes and the rest is read again."""
        kept = tuple(output[-self.most :]) if self.most else ()
        if not kept:
            return
        self.outputs.append(kept)
        self.size += len(kept)
        if self.size <= self.most:
            self._read(kept)
            return
        while self.size > max(self.most // 2, len(kept)):
            self.size -= len(self.outputs.popleft())
        self.tree = ContextTree()
        for output in self.outputs:
            self._read(output)

    def _read(self, output: SequenceOf[int]) -> None:
        for token in output:
            self.tree.push(token)
        self.tree.separate()
