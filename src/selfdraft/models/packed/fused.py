"""A product and a sum in float32 with one rounding, as the instruction of a processor does it."""

from __future__ import annotations

import torch
from torch import Tensor


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a * b + c` of float32 tensors of one shape, rounded once to the nearest, ties to even.

    float64 holds the product exactly. Its sum with `c` is rounded to odd there: where it is not exact, the last bit
    is made 1, so that the rounding to float32 that follows sees which side of a tie it was on.
    """
    product, other = a.double() * b.double(), c.double()
    total = product + other
    part = total - product
    lost = (product - (total - part)) + (other - part)
    bits = total.view(torch.int64)
    even = (lost != 0) & (bits & 1 == 0) & total.isfinite()
    away = (lost > 0) == (total > 0)
    moved = torch.where(even, torch.where(away, bits + 1, bits - 1), bits)
    return moved.view(torch.float64).float()
