"""The token tree hung under the last known token of a sequence: what a drafter proposes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from selfdraft.types import Budget

ROOT = -1
"""Parent of the first nodes: the last known token of the sequence."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A token tree in topological order: node i says `tokens[i]` and follows node `parents[i]` (< i, or ROOT).

    The first `num_candidates` nodes may be accepted; the rest are probes, rows whose answer only the drafter reads
    (a lookahead window, mask tokens). A candidate never hangs under a probe.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()
    """Which drafter proposed each node; several are joined by '+'."""
    num_candidates: int = 0
    probabilities: tuple[float, ...] = ()
    """Estimated acceptance of each node given its parent; empty when the drafter has none."""
    depths: tuple[int, ...] = field(init=False, compare=False, repr=False)
    """Depth of each node; 1 is directly under the last known token."""

    def __post_init__(self) -> None:
        depths: list[int] = []
        for node, parent in enumerate(self.parents):
            assert ROOT <= parent < node, "parents come before their children"
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        assert len(self.tokens) == len(self.parents) == len(self.sources), "one entry per node"
        object.__setattr__(self, "depths", tuple(depths))

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, tokens: Sequence[int], source: str, scores: Sequence[float] = ()) -> Draft:
        """One path of candidates."""
        size = len(tokens)
        return cls(tuple(tokens), tuple(range(-1, size - 1)), (source,) * size, size, tuple(scores))

    @classmethod
    def branches(cls, paths: Iterable[Sequence[int]], source: str) -> Draft:
        """Several paths as a trie: shared prefixes become one node. The first path's nodes come first."""
        tokens: list[int] = []
        parents: list[int] = []
        known: dict[tuple[int, int], int] = {}
        for path in paths:
            node = ROOT
            for token in path:
                child = known.get((node, token))
                if child is None:
                    child = known[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                node = child
        return cls(tuple(tokens), tuple(parents), (source,) * len(tokens), len(tokens))

    def with_probes(self, tokens: Sequence[int], parents: Sequence[int], source: str) -> Draft:
        """Add probes behind the candidates; `parents` count within the probes, negative ones are ~candidate or ROOT.

        A probe's parent p >= 0 is the p-th probe; ROOT (-1) is the last known token; -2 - c is candidate c.
        """
        shift = len(self.tokens)
        assert shift == self.num_candidates, "probes are added once"
        absolute = [shift + p if p >= 0 else ROOT if p == ROOT else -2 - p for p in parents]
        return Draft(
            self.tokens + tuple(tokens),
            self.parents + tuple(absolute),
            self.sources + (source,) * len(tokens),
            self.num_candidates,
            self.probabilities + (0.0,) * len(tokens) if self.probabilities else (),
        )

    def first(self, count: int) -> Draft:
        """The first `count` candidates alone; parents come before their children, so it is a tree."""
        if count >= len(self):
            return self
        count = min(count, self.num_candidates)
        parts = (self.tokens[:count], self.parents[:count], self.sources[:count])
        return Draft(*parts, count, self.probabilities[:count])

    def children(self) -> dict[tuple[int, int], int]:
        """(parent, token) -> candidate node; of equal siblings the first one stands."""
        found: dict[tuple[int, int], int] = {}
        for node in range(self.num_candidates):
            found.setdefault((self.parents[node], self.tokens[node]), node)
        return found

    def leaves(self) -> list[list[int]]:
        """Every root-to-leaf path of the candidates, as node indices; they cover all candidates."""
        inner = set(self.parents[: self.num_candidates])
        paths = []
        for leaf in range(self.num_candidates):
            if leaf in inner:
                continue
            path = [leaf]
            while self.parents[path[-1]] != ROOT:
                path.append(self.parents[path[-1]])
            paths.append(path[::-1])
        return paths

    def clip(self, budget: Budget, vocab: int, masks: int = 0) -> tuple[Draft, tuple[int, ...]]:
        """The part of the tree that can be run: within the budget, with token ids that exist.

        Candidates need 0 <= token < vocab, probes may also be mask ids up to vocab + masks. A node goes with its
        parent; where only a chain can be run, so do a candidate's later siblings. Returns the smaller draft and the
        old index of each of its nodes.
        """
        place: dict[int, int] = {ROOT: ROOT}
        continued = set[int]()  # parents in a chain
        kept: list[int] = []
        candidates = 0
        for node, (token, parent, depth) in enumerate(zip(self.tokens, self.parents, self.depths, strict=True)):
            probe = node >= self.num_candidates
            ids, deepest = (vocab + masks, budget.max_probe_depth) if probe else (vocab, budget.max_depth)
            full = not probe and candidates >= budget.max_nodes
            if parent not in place or full or depth > deepest or not 0 <= token < ids:
                continue
            if budget.chain and not probe and parent in continued:
                continue
            continued.add(parent)
            place[node] = len(kept)
            kept.append(node)
            candidates += not probe
        if len(kept) == len(self.tokens):
            return self, tuple(kept)
        clipped = Draft(
            tuple(self.tokens[node] for node in kept),
            tuple(place[self.parents[node]] for node in kept),
            tuple(self.sources[node] for node in kept),
            candidates,
            tuple(self.probabilities[node] for node in kept) if self.probabilities else (),
        )
        return clipped, tuple(kept)


EMPTY = Draft()


def chances_of(draft: Draft) -> list[float]:
    """The chance of every node's whole path, out of the chances of each node behind its parent."""
    reached: list[float] = []
    for parent, own in zip(draft.parents[: draft.num_candidates], draft.probabilities, strict=False):
        reached.append(own * (reached[parent] if parent != ROOT else 1.0))
    return reached
