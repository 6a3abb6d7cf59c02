"""Operations of our own, which a traced graph names and a tape does by itself (`tape.py`).

Attention and gates compute nothing here; products with block weights (`models/packed/`) compute on the plain path, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selfdraft.models.packed import layout
from selfdraft.models.packed.formats import FORMATS, LANES
from selfdraft.models.packed.twin import rounded

if TYPE_CHECKING:  # attention asks layers for their weights, and these have operations from here
    from selfdraft.models.attention import Scores

PART = 1 << 24
"""Weights that the plain path writes out at a time."""
# torch's own table of operations: adds names, changes none
_LIBRARY: Any = torch.library.Library("selfdraft", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "attend(Tensor q, Tensor k, Tensor v, int layer, int window, float scale, float cap, Tensor? sinks) -> Tensor"
)
_LIBRARY.define("gated(Tensor y, Tensor x, Tensor down, Tensor up, int number) -> Tensor")
_LIBRARY.define("blocks(Tensor x, Tensor packed, Tensor? bias, int code, int out, int wide) -> Tensor")
_LIBRARY.define("block_rows(Tensor ids, Tensor packed, int code, int out, int wide, ScalarType dtype) -> Tensor")


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layer: int, window: int, scale: float, cap: float, sinks: Tensor | None
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _gated(y: Tensor, x: Tensor, down: Tensor, up: Tensor, number: int) -> Tensor:
    return torch.empty_like(y)


def _blocks_shape(x: Tensor, packed: Tensor, bias: Tensor | None, code: int, out: int, wide: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


def _blocks(x: Tensor, packed: Tensor, bias: Tensor | None, code: int, out: int, wide: int) -> Tensor:
    """In float64 exact, as proofs need it; else of rounded rows, equal to kernels/ up to the rounding of sums."""
    exact = x.dtype == torch.float64
    entering = x if exact else rounded(x).values[..., :wide]
    kind, said = FORMATS[code], entering.new_empty(*x.shape[:-1], out)
    for first in range(0, out, some := max(1, PART // (wide * LANES)) * LANES):
        part = layout.dequantised(packed, kind, min(some, out - first), wide, entering.dtype, first=first)
        said[..., first : first + some] = F.linear(entering, part)
    return (said if bias is None else said + bias.to(said.dtype)).to(x.dtype)


def _block_rows_shape(ids: Tensor, packed: Tensor, code: int, out: int, wide: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, wide, dtype=dtype)


def _block_rows(ids: Tensor, packed: Tensor, code: int, out: int, wide: int, dtype: torch.dtype) -> Tensor:
    return layout.rows(packed, ids, FORMATS[code], wide, dtype)


torch.library.register_fake("selfdraft::attend", _attend, lib=_LIBRARY)
torch.library.register_fake("selfdraft::gated", _gated, lib=_LIBRARY)
torch.library.register_fake("selfdraft::blocks", _blocks_shape, lib=_LIBRARY)
torch.library.register_fake("selfdraft::block_rows", _block_rows_shape, lib=_LIBRARY)
_LIBRARY.impl("blocks", _blocks, "CompositeExplicitAutograd")
_LIBRARY.impl("block_rows", _block_rows, "CompositeExplicitAutograd")


@dataclass(eq=False, slots=True)
class Recorder:
    """What travels to attention functions and views instead of a `Plan` while a forward pass is traced."""

    hidden: Tensor | None = None
    """As in `Plan`."""
    calls: list[tuple[int, int | None]] = field(default_factory=list)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Queries [1, heads, n, dim] -> [1, n, heads, dim] by name only."""
        self.calls.append((layer, scores.window))
        told = scores.window or 0, scores.scale, scores.cap or 0.0, scores.sinks
        said: Tensor = torch.ops.selfdraft.attend(query, key, value, layer, *told)
        return said


def gate(y: Tensor, x: Tensor, down: Tensor, up: Tensor, number: int) -> Tensor:
    """`y`, and on the rows of adapter `number` also x @ down @ up, by name only."""
    said: Tensor = torch.ops.selfdraft.gated(y, x, down, up, number)
    return said


def product(x: Tensor, packed: Tensor, bias: Tensor | None, code: int, out: int, wide: int) -> Tensor:
    """Rows x [..., wide] through packed weights [out, wide] in the format `code` (`models/packed/`): [..., out]."""
    said: Tensor = torch.ops.selfdraft.blocks(x, packed, bias, code, out, wide)
    return said


def table_rows(ids: Tensor, packed: Tensor, code: int, out: int, wide: int, dtype: torch.dtype) -> Tensor:
    """The rows `ids` [...] of a packed table [out, wide] in the format `code`: [..., wide]."""
    said: Tensor = torch.ops.selfdraft.block_rows(ids, packed, code, out, wide, dtype)
    return said
