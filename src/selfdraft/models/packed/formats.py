"""Formats of block weights, and the tensor types of GGUF files that are read into them without loss.

A row of weights is cut into blocks; a weight is `scale * q`, or `scale * q + min` where the format has minima. Codes
are stored unsigned: q itself with minima, and q + 8 (4 bits) or q + 128 (8 bits) without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

UNIT = 64
"""Inputs that lie together in the packed layout."""
LANES = 16
"""Outputs that lie together: the numbers of one instruction."""
Bytes: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Words: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.uint32]]
Floats: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Format:
    """How weights are stored: bits of a code, weights of a block, type of the scales, and whether there are minima."""

    code: int
    """Its number on a tape and in kernels/packed.h; 0 stands for float weights there."""
    bits: int
    block: int
    scale: torch.dtype
    min: bool = False

    @property
    def zero(self) -> int:
        """The stored code of q = 0."""
        return 0 if self.min else 1 << (self.bits - 1)

    @property
    def blocks(self) -> int:
        """Blocks of a unit."""
        return UNIT // self.block

    @property
    def front(self) -> int:
        """Bytes of scales, and of minima, in front of the codes of a unit."""
        return self.blocks * LANES * self.scale.itemsize * (1 + self.min)

    @property
    def unit(self) -> int:
        """Bytes of 16 outputs x 64 inputs."""
        return self.front + LANES * UNIT * self.bits // 8

    def size(self, out: int, wide: int) -> int:
        """Bytes of packed weights [out, wide]."""
        return -(-out // LANES) * -(-wide // UNIT) * self.unit

    def __str__(self) -> str:
        kind = str(self.scale).removeprefix("torch.float")
        return f"{self.bits} bits in blocks of {self.block}, f{kind} scales{' and minima' if self.min else ''}"


FORMATS = {
    one.code: one
    for one in (
        Format(1, 4, 32, torch.float16),
        Format(2, 4, 32, torch.float16, min=True),
        Format(3, 4, 32, torch.float32, min=True),
        Format(4, 8, 32, torch.float16),
        Format(5, 8, 32, torch.float32),
        Format(6, 8, 32, torch.float32, min=True),
        Format(7, 8, 16, torch.float32),
    )
}
"""All formats by their codes."""


class Blocks(NamedTuple):
    """Weights [out, in] as stored codes [out, in] uint8, scales [out, blocks] and minima [out, blocks], if any."""

    codes: Bytes
    scales: Floats
    mins: Floats | None

    def rows(self, first: int, last: int) -> Blocks:
        """Some of the outputs."""
        return Blocks(
            self.codes[first:last], self.scales[first:last], None if self.mins is None else self.mins[first:last]
        )

    def of(self, out: int) -> Blocks:
        """The same numbers as those of `out` outputs."""
        mins = None if self.mins is None else self.mins.reshape(out, -1)
        return Blocks(self.codes.reshape(out, -1), self.scales.reshape(out, -1), mins)


class Stored(NamedTuple):
    """A tensor type of GGUF files: weights and bytes of one of its blocks, its format here, and what reads it."""

    block: int
    bytes: int
    code: int
    read: Callable[[Bytes], Blocks]


NIBBLES, PAIRS, BITS = (np.uint32(mask) for mask in (0x0F0F0F0F, 0x03030303, 0x01010101))
"""Four codes in a word of 32 bits are taken out of their bytes at once."""
LEVELS = np.array([1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241], np.uint8)
"""What a 4-bit code of the IQ4 types stands for, 128 added."""


def unpacked(raw: Bytes, kind: str) -> Blocks:
    """The weights of rows of raw blocks [out, bytes] of the tensor type `kind`, exactly.

    `kind` is a key of GGUF_TYPES.
    """
    stored = GGUF_TYPES[kind]
    return stored.read(np.ascontiguousarray(raw).reshape(-1, stored.bytes)).of(len(raw))


def _words(raw: Bytes, first: int, last: int) -> Words:
    return np.ascontiguousarray(raw[:, first:last]).view(np.uint32)


def _halves(raw: Bytes, first: int) -> Floats:
    """The float16 number at byte `first` of every block: [n, 1]."""
    return np.ascontiguousarray(raw[:, first : first + 2]).view(np.float16).astype(np.float32)


def _low_high(words: Words, run: int) -> Words:
    """Low nibbles of each `run` words, then their high ones: [n, words] -> [n, words / run, 2, run]."""
    made = np.empty((len(words), words.shape[1] // run, 2, run), np.uint32)
    runs = words.reshape(len(words), -1, run)
    np.bitwise_and(runs, NIBBLES, out=made[:, :, 0])
    np.bitwise_and(runs >> np.uint32(4), NIBBLES, out=made[:, :, 1])
    return made


def _planes(words: Words, shifts: range, mask: np.uint32) -> Words:
    """The bits at each shift: [n, runs, words] -> [n, runs, shifts, words]."""
    return words[:, :, None] >> np.array(shifts, np.uint32)[:, None] & mask


def _codes(words: Words) -> Bytes:
    return words.view(np.uint8)


def _q4_0(raw: Bytes) -> Blocks:
    return Blocks(_codes(_low_high(_words(raw, 2, 18), 4)), _halves(raw, 0), None)


def _q4_1(raw: Bytes) -> Blocks:
    return Blocks(_codes(_low_high(_words(raw, 4, 20), 4)), _halves(raw, 0), _halves(raw, 2))


def _fifth(raw: Bytes, first: int) -> Bytes:
    """5-bit codes: the fifth bits of a block at `first`, the others behind them."""
    high = np.unpackbits(np.ascontiguousarray(raw[:, first : first + 4]), axis=1, bitorder="little")
    return _codes(_low_high(_words(raw, first + 4, first + 20), 4)).reshape(len(raw), 32) | high << np.uint8(4)


def _q5_0(raw: Bytes) -> Blocks:
    return Blocks(_fifth(raw, 2) + np.uint8(128 - 16), _halves(raw, 0), None)


def _q5_1(raw: Bytes) -> Blocks:
    return Blocks(_fifth(raw, 4), _halves(raw, 0), _halves(raw, 2))


def _q8_0(raw: Bytes) -> Blocks:
    return Blocks(raw[:, 2:] ^ np.uint8(128), _halves(raw, 0), None)


def _six_bits(raw: Bytes, first: int) -> tuple[Floats, Floats]:
    """Scales [n, 8] and minima of Q4_K and Q5_K: whole numbers of 6 bits times the two numbers of the block."""
    low, mid, high = (raw[:, first + 4 * i : first + 4 * i + 4] for i in range(3))
    top = np.uint8(48)
    scales = np.concatenate([low & 63, high & 15 | low >> 2 & top], 1)
    mins = np.concatenate([mid & 63, high >> 4 | mid >> 2 & top], 1)
    return _halves(raw, 0) * scales.astype(np.float32), -(_halves(raw, 2) * mins.astype(np.float32))


def _q4_k(raw: Bytes) -> Blocks:
    scales, mins = _six_bits(raw, 4)
    return Blocks(_codes(_low_high(_words(raw, 16, 144), 8)), scales, mins)


def _q5_k(raw: Bytes) -> Blocks:
    scales, mins = _six_bits(raw, 4)
    high = _planes(_words(raw, 16, 48)[:, None], range(8), BITS).reshape(-1, 4, 2, 8)
    return Blocks(_codes(_low_high(_words(raw, 48, 176), 8) | high << np.uint32(4)), scales, mins)


def _q6_k(raw: Bytes) -> Blocks:
    low = _low_high(_words(raw, 0, 128), 16).reshape(-1, 8, 8)
    high = _planes(_words(raw, 128, 192).reshape(-1, 2, 8), range(0, 8, 2), PAIRS).reshape(-1, 8, 8)
    codes = _codes(low | high << np.uint32(4)) + np.uint8(128 - 32)
    scales = np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.float32)
    return Blocks(codes, _halves(raw, 208) * scales, None)


def _q3_k(raw: Bytes) -> Blocks:
    low = _planes(_words(raw, 32, 96).reshape(-1, 2, 8), range(0, 8, 2), PAIRS).reshape(-1, 8, 8)
    high = _planes(_words(raw, 0, 32)[:, None], range(8), BITS)[:, 0]
    codes = _codes(low + (high << np.uint32(2))) + np.uint8(128 - 4)
    first, last = raw[:, 96:104], raw[:, 104:108]
    fours = np.concatenate([first & 15, first >> 4], 1)
    twos = np.concatenate([last >> np.uint8(shift) & 3 for shift in (0, 2, 4, 6)], 1)
    scales = (fours | twos << 4).astype(np.float32) - np.float32(32)
    return Blocks(codes, _halves(raw, 108) * scales, None)


def _iq4_nl(raw: Bytes) -> Blocks:
    return Blocks(LEVELS[_codes(_low_high(_words(raw, 2, 18), 4))], _halves(raw, 0), None)


def _iq4_xs(raw: Bytes) -> Blocks:
    pairs = np.ascontiguousarray(raw[:, 2:4]).view(np.uint16)
    twos = (pairs >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    fours = np.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], -1).reshape(-1, 8)
    scales = (fours | twos << 4).astype(np.float32) - np.float32(32)
    return Blocks(LEVELS[_codes(_low_high(_words(raw, 8, 136), 4))], _halves(raw, 0) * scales, None)


GGUF_TYPES = {
    "Q4_0": Stored(32, 18, 1, _q4_0),
    "Q4_1": Stored(32, 20, 2, _q4_1),
    "Q5_0": Stored(32, 22, 4, _q5_0),
    "Q5_1": Stored(32, 24, 6, _q5_1),
    "Q8_0": Stored(32, 34, 4, _q8_0),
    "Q3_K": Stored(256, 110, 7, _q3_k),
    "Q4_K": Stored(256, 144, 3, _q4_k),
    "Q5_K": Stored(256, 176, 6, _q5_k),
    "Q6_K": Stored(256, 210, 7, _q6_k),
    "IQ4_NL": Stored(32, 18, 4, _iq4_nl),
    "IQ4_XS": Stored(256, 136, 5, _iq4_xs),
}
"""Tensor types of GGUF files that have a format here; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""
