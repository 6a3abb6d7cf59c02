"""Rounded weights: how near they come, and that the compiled products say what the weights say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfdraft.models.masks import Gate
from selfdraft.models.rounding import LINE, RoundedLinear, decode, encode
from tests.models import tiny_llama
from tests.test_runner import unavailable

compiled = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
SIZES = [(16, 128), (5, 1), (1, 64), (33, 127), (17, 129), (48, 200), (3, 513), (61, 48)]
"""(outputs, inputs): lines that are full, short, and just too long."""


def weights(out: int, wide: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(out, wide, generator=torch.Generator().manual_seed(out * wide)).to(dtype)


@pytest.mark.parametrize(("out", "wide"), SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_weight_is_the_nearest_level(bits: int, out: int, wide: int) -> None:
    """Half a step at most where nothing is clipped; 4 bits may clip, and err less in squares for it."""
    weight = weights(out, wide)
    codes, scales = encode(weight, bits)
    assert codes.shape == (out, -(-wide // LINE) * LINE * bits // 8)
    near = decode(codes, scales, bits, wide)
    assert near.shape == weight.shape
    group = LINE if bits == 8 else LINE // 2
    step = scales.abs().repeat_interleave(group, 1)[:, :wide]
    levels = near / step
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    if bits == 8:
        assert ((near - weight).abs() <= 0.5001 * step).all()
    clipped = (levels.abs() >= 6.9) if bits == 4 else torch.zeros_like(near, dtype=torch.bool)
    assert ((near - weight).abs() <= 0.5001 * step)[~clipped].all()


def test_a_search_for_the_scale_helps() -> None:
    weight = weights(64, 1024)
    codes, scales = encode(weight, 4)
    error = (decode(codes, scales, 4, 1024) - weight).square().mean().sqrt()
    grouped = weight.view(64, -1, 64)
    step = grouped.abs().amax(-1, keepdim=True) / 7
    usual = ((grouped / step).round() * step - grouped).square().mean().sqrt()
    assert error < 0.88 * usual
    assert error < 0.10


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_and_giants(bits: int) -> None:
    weight = torch.zeros(3, 130)
    weight[1, 5], weight[2, 129] = -3.0, 1e30
    codes, scales = encode(weight, bits)
    near = decode(codes, scales, bits, 130)
    assert torch.isfinite(scales).all()
    assert torch.equal(near[0], weight[0])
    torch.testing.assert_close(near[1:], weight[1:], rtol=1e-5, atol=0.0)


def layer(out: int, wide: int, bits: int, dtype: torch.dtype, bias: bool = True) -> RoundedLinear:
    made = nn.Linear(wide, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        made.weight.copy_(weights(out, wide, dtype))
    return RoundedLinear(made, bits, Gate())


class Alone(PreTrainedModel):
    """As much of a model as a tape needs, with one linear layer in it."""

    def __init__(self, product: nn.Module, wide: int, dtype: torch.dtype) -> None:
        super().__init__(tiny_llama(dtype).config)
        self.table = nn.Embedding(7, wide, dtype=dtype)
        self.product = product
