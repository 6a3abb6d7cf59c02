"""Why drafts were rejected: every token of an answer is accepted, rejected for one of five reasons, or was not drafted.

`Explained` is a drafter around another one. It hands on that one's drafts as they are, and looks at the results behind
its back, so texts, drafts and what the drafter learns stay the same.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from weakref import WeakKeyDictionary

from torch import Tensor

from selfdraft.core.sampler import process
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import ROOT, Draft
from selfdraft.core.verify import Result
from selfdraft.engine.engine import Engine
from selfdraft.protocols import Drafter
from selfdraft.types import Budget, JsonObject, within

NEAR = 0.5
"""Most nats of log-probability between the chosen and the drafted token of a near tie: 1.65 times as likely."""
COPYING = frozenset({"copy", "align", "lookup", "suffix", "prediction"})
"""Words in the names of sources that go on with an earlier passage."""
MASKED = frozenset({"masks", "space", "s3d"})
"""Sources that guess several tokens at once from mask tokens."""
KINDS = ("near tie", "copy broken", "mask too deep", "unseen word", "other guess")
"""Why a draft was rejected; the first that applies counts."""
FIRST, SILENT, BEHIND = "first token", "no draft", "behind the draft"
UNDRAFTED = (FIRST, SILENT, BEHIND)
"""Why a token had no candidate: it ends the prefill, its step drafted nothing, or the whole path was accepted."""
BEFORE = 12
"""Tokens of the text before a place that an example shows."""
EXAMPLES = 8

Decode = Callable[[SequenceOf[int]], str]
"""Text of tokens."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A place where something was drafted, and the target chose a token that was not among it.

    `drafted` is the candidate of the place that was thought likeliest, `others` are the rest of them.
    """

    kind: str
    sources: str
    """Who proposed `drafted`; several are joined by '+'."""
    chance: float | None
    """Stated chance that it follows its parent; None when the drafter states none."""
    depth: int
    """Of the place in the draft; 1 is directly behind the last known token."""
    drafted: int
    others: tuple[int, ...]
    chosen: int
    chosen_rank: int | None
    """Of `chosen` among the tokens that the drafter proposed here; None when absent, a number when limits cut it."""
    target_rank: int
    """Of `drafted` in the target's own scores; 1 is the best."""
    margin: float
    """Log-probability of `chosen` less that of `drafted`; below 0 where noise chose the less likely of the two."""
    before: tuple[int, ...]
    """The last tokens before the place."""

    def as_dict(self, decode: Decode) -> JsonObject:
        """The fields as JSON has them, tokens with their texts."""
        return {
            "kind": self.kind,
            "sources": self.sources,
            "chance": _rounded(self.chance),
            "depth": self.depth,
            "drafted": {"id": self.drafted, "text": decode([self.drafted])},
            "others": [{"id": token, "text": decode([token])} for token in self.others],
            "chosen": {"id": self.chosen, "text": decode([self.chosen])},
            "chosen_rank_in_draft": self.chosen_rank,
            "drafted_rank_in_target": self.target_rank,
            "margin": _rounded(self.margin),
            "before": decode(self.before),
        }


@dataclass(slots=True)
class Tally:
    """A number of tokens, and the chances that were stated of them."""

    count: int = 0
    stated: int = 0
    chances: float = 0.0

    def book(self, chance: float | None) -> None:
        """Count one token with its stated chance, if there is one."""
        self.count += 1
        if chance is not None:
            self.stated += 1
            self.chances += chance

    @property
    def mean(self) -> float | None:
        """Mean stated chance; None when none was stated."""
        return self.chances / self.stated if self.stated else None

    def as_dict(self, of: int) -> JsonObject:
        """The count, its share of `of`, and the mean stated chance."""
        share = round(self.count / of, 4) if of else None
        return {"count": self.count, "share": share, "mean_chance": _rounded(self.mean)}


@dataclass(slots=True)
class Summary:
    """What became of all output tokens: accepted + rejected + undrafted = tokens."""

    tokens: int = 0
    accepted: Tally = field(default_factory=Tally)
    accepted_by_rank: Counter[int] = field(default_factory=Counter)
    """Accepted tokens by their rank among the candidates of their place, 1 being the one thought likeliest."""
    undrafted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(UNDRAFTED, 0))
    kinds: dict[str, Tally] = field(default_factory=lambda: {kind: Tally() for kind in KINDS})
    sources: dict[str, list[int]] = field(default_factory=dict)
    """Sources (joined by '+') -> [accepted tokens, rejections] that they proposed together."""
    examples: list[Rejection] = field(default_factory=list)

    @property
    def rejected(self) -> int:
        """Number of rejections."""
        return sum(tally.count for tally in self.kinds.values())

    def as_dict(self, decode: Decode) -> JsonObject:
        """The summary as JSON has it; `decode` gives the examples their texts."""
        ordered = sorted(self.sources.items(), key=lambda one: -sum(one[1]))
        return {
            "tokens": self.tokens,
            "accepted": self.accepted.as_dict(self.tokens),
            "accepted_by_rank": dict(sorted(self.accepted_by_rank.items())),
            "rejected": self.rejected,
            "undrafted": dict(self.undrafted),
            "kinds": {kind: tally.as_dict(self.rejected) for kind, tally in self.kinds.items()},
            "sources": {name: {"accepted": hit, "rejected": missed} for name, (hit, missed) in ordered},
            "examples": [example.as_dict(decode) for example in self.examples],
        }


class Explained:
    """A drafter that drafts as another one, and notes what became of every token.

    Of each kind it keeps at most `examples` rejections, drawn at random with a fixed seed.
    Errors: OptionError for `examples` out of range.
    """

    def __init__(self, drafter: Drafter, examples: int = EXAMPLES) -> None:
        within("examples", examples, 0, 10_000)
        self.drafter, self._most = drafter, examples
        self._counts = Summary()
        self._kept: dict[str, list[Rejection]] = {kind: [] for kind in KINDS}
        self._random = random.Random(0)
        self._booked: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()
        """Output tokens of each sequence that are noted."""

    def __getattr__(self, name: str) -> object:
        return getattr(self.drafter, name)  # what the other one declares, such as `needs`

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return self.drafter.draft(sequences, budgets)

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        self.drafter.observe(sequences, results)  # first: drafters time a step until here
        for sequence, result in zip(sequences, results, strict=True):
            if result.tokens:
                self._book(sequence, result)

    def summary(self) -> Summary:
        """What was seen so far, with at most `examples` examples in all: one of each kind, then a second, and so on."""
        turns = [one for turn in zip_longest(*self._kept.values()) for one in turn if one is not None]
        found = deepcopy(self._counts)
        found.examples = turns[: self._most]
        return found

    def _book(self, sequence: Sequence, result: Result) -> None:
        """Note the tokens of a step; behind a stop the walk may have chosen more than was written."""
        written = sequence.num_output_tokens
        new = min(written - self._booked.get(sequence, 0), len(result.tokens))
        self._booked[sequence] = written
        first = len(sequence.tokens) - new
        for step, node in enumerate((ROOT, *result.path)[:new]):
            candidates = ranked(result.draft, node)
            self._counts.tokens += 1
            if not candidates:
                self._counts.undrafted[self._silence(sequence, result, first + step)] += 1
            elif step < len(result.path):
                self._accept(result, step, candidates)
            else:
                self._reject(explained(sequence, result, node, first + step, candidates))

    @staticmethod
    def _silence(sequence: Sequence, result: Result, place: int) -> str:
        if result.draft.num_candidates:
            return BEHIND
        return FIRST if place == sequence.prompt_length else SILENT

    def _accept(self, result: Result, step: int, candidates: list[int]) -> None:
        node = result.path[step]
        self._counts.accepted.book(chance_of(result.draft, node))
        self._counts.accepted_by_rank[1 + candidates.index(node)] += 1
        self._counts.sources.setdefault(result.draft.sources[node], [0, 0])[0] += 1

    def _reject(self, found: Rejection) -> None:
        tally, kept = self._counts.kinds[found.kind], self._kept[found.kind]
        tally.book(found.chance)
        self._counts.sources.setdefault(found.sources, [0, 0])[1] += 1
        if len(kept) < self._most:
            kept.append(found)
        elif (place := self._random.randrange(tally.count)) < self._most:  # every one is as likely to be kept
            kept[place] = found


def ranked(draft: Draft, parent: int) -> list[int]:
    """The candidates under a node (or ROOT), the one with the highest stated chance first; else in their order."""
    found = [node for node in range(draft.num_candidates) if draft.parents[node] == parent]
    return sorted(found, key=lambda node: -(chance_of(draft, node) or 0.0))


def chance_of(draft: Draft, node: int) -> float | None:
    """Stated chance that a node follows its parent; None when the drafter states none."""
    return draft.probabilities[node] if draft.probabilities else None


def explained(sequence: Sequence, result: Result, node: int, place: int, candidates: SequenceOf[int]) -> Rejection:
    """The rejection at the node where the walk ended; the target's token stands at `place` of the sequence."""
    assert result.logits is not None
    draft, best, chosen = result.draft, candidates[0], sequence.tokens[place]
    drafted, sources, depth = draft.tokens[best], draft.sources[best], draft.depths[best]
    rank, margin = standing(scores_of(sequence, result.logits[node + 1], place), drafted, chosen)
    return Rejection(
        kind_of(sources, depth, margin, seen=chosen in sequence.tokens[:place]),
        sources,
        chance_of(draft, best),
        depth,
        drafted,
        tuple(draft.tokens[other] for other in candidates[1:]),
        chosen,
        proposed_rank(result, node, chosen),
        rank,
        margin,
        tuple(sequence.tokens[max(place - BEFORE, 0) : place]),
    )


def kind_of(sources: str, depth: int, margin: float, *, seen: bool) -> str:
    """The kind of a rejection: the first of KINDS that applies. `seen`: the chosen token stood in the text before."""
    names = {*sources.split("+")}
    if margin <= NEAR:
        return "near tie"
    if COPYING & {*re.split(r"[+-]", sources)}:  # as in memory-align
        return "copy broken"
    if names <= MASKED and depth >= 2:
        return "mask too deep"
    return "other guess" if seen else "unseen word"


def scores_of(sequence: Sequence, row: Tensor, place: int) -> Tensor:
    """Raw logits of a place, with the request's constraints, penalties and processors if it has any.

    Temperature, top-k, top-p and min-p are left out: they say how the noise may choose, not what the target thinks.
    """
    sampling = replace(sequence.sampling, temperature=0.0)
    if sampling.plain:
        return row.float()
    return process(row, sampling, sequence.tokens[:place], sequence.prompt_length, sequence.stop_ids)


def standing(scores: Tensor, drafted: int, chosen: int) -> tuple[int, float]:
    """Rank of the drafted token in the scores, ties to the lowest id, and how many nats it is behind the chosen one."""
    own = scores[drafted]
    rank = 1 + int((scores > own).sum()) + int((scores[:drafted] == own).sum())
    return rank, float(scores[chosen] - own)


def proposed_rank(result: Result, node: int, token: int) -> int | None:
    """Rank of a token among those that were proposed under a node of the draft, before limits cut it."""
    tree = result.proposed
    if not tree.num_candidates:
        return None
    under = ranked(tree, ROOT if node == ROOT else result.nodes[node])
    return next((rank for rank, one in enumerate(under, 1) if tree.tokens[one] == token), None)


def explain(engine: Engine, sequences: SequenceOf[Sequence], examples: int = EXAMPLES) -> Summary:
    """Decode the sequences to their ends and say why drafts were rejected. Errors: those of `Engine.generate`."""
    own = engine.drafter
    watched = Explained(own, examples)
    engine.drafter = watched
    try:
        for _ in engine.generate(sequences):
            pass
    finally:
        engine.drafter = own
    return watched.summary()


def _rounded(value: float | None) -> float | None:
    """A figure for JSON; None stands for what JSON has no number for."""
    return round(value, 4) if value is not None and math.isfinite(value) else None
