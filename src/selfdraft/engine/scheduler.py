"""Who goes next: pure decisions about slots and shares, no model, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf

from selfdraft.core.sequence import Sequence


def admit(waiting: deque[Sequence], free: list[int]) -> list[Sequence]:
    """Give free slots to waiting sequences, first come first served."""
    admitted = []
    while waiting and free:
        sequence = waiting.popleft()
        sequence.slot = free.pop()
        admitted.append(sequence)
    return admitted


def share(sequence: Sequence, chunk: int) -> int:
    """How many pending tokens go into one pass: chunks end at multiples of `chunk`, whatever else is running.

    So the shape of a prefill depends on the prompt alone, and its bits do too.
    """
    pending = len(sequence.tokens) - sequence.num_cached
    return min(pending, chunk - sequence.num_cached % chunk)


def plan(running: SequenceOf[Sequence], chunk: int, rows: int) -> list[tuple[Sequence, int]]:
    """The sequences of the next step with their shares: all that decode, then prefills while `rows` last.

    The first prefill always goes, however few rows are left: whoever decodes cannot keep a long prompt waiting.
    """
    shares = [(sequence, share(sequence, chunk)) for sequence in running]
    work = [(sequence, size) for sequence, size in shares if size == 1]
    decoding, left = len(work), rows - len(work)
    for sequence, size in shares:
        if size > 1 and (size <= left or len(work) == decoding):
            work.append((sequence, size))
            left -= size
    return work
