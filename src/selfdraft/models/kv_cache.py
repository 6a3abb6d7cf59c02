"""A preallocated key/value cache: one strip of places per slot and layer; write, view, keep."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

from selfdraft.errors import EngineError, OptionError
from selfdraft.models.kv_codes import decode, encode, row_bytes

KVCacheDtype = Literal["auto", "int8"]
"""How keys and values are stored: in the dtype of the model, or as codes of 8 bits."""


def check_kv_cache_dtype(name: str) -> None:
    """Errors: OptionError when there is no such way to store keys and values."""
    if name not in (known := get_args(KVCacheDtype)):
        raise OptionError(f"kv_cache_dtype={name!r} is unknown; there are {' and '.join(map(repr, known))}")


def _pages(size: int) -> mmap.mmap:
    """Zeros that take memory page by page when they are written; torch.zeros writes, numpy.zeros asks for huge pages.

    Errors: OSError, OverflowError.
    """
    if sys.platform == "win32":
        return mmap.mmap(-1, max(size, 1))
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages


class KVCache:
    """Keys and values [slots, heads, places, dim] per layer, made when a layer first writes.

    Rows of a forward are written behind the `base` tokens that count; `keep` moves the chosen ones into place.
    Addresses are set aside for slots x places, whatever was drafted; `reserve` doubles the places when more are needed.
    On a CPU the system gives memory only for what was written: requests take the sum of their lengths.
    With dtype 'int8' rows are stored as codes (`kv_codes.py`), and `dim` is the bytes of one; `view` and `gather` give
    the numbers that the codes stand for.
    """

    def __init__(self, slots: int, places: int, dtype: KVCacheDtype = "auto") -> None:
        self.slots = slots
        self.places = places
        self.dtype: KVCacheDtype = dtype
        self._likes: dict[int, tuple[int, int, torch.dtype]] = {}
        """Of a layer whose rows are codes: widths of keys and values, and the type of the numbers."""
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._written: dict[tuple[int, int], int] = {}
        """Places of (layer, slot) that may hold something."""
        self._used: dict[int, int] = {}
        """Places of a slot that a pass has asked for."""

    def reserve(self, places: int, *, exactly: bool = False) -> None:
        """Make room for `places` tokens in every slot, and `exactly` for no more; what is remembered stays."""
        if places <= self.places:
            return
        self.places = places if exactly else max(places, 2 * self.places)
        for store in (self.keys, self.values):
            for layer, old in store.items():
                new = self._zeros(old, self.slots, old.shape[1], self.places, old.shape[3])
                for slot, used in self._used.items():
                    kept = min(used, old.shape[2])
                    new[slot, :, :kept] = old[slot, :, :kept]
                store[layer] = new

    def claim(self, slot: int, base: int, size: int) -> None:
        """A pass writes `size` rows behind `base` tokens of a slot: what lies there outlives a growth of the cache."""
        used = self._used.get(slot, 0) if base else 0
        self._used[slot] = max(used, base + size)

    def open(self, layer: int, heads: int, wide: int, deep: int, like: Tensor) -> None:
        """Make the strips of a layer unless they are there: keys `wide`, values `deep`, of the type of `like`."""
        if layer in self.keys:
            return
        if self.dtype == "int8":
            self._likes[layer] = wide, deep, like.dtype
            wide, deep, like = row_bytes(wide), row_bytes(deep), like.new_empty(0, dtype=torch.int8)
        # zeros, not empty: places behind the mask are read, and 0 * NaN would poison the sum
        self.keys[layer] = self._zeros(like, self.slots, heads, self.places, wide)
        self.values[layer] = self._zeros(like, self.slots, heads, self.places, deep)

    def _zeros(self, like: Tensor, *shape: int) -> Tensor:
        """Strips [..., slots, heads, places, wide] of zeros that take no memory yet where that can be had.

        Errors: EngineError when the system has no room for them.
        """
        layer = 2 * prod(shape[-4:]) * like.itemsize
        try:
            if like.device.type != "cpu":
                return like.new_zeros(shape)
            return torch.frombuffer(_pages(prod(shape) * like.itemsize), dtype=like.dtype).view(shape)
        except (OSError, OverflowError, MemoryError, torch.OutOfMemoryError) as error:
            layers = max(len(self.keys), 1)
            raise EngineError(
                f"no memory for the keys and values of {self.slots} requests with {self.places} tokens each (a layer "
                f"takes {layer / 2**20:.0f} MiB, {layers} were made): lower max_num_seqs or "
                "max_model_len"
            ) from error

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
        self._used[slot] = max(self._used.get(slot, 0), stop)
        if self.dtype == "int8":
            key, value = encode(key), encode(value)
        self.keys[layer][slot].narrow(1, start, stop - start).copy_(key)
        self.values[layer][slot].narrow(1, start, stop - start).copy_(value)

    @torch.inference_mode()
    def touch(self, slot: int, places: int) -> None:
        """Take the memory of a slot's first places from the system: until then reading them costs nothing."""
        for store in (self.keys, self.values):
            for tensor in store.values():
                tensor[slot, :, :places] = 0

    def view(self, layer: int, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, heads, length, dim] of a slot; a copy only where they are stored as codes."""
        keys, values = self.keys[layer][slot : slot + 1, :, :length], self.values[layer][slot : slot + 1, :, :length]
        return self._numbers(layer, keys, values)

    def gather(self, layer: int, slot: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [lanes, heads, length, dim] at places [lanes, length] of a slot."""
        keys, values = (store[layer][slot][:, places].transpose(0, 1) for store in (self.keys, self.values))
        return self._numbers(layer, keys, values)

    def _numbers(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.dtype == "auto":
            return keys, values
        wide, deep, dtype = self._likes[layer]
        return decode(keys, wide, dtype), decode(values, deep, dtype)

    @torch.inference_mode()
    def copy(self, slot: int, source: int, count: int) -> None:
        """Make the first `count` places of `source` those of `slot`; nothing else of `slot` is left (it may be NaN)."""
        self.claim(slot, 0, count)
        for store in (self.keys, self.values):
            for layer, tensor in store.items():
                tensor[slot, :, :count] = tensor[source, :, :count]
                tensor[slot, :, count : self._written.get((layer, slot), 0)] = 0
        for layer in self.keys:
            self._written[layer, slot] = count

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

    def packed(self, slot: int, start: int, count: int) -> Tensor:
        """`count` places of a slot as bytes [n] uint8, layer by layer, keys before values; `unpack` reads them."""
        self.reserve(start + count)
        parts = [
            store[layer][slot].narrow(1, start, count).contiguous().view(torch.uint8).flatten()
            for layer in sorted(self.keys)
            for store in (self.keys, self.values)
        ]
        return torch.cat(parts)

    @torch.inference_mode()
    def unpack(self, slot: int, start: int, data: Tensor) -> None:
        """Put what `packed` made, of the same model, at places of a slot."""
        count, done = self._places_in(data), 0
        self.reserve(start + count)
        self.claim(slot, start, count)
        for layer in sorted(self.keys):
            for store in (self.keys, self.values):
                heads, _, width = store[layer].shape[1:]
                size = heads * count * width * store[layer].itemsize
                part = data[done : done + size].view(store[layer].dtype).view(heads, count, width)
                store[layer][slot].narrow(1, start, count).copy_(part)
                done += size
            self._written[layer, slot] = max(self._written.get((layer, slot), 0), start + count)

    def _places_in(self, data: Tensor) -> int:
        """How many places `packed` bytes are of."""
        place = sum(t.shape[1] * t.shape[3] * t.itemsize for store in (self.keys, self.values) for t in store.values())
        return data.numel() // place

    @property
    def bytes(self) -> int:
        """Memory in bytes."""
        return sum(t.numel() * t.element_size() for store in (self.keys, self.values) for t in store.values())
