"""Rows of keys or values as codes of 8 bits: each row by itself, so that it is the same whatever is written with it.

A row of `wide` numbers is stored as `wide` signed codes, zeros up to a multiple of 4 bytes, and the float32 scale that
codes are multiplied by: what moves a row moves its scale with it. The kernels of the fast runner write the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 127
"""The largest code; the largest number of a row has it."""
SMALLEST = 1e-30
"""A row whose numbers are all smaller is stored as zeros: its scale would not be a normal number."""


def row_bytes(wide: int) -> int:
    """Bytes of a stored row of `wide` numbers."""
    return -(-wide // 4) * 4 + 4


def encode(rows: Tensor) -> Tensor:
    """Rows [..., wide] of any float type, stored: int8 [..., row_bytes(wide)].

    A row that holds an infinite number or a NaN has NaN for its scale: it stays as noticeable as it was.
    """
    rows = rows.float()
    most = rows.abs().amax(-1, keepdim=True)
    coded = most.isfinite() & (most >= SMALLEST)
    factor = torch.where(coded, MOST / most, 0.0)
    scale = torch.where(coded, most / MOST, torch.where(most.isfinite(), 0.0, float("nan")))
    codes = torch.where(coded, rows * factor, 0.0).round().to(torch.int8)
    padding = row_bytes(rows.shape[-1]) - 4 - rows.shape[-1]
    scales = scale.contiguous().view(torch.int8)
    return torch.cat([torch.nn.functional.pad(codes, (0, padding)), scales], -1)


def decode(stored: Tensor, wide: int, dtype: torch.dtype) -> Tensor:
    """The rows [..., wide] of what `encode` made, in `dtype`."""
    scales = stored[..., -4:].contiguous().view(torch.float32)
    return (stored[..., :wide].float() * scales).to(dtype)
