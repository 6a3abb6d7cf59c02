"""Attention of tree rows on a GPU: what `plain_tree_attention.py` says, in two kernels.

Pieces that lie wholly before a sequence's new rows are read once for many rows, all pieces at the same time
(`whole_pieces`). What is left of a row's keys is gathered along its path, and everything is merged in the order of the
pieces (`rest_of_path`). So a row's bits depend on its own path alone: not on its neighbours, not on where in the tree
it stands, and not on how long others are. This module needs Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from selfdraft.models.attention import Scores
from selfdraft.models.graph.plain_tree_attention import Reach
from selfdraft.models.graph.tree_kernels import rest_of_path, whole_pieces

LEAST = 16
"""Fewest rows and columns of a block that is multiplied."""
KEYS = 32
"""Keys of one block: of 64 some kernels spill registers on sm_80, sm_90 and sm_120."""


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Constants of the kernels for one shape of heads."""

    SHARED: int
    WIDTH: int
    VALUE_WIDTH: int
    D: int
    DV: int
    KEYS: int
    PIECE: int
    CAP: float
    WINDOW: int

    @classmethod
    def of(cls, shared: int, width: int, value_width: int, piece: int, scores: Scores) -> BlockSizes:
        """`shared` query heads read one key head; widths are those of keys and values."""
        return cls(
            shared,
            width,
            value_width,
            power_of_two(width),
            power_of_two(value_width),
            min(KEYS, piece),
            piece,
            scores.cap or 0.0,
            scores.window or 0,
        )

    def tile(self, rows: int) -> int:
        """Query rows of a block of `rows` rows: heads that share keys beneath each other."""
        return power_of_two(rows * self.SHARED)

    def constants(self) -> dict[str, int | float]:
        return {name: getattr(self, name) for name in self.__slots__}


def power_of_two(size: int) -> int:
    """The least power of two from LEAST on that holds so many."""
    return max(LEAST, 1 << (size - 1).bit_length())


def attend_fused(
    query: Tensor, keys: Tensor, values: Tensor, sheet: Mapping[str, Tensor], reach: Reach, scores: Scores
) -> Tensor:
    """See `Attention`. Answers of padding rows are not written."""
    query = query.contiguous()
    rows, heads, width = query.shape
    key_heads, places, value_width = keys.shape[1], keys.shape[2], values.shape[3]
    sizes = BlockSizes.of(heads // key_heads, width, value_width, reach.piece, scores)
    pieces = reach.length // reach.piece
    said = query.new_empty(max(pieces, 1), rows, heads, sizes.DV, dtype=torch.float32)
    sums = query.new_empty(max(pieces, 1), rows, heads, 2, dtype=torch.float32)
    out = query.new_empty(rows, heads, value_width)
    at = sheet["slots"], sheet["bases"], sheet["seen"]
    constants = sizes.constants()
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        if pieces:
            whole_pieces[len(sheet["tile_rows"]), key_heads, pieces](
                *(query, keys, values, said, sums, sheet["tile_first"], sheet["tile_rows"], *at),
                *(scores.scale, places, heads, rows),
                TILE=sizes.tile(reach.tile),
                **constants,
            )
        rest_of_path[rows, key_heads](
            *(query, keys, values, said, sums, out, query if scores.sinks is None else scores.sinks),
            *(sheet["path"], *at, scores.scale, places, heads, rows, sheet["path"].shape[1]),
            TILE=sizes.tile(1),
            HAS_SINKS=scores.sinks is not None,
            **constants,
        )
    return out
