"""Weights in the order in which products read them (`kernels/packed.h`), each packed once for all tapes of a target."""

from __future__ import annotations

import torch
from torch import Tensor

from selfdraft.models.packed.arena import Arena
from selfdraft.models.runner import kernel_build
from selfdraft.models.runner.tape import TYPES


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
