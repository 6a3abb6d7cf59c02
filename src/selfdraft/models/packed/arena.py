"""Memory for packed weights, in large pages where the system gives them.

One row at a time a step reads nothing but weights, and in small pages up to a quarter more slowly
(docs/decisions/011-packed-weights.md).
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

PIECE = 1 << 28
"""Bytes that are asked of the system at a time, at most; the first piece is a large page, each next twice as big."""
LARGE = 1 << 21
"""Bytes of a large page."""
ALIGNED = 64
"""Bytes of a cache line."""


class Arena:
    """Memory that is never given back in parts: a tensor that lies in it keeps its whole piece."""

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used, self._next = 0, LARGE

    def take(self, size: int) -> Tensor:
        """`size` bytes [size] on a cache line, of unknown content. Errors: MemoryError."""
        if self._used + size > len(self._piece):
            self._piece, self._used = _large(max(size, self._next)), 0
            self._next = min(2 * len(self._piece), PIECE)
        taken = self._piece[self._used : self._used + size]
        self._used += -(-size // ALIGNED) * ALIGNED
        return taken


def _large(size: int) -> Tensor:
    """Bytes of new memory."""
    try:
        # memory that is shared with other processes has small pages only
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        new = mmap.mmap(-1, size + LARGE, **private)
    except OSError as error:
        raise MemoryError(f"{size >> 20} MiB for weights: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # small pages then
            new.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(new, dtype=torch.uint8)
    return whole[-whole.data_ptr() % LARGE :][:size]
