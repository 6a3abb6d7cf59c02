"""Whether this machine reads weights faster when kernels fetch them ahead by hand: measured once, and kept.

On some processors the hardware's own prefetchers keep up with memory, and the instructions only take room; on others
(virtual machines among them) one row is 15 % and two rows are 30 % faster with them. Bits are the same either way.
"""

from __future__ import annotations

import ctypes
import time
from array import array
from contextlib import suppress
from functools import cache

import torch

from selfdraft.files.atomic import cache_folder, read_record, write_record
from selfdraft.models.machine import cpu_name
from selfdraft.models.runner import kernel_build
from selfdraft.models.runner.tape import Buffer, Instr, Kind, Operand, Slot, Tape, assemble
from selfdraft.types import Clock

BYTES, WIDTH = 1 << 27, 1024
"""Of the weights that are read: more than caches keep; and the length of a row of them."""
ROUNDS = 5
BETTER = 0.97
"""Fetching by hand is taken where it needs at most this share of the time."""


@cache
def ahead(dtype: torch.dtype) -> int:
    """Numbers of rows for which weights are fetched by hand here, as `Pass.ahead` wants them: bit n - 1 for n rows.

    Errors: RunnerUnavailable where kernels cannot be built.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return 0  # no kernel computes in it
    machine = {"kernels": kernel_build.fingerprint(), "processor": cpu_name(), "threads": torch.get_num_threads()}
    place = cache_folder("kernels") / f"ahead-{kernel_build.fingerprint()}-{str(dtype).removeprefix('torch.')}.json"
    kept = (read_record(place, machine) or {}).get("ahead")
    if isinstance(kept, int) and kept in range(4):
        return kept
    found = measure(dtype)
    with suppress(OSError):  # it is measured again next time
        write_record(place, machine, ahead=found)
    return found


def measure(dtype: torch.dtype, clock: Clock = time.perf_counter) -> int:
    """`ahead`, measured now with `clock` in seconds: the shortest of some runs of one large layer each way."""
    layer = Layer(dtype)
    found = 0
    for bit, rows in ((1, 1), (2, 2)):
        took: dict[int, list[float]] = {0: [], bit: []}
        for _ in range(ROUNDS):
            for way, times in took.items():
                began = clock()
                layer.run(rows, way)
                times.append(clock() - began)
        if min(took[bit]) < BETTER * min(took[0]):
            found |= bit
    return found


class Layer:
    """One linear layer of BYTES, as a tape."""

    def __init__(self, dtype: torch.dtype) -> None:
        outputs = BYTES // WIDTH // dtype.itemsize
        self.weight = torch.ones(outputs, WIDTH, dtype=dtype)
        self.given, self.said = torch.ones(2, WIDTH, dtype=dtype), torch.empty(2, outputs, dtype=dtype)
        instr = Instr(
            Kind.LINEAR,
            0,
            Operand(Buffer(dtype, outputs, slot=Slot.HIDDEN)),
            (Operand(Buffer(dtype, WIDTH, slot=Slot.ENTERING)),),
            more=(self.weight.data_ptr(), 0, outputs, WIDTH),
            keep=(self.weight,),
        )
        self.tape: Tape = assemble([instr])
        self._slots = array("q", [0] * Slot.GATES)
        self._slots[Slot.ENTERING], self._slots[Slot.HIDDEN] = self.given.data_ptr(), self.said.data_ptr()

    def run(self, rows: int, way: int) -> torch.Tensor:
        """The layer's outputs for so many rows; `way` is `Pass.ahead`."""
        told = kernel_build.Pass(rows=rows, answers=rows, threads=torch.get_num_threads(), ahead=way)
        told.slots = self._slots.buffer_info()[0]
        steps, instrs = self.tape.steps, self.tape.instrs
        run = kernel_build.library().selfdraft_run
        run(steps.ctypes.data, len(steps), instrs.ctypes.data, ctypes.addressof(told))
        return self.said[:rows]
