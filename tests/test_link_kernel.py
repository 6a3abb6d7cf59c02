"""The link of mask tokens by the kernels says what torch says, and leaves alone what it cannot read."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfdraft.models.adapters import Ends, link_state, shift_of
from selfdraft.models.runner.kernel_build import library
from selfdraft.models.runner.link import LinkKernel
from tests.models import unavailable

WIDE, RANK, VOCAB = 72, 24, 300


def parts(table: torch.dtype, link: torch.dtype) -> tuple[Ends, tuple[Tensor, Tensor]]:
    chance = torch.Generator().manual_seed(3)
    weights = torch.randn(VOCAB, WIDE, generator=chance).to(table)
    down = torch.randn(WIDE, RANK, generator=chance).to(link)
    up = torch.randn(RANK, WIDE, generator=chance).to(link)
    return Ends(partial(F.embedding, weight=weights), weights), (down, up)


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_says_what_torch_says(table: torch.dtype, dtype: torch.dtype) -> None:
    """Up to rounding: widths that fill no vector, too."""
    if unavailable():
        pytest.skip(unavailable())
    ends, link = parts(table, dtype)
    quick = LinkKernel.of(library(), ends.table, ends.weights, link)
    assert quick is not None
    ids = torch.tensor([5, 299, 0, 77, 5])
    assert ends.weights is not None
    exact = ends.weights.double()[ids]
    for token in (0, 9, 299):
        state = link_state(lambda one: ends.table(one).float(), torch.tensor(token), *(part.float() for part in link))
        assert torch.allclose(quick.state(token), state, rtol=1e-3, atol=1e-3)
        assert torch.allclose(quick.shift(state, ids).double(), exact @ state.double(), rtol=1e-4, atol=1e-4)
        plain = shift_of(ends.head, link_state(ends.table, torch.tensor(token), *link), ids).double()
        assert torch.allclose(quick.shift(quick.state(token), ids).double(), plain, rtol=0.1, atol=2.0)


def test_what_the_kernels_cannot_read_is_left_to_torch() -> None:
    if unavailable():
        pytest.skip(unavailable())
    ends, link = parts(torch.float32, torch.float32)
    weights, (down, up) = ends.weights, link
    assert weights is not None
    cases: list[tuple[Tensor | None, tuple[Tensor, Tensor]]] = [
        (None, link),
        (weights.half(), link),
        (weights.T, link),
        (weights, (down.bfloat16(), up)),
        (weights, (down.double(), up.double())),
    ]
    for head, pair in cases:
        assert LinkKernel.of(library(), ends.table, head, pair) is None
    assert Ends(ends.table, nn.Linear(WIDE, VOCAB)).weights is not None
