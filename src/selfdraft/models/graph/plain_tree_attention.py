"""Attention of tree rows in torch's own operations: the specification of the kernels in `tree_attention.py`.

A row reads the keys of its own path, in the order of their positions. Keys are cut into pieces at fixed positions; a
piece has a largest score, a sum and weighted values, and pieces are merged in their order. So a row's bits depend on
its own path alone. Source of cutting and merging: Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from selfdraft.models.attention import Scores
from selfdraft.models.graph.sheet import tensors


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a pass of fixed shape sees, and in which portions it reads."""

    length: int
    """No row sees more places."""
    piece: int
    """Positions of a piece of keys."""
    tile: int
    """Most rows of a tile of the sheet."""


class Attention(Protocol):
    """Queries [n, heads, dim] over keys and values [slots, key heads, places, dim]: [n, heads, dim of values]."""

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, sheet: Mapping[str, Tensor], reach: Reach, scores: Scores
    ) -> Tensor: ...


def attend_plainly(
    query: Tensor, keys: Tensor, values: Tensor, sheet: Mapping[str, Tensor], reach: Reach, scores: Scores
) -> Tensor:
    """See `Attention`. Computed in float32 at least. Padding rows get zeros, or what stands in their slot's place 0."""
    n, heads, _ = query.shape
    key_heads, pieces = keys.shape[1], -(-reach.length // reach.piece)
    at = torch.arange(pieces * reach.piece, device=query.device)[None]
    seen, base = (column[:, None] for column in tensors(sheet, "seen", "bases"))
    path = sheet["path"].long()
    own = path.gather(1, (at - base).clamp(0, path.shape[1] - 1))
    place = torch.where(at < seen, torch.where(at < base, at, own), 0)  # what is stale is never read
    slot = sheet["slots"].long()[:, None, None]
    head = torch.arange(key_heads, device=query.device)[None, :, None]
    wide = torch.promote_types(query.dtype, torch.float32)
    cut = (n, key_heads, pieces, reach.piece, -1)
    some, their = (store[slot, head, place[:, None]].to(wide).view(cut) for store in (keys, values))
    asked = query.reshape(n, key_heads, 1, heads // key_heads, -1).to(wide)
    scored = asked @ some.mT * scores.scale
    if scores.cap is not None:
        scored = scores.cap * torch.tanh(scored / scores.cap)
    sees = at < seen
    if scores.window is not None:
        sees = sees & (at >= seen - scores.window)
    scored = scored.masked_fill(~sees.view(n, 1, pieces, 1, reach.piece), float("-inf"))
    high = scored.amax(-1)
    weights = (scored - _finite(high)[..., None]).exp()
    said = merged(high, weights.sum(-1), weights @ their, _sinks(scores, key_heads, wide))
    return said.reshape(n, heads, -1).to(query.dtype)


def _finite(high: Tensor) -> Tensor:
    """A largest score, and 0 where nothing is seen: -inf less -inf is no number."""
    return high.masked_fill(high == float("-inf"), 0.0)


def _sinks(scores: Scores, key_heads: int, dtype: torch.dtype) -> Tensor | None:
    return None if scores.sinks is None else scores.sinks.view(key_heads, -1).to(dtype)


def merged(high: Tensor, total: Tensor, said: Tensor, sinks: Tensor | None) -> Tensor:
    """The answer out of pieces, merged in their order.

    Of every piece the largest score and the sum [n, key heads, pieces, shared], and the weighted values with one
    dimension more; `sinks` [key heads, shared] take part in the sum alone.
    """
    best, sum_of, values = high[:, :, 0], total[:, :, 0], said[:, :, 0]
    for piece in range(1, high.shape[2]):
        both = torch.maximum(best, high[:, :, piece])
        old, new = (best - _finite(both)).exp(), (high[:, :, piece] - _finite(both)).exp()
        best, sum_of = both, sum_of * old + total[:, :, piece] * new
        values = values * old[..., None] + said[:, :, piece] * new[..., None]
    if sinks is not None:
        both = torch.maximum(best, sinks)
        old = (best - both).exp()
        sum_of, values = sum_of * old + (sinks - both).exp(), values * old[..., None]
    return values / sum_of.masked_fill(sum_of == 0, 1.0)[..., None]
