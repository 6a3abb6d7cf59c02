"""The table of tensors of a GGUF file: names, sizes, types and places, read without the texts in front of it.

The package `gguf` reads it too, but makes an object of every token on the way, which takes seconds. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the types of plain values."""
TEXT, LIST = 8, 9
ALIGNMENT = "general.alignment"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in a file: its bytes are those from `start` on."""

    name: str
    shape: tuple[int, ...]
    """Outputs first, as a model has it."""
    kind: GGMLQuantizationType
    start: int
    bytes: int

    @property
    def type(self) -> str:
        """The name of its type."""
        return self.kind.name

    @property
    def numbers(self) -> int:
        return prod(self.shape)

    def raw(self, file: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Its bytes [outputs, bytes of a row], read now."""
        flat = np.fromfile(file, np.uint8, self.bytes, offset=self.start)
        return flat.reshape(*self.shape[:-1], -1)


class _Cursor:
    """Reads values one after the other. Errors: struct.error, IndexError at the end of the file."""

    def __init__(self, held: mmap.mmap) -> None:
        self.held, self.at = held, 0

    def number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self.held, self.at)
        self.at += struct.calcsize(kind)
        return int(value)

    def text(self) -> str:
        size = self.number("Q")
        self.skip(size)
        held: bytes = self.held[self.at - size : self.at]
        return held.decode()

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.held):
            raise IndexError("it ends within its head")

    def pass_by(self, kind: int) -> None:
        """Step over a value of this type. Errors: ValueError for a type that there is not."""
        if kind in WIDTHS:
            self.skip(WIDTHS[kind])
        elif kind == TEXT:
            self.skip(self.number("Q"))
        elif kind == LIST:
            inner, count = self.number("I"), self.number("Q")
            if inner in WIDTHS:
                self.skip(WIDTHS[inner] * count)
            else:
                for _ in range(count):
                    self.pass_by(inner)
        else:
            raise ValueError(f"there is no type {kind} of values")


def read_table(file: Path) -> list[StoredTensor]:
    """The tensors of a file whose first bytes were checked.

    Errors: struct.error, IndexError, UnicodeDecodeError or ValueError for a damaged head; ValueError names
    GGMLQuantizationType when a tensor has a type that the package `gguf` does not know.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as held:
        cursor = _Cursor(held)
        cursor.skip(8)
        tensors, keys, alignment = cursor.number("Q"), cursor.number("Q"), 32
        for _ in range(keys):
            key, kind = cursor.text(), cursor.number("I")
            if key == ALIGNMENT and kind == 4:
                alignment = cursor.number("I") or 32
            else:
                cursor.pass_by(kind)
        rows = []
        for _ in range(tensors):
            name, dims = cursor.text(), cursor.number("I")
            shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
            rows.append((name, shape, GGMLQuantizationType(cursor.number("I")), cursor.number("Q")))
        first = -(-cursor.at // alignment) * alignment
    return [StoredTensor(name, shape, kind, first + start, _size(shape, kind)) for name, shape, kind, start in rows]


def _size(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return prod(shape) // int(block) * int(size)
