"""A forward pass as a flat list of instructions, ordered into steps, with its memory laid out, for `kernels/`.

Three kinds of steps: a group of linear layers that read the same rows; one attention; and glue, which is everything
else, done row by row. Steps follow one another; inside a step rows or outputs are shared out among threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

ALIGNED = 64
"""Bytes: a cache line, and a full vector."""
UNIT, STAGED = 64, 104
"""Inputs that are staged together, and bytes of a row for them when it is rounded (kernels/stage.h)."""
LARGEST = 14
"""Rows of a chunk, at most (kernels/stage.h)."""


class Kind(IntEnum):
    GLUE, LINEAR, ATTEND = range(3)


class Slot(IntEnum):
    """Memory that is given anew with every pass; gates of adapters follow."""

    TOKENS, POSITIONS, ASKED, EMBEDS, ENTERING, LOGITS, HIDDEN, GATES = range(8)


class Place(IntEnum):
    FIXED, ARENA, SCRATCH, SLOT = range(4)


TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int64: 2}


@dataclass(eq=False, slots=True)
class Buffer:
    """Memory of `width` numbers for every row, or for every row asked for (`answers`)."""

    dtype: torch.dtype
    width: int
    answers: bool = False
    slot: int | None = None
    place: Place = Place.ARENA
    base: int = 0

    @property
    def bytes(self) -> int:
        size = self.width * self.dtype.itemsize
        return size if self.slot is not None else -(-size // ALIGNED) * ALIGNED


@dataclass(frozen=True, eq=False, slots=True)
class Operand:
    """Where an instruction reads or writes: a buffer, or a constant tensor; `steps` are elements per index."""

    source: Buffer | Tensor
    offset: int = 0
    steps: tuple[int, ...] = (0, 0, 0, 0)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype


@dataclass(eq=False, slots=True)
class Instr:
    kind: Kind
    code: int
    out: Operand
    inputs: tuple[Operand | None, ...]
    dims: tuple[int, ...] = (1, 1, 1, 1)
    more: tuple[int, ...] = ()
    numbers: tuple[float, ...] = ()
    keep: tuple[Tensor, ...] = ()
    """Tensors whose addresses are in `more`."""

    @property
    def target(self) -> Buffer:
        assert isinstance(self.out.source, Buffer)
        return self.out.source

    @property
    def reads(self) -> list[Buffer]:
        return [one.source for one in self.inputs if one is not None and isinstance(one.source, Buffer)]


@dataclass(slots=True)
class Step:
    kind: Kind
    answers: bool
    instrs: list[Instr] = field(default_factory=list)


ARG = np.dtype([("place", "i8"), ("base", "i8"), ("row", "i8"), ("steps", "i8", 4), ("type", "i8")])
INSTR = np.dtype(
    [("code", "i8"), ("dims", "i8", 4), ("out", ARG), ("inputs", ARG, 3), ("more", "i8", 8), ("numbers", "f8", 2)]
)
STEP = np.dtype([("kind", "i8"), ("first", "i8"), ("count", "i8"), ("answers", "i8")])
"""The layouts of `Arg`, `Instr` and `Step` in kernels/."""


@dataclass(frozen=True, eq=False, slots=True)
class Tape:
    """What `kernels/` runs. `arena` and `stage` are bytes per row, `scratch` bytes per thread."""

    steps: np.ndarray[tuple[int], np.dtype[np.void]]
    instrs: np.ndarray[tuple[int], np.dtype[np.void]]
    arena: int
    scratch: int
    stage: int
    """For rows as linear layers take them."""
    kept: tuple[Tensor, ...]
    """Every tensor whose address is on the tape."""


def assemble(instrs: SequenceOf[Instr]) -> Tape:
    """Order instructions (given in an order in which they could run) into steps, and give every buffer its place."""
    steps = ordered(instrs)
    arena, scratch = _place(steps)
    flat = [instr for step in steps for instr in step.instrs]
    coded = np.zeros(len(flat), INSTR)
    kept: list[Tensor] = []
    for line, instr in zip(coded, flat, strict=True):
        _encode(line, instr, kept)
    heads = np.zeros(len(steps), STEP)
    first = 0
    for line, step in zip(heads, steps, strict=True):
        line["kind"], line["first"], line["count"], line["answers"] = step.kind, first, len(step.instrs), step.answers
        first += len(step.instrs)
    return Tape(heads, coded, arena, scratch, _stage(flat), tuple(kept))


def _stage(instrs: Iterable[Instr]) -> int:
    """Most bytes that a row takes as linear layers read it (kernels/stage.h): as floats, and rounded in units of 64."""
    inputs = max((instr.more[3] for instr in instrs if instr.kind == Kind.LINEAR), default=0)
    units = -(-inputs // UNIT)
    return -(-(units * UNIT * 4 + units * STAGED) // ALIGNED) * ALIGNED


def ordered(instrs: SequenceOf[Instr]) -> list[Step]:
    """All glue that can run, then one heavy step, and so on; linear layers of the same rows become one step."""
    writers: dict[Buffer, set[Instr]] = {}
    for instr in instrs:
        writers.setdefault(instr.target, set()).add(instr)
    waits = {instr: set().union(*(writers.get(buffer, set()) for buffer in instr.reads)) for instr in instrs}
    left = list(instrs)
    done: set[Instr] = set()
    steps: list[Step] = []

    def take(step: Step, wanted: Iterable[Instr]) -> None:
        step.instrs += wanted
        done.update(step.instrs)
        if step.instrs:
            steps.append(step)

    while left:
        for answers in (False, True):
            step = Step(Kind.GLUE, answers)
            for instr in left:
                if instr.kind == Kind.GLUE and instr.target.answers == answers and waits[instr] <= done:
                    step.instrs.append(instr)
                    done.add(instr)
            take(step, ())
        ready = [instr for instr in left if instr.kind != Kind.GLUE and waits[instr] <= done]
        if ready:
            first = ready[0]
            group = [first]
            if first.kind == Kind.LINEAR:
                group = [instr for instr in ready if instr.kind == Kind.LINEAR and _same_rows(instr, first)]
            take(Step(first.kind, first.target.answers), group)
        before = len(left)
        left = [instr for instr in left if instr not in done]
        assert len(left) < before, "an instruction waits for itself"
    return steps


def _same_rows(one: Instr, other: Instr) -> bool:
    a, b = one.inputs[0], other.inputs[0]
    return a is not None and b is not None and a.source is b.source and a.offset == b.offset


def _place(steps: SequenceOf[Step]) -> tuple[int, int]:
    """Buffers that live inside one glue step go to a thread's scratch, the others into the arena; both are reused."""
    lives: dict[Buffer, tuple[int, int]] = {}
    at = 0
    spans: list[tuple[int, int]] = []
    for step in steps:
        first = at
        for instr in step.instrs:
            for buffer in (instr.target, *instr.reads):
                lives[buffer] = (lives.get(buffer, (at, at))[0], at)
            at += 1
        spans.append((first, at - 1))
    number = {i: s for s, (first, last) in enumerate(spans) for i in range(first, last + 1)}
    local: list[tuple[int, int, Buffer]] = []
    wide: list[tuple[int, int, Buffer]] = []
    for buffer, (start, stop) in lives.items():
        if buffer.slot is not None:
            buffer.place, buffer.base = Place.SLOT, buffer.slot << 32
        elif number[start] == number[stop] and steps[number[start]].kind == Kind.GLUE:
            buffer.place = Place.SCRATCH
            local.append((start, stop, buffer))
        else:  # a step's outputs never lie where its inputs do: rows of it run at the same time
            buffer.place = Place.ARENA
            wide.append((spans[number[start]][0], spans[number[stop]][1], buffer))
    return _pack(wide), _pack(local)


def _pack(lives: list[tuple[int, int, Buffer]]) -> int:
    """Give each buffer the lowest offset that is free while it lives; returns how many bytes that takes."""
    living: list[tuple[int, Buffer]] = []
    most = 0
    for start, stop, buffer in sorted(lives, key=lambda life: life[:2]):
        living = sorted(((end, one) for end, one in living if end >= start), key=lambda pair: pair[1].base)
        base = 0
        for _, one in living:
            if one.base - base >= buffer.bytes:
                break
            base = max(base, one.base + one.bytes)
        buffer.base = base
        living.append((stop, buffer))
        most = max(most, base + buffer.bytes)
    for _, _, buffer in lives:
        if buffer.place == Place.ARENA:
            buffer.base <<= 32
    return most


def _encode(line: np.void, instr: Instr, kept: list[Tensor]) -> None:
    line["code"], line["dims"] = instr.code, instr.dims
    line["more"][: len(instr.more)] = instr.more
    line["numbers"][: len(instr.numbers)] = instr.numbers
    kept += instr.keep
    _encode_operand(line["out"], instr.out, kept)
    for place, operand in zip(line["inputs"], instr.inputs, strict=False):
        if operand is not None:
            _encode_operand(place, operand, kept)


def _encode_operand(arg: np.void, operand: Operand, kept: list[Tensor]) -> None:
    source = operand.source
    skip = operand.offset * source.dtype.itemsize
    arg["steps"], arg["type"] = operand.steps, TYPES[source.dtype]
    if isinstance(source, Tensor):
        kept.append(source.detach())  # a parameter may be given other numbers; what the tape reads has to stay
        arg["place"], arg["base"] = Place.FIXED, source.data_ptr() + skip
    else:
        arg["place"], arg["base"] = source.place, source.base + skip
        arg["row"] = 0 if source.place == Place.SCRATCH else source.bytes
