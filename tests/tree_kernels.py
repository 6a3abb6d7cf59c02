"""The kernels of tree attention where there is no GPU: run by Triton's interpreter, and compiled ahead of time.

`TRITON_INTERPRET=1 python -m tests.tree_kernels interpreted` and `python -m tests.tree_kernels compiled`: JSON each.
Triton decides when it is imported whether it interprets, so each needs a process of its own.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch
from torch import Tensor

from selfdraft.core.rows import tree_rows
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.models.attention import Scores
from selfdraft.models.graph.plain_tree_attention import Reach, attend_plainly
from selfdraft.models.graph.sheet import Lines, Part, Sheet, SheetSize, lay_out

PIECE = 32
"""Small pieces: the interpreter is slow, and short texts have several of them."""
TREE = Draft((1, 2, 3, 4, 5, 6), (-1, -1, 1, 0, 2, 2), ("",) * 6, 6)
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, 3.0, -2.0, 0.3])
CASES = {
    "plain": (8, 2, 16, 16, Scores(0.25)),
    "three heads share": (6, 2, 24, 24, Scores(0.2)),
    "values of another width": (4, 4, 24, 16, Scores(0.2)),
    "window": (8, 2, 16, 16, Scores(0.25, window=21)),
    "soft cap": (4, 2, 16, 16, Scores(1.0, cap=3.0)),
    "sinks": (8, 2, 16, 16, Scores(0.25, sinks=SINKS)),
    "all": (8, 1, 16, 16, Scores(1.0, 40, 3.0, SINKS)),
}
"""Heads, key heads, widths of keys and values, and how a layer scores."""
ARCHITECTURES = (80, 90, 120)
WIDTHS = (64, 128)


def lines(base: int = 70) -> Lines:
    """A tree behind two whole pieces and some more, a row behind none, and one at the edge of a piece."""
    return lay_out(tree_rows([(1, base, 9, TREE), (0, 3, 8, EMPTY), (2, 64, 7, EMPTY)]), {})


def answers(case: str, which: Lines, *, fused: bool, other: SequenceOf[int] = ()) -> Tensor:
    """Answers of all rows, out of random queries and cache: in float32, or by the specification in float64.

    The rows `other` ask something else.
    """
    heads, key_heads, width, deep, how = CASES[case]
    dtype = torch.float32 if fused else torch.float64
    how = Scores(how.scale, how.window, how.cap, None if how.sinks is None else how.sinks.to(dtype))
    draw = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(3, key_heads, 128, size, generator=draw).to(dtype) for size in (width, deep))
    query = torch.randn(12, heads, width, generator=draw).to(dtype)
    query[[*other]] += 1.0
    tile = max(1, 16 // (heads // key_heads))
    sheet = Sheet(SheetSize(12, 12, tile), torch.device("cpu"))
    sheet.fill(which, Part(0, len(which), 3), (), trash=127)
    reach = Reach(128, PIECE, tile)
    if not fused:
        return attend_plainly(query, keys, values, sheet.parts, reach, how)[: len(which)]
    from selfdraft.models.graph.tree_attention import attend_fused

    return attend_fused(query, keys, values, sheet.parts, reach, how)[: len(which)]


def interpreted() -> dict[str, dict[str, float]]:
    """By case, the largest error against float64, and how many rows keep their bits when all others ask otherwise."""
    errors, equal = dict[str, float](), dict[str, float]()
    for case in CASES:
        said = answers(case, lines(), fused=True)
        errors[case] = float((said.double() - answers(case, lines(), fused=False)).abs().max())
        rows = range(len(lines()))
        alike = [answers(case, lines(), fused=True, other=[i for i in rows if i % 2 != odd]) for odd in (0, 1)]
        equal[case] = sum(torch.equal(alike[row % 2][row], said[row]) for row in rows)
    return {"errors": errors, "equal": equal}


def compiled() -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of each kernel by architecture and head width, as `ptxas` counts them."""
    return {
        f"sm_{architecture} {kernel} {width}": _counted(kernel, architecture, width)
        for architecture in ARCHITECTURES
        for kernel in ("whole_pieces", "rest_of_path")
        for width in WIDTHS
    }


def _counted(kernel: str, architecture: int, width: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from selfdraft.models.graph import tree_kernels
    from selfdraft.models.graph.tree_attention import BlockSizes

    function = getattr(tree_kernels, kernel)
    sizes = BlockSizes.of(4, width, width, 256, Scores(width**-0.5))
    fixed: Mapping[str, object] = sizes.constants() | {"TILE": sizes.tile(4 if kernel == "whole_pieces" else 1)}
    fixed = dict(fixed) | ({"HAS_SINKS": False} if kernel == "rest_of_path" else {})
    types = {
        **dict.fromkeys(("Q", "K", "V", "OUT", "SINKS"), "*bf16"),
        "SAID": "*fp32",
        "SUMS": "*fp32",
        "scale": "fp32",
    }
    types |= dict.fromkeys(("tile_first", "tile_rows", "slots", "bases", "seen", "path"), "*i32")
    names = [*inspect.signature(function.fn).parameters]
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    made = triton.compile(ASTSource(function, signature, dict(fixed)), target=GPUTarget("cuda", architecture, 32))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(made.asm["ptx"])
        name = f"--gpu-name=sm_{architecture}" + ("a" if architecture >= 90 else "")
        command = [
            get_ptxas(architecture).path,
            "-v",
            "--regAllocOptLevel=2",
            name,
            str(source),
            "-o",
            str(Path(folder) / "kernel.o"),
        ]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", told)]
    return {"registers": int(re.findall(r"Used (\d+) registers", told)[0]), "spilled": sum(spilled)}


if __name__ == "__main__":
    print(json.dumps({"interpreted": interpreted, "compiled": compiled}[sys.argv[1]]()))
