"""A run of glue as the source of one Triton kernel: what `plain_glue.py` says, one program for each row.

A row's numbers depend on that row alone, so its bits do not depend on how many rows there are. What one instruction
leaves and another one reads at the same places stays in registers; what is read at other places (the other half of a
head) goes through memory, behind a barrier. Runs without sums over a row are cut into chunks of columns. Constants and
sizes stand in the source, so blocks of one shape share a kernel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence as SequenceOf
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from selfdraft.errors import RunnerUnavailable
from selfdraft.models.runner import codes
from selfdraft.models.runner.fuse import HALVES
from selfdraft.models.runner.tape import Buffer, Instr, Operand

CHUNK = 1024
"""Columns of a chunk, at most."""
OF_A_WARP, WARPS = 256, 16
"""Numbers for which there is a warp, and most warps of a program."""
WIDEST = 1 << 15
"""Most numbers that a program holds at once."""
ROUNDED = {torch.float32: "{0}", torch.bfloat16: "{0}.to(tl.bfloat16).to(tl.float32)", torch.int64: "{0}"}
UNARY = {
    codes.COPY: "{0}", codes.NEG: "-{0}", codes.EXP: "tl.exp({0})", codes.RSQRT: "tl.rsqrt({0})",
    codes.SQRT: "tl.sqrt_rn({0})", codes.TANH: "tanh({0})", codes.SIGMOID: "sigmoid({0})",
    codes.SILU: "{0} * sigmoid({0})", codes.GELU: "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    codes.GELU_TANH: "{0} * sigmoid(1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0}))",
    codes.RELU: "tl.maximum({0}, 0.0)", codes.COS: "tl.cos({0})", codes.SIN: "tl.sin({0})", codes.ABS: "tl.abs({0})",
    codes.SQUARE: "{0} * {0}", codes.RECIPROCAL: "1.0 / {0}", codes.CUBE: "{0} * {0} * {0}",
}  # fmt: skip
BINARY = {
    codes.ADD: "{0} + {1}", codes.SUB: "{0} - {1}", codes.MUL: "{0} * {1}", codes.DIV: "{0} / {1}",
    codes.MAXIMUM: "tl.maximum({0}, {1})", codes.MINIMUM: "tl.minimum({0}, {1})",
}  # fmt: skip
REDUCING = {
    codes.SUM: ("tl.sum", "0.0", "{0}"), codes.MEAN: ("tl.sum", "0.0", "{0} / {1}.0"),
    codes.AMAX: ("tl.max", 'float("-inf")', "{0}"),
}  # fmt: skip
NORMS = frozenset({codes.LAYER_NORM, codes.RMS_NORM})
Places = tuple[tuple[int, int], ...]
"""(size, step) of the dimensions that a row's numbers are gone through in; () where it is one number."""


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """A kernel: its text, whose arguments are `operands` in their order, and how it is launched."""

    text: str
    operands: tuple[Buffer | Tensor, ...]
    writes: tuple[Buffer, ...]
    """Those of the operands that the kernel fills."""
    chunks: int
    """Programs of a row."""
    warps: int


@dataclass(slots=True)
class Line:
    """A line of the kernel; `stores` into a buffer may turn out to be read by nobody."""

    text: str
    stores: Buffer | None = None


def source_of(instrs: SequenceOf[Instr], outside: Set[Buffer]) -> Source:
    """The kernel of a run of glue; buffers `outside` are read by others. Errors: RunnerUnavailable."""
    writer = _Writer(instrs, chunked=True)
    if not writer.write():
        writer = _Writer(instrs, chunked=False)
        assert writer.write()
    return writer.source(outside)


@dataclass(slots=True)
class _Values:
    """Numbers that an instruction goes through: how many, their index, and which of them there are."""

    count: int
    index: str
    mask: str


class _Writer:
    """Writes one kernel. `chunked`: a program has some columns of a row, which works for some runs only."""

    def __init__(self, instrs: SequenceOf[Instr], *, chunked: bool) -> None:
        self.instrs, self.chunked = instrs, chunked
        self.lines: list[Line] = []
        self.heads: dict[str, str] = {}
        """Lines that say which numbers there are, by the name that they define."""
        self.names: dict[int, str] = {}
        self.operands: list[Buffer | Tensor] = []
        self.known: dict[tuple[Buffer, int, Places, int], str] = {}
        """Names of numbers in registers, by buffer, offset, places and how many they are."""
        self.unseen: set[Buffer] = set()
        """Buffers written since the last barrier."""
        self.loaded: set[Buffer] = set()
        self.written: set[Buffer] = set()
        self.block = 1
        self.widest = max(instr.more[1] if instr.code == codes.EMBED else math.prod(instr.dims) for instr in instrs)
        self.chunk = min(CHUNK, _power(self.widest))

    def write(self) -> bool:
        """Translate everything; False where it cannot be cut into chunks."""
        for instr in self.instrs:
            if self.chunked and (instr.code in NORMS or instr.code in REDUCING):
                return False
            self._instr(instr)
            if self.chunked and self.loaded & self.written:
                return False
        return True

    def source(self, outside: Set[Buffer]) -> Source:
        kept = self.written & (outside | self.loaded)
        body = [line.text for line in self.lines if line.stores is None or line.stores in kept]
        operands = tuple(one for one in self.operands if not isinstance(one, Buffer) or one in kept | self.loaded)
        names = {self.names[id(one)]: f"P{i}" for i, one in enumerate(operands)}
        whole = "\n    ".join(["row = tl.program_id(0)", *self.heads.values(), *body])
        whole = re.sub(r"\bQ\d+", lambda found: names[found[0]], whole)
        text = f"def glue({', '.join(names.values())}):\n    {whole}\n"
        chunks = -(-self.widest // self.chunk) if self.chunked else 1
        warps = min(WARPS, max(1, self.block // OF_A_WARP))
        writes = tuple(one for one in operands if isinstance(one, Buffer) and one in kept)
        return Source(text, operands, writes, chunks, warps)

    # Numbers

    def _flat(self, count: int) -> _Values:
        """All numbers of a row in order."""
        if count == 1:
            return _Values(1, "0", "")
        size = self.chunk if self.chunked else self._room(count)
        index, mask = f"k{size}", f"m{count}"
        start = f"tl.program_id(1) * {size} + " if self.chunked else ""
        self.heads[index] = f"{index} = {start}tl.arange(0, {size})"
        self.heads[mask] = f"{mask} = {index} < {count}"
        self.block = max(self.block, size)
        return _Values(count, index, mask)

    def _room(self, count: int) -> int:
        size = _power(count)
        if size > WIDEST:
            raise RunnerUnavailable(f"a kernel of glue holds {WIDEST} numbers of a row, not {count}")
        return size

    def _name(self, source: Buffer | Tensor) -> str:
        if id(source) not in self.names:
            self.names[id(source)] = f"Q{len(self.operands)}"
            self.operands.append(source)
        return self.names[id(source)]

    def _start(self, operand: Operand) -> str:
        """The address of a row's first number."""
        name, source = self._name(operand.source), operand.source
        row = f" + row * {source.width}" if isinstance(source, Buffer) else ""
        return f"{name}{row}" + (f" + {operand.offset}" if operand.offset else "")

    def _read(
        self, operand: Operand, values: _Values, places: Places, *, index: str = "", kind: str = "float32"
    ) -> str:
        """Numbers of an operand, in registers already or loaded; `index` where it is not the one of `values`."""
        source = operand.source
        if isinstance(source, Tensor) and not places and (source.device.type == "cpu" or source.numel() == 1):
            return _literal(float(source[(0,) * source.ndim]))
        if isinstance(source, Buffer):
            found = self.known.get((source, operand.offset, places, values.count if places else 1))
            if found is not None and not index:
                return found if kind == "float32" else f"{found}.to(tl.{kind})"
            self.loaded.add(source)
            if source in self.unseen:
                self._say("tl.debug_barrier()")
                self.unseen.clear()
        at = _expression(places, index or values.index)
        more = f", mask={values.mask}, other=0.0" if at and values.mask else ""
        said = self._let(f"tl.load({self._start(operand)}{at}{more}).to(tl.{kind})")
        if isinstance(source, Buffer) and not index and kind == "float32":
            self.known[source, operand.offset, places, values.count if places else 1] = said
        return said

    def _let(self, text: str) -> str:
        name = f"v{len(self.lines)}"
        self._say(f"{name} = {text}")
        return name

    def _say(self, text: str, stores: Buffer | None = None) -> None:
        self.lines.append(Line(text, stores))

    def _keep(self, operand: Operand, values: _Values, places: Places, said: str, mask: str | None = None) -> None:
        """Round what an instruction says, remember it, and store it."""
        buffer = operand.source
        assert isinstance(buffer, Buffer)
        said = self._let(ROUNDED[buffer.dtype].format(f"({said})"))
        at = _expression(places, values.index)
        there = values.mask if mask is None else mask
        shown = f"{said}.to({self._name(buffer)}.dtype.element_ty)"
        more = f", mask={there}" if there else ""
        self._say(f"tl.store({self._start(operand)}{at}, {shown}{more})", buffer)
        self.written.add(buffer)
        self.unseen.add(buffer)
        if mask is None:
            self.known[buffer, operand.offset, places, values.count if places else 1] = said

    # Instructions

    def _instr(self, instr: Instr) -> None:
        if not all(instr.dims):  # such as the part of a head that does not turn, where all of it turns
            return
        if instr.code == codes.EMBED:
            self._embed(instr)
        elif instr.code == codes.ROTARY:
            self._rotary(instr)
        elif instr.code in NORMS or instr.code in REDUCING:
            self._over_last(instr)
        else:
            self._pointwise(instr)

    def _pointwise(self, instr: Instr) -> None:
        values = self._flat(math.prod(instr.dims))
        given = [self._read(one, values, merged(instr.dims, one.steps)) for one in instr.inputs if one is not None]
        if not any(one.startswith("v") for one in given):  # of constants alone
            given[0] = self._let(f"tl.full((), {given[0]}, tl.float32)")
        if instr.code == codes.GLU:
            middle = self._middle(instr, _worded(UNARY, instr.more[1]).format(given[0]))
            said = f"{middle} * {given[1]}"
        else:
            said = _worded(UNARY if len(given) == 1 else BINARY, instr.code).format(*given)
        self._keep(instr.out, values, merged(instr.dims, instr.out.steps), said)

    def _middle(self, instr: Instr, text: str) -> str:
        """What the stock model rounds between two operations that are one instruction here."""
        return self._let(ROUNDED[torch.bfloat16 if instr.more[0] else torch.float32].format(f"({text})"))

    def _rotary(self, instr: Instr) -> None:
        values, wide = self._flat(math.prod(instr.dims)), instr.dims[3]
        x, cosine, sine = (one for one in instr.inputs if one is not None)
        half, k = wide // 2, values.index
        if instr.more[1] == HALVES:
            other, first = f"({k} // {wide} * {wide} + ({k} + {half}) % {wide})", f"{k} % {wide} < {half}"
            if half & (half - 1) == 0 and wide & (wide - 1) == 0:
                other = f"({k} ^ {half})"
        else:
            other, first = f"({k} ^ 1)", f"{k} % 2 == 0"
        straight, cosines, sines = (self._read(one, values, merged(instr.dims, one.steps)) for one in (x, cosine, sine))
        turned = self._read(x, values, merged(instr.dims, x.steps), index=other)
        turned = self._let(f"tl.where({first}, -{turned}, {turned})")
        parts = self._middle(instr, f"{straight} * {cosines}"), self._middle(instr, f"{turned} * {sines}")
        self._keep(instr.out, values, merged(instr.dims, instr.out.steps), " + ".join(parts))

    def _embed(self, instr: Instr) -> None:
        """A row of a table; one that is not in it is NaN."""
        (ids,), (table,) = instr.inputs, instr.keep
        wide, count = instr.more[1], instr.more[2]
        if ids is None or table.stride(1) != 1:
            raise RunnerUnavailable("a kernel of glue reads tables row by row")
        values = self._flat(wide)
        at = self._read(ids, _Values(1, "0", ""), (), kind="int64")
        found = f"tl.load({self._name(table)} + tl.minimum(tl.maximum({at}, 0), {count - 1}) * {table.stride(0)}"
        said = self._let(f"{found} + {values.index}, mask={values.mask}, other=0.0).to(tl.float32)")
        nan = 'float("nan")'
        inside = f"tl.where({at} < 0, {nan}, tl.where({at} < {count}, {said}, {nan}))"
        self._keep(instr.out, values, ((wide, 1),), inside)

    def _over_last(self, instr: Instr) -> None:
        """Norms and sums over the last dimension: of one vector as all numbers in order, of several as a matrix."""
        outer, wide = math.prod(instr.dims[:3]), instr.dims[3]
        if outer == 1 and wide > 1:
            self._vector(instr, self._flat(wide))
            return
        rows, columns = self._room(outer), self._room(wide)
        self._room(rows * columns)
        o, w, inside = f"o{rows}", f"w{columns}", f"m{outer}x{wide}"
        self.heads[o] = f"{o} = tl.arange(0, {rows})[:, None]"
        self.heads[w] = f"{w} = tl.arange(0, {columns})[None, :]"
        self.heads[inside] = f"{inside} = ({o} < {outer}) & ({w} < {wide})"
        self.block = max(self.block, rows * columns)
        # one index that runs as if the matrix were flat, so that places are told as everywhere
        values = _Values(outer * wide, f"({o} * {wide} + {w})", inside)
        self._matrix(instr, values, o, outer)

    def _vector(self, instr: Instr, values: _Values) -> None:
        x = instr.inputs[0]
        assert x is not None
        given = self._read(x, values, merged(instr.dims, x.steps))
        if instr.code in REDUCING:
            self._keep(instr.out, _Values(1, "0", ""), (), self._reduced(instr, given, values, "0"))
        else:
            said = self._normed(instr, given, values, "0")
            self._keep(instr.out, values, merged(instr.dims, instr.out.steps), said)

    def _matrix(self, instr: Instr, values: _Values, o: str, outer: int) -> None:
        """Several vectors: nothing of it is found in registers, and nothing is left there."""
        x = instr.inputs[0]
        assert x is not None
        given = self._read(x, values, merged(instr.dims, x.steps), index=values.index)
        if instr.code in REDUCING:
            mask = self._let(f"{o} < {outer}")
            said = f"({self._reduced(instr, given, values, '1')})[:, None]"
            places = merged((*instr.dims[:3], 1), instr.out.steps)
            self._keep(instr.out, _Values(outer, o, mask), places, said, mask)
            return
        said = self._normed(instr, given, values, "1")
        self._keep(instr.out, values, merged(instr.dims, instr.out.steps), said, values.mask)

    def _reduced(self, instr: Instr, x: str, values: _Values, axis: str) -> str:
        function, nothing, shown = REDUCING[instr.code]
        inside = f"tl.where({values.mask}, {x}, {nothing})"
        return shown.format(f"{function}({inside}, {axis})", instr.dims[3])

    def _normed(self, instr: Instr, x: str, values: _Values, axis: str) -> str:
        """What a norm says. The weights of a layer norm lie in order, whatever its operands say."""
        spread = "[:, None]" if axis == "1" else ""
        wide, epsilon = instr.dims[3], _literal(instr.numbers[0])
        ordered = instr.code == codes.LAYER_NORM
        given = [
            None if one is None else self._read(one, values, merged(instr.dims, (0, 0, 0, 1) if ordered else one.steps))
            for one in instr.inputs[1:]
        ]
        inside = self._let(f"tl.where({values.mask}, {x}, 0.0)")
        if ordered:
            mean = self._let(f"tl.sum({inside}, {axis}) / {wide}.0")
            inside = self._let(f"tl.where({values.mask}, {x} - {mean}{spread}, 0.0)")
        scale = self._let(f"tl.rsqrt(tl.sum({inside} * {inside}, {axis}) / {wide}.0 + {epsilon})")
        said = f"{inside} * {scale}{spread}"
        if not ordered:
            said = self._middle(instr, said)
        weight, shift = (*given, None, None)[:2]
        said = said if weight is None else f"{said} * {weight}"
        return said if shift is None else f"{said} + {shift}"


def merged(dims: SequenceOf[int], steps: SequenceOf[int]) -> Places:
    """Dimensions that are gone through evenly become one; () where it is one number all the time."""
    found: list[tuple[int, int]] = []
    for size, step in zip(dims, steps, strict=True):
        if size == 1:
            continue
        if found and found[-1][1] == size * step:
            found[-1] = found[-1][0] * size, step
        else:
            found.append((size, step))
    return () if all(step == 0 for _, step in found) else tuple(found)


def _power(count: int) -> int:
    """The least power of two that holds so many."""
    return 1 << (count - 1).bit_length()


def _expression(places: Places, index: str) -> str:
    """What is added to the address of a row's first number."""
    terms, below = [], 1
    for i, (size, step) in reversed([*enumerate(places)]):
        at = index if below == 1 else f"{index} // {below}"
        if i and step:
            at = f"{at} % {size}"
        if step:
            terms.append(f"{at} * {step}" if step != 1 else at)
        below *= size
    return "".join(f" + {term}" for term in reversed(terms))


def _literal(number: float) -> str:
    return f"({number!r})" if math.isfinite(number) else f'float("{number}")'


def _worded(words: dict[int, str], code: int) -> str:
    if code not in words:
        raise RunnerUnavailable(f"there is no kernel of glue for the operation {code}")
    return words[code]
