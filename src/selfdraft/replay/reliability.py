"""Predicted against actual acceptance: how often nodes that were given some chance came true."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from selfdraft.core.tree import ROOT, Draft

EDGES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.26, 0.36, 0.48, 0.6, 0.7, 0.8, 0.88, 0.94, 0.98)
"""Classes of predicted chances end here."""
BEHIND = 2000
"""Tokens behind which a prediction counts: before, the drafter is still learning what its sources are worth."""


@dataclass(slots=True)
class Bin:
    """Nodes whose whole path was given about the same chance."""

    nodes: int = 0
    predicted: float = 0.0
    """Their chances, summed up: how many of them should be accepted."""
    accepted: int = 0


@dataclass(slots=True)
class Reliability:
    """Books the nodes of all drafts behind the first `behind` tokens."""

    behind: int = BEHIND
    tokens: int = 0
    """Tokens that were emitted so far."""
    bins: list[Bin] = field(default_factory=lambda: [Bin() for _ in range(len(EDGES) + 1)])

    def book(self, draft: Draft, path: SequenceOf[int], emitted: int) -> None:
        """A step that ran `draft`, accepted the nodes of `path` and emitted so many tokens."""
        counts = self.tokens >= self.behind and len(draft.probabilities) >= draft.num_candidates
        self.tokens += emitted
        if not counts:
            return
        accepted, reached = {*path}, [1.0] * (draft.num_candidates + 1)  # the last one is ROOT
        for node, parent in enumerate(draft.parents[: draft.num_candidates]):
            reached[node] = chance = reached[parent if parent != ROOT else -1] * draft.probabilities[node]
            found = self.bins[bisect(EDGES, chance)]
            found.nodes += 1
            found.predicted += chance
            found.accepted += node in accepted

    @property
    def nodes(self) -> int:
        return sum(found.nodes for found in self.bins)

    @property
    def predicted(self) -> float:
        """Tokens that should have been accepted by what the drafter said."""
        return sum(found.predicted for found in self.bins)

    @property
    def accepted(self) -> int:
        return sum(found.accepted for found in self.bins)

    @property
    def ratio(self) -> float | None:
        """Predicted by actual; None as long as nothing was accepted."""
        return self.predicted / self.accepted if self.accepted else None
