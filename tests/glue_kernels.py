"""The kernels of glue where there is no GPU: run by Triton's interpreter, and compiled ahead of time.

`TRITON_INTERPRET=1 python -m tests.glue_kernels interpreted` and `python -m tests.glue_kernels compiled`: JSON each.
See `tests/tree_kernels.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from selfdraft.models.graph.glue_source import Source, source_of
from selfdraft.models.graph.plain_glue import Memory, plain_glue
from selfdraft.models.graph.tape_pass import AsTheyLie, groups_of
from selfdraft.models.runner.tape import Buffer, Instr, Operand
from selfdraft.models.runner.trace import instructions
from selfdraft.models.target import HFTarget
from tests.test_families import FAMILIES, build

ROWS = 3
SEEN = ("llama", "qwen3", "gemma2", "phi", "phi3", "olmo2", "gpt2", "opt", "cohere", "glm4")
"""Families whose kernels are run. Among them: norms of heads, (1 + w), soft caps, GELU, biases, pairs, tables."""
ARCHITECTURES = (80, 90, 120)
HIDDEN = (576, 2048, 4096)
Program = tuple[list[Instr], Set[Buffer]]


def programs(model: PreTrainedModel) -> Iterator[Program]:
    """The runs of glue of a model's pass, of equal ones the first."""
    view = HFTarget(model)._view
    known = set[str]()
    for group in groups_of(instructions(view, AsTheyLie(), embedded=False)):
        text = source_of(group.instrs, group.outside).text if group.glue else ""
        if text and text not in known:
            known.add(text)
            yield group.instrs, group.outside


def in_float64(program: Program) -> tuple[Program, dict[Buffer, Buffer]]:
    """The same program, nothing in it being rounded to a narrow type."""
    others = dict[object, Buffer | Tensor]()

    def wide(operand: Operand | None) -> Operand | None:
        if operand is None:
            return None
        source = operand.source
        if isinstance(source, Tensor):
            return Operand(source.double() if source.is_floating_point() else source, operand.offset, operand.steps)
        if source not in others:
            dtype = torch.float64 if source.dtype.is_floating_point else source.dtype
            others[source] = Buffer(dtype, source.width)
        return Operand(others[source], operand.offset, operand.steps)

    changed = []
    for one in program[0]:
        out = wide(one.out)
        assert out is not None
        more = (0, *one.more[1:]) if one.code in (81, 85, 86) else one.more  # what stood between is not rounded
        changed.append(
            Instr(one.kind, one.code, out, tuple(map(wide, one.inputs)), one.dims, more, one.numbers, one.keep)
        )
    found = {old: new for old, new in others.items() if isinstance(old, Buffer) and isinstance(new, Buffer)}
    return (changed, {found[one] for one in program[1] if one in found}), found


def inputs_of(program: Program) -> Memory:
    """Random numbers of what a program reads and does not write."""
    draw = torch.Generator().manual_seed(len(program[0]))
    written = {instr.target for instr in program[0]}
    found: Memory = {}
    for instr in program[0]:
        for buffer in instr.reads:
            if buffer not in written and buffer not in found:
                drawn = torch.randn(ROWS, buffer.width, generator=draw)
                ids = torch.randint(0, 40, (ROWS, buffer.width), generator=draw, dtype=torch.int32)
                found[buffer] = drawn.to(buffer.dtype) if buffer.dtype.is_floating_point else ids
    return found


def error(said: Tensor, wanted: Tensor) -> float:
    """The largest difference of a row, in units of the largest number in it."""
    said, wanted = said.detach(), wanted.detach()
    high = wanted.double().abs().amax(-1, keepdim=True).clamp(min=1e-3)
    return float(((said.double() - wanted.double()).abs() / high).max())


def compared(program: Program, device: str = "cpu") -> dict[str, float]:
    """Errors of the kernel and of its specification against float64; the share of equal numbers; and whether each row
    has the bits that it has alone. Of all numbers that others read.
    """
    from selfdraft.models.graph.fused_glue import fused_glue

    instrs, outside = program
    given = {one: x.to(device) for one, x in inputs_of(program).items()}
    wide, others = in_float64(program)
    exact: Memory = {others[one]: x.double() if x.is_floating_point() else x for one, x in given.items()}
    plain_glue(*wide)(exact, ROWS)
    fused, plain = dict(given), dict(given)
    kernel = fused_glue(instrs, outside)
    kernel(fused, ROWS)
    plain_glue(instrs, outside)(plain, ROWS)
    last: Memory = {one: x[-1:].clone() for one, x in given.items()}
    kernel(last, 1)
    found = [instr.target for instr in instrs if instr.target in outside]
    equal = [float((fused[one] == plain[one]).float().mean()) for one in found]
    return {
        "fused": max(error(fused[one], exact[others[one]]) for one in found),
        "plain": max(error(plain[one], exact[others[one]]) for one in found),
        "equal": min(equal),
        "alone": float(all(torch.equal(fused[one][-1:], last[one]) for one in found)),
    }


def rounding() -> None:
    """From now on the interpreter rounds to bfloat16 as a GPU does; Triton's own cuts off what is behind."""
    import triton.language as tl
    from triton.runtime import interpreter

    own = interpreter._convert_float

    def convert(numbers: Any, kind: Any, other: Any, mode: Any) -> Any:
        if (kind, other) != (tl.float32, tl.bfloat16):
            return own(numbers, kind, other, mode)
        said = torch.from_numpy(numbers.reshape(numbers.shape).copy()).to(torch.bfloat16)
        return said.view(torch.int16).numpy().view("uint16").reshape(numbers.shape)

    interpreter._convert_float = convert


def interpreted() -> dict[str, dict[str, float]]:
    """By family and type, the largest errors of the kernels and of their specification against float64."""
    rounding()
    found = dict[str, dict[str, float]]()
    for name in SEEN:
        family = FAMILIES[name]
        for dtype in (torch.float32, torch.bfloat16):
            model = build(family.config, family.options, family.model, dtype)
            all_of_it = [compared(program) for program in programs(model)]
            found[f"{name} {dtype}"] = {
                **{what: max(one[what] for one in all_of_it) for what in ("fused", "plain")},
                **{what: min(one[what] for one in all_of_it) for what in ("equal", "alone")},
                "kernels": len(all_of_it),
            }
    return found


def sized(kind: str, hidden: int) -> PreTrainedModel:
    """A model without weights, of the widths of SmolLM2 135M, Llama 3.2 1B and Llama 3.1 8B."""
    inner = {576: 1536, 2048: 8192, 4096: 14336}[hidden]
    heads = hidden // 64 if hidden < 4096 else 32
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2, "vocab_size": 49152,
             "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4)}  # fmt: skip
    with torch.device("meta"):
        if kind == "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=128)).to(torch.bfloat16)
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)


def compiled() -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of each kernel by architecture and width, as `ptxas` counts them."""
    found = dict[str, dict[str, int]]()
    known = set[str]()
    for kind, hidden in (*(("llama", hidden) for hidden in HIDDEN), ("qwen3", HIDDEN[-1])):
        for number, (instrs, outside) in enumerate(programs(sized(kind, hidden))):
            source = source_of(instrs, outside)
            if source.text in known:
                continue
            known.add(source.text)
            for architecture in ARCHITECTURES:
                found[f"sm_{architecture} {kind} {hidden} {number}"] = counted(source, architecture)
    return found


def counted(source: Source, architecture: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from selfdraft.models.graph.fused_glue import kernel_of

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i32"}
    signature = {f"P{i}": types[one.dtype] for i, one in enumerate(source.operands)}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))}
    options = {"num_warps": source.warps, "enable_fp_fusion": False}
    kernel = ASTSource(kernel_of(source.text), signature, {}, aligned)
    made = triton.compile(kernel, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(made.asm["ptx"])
        name = f"--gpu-name=sm_{architecture}" + ("a" if architecture >= 90 else "")
        command = [get_ptxas(architecture).path, "-v", name, str(ptx), "-o", str(Path(folder) / "kernel.o")]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", told)]
    barriers = source.text.count("debug_barrier")
    assert made.asm["ptx"].count("bar.sync") >= barriers
    return {
        "registers": int(re.findall(r"Used (\d+) registers", told)[0]),
        "spilled": sum(spilled),
        "warps": source.warps,
    }


if __name__ == "__main__":
    print(json.dumps({"interpreted": interpreted, "compiled": compiled}[sys.argv[1]]()))
