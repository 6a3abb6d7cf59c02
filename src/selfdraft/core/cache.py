"""A preallocated key/value cache: one strip of places per slot and layer; write, view, keep."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor


class KVCache:
    """Keys and values [slots, heads, places, dim] per layer, made when a layer first writes.

    Rows of a forward are written behind the `base` tokens that count; `keep` moves the chosen ones into place.
    Memory is slots x places, whatever was drafted; `reserve` doubles the places when more are needed.
    """

    def __init__(self, slots: int, places: int) -> None:
        self.slots = slots
        self.places = places
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._written: dict[tuple[int, int], int] = {}
        """Places of (layer, slot) that may hold something."""

    def reserve(self, places: int) -> None:
        """Make room for `places` tokens in every slot; what is remembered stays."""
        if places <= self.places:
            return
        self.places = max(places, 2 * self.places)
        for store in (self.keys, self.values):
            for layer, old in store.items():
                new = old.new_zeros(old.shape[0], old.shape[1], self.places, old.shape[3])
                new[:, :, : old.shape[2]] = old
                store[layer] = new

    def open(self, layer: int, heads: int, wide: int, deep: int, like: Tensor) -> None:
        """Make the strips of a layer unless they are there: keys `wide`, values `deep`, of the type of `like`."""
        if layer in self.keys:
            return
        # zeros, not empty: places behind the mask are read, and 0 * NaN would poison the sum
        self.keys[layer] = like.new_zeros(self.slots, heads, self.places, wide)
        self.values[layer] = like.new_zeros(self.slots, heads, self.places, deep)

    def write(self, layer: int, slot: int, start: int, key: Tensor, value: Tensor) -> None:
        """Put rows key, value [heads, n, dim] at places start .. start + n of a slot."""
        self.open(layer, key.shape[0], key.shape[-1], value.shape[-1], key)
        stop = start + key.shape[1]
        written = self._written.get((layer, slot), 0)
        if start == 0 and written > stop:  # a new sequence: what a broken one left (NaN) must not reach it
            self.keys[layer][slot, :, stop:written] = 0
            self.values[layer][slot, :, stop:written] = 0
            written = stop
        self._written[layer, slot] = max(written, stop)
        self.keys[layer][slot].narrow(1, start, stop - start).copy_(key)
        self.values[layer][slot].narrow(1, start, stop - start).copy_(value)

    @torch.inference_mode()
    def touch(self, slot: int, places: int) -> None:
        """Take the memory of a slot's first places from the system: until then reading them costs nothing."""
        for store in (self.keys, self.values):
            for tensor in store.values():
                tensor[slot, :, :places] = 0

    def view(self, layer: int, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, heads, length, dim] of a slot, without a copy."""
        return self.keys[layer][slot : slot + 1, :, :length], self.values[layer][slot : slot + 1, :, :length]

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        """Move rows base + order[i] to base + i; only rows that are out of place move."""
        first = next((i for i, row in enumerate(order) if row != i), None)
        if first is None:
            return
        wanted = torch.tensor([base + row for row in order[first:]])
        for store in (self.keys, self.values):
            for tensor in store.values():
                tensor[slot, :, base + first : base + len(order)] = tensor[slot].index_select(
                    1, wanted.to(tensor.device)
                )

    @property
    def bytes(self) -> int:
        """Memory in bytes."""
        return sum(t.numel() * t.element_size() for store in (self.keys, self.values) for t in store.values())
