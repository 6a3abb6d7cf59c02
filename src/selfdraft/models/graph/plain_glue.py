"""What stands between products and attention, in torch's own operations: the specification of `glue_source.py`.

A run of glue instructions (`runner/tape.py`) is a program that every row goes through by itself: norms, rotary
embeddings, gated units, residuals. Numbers are computed in float32 at least, and rounded where an instruction ends.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from selfdraft.models.runner import codes
from selfdraft.models.runner.fuse import HALVES
from selfdraft.models.runner.tape import Buffer, Instr, Operand

Memory = dict[Buffer, Tensor]
"""The numbers [rows, width] of buffers."""


Rows = Callable[[Memory, int], None]
"""A program that so many rows go through: `memory` has what it reads, and then what others read of what it writes."""


class Glue(Protocol):
    """Makes programs. Errors: RunnerUnavailable for an instruction that it does not know."""

    def __call__(self, instrs: SequenceOf[Instr], outside: Set[Buffer]) -> Rows:
        """Instructions in an order in which they run; the buffers `outside` are read by others."""


def plain_glue(instrs: SequenceOf[Instr], outside: Set[Buffer]) -> Rows:
    """See `Glue`: instruction by instruction, on any device."""
    return PlainRows(tuple(instrs))


@dataclass(frozen=True, eq=False, slots=True)
class PlainRows:
    """See `plain_glue`."""

    instrs: tuple[Instr, ...]

    def __call__(self, memory: Memory, rows: int) -> None:
        for instr in self.instrs:
            if instr.target not in memory:
                like = next(iter(memory.values()))
                shape = rows, instr.target.width
                memory[instr.target] = torch.empty(shape, dtype=instr.target.dtype, device=like.device)
            _run(instr, memory, rows)


def seen(memory: Memory, operand: Operand, dims: SequenceOf[int], steps: SequenceOf[int], rows: int) -> Tensor:
    """The numbers [rows, *dims] of an operand; a constant is the same for all rows."""
    source = operand.source
    numbers, row = (memory[source], source.width) if isinstance(source, Buffer) else (source, 0)
    return numbers.as_strided((rows, *dims), (row, *steps), numbers.storage_offset() + operand.offset)


def _run(instr: Instr, memory: Memory, rows: int) -> None:
    wide = torch.promote_types(instr.target.dtype, torch.float32)

    def read(operand: Operand | None, steps: SequenceOf[int] | None = None) -> Tensor | None:
        if operand is None:
            return None
        found = seen(memory, operand, instr.dims, operand.steps if steps is None else steps, rows)
        return found.to(device=memory[instr.target].device, dtype=wide)

    if instr.code == codes.EMBED:
        _embed(instr, memory, rows)
        return
    if instr.code in (codes.LAYER_NORM, codes.RMS_NORM):
        # the weights of a layer norm lie in order, whatever its operands say
        steps = (0, 0, 0, 1) if instr.code == codes.LAYER_NORM else None
        given = [read(instr.inputs[0]), *(read(one, steps) for one in instr.inputs[1:])]
    else:
        given = [read(one) for one in instr.inputs]
    x, *rest = given
    assert x is not None
    said = _said(instr, x, rest)
    dims = (*instr.dims[:3], 1) if instr.code in REDUCING else instr.dims
    seen(memory, instr.out, dims, instr.out.steps, rows).copy_(said)


def _said(instr: Instr, x: Tensor, rest: SequenceOf[Tensor | None]) -> Tensor:
    """What one instruction makes of its operands [rows, four dimensions]."""
    code = instr.code
    if code in UNARY:
        return UNARY[code](x)
    if code in REDUCING:
        return REDUCING[code](x)
    other = rest[0] if rest else None
    if code == codes.RMS_NORM:
        scaled = _middle(instr, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + instr.numbers[0]))
        return scaled if other is None else scaled * other
    if code == codes.LAYER_NORM:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + instr.numbers[0])
        scaled = scaled if other is None else scaled * other
        return scaled if rest[1] is None else scaled + rest[1]
    assert other is not None
    if code == codes.GLU:
        return _middle(instr, UNARY[instr.more[1]](x)) * other
    if code == codes.ROTARY:
        assert rest[1] is not None
        return _middle(instr, x * other) + _middle(instr, _turned(x, instr.more[1]) * rest[1])
    return BINARY[code](x, other)


def _middle(instr: Instr, x: Tensor) -> Tensor:
    """What stood between small instructions before they became this one: the stock model rounds it to bfloat16."""
    return x.to(torch.bfloat16).to(x.dtype) if instr.more[0] else x


def _turned(x: Tensor, way: int) -> Tensor:
    """The numbers of every pair exchanged, one of them negated (`fuse.py`)."""
    if way == HALVES:
        low, high = x.chunk(2, -1)
        return torch.cat([-high, low], -1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _embed(instr: Instr, memory: Memory, rows: int) -> None:
    """Rows out of a table; those of ids that are not in it are NaN."""
    (ids,), (table,) = instr.inputs, instr.keep
    assert ids is not None
    wide, count = instr.more[1], instr.more[2]
    at = seen(memory, ids, (1,), (0,), rows)[:, 0].long()
    said = F.embedding(at.clamp(0, count - 1), table).masked_fill(((at < 0) | (at >= count))[:, None], torch.nan)
    seen(memory, instr.out, (wide,), (1,), rows).copy_(said)


UNARY: dict[int, Callable[[Tensor], Tensor]] = {
    codes.COPY: lambda x: x, codes.NEG: torch.neg, codes.EXP: torch.exp, codes.RSQRT: torch.rsqrt,
    codes.SQRT: torch.sqrt, codes.TANH: torch.tanh, codes.SIGMOID: torch.sigmoid, codes.SILU: F.silu,
    codes.GELU: F.gelu, codes.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"), codes.RELU: F.relu,
    codes.COS: torch.cos, codes.SIN: torch.sin, codes.ABS: torch.abs, codes.SQUARE: torch.square,
    codes.RECIPROCAL: torch.reciprocal, codes.CUBE: lambda x: x * x * x,
}  # fmt: skip
BINARY: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    codes.ADD: torch.add, codes.SUB: torch.sub, codes.MUL: torch.mul, codes.DIV: torch.div, codes.POW: torch.pow,
    codes.MAXIMUM: torch.maximum, codes.MINIMUM: torch.minimum,
}  # fmt: skip
REDUCING: dict[int, Callable[[Tensor], Tensor]] = {
    codes.SUM: lambda x: x.sum(-1, keepdim=True), codes.MEAN: lambda x: x.mean(-1, keepdim=True),
    codes.AMAX: lambda x: x.amax(-1, keepdim=True),
}  # fmt: skip
