"""Operations that compute nothing: they mark, in a traced graph, what a tape does by itself (`tape.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# torch's own table of operations: adds names, changes none
_LIBRARY: Any = torch.library.Library("selfdraft", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "attend(Tensor q, Tensor k, Tensor v, int layer, int window, float scale, float cap, Tensor? sinks) -> Tensor"
)
_LIBRARY.define("gated(Tensor y, Tensor x, Tensor down, Tensor up, int number) -> Tensor")
_LIBRARY.define("rounded(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int wide, int bits) -> Tensor")


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layer: int, window: int, scale: float, cap: float, sinks: Tensor | None
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _gated(y: Tensor, x: Tensor, down: Tensor, up: Tensor, number: int) -> Tensor:
    return torch.empty_like(y)


def _rounded(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, wide: int, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


torch.library.register_fake("selfdraft::attend", _attend, lib=_LIBRARY)
torch.library.register_fake("selfdraft::gated", _gated, lib=_LIBRARY)
torch.library.register_fake("selfdraft::rounded", _rounded, lib=_LIBRARY)


@dataclass(eq=False, slots=True)
class Recorder:
    """What travels to attention functions and views instead of a `Plan` while a forward pass is traced."""

    hidden: Tensor | None = None
    """As in `Plan`."""
    calls: list[tuple[int, int | None]] = field(default_factory=list)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        scale: float,
        cap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Queries [1, heads, n, dim] -> [1, n, heads, dim] by name only."""
        self.calls.append((layer, window))
        said: Tensor = torch.ops.selfdraft.attend(q, k, v, layer, window or 0, scale, cap or 0.0, sinks)
        return said


def gate(y: Tensor, x: Tensor, down: Tensor, up: Tensor, number: int) -> Tensor:
    """`y`, and on the rows of adapter `number` also x @ down @ up, by name only."""
    said: Tensor = torch.ops.selfdraft.gated(y, x, down, up, number)
    return said


def product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, wide: int, bits: int) -> Tensor:
    """A linear layer of `wide` inputs with rounded weights (`models/rounded.py`), by name only."""
    said: Tensor = torch.ops.selfdraft.rounded(x, codes, scales, bias, wide, bits)
    return said
