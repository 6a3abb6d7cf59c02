"""The fast path: a target's passes as tapes that run in one call each. The plain path stays as specification.

A row's bits depend on its own path alone, not on the rows beside it (`kernels/`). So no shape has to be padded for
exactness: one row is computed as one row.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from functools import partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from selfdraft.core.one_row import Search, Top
from selfdraft.core.rows import Rows, Span
from selfdraft.errors import RunnerUnavailable
from selfdraft.models.kv_cache import KVCache
from selfdraft.models.runner import kernel_build
from selfdraft.models.runner.draw import contenders_by
from selfdraft.models.runner.kernel_build import Pass
from selfdraft.models.runner.link import LinkKernel
from selfdraft.models.runner.packing import Packer
from selfdraft.models.runner.tape import LARGEST, TYPES, Slot
from selfdraft.models.runner.trace import Traced, trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from selfdraft.models.adapters import Ends

Words = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Runner:
    """Runs views of one stock model, of weights of one type, over one cache; `packer` may have packed them already.

    Errors: RunnerUnavailable, when it is made.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, cache: KVCache, adapters: int, packer: Packer | None = None
    ) -> None:
        if device.type != "cpu":
            raise RunnerUnavailable(f"the fast runner is made for CPUs; the model is on {device}")
        self._library = kernel_build.library()
        self.search = Search(contenders_by(self._library), partial(likeliest, self._library))
        self.cache = cache
        self.dtype = dtype
        self._like = torch.empty(0, dtype=dtype)
        self._adapters = adapters
        self.packer = packer or Packer()
        self._traced: dict[tuple[int, bool, bool], tuple[PreTrainedModel, Traced]] = {}
        self._memory = np.empty(0, np.uint8)
        self._room_at = 0
        self._strips: tuple[tuple[int, int], Words] | None = None
        self._opened: dict[int, tuple[int, int]] = {}
        self._shapes = np.zeros((0, 3), np.int64)
        self._pass = Pass(coded=cache.dtype == "int8")
        self._address = ctypes.addressof(self._pass)

    def over(self, cache: KVCache) -> Runner:
        """Another one for the same views over another cache."""
        return Runner(self.dtype, torch.device("cpu"), cache, self._adapters, self.packer)

    def tape(self, model: PreTrainedModel, *, embedded: bool = False, resuming: bool = False) -> Traced:
        """The tape of a view, traced when it is first asked for. Errors: RunnerUnavailable."""
        key = (id(model), embedded, resuming)
        if key not in self._traced:  # the view is kept, so that its id stays its own
            with torch.inference_mode(False):
                self._traced[key] = (model, trace(model, self.packer, embedded=embedded, resuming=resuming))
        return self._traced[key][1]

    def run(
        self,
        traced: Traced,
        rows: Rows,
        *,
        embeds: Tensor | None = None,
        hidden: Tensor | None = None,
        gates: Mapping[int, slice | Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [answers, vocab], and the hidden states [rows, hidden] that the view notes, if it does."""
        logits = torch.empty(len(rows.logit_rows), traced.vocab, dtype=self.dtype)
        noted = torch.empty(len(rows), traced.notes, dtype=self.dtype) if traced.notes else None
        slots: list[Tensor | None] = [None] * (Slot.GATES + self._adapters)
        slots[Slot.LOGITS], slots[Slot.HIDDEN] = logits, noted
        slots[Slot.EMBEDS] = None if embeds is None else embeds.contiguous()
        slots[Slot.ENTERING] = None if hidden is None else hidden.contiguous()
        for number in range(self._adapters if gates else 0):
            gate = slots[Slot.GATES + number] = torch.zeros(len(rows), dtype=torch.int64)
            if gates and number in gates:
                gate[gates[number]] = 1
        self._call(traced, rows, slots)
        return logits, noted

    def _call(self, traced: Traced, rows: Rows, slots: list[Tensor | None]) -> None:
        tape, threads, count = traced.tape, torch.get_num_threads(), len(rows)
        steps, instrs = self._open(traced)
        paths, extras = _paths(rows)
        # everything that changes from pass to pass on one sheet: one array is quicker to make than many
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in slots]
        sheet = array("q", [*addresses, *rows.logit_rows, *extras, *chain.from_iterable(paths), *rows.tokens])
        start = sheet.buffer_info()[0]
        addresses_of = start + 8 * len(slots)
        sheet[Slot.ASKED] = addresses_of
        lines = addresses_of + 8 * (len(rows.logit_rows) + len(extras))
        sheet[Slot.POSITIONS], sheet[Slot.TOKENS] = lines + 8 * count * 4, lines + 8 * count * 5
        told, size = self._pass, tape.arena * max(count, len(rows.logit_rows))
        told.rows, told.answers, told.threads = count, len(rows.logit_rows), threads
        told.arena = self._room(size + threads * tape.scratch + stage_rows(count, threads) * tape.stage)
        told.scratch, told.scratch_bytes, told.slots = told.arena + size, tape.scratch, start
        told.stage, told.stage_bytes = told.scratch + threads * tape.scratch, tape.stage
        told.extras = addresses_of + 8 * len(rows.logit_rows)
        told.slot, told.place, told.seen, told.extra, told.position = (lines + 8 * count * i for i in range(5))
        self._library.selfdraft_run(steps, len(tape.steps), instrs, self._address)

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        """What `KVCache.keep` does, for all layers in one call."""
        first = next((i for i, row in enumerate(order) if row != i), None)
        if first is None:
            return
        upwards = all(one < other for one, other in pairwise(order))
        if self._strips is None or self._strips[0][0] != self.cache.places or not upwards:
            self.cache.keep(slot, base, order)
            return
        moves = np.array(order, np.int64)
        size = next(iter(self.cache.keys.values())).itemsize
        self._library.selfdraft_keep(
            self._address, self._shapes.ctypes.data, size, slot, base, moves.ctypes.data, len(moves)
        )

    def link(self, ends: Ends, link: tuple[Tensor, Tensor]) -> LinkKernel | None:
        """The link of an adapter by the kernels; None where they cannot do it."""
        return LinkKernel.of(self._library, ends.table, ends.weights, link)

    def _room(self, size: int) -> int:
        """Address of `size` bytes on a cache line, the same from pass to pass while they suffice."""
        if self._memory.size < size + 64:
            self._memory = np.zeros(size + size // 2 + 64, np.uint8)
            self._room_at = -(-self._memory.ctypes.data // 64) * 64
        return self._room_at

    def _open(self, traced: Traced) -> tuple[int, int]:
        """Note the addresses of all strips, and how far slots and heads are apart in them.

        Returns the addresses of the tape's steps and instructions.
        """
        if id(traced) not in self._opened:
            self._opened[id(traced)] = traced.tape.steps.ctypes.data, traced.tape.instrs.ctypes.data
            for layer, (heads, wide, deep) in traced.heads.items():
                self.cache.open(layer, heads, wide, deep, self._like)
        state = self.cache.places, len(self.cache.keys)
        if self._strips is None or self._strips[0] != state:
            layers = max(self.cache.keys) + 1
            table = np.zeros((6, layers), np.int64)
            strides = np.zeros((layers, 4), np.int64)
            self._shapes = np.zeros((layers, 3), np.int64)
            for layer, keys in self.cache.keys.items():
                values = self.cache.values[layer]
                table[:2, layer] = keys.data_ptr(), values.data_ptr()
                self._shapes[layer] = keys.shape[1], keys.shape[3], values.shape[3]
                strides[layer] = (*keys.stride()[:2], *values.stride()[:2])
            table[2:] = strides.reshape(4, layers)
            told = self._pass
            told.layers = layers
            told.keys, told.values, told.strides = (table[row:].ctypes.data for row in range(3))
            self._strips = (state, table)
        return self._opened[id(traced)]


def likeliest(library: ctypes.CDLL, logits: Tensor, count: int) -> Top | None:
    """The likeliest tokens of rows of bfloat16 or float32, of equals the lowest id first."""
    rows, vocab = logits.shape
    if logits.dtype not in (torch.float32, torch.bfloat16) or logits.stride(1) != 1:
        return None
    count = min(count, vocab)
    values = torch.empty(rows, count, dtype=torch.float64)
    ids = torch.empty(rows, count, dtype=torch.int64)
    step = logits.stride(0) * logits.element_size()
    found = values.data_ptr(), ids.data_ptr()
    library.selfdraft_likeliest(TYPES[logits.dtype], logits.data_ptr(), rows, vocab, step, count, *found)
    return values, ids


def stage_rows(rows: int, threads: int) -> int:
    """For how many rows there has to be room where linear layers stage them: chunks are filled up, all alike."""
    return 2 * threads + 2 * rows + LARGEST


def _paths(rows: Rows) -> tuple[list[list[int]], list[int]]:
    """Per row: slot, own place, how many first places it sees, where its list of further places begins, position.

    And the lists. Nodes of a draft's leading chain stand in order, so what is seen of them is a prefix.
    """
    slots: list[int] = []
    places: list[int] = []
    seen: list[int] = []
    extra: list[int] = [0] * len(rows)
    extras: list[int] = []
    for span in rows.spans:
        slots += [span.slot] * span.size
        places += range(span.base, span.base + span.size)
        seen += range(span.base + 1, span.base + span.size + 1)
        first, parents = span.base + span.pending, span.draft.parents
        trails: dict[int, tuple[int, list[int]]] = {}
        for node in range(_chained(span), len(parents)):
            prefix, trail = trails.get(parents[node], (first + parents[node] + 1, []))
            trails[node] = prefix, [*trail, first + node]
            row = span.start + span.pending + node
            seen[row], extra[row] = prefix, len(extras)
            extras += trails[node][1]
    return [slots, places, seen, extra, [*rows.positions]], extras


def _chained(span: Span) -> int:
    """How many first nodes of the draft are one chain."""
    parents = span.draft.parents
    return next((i for i, parent in enumerate(parents) if parent != i - 1), len(parents))
