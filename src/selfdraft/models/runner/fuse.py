"""Fusion: several small instructions of a traced pass become one that reads and writes memory once.

What belongs together is found by the flow of data alone: which numbers of which buffer an instruction reads, and who
else reads them. A buffer disappears only when nobody but the fused instruction reads it and it is in no slot.
Rounding stays where the stock model rounds to its own type. What fits no pattern stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfdraft.models.runner.codes import (
    ADD,
    COPY,
    GELU,
    GELU_TANH,
    GLU,
    LAYER_NORM,
    MEAN,
    MUL,
    NEG,
    RMS_NORM,
    ROTARY,
    RSQRT,
    SILU,
    SQUARE,
    SUM,
)
from selfdraft.models.runner.tape import Buffer, Instr, Kind, Operand

Places: TypeAlias = NDArray[np.int64]
"""Where numbers lie in a buffer, in the order in which an instruction goes through them."""
FLOATS = frozenset({torch.float32, torch.bfloat16})
ACTIVATIONS = frozenset({SILU, GELU, GELU_TANH})
HALVES, PAIRS = 0, 1
"""How a rotary embedding pairs the numbers of a head: with the one half a head away, or with the neighbour."""


def fused(instrs: SequenceOf[Instr]) -> list[Instr]:
    """The same pass in fewer instructions, in an order in which they could run."""
    flow = _Flow(instrs)
    for step in (_read_through, _write_through, _rms_norm, _glu, _rotary):
        for instr in list(flow):
            if flow.has(instr) and instr.kind == Kind.GLUE:
                step(flow, instr)
    return list(flow)


class _Flow:
    """Instructions in order, with the readers and writers of every buffer."""

    def __init__(self, instrs: SequenceOf[Instr]) -> None:
        self._line: list[Instr | None] = list(instrs)
        self._index = {instr: i for i, instr in enumerate(instrs)}
        self.readers: dict[Buffer, list[Instr]] = {}
        self.writers: dict[Buffer, list[Instr]] = {}
        for instr in instrs:
            self._enter(instr)

    def __iter__(self) -> Iterator[Instr]:
        return (instr for instr in self._line if instr is not None)

    def has(self, instr: Instr) -> bool:
        return instr in self._index

    def _enter(self, instr: Instr) -> None:
        self.writers.setdefault(instr.target, []).append(instr)
        for buffer in set(instr.reads):
            self.readers.setdefault(buffer, []).append(instr)

    def replace(self, old: SequenceOf[Instr], new: Instr) -> None:
        """`new` stands where the last of `old` stood."""
        last = max(self._index[instr] for instr in old)
        for instr in old:
            self.remove(instr)
        self._line[last], self._index[new] = new, last
        self._enter(new)

    def remove(self, instr: Instr) -> None:
        self._line[self._index.pop(instr)] = None
        self.writers[instr.target].remove(instr)
        for buffer in set(instr.reads):
            self.readers[buffer].remove(instr)

    def inner(self, buffer: Buffer) -> tuple[Instr, Instr] | None:
        """The only writer and the only reader of a buffer that may disappear."""
        writers, readers = self.writers.get(buffer, []), self.readers.get(buffer, [])
        return (writers[0], readers[0]) if buffer.slot is None and len(writers) == len(readers) == 1 else None

    def next(self, instr: Instr, code: int) -> Instr | None:
        """The glue instruction of this code that alone reads what `instr` alone writes."""
        pair = self.inner(instr.target)
        return pair[1] if pair is not None and pair[1].kind == Kind.GLUE and pair[1].code == code else None


# Where numbers lie


@lru_cache(maxsize=256)
def _grid(dims: tuple[int, ...], steps: tuple[int, ...]) -> Places:
    """Places from the first number on, flat, the last dimension innermost."""
    grid = np.zeros(dims, np.int64)
    for axis, (size, step) in enumerate(zip(dims, steps, strict=True)):
        grid += (np.arange(size) * step).reshape([-1 if i == axis else 1 for i in range(len(dims))])
    flat = grid.ravel()
    flat.flags.writeable = False
    return flat


def _places(operand: Operand, dims: tuple[int, ...]) -> Places:
    return operand.offset + _grid(dims, operand.steps)


def _carried(keys: Places, values: Places, wanted: Places) -> Places | None:
    """What stands beside each wanted key; None when one is missing."""
    table = np.full(int(max(keys.max(), wanted.max())) + 1, -1)
    table[keys] = values
    found: Places = table[wanted]
    return None if (found < 0).any() else found


def _through(instr: Instr, wanted: Places, operand: Operand) -> Places | None:
    """Where `operand`, an input of a pointwise instruction, lies for the wanted places of the result."""
    return _carried(_places(instr.out, instr.dims), _places(operand, instr.dims), wanted)


def _onwards(instr: Instr, operand: Operand, given: Places, target: Operand) -> Places | None:
    """Where `target` lies for the given places of an input, if the instruction reads these and each once."""
    read = _places(operand, instr.dims)
    if len(read) != len(given) or len(np.unique(given)) != len(given):
        return None
    return _carried(read, _places(target, instr.dims), given)


def _fit(source: Buffer | Tensor, places: Places | None, dims: tuple[int, ...], single: bool = True) -> Operand | None:
    """An operand that lies at these places. `single`: one number may stand for the whole innermost dimension."""
    if places is None:
        return None
    grid = places.reshape(dims)
    first = int(grid[0, 0, 0, 0])
    corners = np.eye(4, dtype=int)
    steps = tuple(int(grid[tuple(c)]) - first if size > 1 else 0 for c, size in zip(corners, dims, strict=True))
    if not np.array_equal(first + _grid(dims, steps), places):
        return None
    if isinstance(source, Tensor) and first:
        return None  # a tape that is kept knows constants by the address of their first number
    if dims[3] == 1 and not single:
        steps = (*steps[:3], 1)
    return Operand(source, first, steps) if single or steps[3] == 1 else None


def _in_line(*operands: Operand | None) -> bool:
    """Whether kernels of fused instructions can read these: floats side by side, or one for all."""
    return all(one is not None and one.dtype in FLOATS and one.steps[3] in (0, 1) for one in operands)


def _pointwise(instr: Instr) -> bool:
    return instr.kind == Kind.GLUE and instr.code < SUM


def _split(instr: Instr, buffer: Buffer | Tensor) -> tuple[Operand, Operand] | None:
    """The operand of a binary instruction that lies in `buffer`, and the other, which does not."""
    one, other = instr.inputs
    assert one is not None
    assert other is not None
    if (one.source is buffer) == (other.source is buffer):
        return None
    return (one, other) if one.source is buffer else (other, one)


def _only(instr: Instr) -> Operand:
    """The first input; for an instruction of one."""
    assert instr.inputs[0] is not None
    return instr.inputs[0]


# Copies


def _read_through(flow: _Flow, copy: Instr) -> None:
    """A copy that changes no number goes: its readers read what it read."""
    source, target = _only(copy).source if copy.inputs else None, copy.target
    if copy.code != COPY or not isinstance(source, Buffer) or target.slot is not None:
        return
    exact = source.dtype == target.dtype or (source.dtype, target.dtype) == (torch.bfloat16, torch.float32)
    if not exact or target.dtype not in FLOATS or flow.writers[target] != [copy]:
        return
    readers = flow.readers.get(target, [])
    changed = [_reading(reader, copy, source) for reader in readers]
    if not changed or any(one is None for one in changed):
        return
    for old, new in zip(list(readers), changed, strict=True):
        assert new is not None
        flow.replace([old], new)
    flow.remove(copy)


def _reading(reader: Instr, copy: Instr, source: Buffer) -> Instr | None:
    """The reader of a copy as one of the source."""
    if reader.kind != Kind.GLUE or reader.code > LAYER_NORM:
        return None
    inputs: list[Operand | None] = []
    for one in reader.inputs:
        if one is not None and one.source is copy.target:
            one = _fit(source, _through(copy, _places(one, reader.dims), _only(copy)), reader.dims)
            if one is None:
                return None
        inputs.append(one)
    return _like(reader, reader.out, inputs, reader.dims)


def _like(instr: Instr, out: Operand, inputs: SequenceOf[Operand | None], dims: tuple[int, ...]) -> Instr:
    return Instr(instr.kind, instr.code, out, tuple(inputs), dims, instr.more, instr.numbers, instr.keep)


def _write_through(flow: _Flow, copy: Instr) -> None:
    """What is computed only to be copied is written there at once."""
    if copy.code != COPY or copy.target.dtype not in FLOATS:
        return
    source = _only(copy).source
    pair = flow.inner(source) if isinstance(source, Buffer) else None
    if pair is None or not _pointwise(pair[0]) or source.dtype not in (torch.float32, copy.target.dtype):
        return
    made = pair[0]
    wanted = _places(_only(copy), copy.dims)
    if len(np.unique(wanted)) != len(wanted) or len(wanted) != len(_places(made.out, made.dims)):
        return
    new = _written(made, copy)
    if new is not None:
        flow.replace([made, copy], new)


def _written(made: Instr, copy: Instr) -> Instr | None:
    """A pointwise instruction that writes where a copy of its result would."""
    out = _fit(copy.target, _onwards(copy, _only(copy), _places(made.out, made.dims), copy.out), made.dims)
    if out is not None:
        return _like(made, out, made.inputs, made.dims)
    inputs = []
    for one in made.inputs:
        assert one is not None
        inputs.append(_fit(one.source, _through(made, _places(_only(copy), copy.dims), one), copy.dims))
    return None if None in inputs else _like(made, copy.out, inputs, copy.dims)


# Patterns


def _rms_norm(flow: _Flow, mean: Instr) -> None:
    """x / sqrt(mean(x * x) + epsilon), times a weight if one follows; all but the result in float32."""
    if mean.code != MEAN or not isinstance(_only(mean).source, Buffer):
        return
    pair = flow.inner(_only(mean).source)  # type: ignore[arg-type]
    plus = flow.next(mean, ADD)
    root = flow.next(plus, RSQRT) if plus else None
    scaled = flow.next(root, MUL) if root else None
    if pair is None or not plus or not root or not scaled or not _squares(pair[0]):
        return
    square, x = pair[0], _only(pair[0])
    if any(one.target.dtype != torch.float32 for one in (square, mean, plus, root)):
        return
    parts, added = _split(scaled, root.target), _split(plus, mean.target)
    epsilon = _number(added[1], plus.dims) if added else None
    read = _through(square, _places(_only(mean), mean.dims), x)
    if parts is None or added is None or epsilon is None or read is None or parts[1].source is not x.source:
        return
    # every number has to be multiplied by the root that belongs to its own mean
    at = _onwards(scaled, parts[1], read, parts[0])
    at = None if at is None else _through(root, at, _only(root))
    at = None if at is None else _through(plus, at, added[0])
    written = _onwards(scaled, parts[1], read, scaled.out)
    if at is None or written is None or not np.array_equal(at, _places(mean.out, mean.dims)):
        return
    operand = _fit(x.source, read, mean.dims, single=False)
    chain = [square, mean, plus, root, scaled]
    for weighted in (True, False):
        out, weight, more = _weighted(flow, scaled, written, mean.dims) if weighted else (scaled, None, written)
        place = _fit(out.target, more, mean.dims, single=False) if out else None
        if out is None or place is None or not _in_line(operand, place) or (weighted and not _in_line(weight)):
            continue
        rounded = int(scaled.target.dtype == torch.bfloat16)
        inputs = (operand, weight) if weight else (operand,)
        new = Instr(Kind.GLUE, RMS_NORM, place, inputs, mean.dims, more=(rounded,), numbers=(epsilon, 0.0))
        flow.replace([*chain, out] if weighted else chain, new)
        break


def _squares(instr: Instr) -> bool:
    return instr.kind == Kind.GLUE and instr.code == SQUARE


def _number(operand: Operand, dims: tuple[int, ...]) -> float | None:
    """The one constant that an operand is for all places."""
    moves = any(step and size > 1 for step, size in zip(operand.steps, dims, strict=True))
    source = operand.source
    return None if moves or isinstance(source, Buffer) else float(source[(0,) * source.ndim])


def _weighted(
    flow: _Flow, scaled: Instr, written: Places, dims: tuple[int, ...]
) -> tuple[Instr | None, Operand | None, Places | None]:
    """The product of a norm with a constant, the constant, and where the product lies."""
    product = flow.next(scaled, MUL)
    parts = _split(product, scaled.target) if product else None
    if product is None or parts is None or not isinstance(parts[1].source, Tensor):
        return None, None, None
    weight = _fit(parts[1].source, _onwards(product, parts[0], written, parts[1]), dims)
    return product, weight, _onwards(product, parts[0], written, product.out)


def _glu(flow: _Flow, act: Instr) -> None:
    """An activation times something else."""
    product = flow.next(act, MUL) if act.code in ACTIVATIONS else None
    parts = _split(product, act.target) if product else None
    if product is None or parts is None:
        return
    inside, other = parts
    x = _fit(_only(act).source, _through(act, _places(inside, product.dims), _only(act)), product.dims)
    if x is None or product.out.steps[3] != 1 or not _in_line(product.out, x, other):
        return
    more = (int(act.target.dtype == torch.bfloat16), act.code)
    flow.replace([act, product], Instr(Kind.GLUE, GLU, product.out, (x, other), product.dims, more=more))


def _rotary(flow: _Flow, total: Instr) -> None:
    """x * cos + turned(x) * sin, where `turned` exchanges the numbers of every pair and negates one."""
    if total.code != ADD:
        return
    first, second = (one.source for one in total.inputs if one is not None)
    if not isinstance(first, Buffer) or not isinstance(second, Buffer):
        return
    one, other = flow.inner(first), flow.inner(second)
    if one is None or other is None or first is second or first.dtype != second.dtype:
        return
    if any(pair[0].kind != Kind.GLUE or pair[0].code != MUL for pair in (one, other)):
        return
    ways = ((one[0], other[0]), (other[0], one[0]))
    tried = (_turned(flow, total, *way, rotated) for way in ways for rotated in way[1].inputs)
    new = next((found for found in tried if found is not None), None)
    if new is not None:
        flow.replace(*new)


def _turned(
    flow: _Flow, total: Instr, straight: Instr, turned: Instr, rotated: Operand | None
) -> tuple[list[Instr], Instr] | None:
    """A rotary embedding whose exchanged numbers are `rotated`: the instructions that it replaces, and itself."""
    if rotated is None or not isinstance(rotated.source, Buffer) or rotated.source.slot is not None:
        return None
    writers = flow.writers.get(rotated.source, [])
    if flow.readers[rotated.source] != [turned] or sorted(one.code for one in writers) != [COPY, NEG]:
        return None
    if any(one.kind != Kind.GLUE for one in writers) or len({_only(one).source for one in writers}) != 1:
        return None
    source = _only(writers[0]).source
    if source.dtype not in (rotated.dtype, torch.bfloat16):
        return None
    parts, angles = _split(straight, source), _split(turned, rotated.source)
    sums = _split(total, straight.target)
    if parts is None or angles is None or sums is None:
        return None
    dims = straight.dims
    x, here = _places(parts[0], dims), _places(straight.out, dims)
    there = _onwards(total, sums[0], here, sums[1])
    exchanged = None if there is None else _through(turned, there, rotated)
    if there is None or exchanged is None:
        return None
    way = _pairing(writers, x, exchanged, dims[3])
    place = _fit(total.target, _onwards(total, sums[0], here, total.out), dims, single=False)
    operand = _fit(source, x, dims, single=False)
    sine = _fit(angles[1].source, _through(turned, there, angles[1]), dims)
    if way is None or place is None or not _in_line(operand, place, parts[1], sine):
        return None
    more = (int(straight.target.dtype == torch.bfloat16), way)
    new = Instr(Kind.GLUE, ROTARY, place, (operand, parts[1], sine), dims, more=more)
    return [total, straight, turned, *writers], new


def _pairing(writers: SequenceOf[Instr], x: Places, exchanged: Places, wide: int) -> int | None:
    """How the numbers at `exchanged`, written by a copy and a negation, are those at `x`; None: in no known way."""
    into = np.concatenate([_places(one.out, one.dims) for one in writers])
    out_of = np.concatenate([_places(_only(one), one.dims) for one in writers])
    negated = np.concatenate([np.full(int(np.prod(one.dims)), one.code == NEG, np.int64) for one in writers])
    found, sign = _carried(into, out_of, exchanged), _carried(into, negated, exchanged)
    if found is None or sign is None or wide % 2:
        return None
    for way, order in ((HALVES, (2, wide // 2)), (PAIRS, (wide // 2, 2))):
        axis = 1 if way == HALVES else 2
        heads = x.reshape(-1, *order)
        signs = np.zeros_like(heads)
        signs[(slice(None),) * axis + (0,)] = 1
        if np.array_equal(np.flip(heads, axis).ravel(), found) and np.array_equal(signs.ravel(), sign):
            return way
    return None
