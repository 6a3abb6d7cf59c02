"""A decoding pass as the steps of a tape: products by torch, attention by the plan, and all between them as glue.

The CPU's runner writes a stock forward down as instructions (`runner/trace.py`). Here the same instructions are run on
any device: each run of glue is one program of rows, which on a GPU is one kernel (`fused_glue.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from selfdraft.errors import RunnerUnavailable
from selfdraft.models.attention import Scores
from selfdraft.models.graph.plain_glue import Glue, Memory, Rows, seen
from selfdraft.models.graph.static_pass import StaticPlan
from selfdraft.models.runner import codes
from selfdraft.models.runner.tape import Buffer, Instr, Kind, Operand, Slot, ordered
from selfdraft.models.runner.trace import instructions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


INPUTS = frozenset({Slot.TOKENS, Slot.POSITIONS, Slot.EMBEDS})


class AsTheyLie:
    """Weights that stay where the model has them. See `runner.trace.Weights`."""

    def floats(self, weight: Tensor) -> Tensor:
        return weight.detach()


@dataclass(frozen=True, eq=False, slots=True)
class Given:
    """What one pass is given."""

    plan: StaticPlan
    gates: SequenceOf[Tensor]
    """For each adapter which rows [n] use it (not 0)."""
    rows: int


@dataclass(frozen=True, eq=False, slots=True)
class Group:
    """Instructions that are done at once."""

    instrs: list[Instr]
    glue: bool
    outside: frozenset[Buffer]
    """Buffers of it that later ones read."""
    over: tuple[Buffer, ...]
    """Those that nobody reads any more."""


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """Instructions that are done at once, and the buffers that nobody reads afterwards."""

    do: Callable[[Memory, Given], None]
    over: tuple[Buffer, ...]


class TapePass:
    """The pass of one view. `embedded`: it starts from embeddings, and any row may use any adapter.

    Errors: RunnerUnavailable where the pass cannot be written down, or `glue` does not know an instruction.
    """

    def __init__(self, model: PreTrainedModel, glue: Glue, *, embedded: bool) -> None:
        with torch.inference_mode(False):
            groups = groups_of(instructions(model, AsTheyLie(), embedded=embedded))
        instrs = [instr for group in groups for instr in group.instrs]
        self._inputs = {one.slot: one for instr in instrs for one in instr.reads if one.slot in INPUTS}
        self._logits = next(instr.target for instr in instrs if instr.target.slot == Slot.LOGITS)
        self._parts = [
            Part(_rows(glue(group.instrs, group.outside)) if group.glue else _heavy(group.instrs), group.over)
            for group in groups
        ]
        self.ran = False
        """Whether it has once run to its end: kernels are compiled at their first launch."""

    def __call__(self, inputs: Mapping[Slot, Tensor], given: Given) -> Tensor:
        """Answers [rows, vocab] of all rows. `inputs` are those of the pass, a row each."""
        memory: Memory = {buffer: inputs[Slot(slot)].reshape(given.rows, -1) for slot, buffer in self._inputs.items()}
        for part in self._parts:
            part.do(memory, given)
            for buffer in part.over:
                memory.pop(buffer, None)
        self.ran = True
        return memory[self._logits]


def groups_of(instrs: SequenceOf[Instr]) -> list[Group]:
    """What runs at once: all glue up to the next product, gate or attention; of the latter each by itself."""
    read = {buffer for instr in instrs for buffer in instr.reads}
    needed = [instr for instr in instrs if instr.target in read or instr.target.slot == Slot.LOGITS]
    line = [_told(instr) for step in ordered(needed) for instr in step.instrs]
    parts: list[list[Instr]] = []
    for instr in line:
        if parts and _is_glue(instr) and _is_glue(parts[-1][-1]):
            parts[-1].append(instr)
        else:
            parts.append([instr])
    last = {one: i for i, part in enumerate(parts) for instr in part for one in (instr.target, *instr.reads)}
    found = []
    for i, part in enumerate(parts):
        touched = dict.fromkeys(one for instr in part for one in (instr.target, *instr.reads))
        outside = frozenset(one for one in touched if last[one] > i or one.slot == Slot.LOGITS)
        found.append(Group(part, _is_glue(part[0]), outside, tuple(one for one in touched if one not in outside)))
    return found


def _is_glue(instr: Instr) -> bool:
    return instr.kind == Kind.GLUE and instr.code != codes.GATED


def _told(instr: Instr) -> Instr:
    """The instruction as it is here: all rows are asked for, so picking rows is a copy.

    Errors: RunnerUnavailable for block weights.
    """
    if instr.kind == Kind.LINEAR and instr.code:
        raise RunnerUnavailable("block weights have kernels for CPUs alone")
    if instr.code != codes.PICK or instr.kind != Kind.GLUE:
        return instr
    x, steps = instr.inputs[0], (0, 0, 0, 1)
    assert x is not None
    out, x = Operand(instr.target, instr.out.offset, steps), Operand(x.source, x.offset, steps)
    return Instr(Kind.GLUE, codes.COPY, out, (x,), (1, 1, 1, instr.more[1] // instr.target.dtype.itemsize))


def _rows(program: Rows) -> Callable[[Memory, Given], None]:
    return lambda memory, given: program(memory, given.rows)


def _heavy(group: SequenceOf[Instr]) -> Callable[[Memory, Given], None]:
    (instr,) = group
    heavy = {Kind.LINEAR: _product, Kind.ATTEND: _attention, Kind.GLUE: _gated}[instr.kind]
    return lambda memory, given: heavy(instr, memory, given)


def _product(instr: Instr, memory: Memory, given: Given) -> None:
    x, (weight, *bias) = instr.inputs[0], instr.keep
    assert x is not None
    rows = seen(memory, x, (instr.more[3],), (1,), given.rows)
    memory[instr.target] = F.linear(rows, weight, *bias)


def _attention(instr: Instr, memory: Memory, given: Given) -> None:
    """Heads may lie anywhere in a row; the numbers of one are together."""
    layer, window, heads, keyed, wide, deep, _ = instr.more
    scale, cap = instr.numbers
    query, key, value = (
        seen(memory, operand, (count, size), (operand.steps[1], 1), given.rows).transpose(0, 1)[None]
        for operand, count, size in zip(instr.inputs, (heads, keyed, keyed), (wide, wide, deep), strict=True)
        if operand is not None
    )
    scores = Scores(scale, window or None, cap or None, instr.keep[0] if instr.keep else None)
    memory[instr.target] = given.plan.attend(layer, query, key, value, scores).reshape(given.rows, heads * deep)


def _gated(instr: Instr, memory: Memory, given: Given) -> None:
    """See `adapters.Gated`: rows whose gate is closed keep their bits."""
    (down, up), (y, x) = instr.keep, instr.inputs
    assert y is not None
    assert x is not None
    said = seen(memory, y, (instr.dims[3],), (1,), given.rows)
    more = F.linear(F.linear(seen(memory, x, (instr.more[2],), (1,), given.rows), down), up)
    on = given.gates[instr.more[4] - Slot.GATES][:, None] != 0
    memory[instr.target] = torch.where(on, said + more, said)
