"""Keys and values of fixed size, layers of one shape in one tensor: graphs hold its addresses."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selfdraft.models.attention import Scores
from selfdraft.models.kv_cache import KVCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Heads of a layer, and the widths of a key and of a value."""

    heads: int
    key_heads: int
    key_width: int
    value_width: int


@dataclass(eq=False, slots=True)
class ShapeNotes:
    """What travels to attention functions instead of a plan when only the shapes of layers are asked for."""

    layers: dict[int, LayerShape] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    """Of the keys."""
    hidden: Tensor | None = None
    """As in `Plan`."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Queries [1, heads, n, dim] -> zeros [1, n, heads, dim of values]."""
        self.layers[layer] = LayerShape(query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        self.dtype = key.dtype
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


@torch.inference_mode()
def shapes_of(view: PreTrainedModel, device: torch.device) -> ShapeNotes:
    """The shapes of all layers of a view, out of a pass of one row without attention."""
    notes, row = ShapeNotes(), torch.zeros(1, 1, dtype=torch.int64, device=device)
    view(input_ids=row, position_ids=row, use_cache=False, selfdraft=notes)
    return notes


class StackedCache(KVCache):
    """A cache whose layers are all there from the start, for passes of fixed shape.

    `stacks` [layers and kinds, slots, heads, places, dim] hold keys and values of one shape each, so that rows of all
    layers are moved together. The last place of a slot is for rows that nobody reads (`trash`). It may still grow,
    where drafts reach far behind the context: then every address is another one, and `places` says so.
    """

    def __init__(self, slots: int, places: int, shapes: Mapping[int, LayerShape], like: Tensor) -> None:
        super().__init__(slots, places)
        self._shapes, self._like = dict(shapes), like
        self.stacks: list[Tensor] = self._made()

    @property
    def trash(self) -> int:
        """A place of every slot that no row sees."""
        return self.places - 1

    def _made(self) -> list[Tensor]:
        """Stacks of zeros; `keys` and `values` become parts of them."""
        kinds: dict[tuple[int, int], list[tuple[dict[int, Tensor], int]]] = {}
        for layer, shape in self._shapes.items():
            kinds.setdefault((shape.key_heads, shape.key_width), []).append((self.keys, layer))
            kinds.setdefault((shape.key_heads, shape.value_width), []).append((self.values, layer))
        stacks = []
        for (heads, width), wanted in kinds.items():
            stack = self._zeros(self._like, len(wanted), self.slots, heads, self.places, width)
            for (store, layer), strips in zip(wanted, stack, strict=True):
                store[layer] = strips
            stacks.append(stack)
        return stacks

    @torch.inference_mode()
    def reserve(self, places: int, *, exactly: bool = False) -> None:
        if places < self.places:  # one is left for `trash`
            return
        self.places = places + 1 if exactly else max(places + 1, 2 * self.places)
        old, self.stacks = self.stacks, self._made()
        for before, stack in zip(old, self.stacks, strict=True):
            for slot, used in self._used.items():
                kept = min(used, before.shape[3] - 1)
                stack[:, slot, :, :kept] = before[:, slot, :, :kept]

    @torch.inference_mode()
    def move(self, slot: int, source: SequenceOf[int], to: SequenceOf[int]) -> None:
        """Rows at places `source` of a slot to places `to`, in all layers; all are read before one is written."""
        for stack in self.stacks:
            strips = stack[:, slot]
            strips[:, :, list(to)] = strips[:, :, list(source)]
