"""The fast path: a target's passes as tapes that run in one call each. The plain path stays as specification.

A row's bits depend on its own path alone, not on the rows beside it (`kernels.cpp`). So no shape has to be padded for
exactness: one row is computed as one row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfdraft.core.cache import KVCache
from selfdraft.core.rows import Rows, Span
from selfdraft.errors import RunnerUnavailable
from selfdraft.models import native
from selfdraft.models.tape import INSTR, STEP, Slot
from selfdraft.models.trace import Traced, trace

Words = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Pass(ctypes.Structure):
    """The layout of `Pass` in kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "answers", "threads", "layers")),
        *((name, ctypes.c_void_p) for name in ("arena", "scratch")),
        ("scratch_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("slots", "slot", "place", "seen", "extra", "position", "extras")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "strides")),
    ]


class Runner:
    """Runs views of one stock model over one cache. Errors: RunnerUnavailable, when it is made."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, adapters: int) -> None:
        weight = next(p for p in model.parameters() if p.is_floating_point())
        if weight.device.type != "cpu":
            raise RunnerUnavailable(f"the fast runner is made for CPUs; the model is on {weight.device}")
        self._library = native.library()
        sizes = [self._library.selfdraft_sizes(which) for which in range(3)]
        assert sizes == [INSTR.itemsize, STEP.itemsize, ctypes.sizeof(Pass)], "kernels.cpp and tape.py disagree"
        self.cache = cache
        self.dtype = weight.dtype
        self._like = weight.new_empty(0)
        self._adapters = adapters
        self._traced: dict[tuple[int, bool, bool], tuple[PreTrainedModel, Traced]] = {}
        self._memory = np.empty(0, np.uint8)
        self._strips: tuple[tuple[int, int], Words] | None = None

    def tape(self, model: PreTrainedModel, *, embedded: bool = False, resuming: bool = False) -> Traced:
        """The tape of a view, traced when it is first asked for. Errors: RunnerUnavailable."""
        key = (id(model), embedded, resuming)
        if key not in self._traced:  # the view is kept, so that its id stays its own
            with torch.inference_mode(False):
                self._traced[key] = (model, trace(model, embedded=embedded, resuming=resuming))
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
        count, answers = len(rows), len(rows.answers)
        logits = torch.empty(answers, traced.vocab, dtype=self.dtype)
        noted = torch.empty(count, traced.notes, dtype=self.dtype) if traced.notes else None
        asked = torch.tensor(rows.answers, dtype=torch.int64)
        slots = np.zeros(Slot.GATES + self._adapters, np.int64)
        given = {Slot.TOKENS: rows.tokens, Slot.POSITIONS: rows.positions, Slot.ASKED: asked, Slot.LOGITS: logits}
        given |= {Slot.EMBEDS: embeds, Slot.ENTERING: hidden, Slot.HIDDEN: noted}
        held = {slot: tensor.contiguous() for slot, tensor in given.items() if tensor is not None}
        for slot, tensor in held.items():
            slots[slot] = tensor.data_ptr()
        open_ = np.zeros((self._adapters, count), np.int64)
        for number, acting in (gates or {}).items():
            open_[number, acting.numpy() if isinstance(acting, Tensor) else acting] = 1
        slots[Slot.GATES :] = [line.ctypes.data for line in open_]
        self._call(traced, rows, slots)
        return logits, noted

    def _call(self, traced: Traced, rows: Rows, slots: Words) -> None:
        tape, threads = traced.tape, torch.get_num_threads()
        arena = self._room(tape.arena * max(len(rows), len(rows.answers)) + threads * tape.scratch)
        strips = self._open(traced)
        paths, extras = _paths(rows)
        layers = strips.shape[1]
        told = Pass(
            rows=len(rows),
            answers=len(rows.answers),
            threads=threads,
            layers=layers,
            arena=arena,
            scratch=arena + tape.arena * max(len(rows), len(rows.answers)),
            scratch_bytes=tape.scratch,
            slots=slots.ctypes.data,
            slot=paths[0].ctypes.data,
            place=paths[1].ctypes.data,
            seen=paths[2].ctypes.data,
            extra=paths[3].ctypes.data,
            position=paths[4].ctypes.data,
            extras=extras.ctypes.data,
            keys=strips[0].ctypes.data,
            values=strips[1].ctypes.data,
            strides=strips[2:].ctypes.data,
        )
        steps, instrs = tape.steps, tape.instrs
        self._library.selfdraft_run(
            ctypes.c_void_p(steps.ctypes.data),
            ctypes.c_int64(len(steps)),
            ctypes.c_void_p(instrs.ctypes.data),
            ctypes.byref(told),
        )

    def _room(self, size: int) -> int:
        """Address of `size` bytes on a cache line, the same from pass to pass while they suffice."""
        if self._memory.size < size + 64:
            self._memory = np.zeros(size + size // 2 + 64, np.uint8)
        return -(-self._memory.ctypes.data // 64) * 64

    def _open(self, traced: Traced) -> Words:
        """Addresses of all strips, and how far slots and heads are apart in them."""
        for layer, (heads, wide, deep) in traced.heads.items():
            self.cache.open(layer, heads, wide, deep, self._like)
        state = self.cache.places, len(self.cache.keys)
        if self._strips is None or self._strips[0] != state:
            layers = max(self.cache.keys) + 1
            table = np.zeros((6, layers), np.int64)
            strides = np.zeros((layers, 4), np.int64)
            for layer, keys in self.cache.keys.items():
                values = self.cache.values[layer]
                table[:2, layer] = keys.data_ptr(), values.data_ptr()
                strides[layer] = (*keys.stride()[:2], *values.stride()[:2])
            table[2:] = strides.reshape(4, layers)
            self._strips = (state, table)
        return self._strips[1]


def _paths(rows: Rows) -> tuple[Words, Words]:
    """Per row: slot, own place, how many first places it sees, where its list of further places begins, position.

    And the lists. Nodes of a draft's leading chain stand in order, so what is seen of them is a prefix.
    """
    paths = np.zeros((5, len(rows)), np.int64)
    paths[4] = rows.positions.numpy()
    extras: list[int] = []
    for span in rows.spans:
        mine = slice(span.start, span.start + span.size)
        paths[0, mine] = span.slot
        paths[1, mine] = np.arange(span.base, span.base + span.size)
        paths[2, mine] = np.arange(span.base + 1, span.base + span.size + 1)
        first, chain, parents = span.base + span.pending, _chained(span), span.draft.parents
        trails: dict[int, tuple[int, list[int]]] = {}
        for node in range(chain, len(parents)):
            seen, trail = trails.get(parents[node], (first + parents[node] + 1, []))
            trails[node] = seen, [*trail, first + node]
            paths[2, span.start + span.pending + node] = seen
            paths[3, span.start + span.pending + node] = len(extras)
            extras += trails[node][1]
    return paths, np.array(extras or [0], np.int64)


def _chained(span: Span) -> int:
    """How many first nodes of the draft are one chain."""
    parents = span.draft.parents
    return next((i for i, parent in enumerate(parents) if parent != i - 1), len(parents))
