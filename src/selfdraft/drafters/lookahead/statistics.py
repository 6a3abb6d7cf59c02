"""What the n-gram pool was good for: hits, accepted tokens by source, ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from selfdraft.drafters.lookahead.guesses import Node
from selfdraft.drafters.lookahead.pool import ANSWERS, PROMPT, TEXT, WINDOW


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """What the n-gram pool was good for, in one request or in all so far."""

    size: int = 0
    """Tuples in the pool now; of all requests those that are still running."""
    steps: int = 0
    hits: int = 0
    """Steps in which some guess was there for the last token."""
    accepted: dict[str, int] = field(default_factory=dict)
    """Accepted tokens by source: prompt, text, window, answers."""
    ranks: int = 0
    """Sum of the ranks of the accepted guesses; 0 is the first."""
    accepting_steps: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.steps if self.steps else 0.0

    @property
    def mean_rank(self) -> float:
        """Mean rank of the guess whose tokens were accepted, over the steps that accepted any."""
        return self.ranks / self.accepting_steps if self.accepting_steps else 0.0

    def as_dict(self) -> dict[str, object]:
        rates = {"hit_rate": round(self.hit_rate, 4), "mean_rank": round(self.mean_rank, 4)}
        return {**asdict(self), **rates}


@dataclass(slots=True)
class Counts:
    """The running counts behind `PoolStatistics`."""

    steps: int = 0
    hits: int = 0
    accepted: dict[str, int] = field(default_factory=lambda: dict.fromkeys((PROMPT, TEXT, WINDOW, ANSWERS), 0))
    ranks: int = 0
    accepting_steps: int = 0

    def book(self, nodes: list[Node], path: list[int]) -> None:
        self.steps += 1
        self.hits += bool(nodes)
        for node in path:
            self.accepted[nodes[node].guess.source] += 1
        if path:
            self.accepting_steps += 1
            self.ranks += nodes[path[-1]].guess.rank

    def freeze(self, size: int) -> PoolStatistics:
        return PoolStatistics(size, self.steps, self.hits, dict(self.accepted), self.ranks, self.accepting_steps)
