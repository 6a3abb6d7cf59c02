"""The specification of products with block weights: every rounding in the order in which kernels/ does it.

Rows are rounded to 8 bits in blocks of 32 with a scale each; products of whole numbers are summed exactly within a
block, and the blocks of a row are added one after the other in rising order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfdraft.models.packed.formats import UNIT, Format
from selfdraft.models.packed.fused import fused
from selfdraft.models.packed.layout import unpack

BLOCK = 32
"""Inputs that share a scale."""
LARGEST = 127
SMALLEST = 2.0**-126
"""Scales below this count as 0: their reciprocals would be infinite."""


class Rounded(NamedTuple):
    """Rows in 8 bits: whole numbers [..., blocks, 32] and scales [..., blocks], both float32."""

    whole: Tensor
    scales: Tensor

    @property
    def values(self) -> Tensor:
        """The numbers that they stand for [..., blocks * 32]."""
        return (self.whole * self.scales[..., None]).flatten(-2)


def rounded(x: Tensor) -> Rounded:
    """Rows [..., wide] in 8 bits, filled up with zeros to whole units; a block with a NaN or an infinity is all NaN."""
    filled = F.pad(x.float(), (0, -x.shape[-1] % UNIT))
    filled = filled.view(*x.shape[:-1], filled.shape[-1] // BLOCK, BLOCK)
    largest = filled.abs().amax(-1)
    scales = largest / LARGEST
    scales = torch.where(scales < SMALLEST, 0.0, scales)
    whole = (filled * torch.where(scales == 0, 0.0, 1.0 / scales)[..., None]).round()
    finite = largest.isfinite()
    whole = torch.where(finite[..., None] & (scales != 0)[..., None], whole, 0.0)
    return Rounded(whole, torch.where(finite, scales, torch.nan))


def twin(x: Tensor, packed: Tensor, bias: Tensor | None, kind: Format, out: int, wide: int) -> Tensor:
    """Rows x [n, wide] through packed weights [out, wide]: [n, out] in the type of x, to the bit as kernels/ say it."""
    rows = rounded(x)
    weights = unpack(packed, kind, out, wide)
    scales = torch.from_numpy(weights.scales)
    mins = None if weights.mins is None else torch.from_numpy(weights.mins)
    blocks = scales.shape[1]
    stored = F.pad(torch.from_numpy(weights.codes).double() - kind.zero, (0, blocks * kind.block - wide))
    stored = stored.view(out, blocks, kind.block)
    whole = rows.whole.view(len(x), -1, kind.block)
    said = torch.zeros(len(x), out)
    for block in range(blocks):
        scale = rows.scales[:, block * kind.block // BLOCK, None]
        # sums of whole numbers below 2^53 are exact in float64
        sums = (whole[:, block].double() @ stored[:, block].mT).float()
        said = fused(sums * scale, scales[:, block].expand(said.shape), said)
        if mins is not None:
            added = scale * whole[:, block].sum(-1, keepdim=True)
            said = fused(mins[:, block].expand(said.shape), added.expand(said.shape), said)
    return (said if bias is None else said + bias.float()).to(x.dtype)
