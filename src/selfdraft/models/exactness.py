"""Canonical shapes: the rules that make the bits of a row independent of what is computed beside it.

A matrix product may choose another kernel, and so other rounding, for another number of rows; attention may sum in
another order for another length. If both numbers come from a few classes that plain and drafted decoding share,
the same row has the same bits in both. Which classes this machine needs is measured, not assumed (`probe_rows`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from selfdraft.models.packed.layers import BlockEmbedding, BlockLinear

MULTIPLES = (1, 2, 4, 8, 16)
LARGEST = 64
"""Row counts are probed up to this many rows."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """Multiples to round up to; a bucket of 0 means natural shapes."""

    rows: int = 1
    """Rows of a pass, and of its answers."""
    bucket: int = 0
    """Attention length, in positions."""
    width: int = 1
    """Query rows that attend together."""

    def __str__(self) -> str:
        if not self.canonical:
            return "natural"
        return f"rows x{self.rows}/{self.width}, bucket {self.bucket}"

    @property
    def canonical(self) -> bool:
        return self.bucket > 0

    def round_rows(self, count: int) -> int:
        return -(-count // self.rows) * self.rows

    def round_width(self, count: int) -> int:
        multiple = max(self.width, self.rows)  # both are powers of two
        return -(-count // multiple) * multiple

    def round_length(self, count: int) -> int:
        return -(-count // self.bucket) * self.bucket if self.bucket else count


NATURAL = Shapes()


def probe_rows(model: nn.Module, most: int = LARGEST) -> int | None:
    """Smallest multiple of rows at which every linear layer of `model` is row-invariant to the bit, or None.

    Each distinct (in, out, type) is tried once with random neighbours, at 1 to `most` rows.
    """
    seen: dict[tuple[object, ...], nn.Module] = {}
    for module in model.modules():
        if isinstance(module, BlockLinear):
            seen.setdefault((type(module), module.kind, module.in_features, module.out_features), module)
            continue
        weight = None if isinstance(module, BlockEmbedding) else getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            seen.setdefault((type(module), width_of(module), *weight.shape, weight.dtype), module)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    layers = [(module, width_of(module)) for module in seen.values()]
    for multiple in MULTIPLES:
        if all(_invariant(module, width, dtype, range(multiple, most + 1, multiple)) for module, width in layers):
            return multiple
    return None


def width_of(module: nn.Module) -> int:
    """Input width of a linear-like layer; Conv1D of GPT-2 keeps its weight transposed."""
    features = getattr(module, "in_features", None) or getattr(module, "nx", None)
    if features is None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        features = weight.shape[1]
    return int(features)


def out_of(module: nn.Module) -> int | None:
    """Output width of a linear-like layer."""
    features = getattr(module, "out_features", None) or getattr(module, "nf", None)
    return int(features) if features is not None else None


@torch.inference_mode()
def _invariant(module: nn.Module, width: int, dtype: torch.dtype, counts: Iterable[int]) -> bool:
    device = next(chain(module.parameters(), module.buffers())).device
    draw = torch.Generator().manual_seed(1)
    row = torch.randn(1, width, generator=draw).to(device, dtype)
    first: Tensor | None = None
    for count in counts:
        others = torch.randn(count, width, generator=draw).to(device, dtype)
        place = count // 2
        others[place] = row
        answer = module(others[None])[0, place]
        if first is None:
            first = answer
        elif not torch.equal(answer, first):
            return False
    return True
