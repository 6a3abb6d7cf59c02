"""Block weights: raw blocks are read without loss, packed and read back; products have the bits they are said to have."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from selfdraft.models.packed import layout
from selfdraft.models.packed.formats import FORMATS, GGUF_TYPES, Blocks, Format, unpacked
from selfdraft.models.packed.fused import fused
from selfdraft.models.packed.twin import rounded, twin
from selfdraft.models.runner.one_layer import run_blocks
from selfdraft.models.runner.trace_ops import product
from tests import gguf_files
from tests.models import unavailable

compiled = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
SIZES = [(5, 1), (17, 33), (48, 64), (33, 200), (16, 96), (70, 500)]
"""(outputs, inputs): whole groups and units, and some that end within one."""


def blocks(kind: Format, out: int, wide: int, seed: int = 0) -> Blocks:
    draw = np.random.default_rng(seed + 1000 * out + wide + kind.code)
    count = -(-wide // kind.block)

    def numbers() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        made: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = draw.normal(size=(out, count)).astype(np.float32)
        return made.astype(np.float16).astype(np.float32) if kind.scale == torch.float16 else made

    codes = draw.integers(0, 1 << kind.bits, (out, wide), dtype=np.uint8)
    return Blocks(codes, numbers(), numbers() if kind.min else None)


def values(kind: Format, weights: Blocks) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The weights in float64, by the definition."""
    wide = weights.codes.shape[1]

    def spread(
        part: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return np.repeat(part.astype(np.float64), kind.block, 1)[:, :wide]

    found = (weights.codes.astype(np.float64) - kind.zero) * spread(weights.scales)
    return found if weights.mins is None else found + spread(weights.mins)


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_raw_blocks_are_read_without_loss(name: str) -> None:
    """Against the package gguf, to the bit in float32."""
    kind, stored = GGMLQuantizationType[name], GGUF_TYPES[name]
    assert GGML_QUANT_SIZES[kind] == (stored.block, stored.bytes)
    values_ = np.random.default_rng(1).normal(0, 0.1, (35, 768)).astype(np.float32)
    raw = gguf_files.blocks(kind, values_)
    weights, format_ = unpacked(raw, name), FORMATS[stored.code]
    packed = layout.pack(weights, format_)
    wanted = torch.from_numpy(np.array(dequantize(raw, kind)))
    assert torch.equal(layout.dequantised(packed, format_, 35, 768), wanted)
    ids = torch.tensor([[0, 34], [17, 3]])
    assert torch.equal(layout.rows(packed, ids, format_, 768, torch.float32), wanted[ids])


@pytest.mark.parametrize(("out", "wide"), SIZES)
@pytest.mark.parametrize("kind", FORMATS.values(), ids=str)
def test_what_is_packed_comes_back(kind: Format, out: int, wide: int) -> None:
    weights = blocks(kind, out, wide)
    room = torch.full((kind.size(out, wide),), 255, dtype=torch.uint8)
    assert layout.pack(weights, kind, room) is room
    again = layout.unpack(room, kind, out, wide)
    np.testing.assert_array_equal(again.codes, weights.codes)
    np.testing.assert_array_equal(again.scales, weights.scales)
    if weights.mins is not None:
        assert again.mins is not None
        np.testing.assert_array_equal(again.mins, weights.mins)
    exact = layout.dequantised(room, kind, out, wide, torch.float64)
    np.testing.assert_array_equal(exact.numpy(), values(kind, weights))


def test_places_of_bytes() -> None:
    """One weight at a time, against the words of the layout's description."""
    for code, place in (
        (4, lambda o, i: 64 + i // 4 * 64 + 4 * o + i % 4),
        (1, lambda o, i: 64 + i // 8 * 64 + 4 * o + i % 4),
    ):
        kind = FORMATS[code]
        for o, i in ((0, 0), (3, 5), (15, 63), (7, 36)):
            codes = np.zeros((16, 64), np.uint8)
            codes[o, i] = 9
            packed = layout.pack(Blocks(codes, np.zeros((16, 2), np.float32), None), kind)
            assert packed.nonzero().tolist() == [[place(o, i)]]
            assert packed[place(o, i)] == (9 << 4 if code == 1 and i % 8 >= 4 else 9)


def nearest(value: Fraction) -> float:
    """The float32 nearest to a fraction, ties to even."""
    if value == 0:
        return 0.0
    size, power = abs(value), abs(value).numerator.bit_length() - value.denominator.bit_length()
    power -= Fraction(2) ** power > size
    step = Fraction(2) ** (max(power, -126) - 23)
    whole = size / step
    near, rest = whole.numerator // whole.denominator, whole - whole.numerator // whole.denominator
    near += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and near % 2 == 1)
    found = float("inf") if near * step >= Fraction(2) ** 128 else float(near * step)
    return found if value > 0 else -found


def test_a_fused_product_is_rounded_once() -> None:
    draw = random.Random(0)

    def hard() -> float:
        whole = draw.choice([1, 3, 2**23 + 1, 2**24 - 1, draw.getrandbits(24) | 1])
        return draw.choice([1, -1]) * whole * 2.0 ** (draw.choice([0, 1, 12, 23, -24, -60, -100, 60]) - 24)

    cases = []
    for _ in range(4000):
        a, b = hard(), hard()
        near = [float(torch.tensor(a * b * scale, dtype=torch.float32)) for scale in (-1.0, 2.0**24, 2.0**-24)]
        cases.append((a, b, draw.choice([hard(), 0.0, *near])))
    said = fused(*torch.tensor(cases, dtype=torch.float32).unbind(1)).tolist()
    for (a, b, c), found in zip(cases, said, strict=True):
        if abs(c) != float("inf"):
            assert found == nearest(Fraction(a) * Fraction(b) + Fraction(c)), (a, b, c)


def test_rows_in_eight_bits() -> None:
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2, 40], x[3, 70] = float("nan"), float("inf")
    found = rounded(x)
    assert found.whole.shape == (4, 4, 32)
    assert (found.values[0, :100] - x[0]).abs().max() <= found.scales[0].max() / 2 * 1.001
    assert found.whole[0].abs().amax(-1).tolist() == [127.0] * 4
    assert not found.scales[1].any()
    assert found.scales[2:].isnan().nonzero().tolist() == [[0, 1], [1, 2]]
    tiny = rounded(torch.full((1, 64), 2.0**-130))
    assert not tiny.scales.any()
    assert not tiny.whole.any()


@pytest.mark.parametrize("kind", FORMATS.values(), ids=str)
def test_the_plain_product_is_near_the_specification(kind: Format) -> None:
    for out, wide in SIZES:
        weights = blocks(kind, out, wide)
        packed = layout.pack(weights, kind)
        x = torch.randn(3, wide, generator=torch.Generator().manual_seed(2))
        bias = torch.randn(out, generator=torch.Generator().manual_seed(3))
        exact = x.double() @ torch.from_numpy(values(kind, weights)).mT + bias.double()
        torch.testing.assert_close(product(x.double(), packed, bias, kind.code, out, wide), exact)
        size = x.abs().double() @ torch.from_numpy(np.abs(values(kind, weights))).mT + 1
        plain = product(x, packed, bias, kind.code, out, wide)
        said = twin(x, packed, bias, kind, out, wide)
        assert ((said - plain).abs() / size).max() < 1e-6
        assert ((said - exact).abs() / size).max() < 0.005


def odd_rows(wide: int, dtype: torch.dtype) -> Tensor:
    """Rows of all sizes; zeros, a NaN and an infinity among them."""
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(13, wide, generator=draw) * 10.0 ** torch.randint(-30, 30, (13, 1), generator=draw)
    x[3] = 0
    x[5, wide // 2], x[7, 0] = float("nan"), float("inf")
    return x.to(dtype)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMATS.values(), ids=str)
def test_kernels_have_the_bits_of_the_specification(kind: Format, dtype: torch.dtype) -> None:
    for out, wide in SIZES:
        packed = layout.pack(blocks(kind, out, wide), kind)
        x, bias = odd_rows(wide, dtype), torch.randn(out, generator=torch.Generator().manual_seed(5)).to(dtype)
        wanted = twin(x, packed, bias, kind, out, wide)
        for rows in (1, 2, 13):
            said = run_blocks(x[:rows], packed, bias, kind.code, out, wide)
            assert torch.equal(said.nan_to_num(1.5), wanted[:rows].nan_to_num(1.5)), (out, wide, rows)
