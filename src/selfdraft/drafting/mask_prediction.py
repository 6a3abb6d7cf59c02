"""From what mask rows say to a token tree: likeliest tokens for each place, expanded best first.

The rows of one group do not know one another's tokens; a link tells each place the token before it while the tree is
made. The chance of a node is the product along its path, so best-first expansion gives the best tree of every size.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from selfdraft.core.noise import gumbel, gumbel_at, gumbel_rows
from selfdraft.core.one_row import Top, alive, apart, contenders, widened
from selfdraft.core.sampler import process, score_rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.core.verify import Result
from selfdraft.drafting.cost_model import RowCost
from selfdraft.drafting.estimators import Mean
from selfdraft.drafting.successors import scores_of, topk
from selfdraft.types import Budget, SamplingParams, within

CANDIDATES = 128
"""Tokens that are looked at for one place."""
Groups: TypeAlias = dict[int, tuple[int, int]]
"""Accept point (ROOT or a candidate) -> (first probe of the group that hangs there, number of masks)."""
Link = Callable[[int, Tensor], Tensor | None]
"""(token before, ids [k]) -> what it adds to their logits [k], or None."""
Links = Callable[[Tensor, Tensor], Tensor | None]
"""The same for many: (tokens before [n, b], ids [n, k]) -> [n, b, k], on their device."""


@dataclass(frozen=True, slots=True)
class MaskTokens:
    """Learned placeholder tokens of one method: input only, never chosen."""

    ids: range
    """vocab <= id < vocab + masks, the one that stands nearest to the text first."""
    shift: Link = lambda token, ids: None
    """(token, ids [k]) -> what to add to the logits of `ids` when `token` stands before them; None: nothing."""
    shifts: Links = lambda before, ids: None
    """The same for many rows and tokens at once."""
    acceptance: tuple[float, ...] = ()
    """Share of tokens that each place guessed right after training; (): unknown."""


@dataclass(frozen=True, slots=True)
class Guess:
    """What may stand at one place: tokens, best first, and the chance that the drafter gives to each."""

    tokens: tuple[int, ...]
    chances: tuple[float, ...]


class Ahead(Protocol):
    """What is known of one place ahead."""

    def after(self, token: int, link: Link, most: int) -> Guess:
        """The best `most` tokens when `token` stands before this place."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a row says of one place: its likeliest `ids` [k] with their logits, temperature and noise of the request."""

    ids: Tensor
    logits: Tensor
    noise: Tensor
    temperature: float

    def after(self, token: int, link: Link, most: int) -> Guess:
        """The best `most` tokens when `token` stands before this place."""
        shift = link(token, self.ids)
        if apart(self.logits):  # both in one wait
            logits = self.logits if shift is None else self.logits + shift.to(self.logits.dtype) / self.temperature
            best = (logits + self.noise).softmax(-1).topk(min(most, len(self.ids)))
            ids, chances = torch.stack([self.ids[best.indices].double(), best.values.double()]).tolist()
            return Guess(tuple(map(int, ids)), tuple(chances))
        sums = self.logits.numpy() + self.noise.numpy()  # for so few numbers numpy is several times as quick
        if shift is not None:
            sums = sums + widened(shift) / self.temperature
        order = np.argsort(-sums, kind="stable")[:most]
        weights = np.exp(sums - sums[order[:1]])
        return Guess(tuple(self.ids.numpy()[order].tolist()), tuple((weights[order] / weights.sum()).tolist()))


def places(logits: Tensor, sequence: Sequence) -> list[Place]:
    """What rows of `logits` [n, vocab] say; row i speaks of the place len(tokens) + i.

    A sampled request is guessed with the noise that the target will use there: that is what makes them agree.
    """
    # no processor is asked about a place behind the end
    sampling, logits = sequence.sampling, logits[: sequence.remaining]
    if sampling.plain or (sampling.local and apart(logits)):
        end = len(sequence.tokens)
        said = scored(logits, sampling, sequence.seed, range(end, end + len(logits)))
        return [Place(*row, said.temperature) for row in zip(said.ids, said.logits, said.noise, strict=True)]
    path, found = [] if sampling.local else list(sequence.tokens), []
    for position, row in enumerate(logits, len(sequence.tokens)):
        scores = process(row, sampling, path, sequence.prompt_length, sequence.stop_ids)
        left = _within_reach(scores, sampling, sequence.seed, position)
        noise = torch.zeros(len(left), dtype=scores.dtype, device=scores.device)
        if not sampling.greedy:
            noise = gumbel(sequence.seed, position, left).to(scores.dtype)
        order = (scores[left] + noise).topk(min(CANDIDATES, len(left))).indices
        found.append(Place(left[order], scores[left[order]], noise[order], sampling.temperature or 1.0))
        if not sampling.local:
            path.append(int(left[order[0]]) if len(order) else path[-1])
    return found


def known_places(top: Top, rows: SequenceOf[int], sequence: Sequence) -> list[Place]:
    """`places` of rows whose likeliest tokens are known (`top`): of a sampled request these alone are given noise."""
    sampling, end = sequence.sampling, len(sequence.tokens)
    numbers = torch.tensor(rows[: sequence.remaining])
    scores, ids = scores_of((top[0][numbers], top[1][numbers]), sampling)
    noise = np.zeros_like(scores) if sampling.greedy else gumbel_rows(sequence.seed, range(end, end + len(ids)), ids)
    found = zip(torch.from_numpy(ids), torch.from_numpy(scores), torch.from_numpy(noise), strict=True)
    return [Place(*row, sampling.temperature or 1.0) for row in found]


def _within_reach(scores: Tensor, sampling: SamplingParams, seed: int, position: int) -> Tensor:
    """Ids that are not banned; on a CPU those alone that may be among the likeliest, with the noise of the place."""
    if apart(scores):
        return torch.isfinite(scores).nonzero().squeeze(1)
    row = scores.numpy()
    return torch.from_numpy(alive(row, CANDIDATES) if sampling.greedy else contenders(row, seed, position, CANDIDATES))


@dataclass(frozen=True, slots=True)
class Scored:
    """The likeliest `ids` [n, k] of rows with their logits and noise, best first; see `Place`."""

    ids: Tensor
    logits: Tensor
    noise: Tensor
    temperature: float


def scored(logits: Tensor, sampling: SamplingParams, seed: int, positions: SequenceOf[int]) -> Scored:
    """Rows [n, vocab] in one call, without a wait, for a sampling that looks at the row alone.

    `positions`: where the tokens will stand that they speak of. A token that is banned keeps its place, and no chance.
    """
    if sampling.plain:
        values, ids = topk(logits, CANDIDATES)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return Scored(ids, values, torch.zeros_like(values), 1.0)
    scores = score_rows(logits, sampling)
    noise = torch.zeros_like(scores)
    if not sampling.greedy:
        every = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        places = [(seed, position) for position, _ in zip(positions, scores, strict=False)]
        noise = gumbel_at(places, every).to(scores.dtype)
    ids = (scores + noise).topk(min(CANDIDATES, scores.shape[1])).indices
    return Scored(ids, scores.gather(1, ids), noise.gather(1, ids), sampling.temperature or 1.0)


def expand(
    first: Guess,
    after: Callable[[int, int, int, int], Guess],
    chance: Callable[[int, int, float], float],
    budget: Budget,
    prices: SequenceOf[float],
    source: str,
) -> Draft:
    """The tree whose i-th node is at least as likely as `prices[i]`, within the budget, the likeliest first.

    Prices never fall, and there is one for each node of the budget. `first` are the guesses for depth 1,
    `after(depth, token, node, parent)` those behind `node`, whose token has that depth. `chance(depth, rank, raw)`
    calibrates what the drafter says; scores of the draft are the raw ones.
    """
    tokens: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    guesses = {ROOT: first}
    reached = {ROOT: 1.0}
    heap: list[tuple[float, int, int, int]] = []  # (-chance of the path, parent, depth, rank)

    def push(parent: int, depth: int, rank: int) -> None:
        guess = guesses[parent]
        if rank < len(guess.tokens):
            own = reached[parent] * chance(depth, rank, guess.chances[rank])
            if own >= prices[len(tokens)] and own > 0.0:
                heapq.heappush(heap, (-own, parent, depth, rank))

    push(ROOT, 1, 0)
    while heap:
        likely, parent, depth, rank = heapq.heappop(heap)
        node, guess = len(tokens), guesses[parent]
        if -likely < prices[node]:  # it was worth an earlier node; what is left is no likelier
            break
        tokens.append(guess.tokens[rank])
        scores.append(guess.chances[rank])
        parents.append(parent)
        reached[node] = -likely
        if len(tokens) == budget.max_nodes:
            break
        push(parent, depth, rank + 1)
        if depth < budget.max_depth:
            guesses[node] = after(depth, guess.tokens[rank], node, parent)
            push(node, depth + 1, 0)
    return Draft(tuple(tokens), tuple(parents), (source,) * len(tokens), len(tokens), tuple(scores))


@dataclass(slots=True)
class Calibration:
    """How often guesses of a depth, a rank and a stated chance came true; it starts by believing the statement."""

    _means: dict[tuple[int, int, int], Mean] = field(default_factory=dict)

    def chance(self, depth: int, rank: int, raw: float) -> float:
        mean = self._means.get(self._kind(depth, rank, raw))
        return mean.value if mean else raw

    def observe(self, result: Result) -> None:
        """Book every node that was tried: the children of the accepted ones and of the root."""
        draft = result.draft
        if len(draft.probabilities) < draft.num_candidates:
            return
        tried, accepted = {ROOT, *result.path}, set(result.path)
        for node, rank in enumerate(ranks(draft)):
            if draft.parents[node] in tried:
                kind = self._kind(draft.depths[node], rank, draft.probabilities[node])
                if kind not in self._means:
                    self._means[kind] = Mean(draft.probabilities[node], 6.0, 0.995)
                self._means[kind].observe(float(node in accepted))

    @staticmethod
    def _kind(depth: int, rank: int, raw: float) -> tuple[int, int, int]:
        return depth, rank, min(int(raw * 6), 5)


@dataclass(slots=True)
class Guesser:
    """How a drafter with mask tokens makes trees: at most `nodes` candidates, `branches` of them for each place.

    A node must be as likely as `row_cost.tokens`; first trees are small ones, for the cost of a row is learned from
    steps of several sizes. Errors: OptionError for values out of range.
    """

    nodes: int
    branches: int
    row_cost: RowCost
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        within("num_speculative_tokens", self.nodes, 1, 256)
        within("branches", self.branches, 1, 16)

    def tree(self, known: int, ahead: SequenceOf[Ahead], link: Link, budget: Budget, source: str) -> Draft:
        """The best tree behind the `known` token over the places `ahead` of it, within the budget."""
        most = min(budget.max_nodes, self.nodes, self.row_cost.most_rows)
        room = Budget(most, min(budget.max_depth, len(ahead)), budget.max_probe_depth)
        if room.max_depth <= 0 or room.max_nodes <= 0:
            return EMPTY

        def after(depth: int, token: int, node: int, parent: int) -> Guess:
            return ahead[depth].after(token, link, self.branches)

        prices = [self.row_cost.tokens] * room.max_nodes
        return expand(after(0, known, ROOT, ROOT), after, self.calibration.chance, room, prices, source)

    def observe(self, results: SequenceOf[Result], seconds: float | None) -> None:
        """Learn from a step that took `seconds` from the end of drafting on; None: its time says nothing."""
        for result in results:
            self.calibration.observe(result)
        if seconds is not None:
            rows = sum(len(result.argmax) for result in results)
            self.row_cost.observe(rows, seconds, sum(len(result.tokens) for result in results))

    def endings(self, draft: Draft) -> list[tuple[int, float]]:
        """ROOT and every candidate with the chance that acceptance ends there, the likeliest first."""
        reached: list[float] = []
        for node, rank in enumerate(ranks(draft)):
            parent = draft.parents[node]
            own = self.calibration.chance(draft.depths[node], rank, draft.probabilities[node])
            reached.append(own * (reached[parent] if parent != ROOT else 1.0))
        return endings(draft, reached)


def endings(tree: Draft, reached: SequenceOf[float]) -> list[tuple[int, float]]:
    """ROOT and every candidate with the chance that acceptance ends there, the likeliest first.

    `reached`: the chance of every candidate's whole path.
    """
    left = {ROOT: 1.0}
    for node, chance in enumerate(reached):
        left[node] = chance
        left[tree.parents[node]] = max(left[tree.parents[node]] - chance, 0.0)
    return sorted(left.items(), key=lambda item: -item[1])


def with_groups(tree: Draft, sizes: SequenceOf[tuple[int, int]], masks: range, source: str) -> tuple[Draft, Groups]:
    """The tree with a group of masks under each accept point of `sizes` (accept point, number of masks)."""
    tokens: list[int] = []
    parents: list[int] = []
    groups: Groups = {}
    for point, size in sizes:
        groups[point] = (len(tree) + len(tokens), size)
        under = ROOT if point == ROOT else -2 - point
        parents += [under, *range(len(tokens), len(tokens) + size - 1)]
        tokens += masks[:size]
    return tree.with_probes(tokens, parents, source), groups


class Tables(Protocol):
    """What rows of the last step said, where all of them were asked about (`mask_tables.py`)."""

    def places(self, sequence: Sequence, rows: SequenceOf[int]) -> list[Ahead] | None:
        """What these rows of a sequence say; None where they were not asked about."""


def read_group(groups: Groups, sequence: Sequence, result: Result, tables: Tables) -> list[Ahead]:
    """What the masks behind the end of acceptance say; without a group there, the later masks of one before it."""
    point = result.nodes[result.path[-1]] if result.path else ROOT
    ahead = 0
    while point not in groups and point != ROOT:
        point, ahead = result.proposed.parents[point], ahead + 1
    first, size = groups.get(point, (0, 0))
    place = {old: new for new, old in enumerate(result.nodes)}
    rows = [1 + place[probe] for probe in range(first + ahead, first + size) if probe in place]
    if not rows or result.logits is None:
        return []
    known = tables.places(sequence, rows)
    if known is not None:
        return known[: sequence.remaining]
    if result.top is not None and sequence.sampling.unbiased:
        return [*known_places(result.top, rows, sequence)]
    return [*places(result.logits[rows], sequence)]


def ranks(draft: Draft) -> list[int]:
    """For every candidate, how many siblings stand before it."""
    counts: dict[int, int] = {}
    found = []
    for parent in draft.parents[: draft.num_candidates]:
        counts[parent] = counts.get(parent, -1) + 1
        found.append(counts[parent])
    return found
