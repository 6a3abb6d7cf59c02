"""The link of mask tokens by the kernels: what `models/adapters.py` does by five operations of torch, but quicker.

A tree asks what its masks say some times in every step, and each time 37,000 numbers are multiplied: for so little
torch needs longer to begin than to compute.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selfdraft.models.runner.tape import TYPES

FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class LinkKernel:
    """`adapters.link_state` of one token, and `adapters.shift_of` of some ids, for float tables on the CPU."""

    library: ctypes.CDLL
    embed: Callable[[Tensor], Tensor]
    """Embeddings [n, hidden] of tokens [n]."""
    head: Tensor
    """Weights of the output layer [vocab, hidden], row after row."""
    link: tuple[Tensor, Tensor]
    """down [hidden, rank], up [rank, hidden]."""

    @classmethod
    def of(
        cls, library: ctypes.CDLL, embed: Callable[[Tensor], Tensor], head: Tensor | None, link: tuple[Tensor, Tensor]
    ) -> LinkKernel | None:
        """None where a tensor is not as the kernels take it."""
        if head is None or link[0].dtype != link[1].dtype:
            return None
        able = (
            type(part) in (Tensor, nn.Parameter) and part.dtype in FLOATS and part.is_contiguous()
            for part in (head, *link)
        )
        return cls(library, embed, head, link) if all(able) else None

    def state(self, token: int) -> Tensor:
        """What `token` adds to what the output layer is given: [hidden], float32."""
        down, up = self.link
        row = self.embed(torch.tensor([token]))[0]
        if row.dtype not in FLOATS:
            row = row.float()
        said = torch.empty(len(row), dtype=torch.float32)
        self.library.selfdraft_link_state(
            TYPES[row.dtype],
            row.data_ptr(),
            len(row),
            TYPES[down.dtype],
            down.data_ptr(),
            up.data_ptr(),
            len(up),
            torch.finfo(torch.float32).eps,
            said.data_ptr(),
        )
        return said

    def shift(self, state: Tensor, ids: Tensor) -> Tensor:
        """What a state adds to the logits of `ids` [k]: [k], float32."""
        head, said = self.head, torch.empty(len(ids), dtype=torch.float32)
        ids = ids.contiguous()
        self.library.selfdraft_picked(
            TYPES[head.dtype],
            head.data_ptr(),
            head.shape[1],
            ids.data_ptr(),
            len(ids),
            state.data_ptr(),
            said.data_ptr(),
        )
        return said
