"""Canonical shapes are found by trying: planted row-dependence must be noticed, and what is promised must hold."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.drafters import build
from selfdraft.models.attention import kernel
from selfdraft.models.exactness import NATURAL, Shapes, probe_rows
from selfdraft.models.load import open_target
from selfdraft.models.proof import shapes
from selfdraft.models.target import HFTarget
from selfdraft.prove.doctor import trial
from selfdraft.types import SamplingParams
from tests.models import tiny_llama


class RowDependent(nn.Linear):
    """A linear layer that rounds otherwise when the number of rows is no multiple of `multiple`."""

    multiple = 1

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        return super().forward(x) * (1.0 if rows % self.multiple == 0 else 1.0 + 1e-6 * rows)


def planted(multiple: int) -> LlamaForCausalLM:
    model = copy.deepcopy(tiny_llama(torch.float64))
    layer = model.model.layers[0].mlp.up_proj
    twin = RowDependent(layer.in_features, layer.out_features, bias=False, dtype=torch.float64)
    twin.weight, twin.multiple = layer.weight, multiple
    model.model.layers[0].mlp.up_proj = twin
    return model


def request() -> Sequence:
    return open_sequence([3, 1, 4, 1, 5], SamplingParams(max_tokens=90), seed=0, eos=frozenset(), context=512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_promised_holds(dtype: torch.dtype) -> None:
    target = open_target(tiny_llama(dtype), slots=1)
    if target.exactness.level != "bitwise":
        pytest.skip(f"this machine does not reach it: {target.exactness.why}")
    found = trial(target, build("none", target), [request], str(dtype), str(target.shapes))
    assert (found.tokens_equal, found.rows_bitwise_equal) == (found.tokens, found.rows) == (90, 90)
    assert found.level == "bitwise"


def test_natural_shapes_are_the_negative_control() -> None:
    """The trial can see a difference: with a layer that depends on the number of rows it does."""
    model = planted(4)
    target = HFTarget(model, shapes=NATURAL)
    found = trial(target, build("none", target), [request], "float64", "natural")
    assert found.rows_bitwise_equal < found.rows
    assert found.level in ("token", "none")


@pytest.mark.parametrize("multiple", [4, 8, 16])
def test_a_row_dependent_layer_raises_the_multiple(multiple: int) -> None:
    model = planted(multiple)
    rows = probe_rows(model)
    assert rows == multiple
    found = shapes.probe_shapes(model)
    assert found is not None
    assert found.rows == multiple
    assert found.width >= multiple


def test_a_layer_beyond_all_multiples_is_reported() -> None:
    target = open_target(planted(10**6), slots=1)
    assert target.shapes == NATURAL
    assert target.exactness.level == "token"
    assert "multiples of 16" in target.exactness.why


def test_attention_has_a_multiple_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers may be row-invariant where attention is not (bfloat16 on a CPU without units for it)."""
    honest = kernel

    def uneven(query: Tensor, *rest: object) -> Tensor:
        rows = query.shape[2] // 3  # three query heads share their keys
        return honest(query, *rest) * (1.0 if rows % 8 == 0 else 1.0 + 1e-5 * rows)  # type: ignore[arg-type]

    monkeypatch.setattr(shapes, "kernel", uneven)
    assert shapes.probe_width(tiny_llama(torch.float64)) == 8


def test_rounding_up() -> None:
    shapes = Shapes(4, 64, 2)
    assert [shapes.round_rows(n) for n in (1, 4, 5)] == [4, 4, 8]
    assert [shapes.round_width(n) for n in (1, 4, 5)] == [4, 4, 8]
    assert [Shapes(1, 64, 2).round_width(n) for n in (1, 2, 3)] == [2, 2, 4]
    assert [shapes.round_length(n) for n in (1, 64, 65)] == [64, 64, 128]
    assert NATURAL.round_length(5) == 5
