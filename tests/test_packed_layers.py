"""Layers of block weights, float weights that become them, and models that run on them."""

from __future__ import annotations

import copy
import itertools
import shutil
import subprocess
from ctypes import CDLL, c_int64, c_void_p
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfdraft import LLM, SamplingParams
from selfdraft.errors import LoadError, OptionError, UnsupportedModel
from selfdraft.models.identity import base_hash, config_hash, whole_hash
from selfdraft.models.load import load_quantised, open_target
from selfdraft.models.packed.arena import Arena
from selfdraft.models.packed.formats import FORMATS
from selfdraft.models.packed.layers import BlockEmbedding, BlockLinear, formats_of
from selfdraft.models.packed.quantise import (
    CODES,
    four_by_kernel,
    four_by_numpy,
    quantise_model,
    quantised,
    quantised_linear,
)
from selfdraft.models.pocket import POCKET
from selfdraft.models.proof.wide import Wide
from selfdraft.models.runner import kernel_build
from selfdraft.models.runner.levels import COMPILERS, FLAGS
from selfdraft.models.runner.one_layer import run_blocks
from tests.models import tiny_llama, tiny_target, unavailable

compiled = pytest.mark.skipif(bool(unavailable()), reason=unavailable())
GREEDY = SamplingParams(max_tokens=24)


def weights(out: int, wide: int) -> Tensor:
    return torch.randn(out, wide, generator=torch.Generator().manual_seed(out * wide)) * 0.05


def near(weight: Tensor, bits: int) -> Tensor:
    packed, kind = quantised(weight, bits, Arena())
    return BlockLinear(packed, kind, *weight.shape).dequantised()


@pytest.mark.parametrize(("out", "wide"), [(16, 128), (5, 1), (33, 127), (3, 513), (61, 48)])
def test_eight_bits_are_the_nearest_levels(out: int, wide: int) -> None:
    weight = weights(out, wide)
    steps = torch.nn.functional.pad(weight.abs(), (0, -wide % 32)).view(out, -1, 32).amax(-1) / 127
    error = (near(weight, 8) - weight).abs()
    assert (error <= steps.repeat_interleave(32, 1)[:, :wide] * 0.57).all()


def test_a_search_for_scale_and_minimum_helps() -> None:
    weight = weights(64, 1024)
    low, high = weight.view(64, -1, 32).aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    usual = (((weight.view(64, -1, 32) - low) / step).round() * step + low).view(64, 1024)
    assert (near(weight, 4) - weight).norm() < 0.95 * (usual - weight).norm()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_have_few_levels_come_back(bits: int, dtype: torch.dtype) -> None:
    once = near(weights(20, 96), bits).to(dtype)
    again = near(once, bits)
    assert (again - once).abs().max() <= 0.004 * once.abs().max()


FOUR = """#if defined(__clang__)
#pragma clang fp contract(fast)
#endif
#include "{header}"
extern "C" void selfdraft_four(const float *weights, long count, long halves, unsigned char *codes, float *scales,
                               float *mins) {{
  quantise::four(weights, count, halves != 0, codes, scales, mins);
}}
"""


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("instructions", kernel_build.INSTRUCTIONS)
def test_the_kernel_for_four_bits_has_the_bits_of_its_twin(instructions: str, compiler: str, tmp_path: Path) -> None:
    """On every kind of processor, and by every compiler that is here: the codes of a model are its text."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    (tmp_path / "four.cpp").write_text(FOUR.format(header=kernel_build.SOURCE.with_name("quantise.h")))
    flags = (*FLAGS, kernel_build.INSTRUCTIONS[instructions])
    subprocess.run([compiler, *flags, str(tmp_path / "four.cpp"), "-o", str(tmp_path / "four.so")], check=True)
    library = CDLL(str(tmp_path / "four.so"))
    word, place = c_int64, c_void_p
    library.selfdraft_four.argtypes = [place, word, word, place, place, place]
    rows = weights(64, 576).numpy()
    rows[0], rows[1], rows[2], rows[2, :16], rows[3] = 0, 0.25, 0, 1, rows[3] * 1e-4
    for code, size in itertools.product(CODES[4], (1.0, 1e-3, 1e-6, 3e4)):
        blocks, kind = (rows * np.float32(size)).reshape(64, -1, 32), FORMATS[code]
        found, wanted = four_by_kernel(blocks, kind, library), four_by_numpy(blocks, kind)
        for i in range(3):
            assert np.asarray(found[i]).tobytes() == np.asarray(wanted[i]).tobytes(), (str(kind), size)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_giants_and_dwarfs(bits: int) -> None:
    assert not near(torch.zeros(3, 70), bits).any()
    for size in (1e30, 1e-25):
        weight = weights(3, 70) * size
        error = (near(weight, bits).double() - weight.double()).norm()
        assert error < (0.1 if bits == 4 else 0.01) * weight.double().norm()
    for odd in (float("nan"), float("inf")):
        weight = weights(3, 70)
        weight[1, 5] = odd
        with pytest.raises(LoadError, match="no number of bits holds it"):
            quantised(weight, bits, Arena())


def test_a_layer_keeps_its_bias_and_is_exact_in_a_wide_pass() -> None:
    layer = nn.Linear(70, 9, dtype=torch.bfloat16)
    made = quantised_linear(layer, 8, Arena())
    assert made.bias is layer.bias
    x = torch.randn(2, 3, 70, dtype=torch.bfloat16)
    assert made(x).shape == (2, 3, 9)
    assert made(x).dtype == torch.bfloat16
    with Wide(torch.float64):
        said = made(x.double())
    wanted = x.double() @ made.dequantised(torch.float64).mT + made.bias.double()
    torch.testing.assert_close(said, wanted)


def test_packed_weights_of_another_size_are_refused() -> None:
    packed, kind = quantised(weights(16, 64), 8, Arena())
    with pytest.raises(ValueError, match="are not weights of 17 x 64"):
        BlockLinear(packed, kind, 17, 64)


def test_a_quantised_model() -> None:
    model = copy.deepcopy(tiny_llama(torch.float32))
    model.lm_head.weight = model.model.embed_tokens.weight
    before = base_hash(model), config_hash(model), whole_hash(model)
    made = quantise_model(copy.deepcopy(model), 4)
    head, table = made.lm_head, made.model.embed_tokens
    assert isinstance(table, BlockEmbedding)
    assert isinstance(head, BlockLinear)
    assert head.packed.data_ptr() == table.packed.data_ptr(), "a tied head shares its weights"
    assert head.kind.bits == 8
    assert sum(formats_of(made).values()) == 4 * 7 + 1
    after = base_hash(made), config_hash(made), whole_hash(made)
    assert before[0] == after[0], "an adapter knows its model, whatever its weights are stored as"
    assert before[1] != after[1]
    assert before[2] != after[2]
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(LoadError, match="the embedding: a weight is nan"):
        quantise_model(model, 8)


@pytest.mark.parametrize("runner", ["plain", pytest.param("fast", marks=compiled)])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_drafted_text_is_plain_text(quantization: str, runner: str) -> None:
    llm = LLM("pocket", quantization=quantization, runner=runner, drafter="none", cache=False)  # type: ignore[arg-type]
    assert llm.target.runs == "fast" or runner == "plain"
    assert llm.target.facts.formats
    plain = llm.generate("Once upon a time", GREEDY)[0].outputs[0].token_ids
    for drafter in ("lookup", "quantised", "layer_skip"):
        llm.use(drafter)
        assert llm.generate("Once upon a time", GREEDY)[0].outputs[0].token_ids == plain, drafter


@compiled
def test_a_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, *rest: object) -> Tensor:
        said = run_blocks(x, *rest)  # type: ignore[arg-type]
        said[-1, -1] = torch.nextafter(said[-1, -1].float(), torch.tensor(9e9)).to(said.dtype)
        return said

    monkeypatch.setattr("selfdraft.models.proof.blocks.run_blocks", wrong)
    model = quantise_model(copy.deepcopy(tiny_llama(torch.float32)), 8)
    with pytest.raises(UnsupportedModel, match=r"computes .* otherwise"):
        open_target(model, slots=1, runner="fast")


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="quantization='int3' is unknown; there are auto, none, int8, int4"):
        LLM("pocket", quantization="int3")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="is for checkpoints"):
        LLM(tiny_llama(torch.float32), quantization="int8")
    assert not formats_of(load_quantised(POCKET, "auto", dtype=None))
    assert tiny_target().facts.formats == {}
