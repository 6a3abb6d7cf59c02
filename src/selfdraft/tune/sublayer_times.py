"""Seconds of every sublayer in a target's own forward pass: what leaving it out would save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from selfdraft.core.rows import Rows
from selfdraft.models import views
from selfdraft.models.reference import Model
from selfdraft.models.target import HFTarget


@dataclass(slots=True)
class SublayerTimes:
    """Seconds of one pass: each block's attention and MLP with the norm that only it reads, the block, and the pass."""

    attention: list[float]
    mlp: list[float]
    block: list[float]
    whole: float = 0.0


class SublayerClock:
    """A view of a target in which every sublayer is timed; the pass is the target's own otherwise."""

    def __init__(self, target: HFTarget) -> None:
        self.target = target
        self.now = clock_of(target)
        self._reset()
        self._model: Model = views.rearranged(target._view, target.layers, self._timed)

    def _reset(self) -> None:
        layers = self.target.layers
        self.times = SublayerTimes([0.0] * layers, [0.0] * layers, [0.0] * layers)

    def _timed(self, index: int, block: nn.Module) -> nn.Module:
        shell = views.shallow(block)
        of_attention = {views.attention_of(block), *views.idle_norms(block, no_attention=True)}
        of_mlp = {views.mlp_of(block), *views.idle_norms(block, no_attention=False)}
        for kind, names in (("attention", of_attention), ("mlp", of_mlp)):
            for name in names - {None}:
                shell._modules[str(name)] = _Timed(block._modules[str(name)], self, kind, index)
        return _Timed(shell, self, "block", index)

    @torch.inference_mode()
    def measure(self, rows: Rows) -> SublayerTimes:
        """One pass over `rows`, timed. Nothing is remembered."""
        self._reset()
        began = self.now()
        self.target._run(self._model, rows)
        self.times.whole = self.now() - began
        return self.times


class _Timed(nn.Module):
    def __init__(self, inner: nn.Module | None, watch: SublayerClock, kind: str, index: int) -> None:
        super().__init__()
        assert inner is not None
        self.inner, self.watch, self.kind, self.index = inner, watch, kind, index
        if hasattr(inner, "attention_type"):
            self.attention_type = inner.attention_type  # some models pick the mask by it

    def forward(self, *args: object, **kwargs: object) -> object:
        began = self.watch.now()
        answer = self.inner(*args, **kwargs)
        getattr(self.watch.times, self.kind)[self.index] += self.watch.now() - began
        return answer


def clock_of(target: HFTarget) -> Callable[[], float]:
    """The target's clock, which waits for its device first."""
    device = target.facts.device
    if device.type != "cuda":
        return target.clock

    def now() -> float:
        torch.cuda.synchronize(device)
        return target.clock()

    return now
