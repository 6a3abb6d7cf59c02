"""Mixes several sources into one calibrated probability for each token, and grows one tree from them.

Two stages of counting, both while decoding. First each source alone: how often candidates of one kind of evidence
(match length, rank) and depth came true; that puts the kind on a scale of LEVELS. Then all together: how often a token
came true for which the sources stand at these levels, at that depth. Every source is scored on every verified token,
even if its candidate was not in the tree, so no exploration is needed ("Not-a-Bandit", HedgeSpec, ICLR 2026).
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence as SequenceOf
from heapq import heappop, heappush, heapreplace
from operator import itemgetter
from typing import NamedTuple

from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.drafting.context_tree import Guesses
from selfdraft.drafting.estimators import Mean
from selfdraft.drafting.sources import Source, Standing
from selfdraft.types import Budget

STEPS = (0.015, 0.06, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95, 0.985)
LEVELS = len(STEPS) + 1
"""A source stands at level 1 to LEVELS; 0 is silence."""
MIDDLES = (0.0, *((low + high) / 2 for low, high in zip((0.0, *STEPS), (*STEPS, 1.0), strict=True)))
"""The chance that a level stands for."""
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Classes of depths begin here, behind class 0, the first depth."""
CLASSES = len(DEPTHS) + 1
_CLASS = [bisect(DEPTHS, depth) for depth in range(DEPTHS[-1] + 1)]
TOGETHER = [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
"""The coarser class of a depth for all sources together: each alone knows the depth already."""
COARSE = TOGETHER[-1] + 1
_CHANCE = itemgetter(1)
PRIOR, FADE = 4.0, 0.998
WEIGHT = 20.0
"""Pseudo-count of the prior: nodes that count as predicted rightly before any was seen."""
TRUST = 0.7
"""The prior mixes the best source (0.7) with the mean of the others: the maximum of several noisy estimates is biased
upwards."""
FLOOR = 0.002
"""A node less likely than this is not worth its row, however cheap rows are."""


KEPT = 50.0
"""What was learned earlier counts as at most 50 measurements, so that text of another kind is soon followed."""
Learned = tuple[float, float, float, float]
"""A cell and its mean: number of the cell, guess, total and weight of what was measured."""


def _numbers(mean: Mean) -> tuple[float, float, float]:
    return mean.guess, mean.total, mean.weight


def _mean(guess: float, total: float, weight: float) -> Mean:
    share = min(1.0, KEPT / weight) if weight else 1.0
    return Mean(guess, PRIOR, FADE, share * total, share * weight)


class Counts:
    """How often one source's guesses of each kind and depth came true."""

    def __init__(self, beliefs: tuple[float, ...], unit: int, learned: SequenceOf[Learned] = ()) -> None:
        self.unit = unit
        """What one level counts in the key of a joint cell."""
        first = [unit * (1 + bisect(STEPS, belief)) for belief in beliefs]
        self.levels = [[*first] for _ in range(CLASSES)]
        """By depth class, then by kind: the level, times the unit."""
        self._beliefs = beliefs
        self._means: dict[int, Mean] = {}
        for cell, *numbers in sorted(learned):
            kind, depth = divmod(int(cell), CLASSES)
            if kind < len(beliefs):
                mean = self._means[int(cell)] = _mean(*numbers)
                self._move(kind, depth, unit * (1 + bisect(STEPS, mean.value)))

    def learned(self) -> list[Learned]:
        """What was counted, for a task profile."""
        return [(cell, *_numbers(mean)) for cell, mean in self._means.items()]

    def observe(self, guesses: Guesses, depth: int, token: int) -> None:
        """Book the guesses at a place where the text went on with `token`."""
        means, levels = self._means, self.levels[depth]
        for guessed, kind in guesses.items():
            mean = means.get(kind * CLASSES + depth) or self._begin(kind, depth)
            level = self.unit * (1 + bisect(STEPS, mean.after(1.0 if guessed == token else 0.0)))
            if level != levels[kind]:
                self._move(kind, depth, level)

    def _begin(self, kind: int, depth: int) -> Mean:
        """A depth that was never seen stands where the next shallower one does."""
        cell = kind * CLASSES + depth
        above = next((self._means[c] for c in range(cell, cell - depth - 1, -1) if c in self._means), None)
        mean = self._means[cell] = Mean(above.value if above else self._beliefs[kind], PRIOR, FADE)
        return mean

    def _move(self, kind: int, depth: int, level: int) -> None:
        self.levels[depth][kind] = level
        for deeper in range(depth + 1, CLASSES):
            if kind * CLASSES + deeper in self._means:
                break
            self.levels[deeper][kind] = level


class Cell(NamedTuple):
    """Acceptance of one combination of source levels, with a prior shared by all that have the same two best levels."""

    mean: Mean
    family: Mean


class Paths:
    """How many nodes of a depth were accepted, for each one that the product of chances foretold.

    Some stretches of text are easier than others, and a product of means does not know which one it stands in: the
    paths that are deep are those of the easy stretches, and would be foretold too low.
    """

    def __init__(self, learned: tuple[SequenceOf[float], SequenceOf[float]] | None = None) -> None:
        foretold, accepted = learned or ([WEIGHT] * CLASSES, [WEIGHT] * CLASSES)
        self._foretold, self._accepted = [*foretold], [*accepted]
        self.ratios = [right / expected for right, expected in zip(accepted, foretold, strict=True)]
        """By depth class."""

    def learned(self) -> tuple[list[float], list[float]]:
        """What was foretold and what was accepted, by depth class, for a task profile."""
        return self._foretold, self._accepted

    def observe(self, foretold: SequenceOf[float], accepted: int) -> None:
        """Book a tree: its nodes' products, summed up by depth class, and how deep it was accepted."""
        came = [0] * CLASSES
        for depth in range(1, accepted + 1):
            came[_CLASS[depth] if depth < len(_CLASS) else CLASSES - 1] += 1
        for depth, (expected, right) in enumerate(zip(foretold, came, strict=True)):
            if expected:
                self._foretold[depth] = FADE * self._foretold[depth] + (1 - FADE) * WEIGHT + expected
                self._accepted[depth] = FADE * self._accepted[depth] + (1 - FADE) * WEIGHT + right
                self.ratios[depth] = self._accepted[depth] / self._foretold[depth]


class TaskProfile(NamedTuple):
    """What a credit has learned, in plain numbers: good for later text of the same kind."""

    alone: dict[str, list[Learned]]
    """By source; the order is that of the keys in `together`."""
    families: list[tuple[tuple[int, ...], tuple[float, float, float]]]
    together: list[Learned]
    paths: tuple[list[float], list[float]]


class Credit:
    """What the evidence of all sources together is worth. Outlives the requests; knows no token.

    `before`: what was learned earlier on text of the same kind.
    """

    def __init__(self, before: TaskProfile | None = None) -> None:
        self.counts: dict[str, Counts] = {}
        self._before: dict[str, list[Learned]] = {} if before is None else dict(before.alone)
        self._order = {name: number for number, name in enumerate(self._before)}
        """The place of each source in the key of a joint cell."""
        self.paths = Paths(before.paths if before else None)
        self._cells: dict[int, Cell] = {}
        self._families: dict[tuple[int, ...], Mean] = {}
        self._chances: dict[int, float] = {}
        self._names: dict[int, str] = {}
        if before is not None:
            self._families = {family: _mean(*numbers) for family, numbers in before.families}
            for key, *numbers in before.together:
                self._cells[int(key)] = self._cell(int(key))._replace(mean=_mean(*numbers))

    def learned(self) -> TaskProfile:
        """What was learned so far."""
        alone = {
            name: self.counts[name].learned() if name in self.counts else self._before[name] for name in self._order
        }
        families = [(family, _numbers(mean)) for family, mean in self._families.items()]
        together: list[Learned] = [(key, *_numbers(cell.mean)) for key, cell in self._cells.items()]
        return TaskProfile(alone, families, together, self.paths.learned())

    def counts_of(self, source: Source) -> Counts:
        """The counts of a source by its name; the same for all requests."""
        found = self.counts.get(source.name)
        if found is None:
            unit = COARSE * (LEVELS + 1) ** self._order.setdefault(source.name, len(self._order))
            found = self.counts[source.name] = Counts(source.beliefs, unit, self._before.get(source.name, ()))
        return found

    def chance(self, key: int) -> float:
        """How likely a token is whose sources stand at the levels of `key`."""
        known = self._chances.get(key)
        if known is None:
            mean, family = self._cell(key)
            mean.guess = family.value
            known = self._chances[key] = mean.value
        return known

    def observe(self, keys: dict[int, int], token: int) -> None:
        """Book the guesses of a place where the text went on with `token`."""
        cells, chances = self._cells, self._chances
        for guessed, key in keys.items():
            mean, family = cells.get(key) or self._cell(key)
            right = 1.0 if guessed == token else 0.0
            mean.guess = family.after(right)
            chances[key] = mean.after(right)

    def _cell(self, key: int) -> Cell:
        cell = self._cells.get(key)
        if cell is None:
            best, *rest = sorted(filter(None, self._levels(key)), reverse=True)
            family = key % COARSE, best, *rest[:1]
            if family not in self._families:
                lower = [MIDDLES[level] for level in rest] or [MIDDLES[best]]
                start = TRUST * MIDDLES[best] + (1 - TRUST) * sum(lower) / len(lower)
                self._families[family] = Mean(start, PRIOR, FADE)
            cell = self._cells[key] = Cell(Mean(0.0, PRIOR, FADE), self._families[family])
        return cell

    def ranked(self, keys: dict[int, int]) -> list[tuple[int, float]]:
        """Tokens with their chance, the likeliest first; of equals the one that was named first."""
        known, chance = self._chances, self.chance
        pairs = [(token, known[key] if key in known else chance(key)) for token, key in keys.items()]
        if len(pairs) > 1:
            pairs.sort(key=_CHANCE, reverse=True)
        return pairs

    def names(self, key: int) -> str:
        """The sources that speak for a token, joined by '+'."""
        known = self._names.get(key)
        if known is None:
            pairs = zip(self._order, self._levels(key), strict=False)
            known = self._names[key] = "+".join(name for name, level in pairs if level)
        return known

    @staticmethod
    def _levels(key: int) -> list[int]:
        key //= COARSE
        found = []
        while key:
            key, level = divmod(key, LEVELS + 1)
            found.append(level)
        return found


Branch = tuple[float, int, int, int, float, float, list[tuple[int, float]]]
"""The best that was not taken yet of what may follow a node: -chance of the path, node, rank, depth of the follower,
chance of the node's own path, product of the chances along it, tokens and chances."""


class Place(NamedTuple):
    """A place of the tree, or of the text, whose guesses were asked for."""

    states: list[Standing]
    depth: int
    """Its class."""
    guesses: list[tuple[Counts, Guesses]]
    """Those of each source that has any."""
    keys: dict[int, int]
    """Token -> key of its joint cell."""


class Merger:
    """The sources of one request, and its tree."""

    def __init__(self, sources: SequenceOf[Source], credit: Credit) -> None:
        self.sources, self.credit = sources, credit
        self._asks = [(source.step, source.guess, credit.counts_of(source)) for source in sources]
        self._places: dict[int, Place] = {}
        """The guesses at ROOT and at nodes of the draft."""
        self._draft = EMPTY
        self._trail: tuple[list[int], Place | None] = [], None
        self._foretold: list[float] = []
        """By depth class, the sum of the products of chances of the draft's nodes."""

    def tree(self, budget: Budget, prices: SequenceOf[float], path: SequenceOf[int] = ()) -> Draft:
        """The tree whose i-th node is at least as likely as `prices[i]`, within the budget, the likeliest first.

        Prices never fall, one for each node of the budget. Scores are chances. A chain has likeliest children alone.
        `path`: tokens that are thought to come first; the tree hangs under the last of them.
        """
        self._places, self._draft = {}, EMPTY
        most = min(budget.max_nodes, len(prices)) if budget.max_depth > 0 else 0
        if most <= 0:
            return EMPTY
        ranked, names = self.credit.ranked, self.credit.names
        tokens, parents, scores, sources = list[int](), list[int](), list[float](), list[str]()
        places, heap = dict[int, Place](), list[Branch]()
        ratios, foretold = self.credit.paths.ratios, [0.0] * CLASSES
        place, node, reached, product, depth = self._behind(path), ROOT, 1.0, 1.0, 0
        while True:
            floor = max(prices[len(tokens)], FLOOR)
            if depth < budget.max_depth:
                places[node] = place
                pairs = ranked(place.keys)
                depth += 1
                if pairs:
                    ratio = ratios[_CLASS[depth] if depth < len(_CLASS) else CLASSES - 1]
                    if (likely := min(reached, product * pairs[0][1] * ratio)) >= floor:
                        heappush(heap, (-likely, node, 0, depth, reached, product, pairs))
            if not heap or -heap[0][0] < floor:  # it was worth an earlier node; what is left is no likelier
                break
            best, parent, rank, depth, above, before, pairs = heap[0]
            token, chance = pairs[rank]
            node, reached, product = len(tokens), -best, before * chance
            level = _CLASS[depth] if depth < len(_CLASS) else CLASSES - 1
            foretold[level] += product
            tokens.append(token)
            parents.append(parent)
            scores.append(reached / above)
            sources.append(names(places[parent].keys[token]))
            if len(tokens) == most:
                break
            rank = len(pairs) if budget.chain else rank + 1
            if rank < len(pairs) and (likely := min(above, before * pairs[rank][1] * ratios[level])) >= floor:
                heapreplace(heap, (-likely, parent, rank, depth, above, before, pairs))
            else:
                heappop(heap)
            if depth < budget.max_depth:
                place = self._after(places[parent], token, len(path) + depth)
        draft = Draft(tuple(tokens), tuple(parents), tuple(sources), len(tokens), tuple(scores))
        if not path:  # else they are no places of the text
            self._places, self._draft, self._foretold = places, draft, foretold
        return draft

    def score(self, tokens: SequenceOf[int]) -> None:
        """The text went on with `tokens`: book what every source guessed at each of these places, run or not.

        To be called before the sources read the tokens.
        """
        place = self._places.get(ROOT) or self._here()
        self._trail = [], None
        node: int | None = ROOT
        accepted = 0
        children = self._draft.children() if len(tokens) > 1 else {}
        for depth, token in enumerate(tokens, 1):
            self.credit.observe(place.keys, token)
            for counts, guesses in place.guesses:
                counts.observe(guesses, place.depth, token)
            if depth < len(tokens):
                node = children.get((node, token)) if node is not None else None
                accepted += node is not None
                known = self._places.get(node) if node is not None else None
                place = known or self._after(place, token, depth)
        if len(self._draft):
            self.credit.paths.observe(self._foretold, accepted)
        self._places, self._draft = {}, EMPTY

    def _behind(self, path: SequenceOf[int]) -> Place:
        """The place behind tokens that are thought to come. A longer path goes on where the last one ended."""
        known, place = self._trail
        if not path or place is None or list(path[: len(known)]) != known:
            known, place = [], self._here()
        for depth in range(len(known), len(path)):
            place = self._after(place, path[depth], depth + 1)
        self._trail = [*path], place
        return place

    def _here(self) -> Place:
        return self._place([source.state for source in self.sources], 0)

    def _after(self, place: Place, token: int, depth: int) -> Place:
        asks, old = self._asks, place.states
        states = [ask[0](state, token) if state else None for ask, state in zip(asks, old, strict=True)]
        return self._place(states, _CLASS[depth] if depth < len(_CLASS) else CLASSES - 1)

    def _place(self, states: list[Standing], depth: int) -> Place:
        """Ask every source; the key of a token sums up the levels of all that named it."""
        keys: dict[int, int] = {}
        found: list[tuple[Counts, Guesses]] = []
        base = TOGETHER[depth]
        for (_, guess, counts), state in zip(self._asks, states, strict=True):
            if state and (guesses := guess(state)):
                found.append((counts, guesses))
                levels = counts.levels[depth]
                for token, kind in guesses.items():
                    keys[token] = keys.get(token, base) + levels[kind]
        return Place(states, depth, found, keys)
