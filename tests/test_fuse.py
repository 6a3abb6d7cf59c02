"""Fused instructions compute what the small ones did, and only where nobody else needs what stood between them."""

from __future__ import annotations

import ctypes
from array import array
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from selfdraft.models.runner import codes, kernel_build, trace
from selfdraft.models.runner.fuse import fused as fuse_all
from selfdraft.models.runner.graph import record
from selfdraft.models.runner.packing import Packer
from selfdraft.models.runner.tape import Instr, Slot, Tape
from selfdraft.models.target import HFTarget
from tests.models import unavailable
from tests.test_families import FAMILIES, build

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
Function = Callable[[Tensor], Tensor]
MARKS = 101, 103
TYPES = (torch.float32, torch.bfloat16)


def tape_of(function: Function, wide: int, dtype: torch.dtype, fuse: bool) -> Tape:
    """A function of rows [1, n, wide] as a tape."""

    def forward(tokens: Tensor, positions: Tensor, wanted: Tensor, embeds: Tensor, entering: Tensor) -> list[Tensor]:
        return [function(embeds)]

    ids, states = torch.zeros(1, MARKS[0], dtype=torch.int64), torch.zeros(1, MARKS[0], wide, dtype=dtype)
    graph = record(forward, (ids, ids, torch.zeros(MARKS[1], dtype=torch.int64), states, states))
    with pytest.MonkeyPatch.context() as patch:
        if not fuse:
            patch.setattr(trace, "fused", list)
        return trace._Writer(graph, Packer(), *MARKS).write(()).tape


def run(tape: Tape, x: Tensor, wide: int, threads: int = 1) -> Tensor:
    """What the tape says about rows x [n, in]."""
    said = torch.full((len(x), wide), torch.nan, dtype=x.dtype)
    slots = array("q", [0] * Slot.GATES)
    slots[Slot.EMBEDS], slots[Slot.LOGITS] = x.data_ptr(), said.data_ptr()
    room = torch.zeros(len(x) * tape.arena + threads * tape.scratch + 64, dtype=torch.uint8)
    told = kernel_build.Pass(rows=len(x), threads=threads)
    told.slots, told.arena, told.scratch_bytes = slots.buffer_info()[0], room.data_ptr(), tape.scratch
    told.scratch = told.arena + len(x) * tape.arena
    sheets = tape.steps.ctypes.data, len(tape.steps), tape.instrs.ctypes.data
    kernel_build.library().selfdraft_run(*sheets, ctypes.addressof(told))
    return said


def codes_of(tape: Tape) -> Counter[int]:
    return Counter(int(code) for code in tape.instrs["code"])


def compare(function: Function, wide: int, dtype: torch.dtype, code: int, beside: tuple[int, ...] = ()) -> None:
    """One instruction, with those `beside` it, says what the unfused tape and torch say, but for roundings."""
    draw = torch.Generator().manual_seed(wide)
    x = (2 * torch.randn(7, wide, generator=draw)).to(dtype)
    fused, plain = (tape_of(function, wide, dtype, fuse) for fuse in (True, False))
    assert codes_of(fused) == Counter([code, *beside])
    assert code not in codes_of(plain)
    stock = function(x[None])[0]
    said, unfused = (run(tape, x, stock.shape[1]) for tape in (fused, plain))
    unit = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 1)  # float32: sums in another order
    for wanted in (stock, unfused):
        assert torch.allclose(said.double(), wanted.double(), rtol=unit, atol=4 * unit), (said - wanted).abs().max()
    if dtype == torch.bfloat16:  # rounded at the same places: hardly a number differs at all
        assert (said != unfused).float().mean() < 0.01
    alone = torch.cat([run(fused, x[i : i + 1], stock.shape[1]) for i in range(len(x))])
    assert torch.equal(said, alone)
    assert torch.equal(said, run(fused, x, stock.shape[1], threads=2))


def normed(x: Tensor, epsilon: float = 1e-2) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


def in_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, -1)


def weight_of(wide: int) -> Tensor:
    return torch.randn(wide, generator=torch.Generator().manual_seed(1))


NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weight behind the rounding": lambda x, w: w.to(x.dtype) * normed(x.float()).to(x.dtype),
    "weight before the rounding": lambda x, w: (normed(x.float()) * (1.0 + w)).to(x.dtype),
    "no weight": lambda x, w: normed(x.float()).to(x.dtype),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wide", [2, 16, 37, 576])
@pytest.mark.parametrize("name", NORMS)
def test_rms_norm(name: str, wide: int, dtype: torch.dtype) -> None:
    weight = weight_of(wide)
    compare(lambda x: NORMS[name](x, weight), wide, dtype, codes.RMS_NORM)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "wide"), [(3, 8), (2, 64), (5, 22)])
def test_rms_norm_of_heads(heads: int, wide: int, dtype: torch.dtype) -> None:
    weight = weight_of(wide)

    def function(x: Tensor) -> Tensor:
        return NORMS["weight behind the rounding"](in_heads(x, heads), weight).flatten(-2)

    compare(function, heads * wide, dtype, codes.RMS_NORM)


ACTIVATIONS: dict[str, Function] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wide", [3, 16, 37, 530])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_units(name: str, wide: int, dtype: torch.dtype) -> None:
    compare(lambda x: x[..., wide:] * ACTIVATIONS[name](x[..., :wide]), 2 * wide, dtype, codes.GLU)


def halves(x: Tensor) -> Tensor:
    one, other = x.chunk(2, -1)
    return torch.cat((-other, one), -1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "wide"), [(1, 16), (3, 6), (4, 64), (2, 46)])
@pytest.mark.parametrize("turn", [halves, pairs])
def test_rotary_embeddings(turn: Function, heads: int, wide: int, dtype: torch.dtype) -> None:
    """The angles are the last numbers of a row; heads lie before them."""

    def function(x: Tensor) -> Tensor:
        q = in_heads(x[..., : heads * wide], heads).transpose(1, 2)
        angles = x[..., heads * wide :].unsqueeze(1)
        cosine, sine = angles.cos(), angles.sin()
        turned: Tensor = q * cosine + turn(q) * sine
        return turned.transpose(1, 2).flatten(-2)

    compare(function, (heads + 1) * wide, dtype, codes.ROTARY, (codes.COS, codes.SIN))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_rotary_embedding_of_a_part_is_written_beside_the_rest(dtype: torch.dtype) -> None:
    heads, wide, part = 3, 20, 12

    def function(x: Tensor) -> Tensor:
        q = in_heads(x[..., : heads * wide], heads).transpose(1, 2)
        angles = x[..., heads * wide :].unsqueeze(1)
        cosine, sine = angles.cos(), angles.sin()
        turned, rest = q[..., :part], q[..., part:]
        return torch.cat((turned * cosine + halves(turned) * sine, rest), -1).transpose(1, 2).flatten(-2)

    size = heads * wide + part
    fused = tape_of(function, size, dtype, True)
    assert codes_of(fused)[codes.ROTARY] == 1
    assert sum(codes_of(fused).values()) == 4  # with a copy, a cosine and a sine
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.allclose(run(fused, x, heads * wide).float(), function(x[None])[0].float(), atol=3e-2)


def apart(x: Tensor) -> Tensor:
    inner = functional.silu(x[..., :9])
    return torch.cat((inner * x[..., 9:], inner), -1)


def normed_apart(x: Tensor) -> Tensor:
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
    return torch.cat((x * root, root), -1)


def wrongly_normed(x: Tensor) -> Tensor:
    """Numbers are scaled by the means of other heads."""
    heads = in_heads(x[..., :9], 3)
    root = torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + 1e-3)
    return (heads * root.transpose(-1, -2)).flatten(-2)


def negated_both(x: Tensor) -> Tensor:
    one, other = x[..., :6].chunk(2, -1)
    return x[..., :6] * x[..., 6:12] + torch.cat((one, -other), -1) * x[..., 12:]


def copied_narrow(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(torch.float32) * x


@pytest.mark.parametrize("function", [apart, normed_apart, wrongly_normed, negated_both, copied_narrow])
def test_what_is_needed_elsewhere_or_flows_otherwise_stays(function: Function) -> None:
    fused = tape_of(function, 18, torch.float32, True)
    assert not {codes.RMS_NORM, codes.GLU, codes.ROTARY} & set(codes_of(fused))
    x = torch.randn(5, 18, generator=torch.Generator().manual_seed(4))
    wanted = function(x[None])[0]
    assert torch.allclose(run(fused, x, wanted.shape[1]), wanted, atol=1e-5)


def test_a_scaled_norm_that_another_reads_keeps_its_buffer() -> None:
    """The norm is fused without the weight."""
    weight = weight_of(18)

    def function(x: Tensor) -> Tensor:
        inner = normed(x)
        return torch.cat((inner * weight, inner), -1)

    fused = tape_of(function, 18, torch.float32, True)
    assert codes_of(fused)[codes.RMS_NORM] == codes_of(fused)[codes.MUL] == 1
    x = torch.randn(5, 18, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(run(fused, x, 36), function(x[None])[0], atol=1e-5)


COUNTS = {"llama": (57, 141), "qwen3": (63, 189), "gemma": (58, 142), "phi3": (54, 144), "gpt2": (57, 57)}


@pytest.mark.parametrize("name", COUNTS)
def test_fewer_instructions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instructions of a family's tape in bfloat16, fused and not."""
    family = FAMILIES[name]
    model: PreTrainedModel = build(family.config, family.options, family.model, torch.bfloat16)
    seen: list[tuple[int, int]] = []

    def counted(instrs: list[Instr]) -> list[Instr]:
        done = fuse_all(instrs)
        seen.append((len(done), len(instrs)))
        return done

    monkeypatch.setattr(trace, "fused", counted)
    HFTarget(model, fast=True)
    assert seen[0] == COUNTS[name]
