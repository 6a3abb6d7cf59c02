"""Glue on a GPU: each run of it is one kernel, which `glue_source.py` writes. This module needs Triton."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Set
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Protocol, cast

import torch
import triton
import triton.language as tl

from selfdraft.models.graph.glue_kernels import sigmoid, tanh
from selfdraft.models.graph.glue_source import Source, source_of
from selfdraft.models.graph.plain_glue import Memory, Rows
from selfdraft.models.runner.tape import Buffer, Instr


class Kernel(Protocol):
    """A function of Triton's."""

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        """What launches it as so many programs."""


def fused_glue(instrs: SequenceOf[Instr], outside: Set[Buffer]) -> Rows:
    """See `Glue`."""
    source = source_of(instrs, outside)
    return FusedRows(source, kernel_of(source.text))


@dataclass(frozen=True, eq=False, slots=True)
class FusedRows:
    """See `Rows`: one launch."""

    source: Source
    kernel: Kernel

    def __call__(self, memory: Memory, rows: int) -> None:
        device = next(iter(memory.values())).device
        for buffer in self.source.writes:
            if buffer not in memory:
                memory[buffer] = torch.empty(rows, buffer.width, dtype=buffer.dtype, device=device)
        given = [memory[one] if isinstance(one, Buffer) else one for one in self.source.operands]
        with torch.cuda.device_of(given[0]):  # type: ignore[no-untyped-call]
            self.kernel[rows, self.source.chunks](*given, num_warps=self.source.warps, enable_fp_fusion=False)


@cache
def kernel_of(text: str) -> Kernel:
    """The kernel of a source. Triton asks Python for the lines of a function, so they are noted where it looks."""
    whole, name = "@triton.jit\n" + text, f"<glue {sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = len(whole), None, whole.splitlines(keepends=True), name
    space: dict[str, object] = {"triton": triton, "tl": tl, "sigmoid": sigmoid, "tanh": tanh, "__name__": __name__}
    exec(compile(whole, name, "exec"), space)  # of our own words and of sizes alone
    return cast("Kernel", space["glue"])
