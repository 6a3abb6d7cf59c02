"""The packed layout of block weights: what kernels/packed.h reads, written and read with torch.

Outputs stand in groups of 16, one group after the other. A group is its units of 64 inputs in order; a unit is the
scales of its blocks, 16 at a time, then its minima, then its codes in vectors of 64 bytes: in vector s of an 8-bit
format byte 4 o + i is the code of output o and input 4 s + i; of a 4-bit format vector p holds inputs 8 p to 8 p + 3 in
the low halves of its bytes and 8 p + 4 to 8 p + 7 in the high ones. What fills up the last group and unit is zero.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from selfdraft.models.packed.formats import LANES, UNIT, Blocks, Bytes, Format
from selfdraft.models.packed.fused import fused

Numbers: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

PART = 1 << 18
"""Weights that are handled at a time: what is made of them stays close to the processor."""
LOW = 0x0F0F0F0F
"""The low halves of four bytes."""


def groups_at_once(wide: int) -> int:
    """Groups of 16 outputs that make a part of about PART weights."""
    return max(1, PART // (LANES * max(wide, 1)))


def pack(blocks: Blocks, kind: Format, into: Tensor | None = None) -> Tensor:
    """Packed bytes [size] of weights. `into`: where they are to be written, uint8 on a 64-byte boundary.

    Scales and minima are rounded to the type of the format.
    """
    out, wide = blocks.codes.shape
    packed = torch.empty(kind.size(out, wide), dtype=torch.uint8) if into is None else into
    some = groups_at_once(wide)
    for group in range(0, -(-out // LANES), some):
        pack_groups(packed, group, blocks.rows(group * LANES, (group + some) * LANES), kind)
    return packed


def pack_groups(packed: Tensor, group: int, blocks: Blocks, kind: Format) -> None:
    """Write the groups from `group` on.

    numpy moves a part of this size in a tenth of a millisecond; torch, which wakes its threads for it, takes several.
    """
    units, count = -(-blocks.codes.shape[1] // UNIT), -(-len(blocks.codes) // LANES)
    placed = packed.numpy().reshape(-1, units, kind.unit)[group : group + count]
    part, dtype = kind.front // (1 + kind.min), np.dtype(f"f{kind.scale.itemsize}")
    for number, one in enumerate((blocks.scales, blocks.mins) if kind.min else (blocks.scales,)):
        assert one is not None
        lanes = _filled(one.astype(dtype), count, units, kind.blocks)
        there = placed[..., number * part : (number + 1) * part].view(dtype)
        there.reshape(*there.shape[:2], -1, LANES)[...] = np.moveaxis(lanes, 1, -1)
    words = _filled(blocks.codes, count, units, UNIT).view(np.uint32)
    if kind.bits == 4:
        words = words[..., 0::2] | words[..., 1::2] << np.uint32(4)
    there = placed[..., kind.front :].view(np.uint32)
    there.reshape(*there.shape[:2], -1, LANES)[...] = np.moveaxis(words, 1, -1)


def _filled(rows: Numbers, count: int, units: int, width: int) -> Numbers:
    """[outputs, inputs] -> [count, 16, units, width], with zeros behind the rows and the columns."""
    short, narrow = count * LANES - rows.shape[0], units * width - rows.shape[1]
    whole = np.pad(rows, ((0, short), (0, narrow))) if short or narrow else np.ascontiguousarray(rows)
    return whole.reshape(count, LANES, units, width)


def _parts(packed: Tensor, kind: Format) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scales and minima [..., blocks, 16] float32 and words of codes [..., vectors, 16] of units [..., bytes]."""
    part = kind.front // (1 + kind.min)
    numbers = [
        _split(packed[..., first : first + part].contiguous().view(kind.scale), LANES).float()
        for first in range(0, kind.front, part)
    ]
    words = packed[..., kind.front :].contiguous().view(torch.int32)
    return numbers[0], numbers[1] if kind.min else None, _split(words, LANES)


def _split(numbers: Tensor, width: int) -> Tensor:
    """[..., n * width] -> [..., n, width]."""
    return numbers.reshape(*numbers.shape[:-1], -1, width)


def _codes(words: Tensor, kind: Format) -> Tensor:
    """Words [..., vectors] -> codes [..., 64] uint8."""
    if kind.bits == 4:
        words = torch.stack([words & LOW, words >> 4 & LOW], -1).flatten(-2)
    return words.contiguous().view(torch.uint8)


def unpack(packed: Tensor, kind: Format, out: int, wide: int) -> Blocks:
    """The weights [out, wide] that were packed."""
    scales, mins, words = _parts(packed.view(-1, -(-wide // UNIT), kind.unit), kind)

    def rows(lanes: Tensor, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """[groups, units, n, 16] -> [out, width]."""
        return lanes.movedim(-1, 1).flatten(2).flatten(0, 1)[:out, :width].numpy()

    codes = _codes(words.movedim(-1, 1), kind).flatten(2).flatten(0, 1)[:out, :wide].numpy()
    blocks = -(-wide // kind.block)
    return Blocks(codes, rows(scales, blocks), None if mins is None else rows(mins, blocks))


def dequantised(
    packed: Tensor, kind: Format, out: int, wide: int, dtype: torch.dtype = torch.float32, *, first: int = 0
) -> Tensor:
    """The weights [out, wide] of `out` outputs from `first` on, a multiple of 16.

    In float64 they are exact; in float32 `scale * q` and the sum with the minimum are each rounded once. Of weights out
    of a file the product is exact: their scales have 19 bits at most.
    """
    units, begin = -(-wide // UNIT), first // LANES
    groups = packed.cpu().numpy().reshape(-1, units, kind.unit)[begin : begin + -(-out // LANES)]
    whole = np.empty((out, wide), f"f{dtype.itemsize}")
    for group in range(0, len(groups), some := groups_at_once(wide)):
        numbers = _numbers(groups[group : group + some], kind, whole.dtype)
        there = whole[group * LANES : (group + some) * LANES]
        there[...] = numbers[: len(there), :wide]
    return torch.from_numpy(whole).to(packed.device)


def _numbers(units: Bytes, kind: Format, dtype: np.dtype[np.generic]) -> Numbers:
    """Units [groups, units, bytes] -> weights [groups * 16, units * 64]."""
    groups, many = units.shape[:2]
    words = np.moveaxis(units[..., kind.front :].view(np.uint32).reshape(groups, many, -1, LANES), -1, 1)
    codes = np.empty((groups, LANES, many, UNIT // 4), np.uint32)
    if kind.bits == 4:
        np.bitwise_and(words, LOW, out=codes[..., 0::2])
        np.bitwise_and(words >> 4, LOW, out=codes[..., 1::2])
    else:
        codes[...] = words
    numbers = codes.view(np.uint8).reshape(groups, LANES, many, kind.blocks, kind.block).astype(dtype)
    if kind.zero:
        numbers -= dtype.type(kind.zero)
    part = kind.front // (1 + kind.min)
    for first, act in ((0, np.multiply), (part, np.add))[: 1 + kind.min]:
        scales = units[..., first : first + part].view(f"f{kind.scale.itemsize}")
        lanes = np.moveaxis(scales.reshape(groups, many, -1, LANES), -1, 1)
        act(numbers, lanes.astype(dtype)[..., None], out=numbers)
    return numbers.reshape(groups * LANES, many * UNIT)


def rows(packed: Tensor, ids: Tensor, kind: Format, wide: int, dtype: torch.dtype) -> Tensor:
    """The weights [..., wide] of the outputs `ids` [...], each rounded once to float32 and then to `dtype`.

    In float64 they are exact.
    """
    units = -(-wide // UNIT)
    flat = ids.reshape(-1)
    taken = packed.view(-1, units, kind.unit)[flat // LANES]
    lane = (flat % LANES)[:, None, None, None]
    scales, mins, words = (
        None if part is None else torch.take_along_dim(part, lane, -1)[..., 0] for part in _parts(taken, kind)
    )
    assert scales is not None
    assert words is not None
    q = _split(_codes(words, kind), kind.block).double() - kind.zero
    if dtype == torch.float64:
        numbers = q * scales[..., None].double()
        numbers = numbers if mins is None else numbers + mins[..., None].double()
    elif mins is None:
        numbers = (q * scales[..., None].double()).float()
    else:
        numbers = fused(scales[..., None].expand(q.shape), q.float(), mins[..., None].expand(q.shape))
    found: Tensor = numbers.flatten(1)[:, :wide].to(dtype).view(*ids.shape, wide)
    return found
