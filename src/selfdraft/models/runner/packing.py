"""Weights in the order in which products read them (`kernels/packed.h`): each packed once, for all tapes of a target.

Memory comes in large pieces, for which the system is asked for large pages: one row at a time a step reads nothing but
weights, and with small pages it reads a quarter fewer bytes a second (docs/decisions/011-packed-weights.md).
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

from selfdraft.models.runner import kernel_build
from selfdraft.models.runner.tape import ALIGNED, TYPES

PIECE = 1 << 28
"""Bytes that are asked of the system at a time; what is not written to takes no memory."""
LARGE = 1 << 21
"""Bytes of a large page."""


class Arena:
    """Memory for weights, never given back in parts: a tensor that lies in it keeps its whole piece."""

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> Tensor:
        """`size` bytes [size] on a cache line, of unknown content. Errors: MemoryError."""
        if self._used + size > len(self._piece):
            self._piece, self._used = _large(max(size, PIECE)), 0
        taken = self._piece[self._used : self._used + size]
        self._used += -(-size // ALIGNED) * ALIGNED
        return taken


def _large(size: int) -> Tensor:
    """Bytes of new memory, in large pages where the system gives them."""
    try:
        new = mmap.mmap(-1, size + LARGE)
    except OSError as error:
        raise MemoryError(f"{size >> 20} MiB for weights: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # small pages then
            new.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(new, dtype=torch.uint8)
    return whole[-whole.data_ptr() % LARGE :][:size]


class Packer:
    """Packs weights, and knows those that it has packed by where they lie."""

    def __init__(self) -> None:
        self.arena = Arena()
        self.sources: dict[int, Tensor] = {}
        """The weights [out, in] of a packed one, by its address."""
        self._packed: dict[tuple[object, ...], Tensor] = {}

    def floats(self, weight: Tensor) -> Tensor:
        """Bytes of weights [out, in] of a float type, packed. Errors: MemoryError."""
        key = _key(weight)
        if key not in self._packed:
            packed = packed_floats(weight, self.arena)
            self._packed[key] = packed
            self.sources[packed.data_ptr()] = weight.detach()  # holds the numbers, whatever becomes of the parameter
        return self._packed[key]

    def moved(self, old: Tensor, new: Tensor) -> None:
        """Know what was packed of a contiguous weight by where the same numbers lie; the old place may be freed."""
        first, last = old.data_ptr(), old.data_ptr() + old.nbytes
        for key, packed in [*self._packed.items()]:
            source = self.sources[packed.data_ptr()]
            if first <= source.data_ptr() < last:
                skip = (source.data_ptr() - first) // source.dtype.itemsize
                moved = new.as_strided(source.shape, source.stride(), new.storage_offset() + skip)
                del self._packed[key]
                self._packed[_key(moved)] = packed
                self.sources[packed.data_ptr()] = moved


def _key(weight: Tensor) -> tuple[object, ...]:
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def packed_floats(weight: Tensor, arena: Arena) -> Tensor:
    """The weights [out, in], packed into new memory of `arena`. Errors: MemoryError."""
    library = kernel_build.library()
    kind, (out, wide) = TYPES[weight.dtype], weight.shape
    packed = arena.take(library.selfdraft_packed_bytes(kind, 0, out, wide))
    library.selfdraft_pack(
        kind, weight.data_ptr(), out, wide, *weight.stride(), packed.data_ptr(), torch.get_num_threads()
    )
    return packed
