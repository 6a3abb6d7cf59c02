"""One linear layer alone through the kernels: for proofs and tests that compare it with what it should compute."""

from __future__ import annotations

import ctypes
from array import array

import torch
from torch import Tensor

from selfdraft.models.packed.arena import Arena
from selfdraft.models.runner import kernel_build
from selfdraft.models.runner.packing import packed_floats
from selfdraft.models.runner.runner import stage_rows
from selfdraft.models.runner.tape import Buffer, Instr, Kind, Operand, Slot, assemble


def run_floats(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, threads: int | None = None) -> Tensor:
    """Rows x [n, in] through weights [out, in] and a bias [out] of their type. Errors: RunnerUnavailable."""
    return run_blocks(x, packed_floats(weight, Arena()), bias, 0, *weight.shape, threads=threads)


def run_blocks(
    x: Tensor, packed: Tensor, bias: Tensor | None, code: int, out: int, wide: int, *, threads: int | None = None
) -> Tensor:
    """Rows x [n, wide] through packed weights in the format `code`; y [n, out] in the type of x, as is the bias.

    Errors: RunnerUnavailable where kernels cannot be built.
    """
    library = kernel_build.library()
    x = x.contiguous()
    y = x.new_empty(len(x), out)
    operands = [Operand(Buffer(x.dtype, width, slot=slot)) for width, slot in ((out, Slot.HIDDEN), (wide, Slot.EMBEDS))]
    more = (packed.data_ptr(), 0 if bias is None else bias.data_ptr(), out, wide)
    tape = assemble([Instr(Kind.LINEAR, code, operands[0], (operands[1],), more=more)])
    slots = array("q", [0] * Slot.GATES)
    slots[Slot.EMBEDS], slots[Slot.HIDDEN] = x.data_ptr(), y.data_ptr()
    count = threads or torch.get_num_threads()
    room = torch.empty(stage_rows(len(x), count) * tape.stage, dtype=torch.uint8)
    told = kernel_build.Pass(rows=len(x), answers=len(x), threads=count)
    told.slots, told.stage, told.stage_bytes = slots.buffer_info()[0], room.data_ptr(), tape.stage
    library.selfdraft_run(tape.steps.ctypes.data, len(tape.steps), tape.instrs.ctypes.data, ctypes.addressof(told))
    return y
