"""Float weights become block weights of 8 or 4 bits.

8 bits: a scale for each block of 32, the largest weight being 127 of it. 4 bits: a scale and a minimum for each block,
first those of its range, then what least squares say of the codes found, and again from a narrower range; of all that
were tried the one with the smallest squared error is taken. Scales are rounded to their stored type before codes are
chosen, so that codes make up for it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from selfdraft.errors import LoadError, RunnerUnavailable
from selfdraft.models.packed.arena import Arena
from selfdraft.models.packed.formats import FORMATS, LANES, Blocks, Bytes, Floats, Format
from selfdraft.models.packed.layers import BlockEmbedding, BlockLinear, is_plain, is_transposed, linear_of, scale_of
from selfdraft.models.packed.layout import groups_at_once, pack_groups
from selfdraft.models.runner.kernel_build import library

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CODES = {8: (4, 5), 4: (2, 3)}
"""Formats by bits: with scales in half precision, and in single precision for layers whose scales it does not hold."""
TOP = {8: 127, 4: 15}
HELD = (2.0**-14, 60000.0)
"""Largest scales and weights of a layer that half precision holds without loss."""
HEAD_BITS = 8
"""Embeddings and the output layer keep 8 bits: they say which token is largest."""
NARROWER = (1.0, 0.88)
"""4 bits: parts of a block's range from which the search for scale and minimum starts."""
REFINED = 2
"""How often least squares are asked from each start."""
SUMS = 8
"""Running sums of a block."""
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers by their bytes."""


def quantised(weight: Tensor, bits: int, arena: Arena) -> tuple[Tensor, Format]:
    """Packed weights [size] of float weights [out, in] in new memory of `arena`, and their format. `bits`: 8 or 4.

    Errors: LoadError when a weight is not finite; MemoryError.
    """
    largest = _largest(weight)
    kind = _format_for(largest, bits)
    power = int(np.frexp(largest)[1]) if kind.code == CODES[bits][1] else 0
    out, wide = weight.shape
    packed = arena.take(kind.size(out, wide))
    find = _eight if bits == 8 else _four
    groups, threads = -(-out // LANES), torch.get_num_threads()
    some = min(groups_at_once(wide), max(1, -(-groups // threads)))  # every thread has some

    def write(group: int) -> None:
        part = floats_of(weight[group * LANES : (group + some) * LANES])
        if power:  # squares of such numbers would be infinite or nothing
            found = find(np.ldexp(part, -power), kind)
            mins = None if found.mins is None else np.ldexp(found.mins, power)
            pack_groups(packed, group, Blocks(found.codes, np.ldexp(found.scales, power), mins), kind)
        else:
            pack_groups(packed, group, find(part, kind), kind)

    with ThreadPoolExecutor(threads) as pool:  # numpy and the kernels let other threads run while they compute
        for _ in pool.map(write, range(0, groups, some)):
            pass
    return packed, kind


def _largest(weight: Tensor) -> float:
    """The size of the largest weight. Errors: LoadError when one is not finite.

    By its bits without the sign, which grow with it; numpy leaves no threads of torch behind that spin beside the
    pool's.
    """
    plain = weight.detach().cpu().contiguous()
    bits = plain.view(WORDS[plain.element_size()]).numpy() & np.iinfo(f"i{plain.element_size()}").max
    word = torch.tensor([bits.max() if bits.size else 0], dtype=WORDS[plain.element_size()])
    largest = float(word.view(plain.dtype))
    if not np.isfinite(largest):
        raise LoadError(f"a weight is {largest}; no number of bits holds it: download the checkpoint again")
    return largest


def _format_for(largest: float, bits: int) -> Format:
    """The format that holds weights up to this size."""
    held = largest == 0 or (largest / TOP[bits] >= HELD[0] and largest <= HELD[1])
    return FORMATS[CODES[bits][0 if held else 1]]


def floats_of(weight: Tensor) -> Floats:
    """A weight as float32 numbers of numpy, which has no bfloat16."""
    plain = weight.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        words: Floats = (plain.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return words
    return plain.numpy().astype(np.float32)


def _cut(part: Floats, block: int) -> Floats:
    """Rows [n, in] in blocks [n, blocks, block]; the last is filled up with its last number, which widens no range."""
    return np.pad(part, ((0, 0), (0, -part.shape[1] % block)), "edge").reshape(len(part), -1, block)


def _joined(codes: Floats | Bytes, wide: int) -> Bytes:
    return codes.astype(np.uint8).reshape(len(codes), -1)[:, :wide]


def _stored(numbers: Floats, kind: Format) -> Floats:
    """Numbers as the format keeps them."""
    return numbers.astype(np.float16).astype(np.float32) if kind.scale == torch.float16 else numbers


def _over(numbers: Floats, scales: Floats) -> Floats:
    """Numbers in units of their scales; 0 where the scale is 0."""
    return numbers * np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)


def _eight(part: Floats, kind: Format) -> Blocks:
    blocks = _cut(part, kind.block)
    scales = _stored(np.abs(blocks).max(-1, keepdims=True) / np.float32(127), kind)
    codes = np.clip(np.rint(_over(blocks, scales)), -127, 127) + 128
    return Blocks(_joined(codes, part.shape[1]), scales[..., 0], None)


def _four(part: Floats, kind: Format) -> Blocks:
    """4 bits by the kernels, which are three times as quick, or by their plain twin where there are none."""
    blocks = _cut(part, kind.block)
    try:
        codes, scales, mins = four_by_kernel(blocks, kind, library())
    except RunnerUnavailable:
        codes, scales, mins = four_by_numpy(blocks, kind)
    return Blocks(_joined(codes, part.shape[1]), scales, mins)


def four_by_kernel(blocks: Floats, kind: Format, kernels: CDLL) -> tuple[Bytes, Floats, Floats]:
    """The same as `four_by_numpy`."""
    held = np.ascontiguousarray(blocks, np.float32)
    codes, count = np.empty(held.shape, np.uint8), held.shape[:-1]
    scales, mins = np.empty(count, np.float32), np.empty(count, np.float32)
    halves = int(kind.scale == torch.float16)
    places = (codes.ctypes.data, scales.ctypes.data, mins.ctypes.data)
    kernels.selfdraft_four(held.ctypes.data, scales.size, halves, *places)
    return codes, scales, mins


def four_by_numpy(blocks: Floats, kind: Format) -> tuple[Bytes, Floats, Floats]:
    """Codes, scales and minima of blocks [n, blocks, 32]; kernels/quantise.h makes the same, bit for bit.

    Weights of one place in their blocks stand in one line here: numpy takes long lines many times as quickly.
    """
    lines = np.ascontiguousarray(blocks.reshape(-1, kind.block).T)
    low, high = lines.min(0), lines.max(0)
    middle = _sums(lines) / np.float32(kind.block)
    tried = [np.zeros_like(lines), np.zeros_like(low), low.copy(), np.full_like(low, np.inf)]
    for share in NARROWER:
        scales = (high - low) * np.float32(share / TOP[4])
        mins = low + (high - low) * np.float32((1 - share) / 2)
        for left in reversed(range(REFINED + 1)):
            scales, mins = _stored(scales, kind), _stored(mins, kind)
            codes = np.rint(np.clip(_over(lines - mins, scales), 0, TOP[4]))
            error = _sums(np.square(codes * scales + mins - lines))
            better = error < tried[-1]
            for best, new in zip(tried, (codes, scales, mins, error), strict=True):
                np.copyto(best, new, where=better)
            if left:
                scales, mins = _fitted(lines, codes, middle, scales, mins)
    codes, scales, mins, _ = tried
    count = blocks.shape[:-1]
    return codes.T.astype(np.uint8).reshape(blocks.shape), scales.reshape(count), mins.reshape(count)


def _fitted(lines: Floats, codes: Floats, middle: Floats, scales: Floats, mins: Floats) -> tuple[Floats, Floats]:
    """Scale and minimum with the smallest squared error for these codes; as they are where all codes are equal."""
    count = np.float32(len(lines))
    mean = _sums(codes) / count
    spread = _sums(np.square(codes)) - count * mean * mean
    shared = _sums(codes * lines) - count * mean * middle
    some = spread > 0
    fitted = np.divide(shared, spread, out=scales.copy(), where=some)
    return fitted, np.where(some, middle - fitted * mean, mins)


def _sums(lines: Floats) -> Floats:
    """Sums [blocks] of lines [32, blocks] in the order of the kernels: eight running ones, then theirs in pairs."""
    found: Floats = lines[:SUMS]
    for first in range(SUMS, len(lines), SUMS):
        found = found + lines[first : first + SUMS]
    while len(found) > 1:
        found = found[0::2] + found[1::2]
    total: Floats = found[0]
    return total


def quantised_linear(layer: nn.Module, bits: int, arena: Arena) -> BlockLinear:
    """The layer of block weights in the place of a plain one (`layers.is_plain`), with its bias.

    Errors: those of `quantised`.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return linear_of(layer, *quantised(weight.T if is_transposed(layer) else weight, bits, arena))


def quantise_model(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """The model with block weights in its linear layers and its embedding, in place: float weights go one by one.

    `bits`: 8 or 4; the embedding and the output layer keep 8. Experts and other kinds of layers stay as they are.
    Errors: LoadError names the layer whose weights are not finite.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and getattr(head, "weight", None) is getattr(table, "weight", head)
    arena = Arena()
    made = _embedding(table, arena)
    if made is not None:
        model.set_input_embeddings(made)
    for path, layer in list(model.named_modules()):
        if not is_plain(layer):
            continue
        try:
            if layer is head and tied and made is not None:
                new = linear_of(layer, made.packed, made.kind)
            elif layer is head and tied:
                continue  # its weights are those of an embedding that stays as it is
            else:
                new = quantised_linear(layer, max(bits, HEAD_BITS) if layer is head else bits, arena)
        except LoadError as error:
            raise LoadError(f"{path}: {error}") from error
        model.set_submodule(path, new)
        layer._parameters.clear()
    return model


def _embedding(table: nn.Module, arena: Arena) -> BlockEmbedding | None:
    """The embedding of block weights; None for a class of its own, which stays as it is. Errors: LoadError."""
    try:
        scale = scale_of(table)
    except TypeError:
        return None
    weight = table.weight
    assert isinstance(weight, Tensor)
    try:
        packed, kind = quantised(weight, HEAD_BITS, arena)
    except LoadError as error:
        raise LoadError(f"the embedding: {error}") from error
    samples = weight[:: max(1, len(weight) // 64), :16].detach().clone()
    count, wide = weight.shape
    return BlockEmbedding(packed, kind, count, wide, weight.dtype, scale=scale, samples=samples)
