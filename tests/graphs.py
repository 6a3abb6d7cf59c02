"""Graphs without a GPU: what is captured is run again by plain calls, and what a GPU would not forgive shows."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from torch import Tensor

from selfdraft.models.graph.capture import WARM_UPS
from selfdraft.models.graph.graph_runner import GraphSettings
from selfdraft.models.graph.plain_tree_attention import attend_plainly


class Again:
    """A capture that is none: a replay is a call.

    As before a real capture the function is run first, on whatever the sheet holds; and before each replay the answers
    of the one before are spoilt, so that whoever kept the memory instead of a copy reads NaN.
    """

    def __init__(self, fails_from: int | None = None) -> None:
        self.fails_from = fails_from
        """Number of the first capture that fails."""
        self.made: list[AgainReplay] = []

    def __call__(self, run: Callable[[], None], outputs: SequenceOf[Tensor]) -> AgainReplay:
        for _ in range(WARM_UPS):
            run()
        if self.fails_from is not None and len(self.made) >= self.fails_from:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.made.append(AgainReplay(run, outputs))
        return self.made[-1]


class AgainReplay:
    """A captured function of `Again`."""

    def __init__(self, run: Callable[[], None], outputs: SequenceOf[Tensor]) -> None:
        self.run, self.outputs = run, outputs
        self.runs = 0
        self.closed = False

    def __call__(self) -> None:
        assert not self.closed, "a graph is replayed that has been closed"
        self.runs += 1
        for output in self.outputs:
            output.fill_(float("nan"))
        self.run()

    def close(self) -> None:
        assert not self.closed, "a graph is closed twice"
        self.closed = True


SETTINGS = GraphSettings(Again(), attend_plainly, piece=64, shortest=64)
"""For short texts: several pieces, and several lengths of graphs."""


def settings(**changes: object) -> GraphSettings:
    """SETTINGS with a capture of their own, and changed."""
    return replace(SETTINGS, **{"capture": Again(), **changes})  # type: ignore[arg-type]
