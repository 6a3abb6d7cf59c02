"""Clocks that tests hand in: what is drafted by measured times is then the same on every machine, however busy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from selfdraft.core.rows import Rows
from selfdraft.drafting.cost_model import Profile
from selfdraft.models.target import HFTarget
from selfdraft.types import PassVariant


class Ticking:
    """A clock that goes on by `step` seconds whenever it is read."""

    def __init__(self, step: float = 1.0) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Passes:
    """A clock that moves only while a target runs: seconds of a pass, of a shorter one, and of each row beside that."""

    def __init__(self, whole: float = 1.0, short: float = 0.25, row: float = 1 / 64) -> None:
        self.now, self.whole, self.short, self.row = 0.0, whole, short, row

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Machine:
    """A made-up machine whose prices never change: seconds of a pass, and of each row beside that."""

    whole: float
    row: float

    def run(self, target: HFTarget) -> HFTarget:
        """The target on this machine: its clock, and the profile that would be measured with it."""
        rows = (1, 2, 4, 8, 16, 64)
        target.profile = Profile(rows, tuple(self.whole + self.row * count for count in rows), (0.0,) * len(rows))
        return on_passes(target, Passes(self.whole, self.whole / 4, self.row))


def on_passes(target: HFTarget, clock: Passes | None = None) -> HFTarget:
    """The target, with a clock that its own passes move."""
    moved = clock or Passes()
    forward: Callable[..., Tensor] = target.forward

    def timed(rows: Rows, short: PassVariant | None = None) -> Tensor:
        moved.now += (moved.whole if short is None else moved.short) + moved.row * len(rows)
        return forward(rows, short)

    target.forward, target.clock = timed, moved  # type: ignore[method-assign]
    return target
