"""Inner passes: cheaper passes of the model verify trees that cost no pass; the chain that they agree to is drafted.

Source: ML-SpecQD (arXiv 2503.13565), which puts a small model under a 4-bit one; here what costs no pass is under it:
the request's own text and runners-up. How many inner passes a step has, if any, is decided by measured times
(`InnerPassRule`).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from selfdraft.core.one_row import Contenders
from selfdraft.core.rows import Rows, chain_rows, tree_rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft, chances_of
from selfdraft.core.verify import Result
from selfdraft.drafting.autoregressive import Chain
from selfdraft.drafting.cost_guard import CostGuard
from selfdraft.drafting.cost_model import Throughput
from selfdraft.drafting.draft_length import AGREED, Confidence
from selfdraft.drafting.estimators import TRUSTED, Mean, StepTime
from selfdraft.drafting.source_tree import SourceTree
from selfdraft.drafting.step_timer import StepTimer
from selfdraft.types import Budget, PassVariant, Rounded

INNER = 16
"""Most nodes of a tree that an inner pass verifies: more rows cost it what the model itself costs."""
TOGETHER = 4
"""Most requests at a time that inner passes draft for: with more a whole pass is well used as it is, and prompts of
others would wait for them (docs/log.md)."""
LOOK_EVERY = 8
"""After so many passes trees are made though they did not pay."""
PAUSES = (32, 1024)
"""Steps until a pass that did not pay is tried again: at first, and at most; doubled each time."""
HOPE = 3.0
"""A pass that costs 3 times what it is worth is not tried until its time is known."""


class Runs(Protocol):
    """What an inner pass asks of the target."""

    def forward(self, rows: Rows, short: PassVariant | None = None) -> Tensor: ...

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None: ...


@dataclass(slots=True)
class Link:
    """A chain, and the tree under its end."""

    chain: Chain
    room: Budget
    tree: Draft = EMPTY
    chances: list[float] = field(default_factory=list)
    """Of every node of the tree, if the chain is right."""
    hung: bool = False
    """Whether the tree is one for this end."""
    inner: Draft = EMPTY
    """The part of it that the next inner pass verifies: the nodes that pay."""


class InnerPasses:
    """Chains that passes `short` of the model agreed to, and the trees of `tree` under their ends.

    `guard` prices rows and hands the clock; `search` looks a row through on a CPU. Drafted tokens carry the name
    `source`.
    """

    def __init__(
        self, target: Runs, short: PassVariant, tree: SourceTree, guard: CostGuard, search: Contenders, source: str
    ) -> None:
        self.target, self.short, self.tree, self.guard, self.source = target, short, tree, guard, source
        self.search = search
        self.rule = InnerPassRule(confidence=Confidence(AGREED if isinstance(short, Rounded) else 0.0))
        self.seconds = 0.0
        """Seconds that the inner passes of this step took."""
        self._opened = False
        self._chains: dict[Sequence, Chain] = {}
        self._row_costs: SequenceOf[float] = []
        """Of each node of a tree in this step."""
        self._timer = StepTimer(guard.clock)

    def start(self, sequences: SequenceOf[Sequence]) -> None:
        """Begin a step, before anything of it is timed: at the first one the cheaper model is used once."""
        if not self._opened:
            self.target.forward(chain_rows([(s.slot, s.num_cached, s.tokens[-1]) for s in sequences]), self.short)
            self._opened = True
        self._chains, self.seconds = {}, 0.0
        self._timer.start(len(sequences))

    def draft(
        self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget], row_costs: SequenceOf[float]
    ) -> list[Draft]:
        """Chains, as long as inner passes pay, and the trees under their ends."""
        self._row_costs = row_costs
        links = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            room = Budget(min(len(row_costs), budget.max_nodes), budget.max_depth, budget.max_probe_depth)
            links.append(Link(Chain(sequence, min(room.max_nodes, room.max_depth), self.search), room))
        plain = self.guard.plain_seconds(sequences)
        least = len(sequences) / plain if plain else 0.0
        first = True
        for link in links:
            self._hang(link)
        while len(links) <= TOGETHER and (going := self._going(links, least, first)):
            began = self.guard.clock()
            rows = self._pass(going)
            self.seconds += self.guard.clock() - began
            self._hang_all(going)
            self.rule.time.observe(rows, self.guard.clock() - began)
            first = False
        for link in links:
            if not link.hung:
                self._hang(link)
        self._chains = {link.chain.sequence: link.chain for link in links if link.chain.tokens}
        return [self._joined(link) for link in links]

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        """Learn how much of the chains was right, and what the step took."""
        for sequence, result in zip(sequences, results, strict=True):
            if sequence in self._chains:
                scores = self._chains[sequence].scores[: result.draft.num_candidates]
                self.rule.confidence.observe(scores, sum(node < len(scores) for node in result.path))
        if (took := self._timer.seconds(results)) is not None:
            self.rule.throughput.observe(sum(len(result.tokens) for result in results), took)
        self._chains = {}

    def _hang_all(self, links: list[Link]) -> None:
        """Trees under the new ends, as long as what they guess is worth making them."""
        if not self.rule.hangs():
            for link in links:
                link.tree, link.chances, link.hung = EMPTY, [], False
            return
        began = self.guard.clock()
        for link in links:
            self._hang(link)
            self.rule.guessed.observe(sum(link.chances))
        self.rule.hanging.observe((self.guard.clock() - began) / len(links))

    def _hang(self, link: Link) -> None:
        """Put what costs no pass under the chain's end; nothing where the text ends."""
        chain, room = link.chain, link.room
        path, done = self.rule.confidence.path(chain.scores), len(chain.tokens)
        row_costs = [min(1.0, cost / path) if path else 1.0 for cost in self._row_costs[done:]]
        left = Budget(room.max_nodes - done, room.max_depth - done, room.max_probe_depth)
        left = left if chain.going else Budget(0, 0, 0)
        link.tree = self.tree.tree(chain.sequence, left, row_costs, chain.tokens)
        link.chances, link.hung = chances_of(link.tree), True

    def _going(self, links: list[Link], least: float, first: bool) -> list[Link]:
        """The chains that one more inner pass extends; none when it does not pay. `least`: tokens per second.

        Each has to be worth its own rows, and all of them together the pass. The token that a pass adds to a chain has
        a row in the whole pass as well, at the price of a node there.
        """
        going = [link for link in links if link.chain.going]
        if not going:
            return []
        row_cost = self.rule.throughput.cost(self.rule.time.per_row, least)
        for link in going:
            path = self.rule.confidence.path(link.chain.scores)
            link.inner = link.tree.first(sum(path * chance >= row_cost for chance in link.chances[:INNER]))
        worths = [self.rule.worth(link.chain.scores, sum(link.chances)) for link in going]
        rows = [1 + len(link.inner) for link in going]
        verified = [self._row_costs[len(link.chain.tokens)] for link in going]

        def cost(places: SequenceOf[int]) -> float:
            return self.rule.cost(sum(rows[i] for i in places), least) + sum(verified[i] for i in places)

        own = [i for i, worth in enumerate(worths) if self.rule.pays(worth, row_cost * rows[i] + verified[i])]
        if own and self.rule.pays(sum(worths[i] for i in own), cost(own)):
            self.rule.paid()
            return [going[i] for i in own]
        return going if first and self.rule.tries(sum(worths), cost(range(len(going)))) else []

    def _pass(self, links: list[Link]) -> int:
        """One inner pass: every chain goes on along its tree as far as the pass agrees, and by one token more.

        Returns how many rows it had.
        """
        items = []
        for link in links:
            chain = link.chain
            place = chain.sequence.num_cached + len(chain.tokens)
            items.append((chain.sequence.slot, place, chain.path[-1], link.inner))
        rows = tree_rows(items)
        logits = self.target.forward(rows, self.short)
        for link, span in zip(links, rows.spans, strict=True):
            path = self._walk(link, logits[span.start : span.start + span.size])
            self.target.keep(span.slot, span.base, [0, *(1 + node for node in path)])
            link.chain.sequence.stats.num_draft_passes += 1
        return len(rows)

    def _walk(self, link: Link, answers: Tensor) -> list[int]:
        """Extend a chain by what the pass says along its tree. Returns the nodes that it agreed to."""
        children, path = link.inner.children(), list[int]()
        node: int | None = ROOT
        while node is not None:
            token = link.chain.extend(answers[1 + node])
            node = children.get((node, token)) if link.chain.going else None
            if node is not None:
                path.append(node)
        return path

    def _joined(self, link: Link) -> Draft:
        """The chain with the calibrated chances of its tokens, and the tree under its end."""
        chain, tree, size = link.chain, link.tree, len(link.chain.tokens)
        if not size:
            return tree
        return Draft(
            (*chain.tokens, *tree.tokens),
            (*range(-1, size - 1), *(parent + size for parent in tree.parents)),
            ((self.source,) * size) + tree.sources,
            size + len(tree),
            (*map(self.rule.confidence.chance, chain.scores), *tree.probabilities),
        )


@dataclass(slots=True)
class PassRule:
    """Whether a pass that only drafts pays: what such passes cost by their rows, and what whole steps bring.

    Source of the rule: renewal-reward (`drafting/cost_model.py`). A pass pays iff the tokens that it adds to
    what the model will accept are more than the cost of its seconds.
    """

    time: StepTime = field(default_factory=StepTime)
    throughput: Throughput = field(default_factory=Throughput)
    """Of whole steps."""
    left: int = 0
    """Steps until a pass is tried again, though it did not pay."""
    pause: int = PAUSES[0]
    hope: float = HOPE
    """A pass is tried at first when it costs at most so many times what it is worth."""

    def cost(self, rows: int, least: float) -> float:
        """What a pass of `rows` rows costs, in tokens; at least at `least` tokens per second."""
        return self.throughput.cost(self.time.at(rows), least)

    def pays(self, worth: float, cost: float) -> bool:
        """Whether a pass that adds `worth` tokens pays."""
        return worth > cost

    def tries(self, worth: float, cost: float) -> bool:
        """Whether to run an unprofitable pass once to keep its cost estimate fresh. Asked once a step.

        Always during the first 8 steps, unless it costs `hope` times what it is worth; then after pauses that double,
        up to 1,024 steps, as long as it does not pay.
        """
        if self.time.steps < TRUSTED and self.hope * worth >= cost:
            return True
        self.left -= 1
        if self.left > 0:
            return False
        self.left, self.pause = self.pause, min(2 * self.pause, PAUSES[1])
        return True

    def paid(self) -> None:
        """A pass was run because it pays."""
        self.pause, self.left = PAUSES[0], PAUSES[0]


@dataclass(slots=True)
class InnerPassRule(PassRule):
    """Whether an inner pass pays: how often the model says what such passes said."""

    confidence: Confidence = field(default_factory=Confidence)
    guessed: Mean = field(default_factory=Mean)
    """Tokens that are expected to be right of what hangs under a chain after a pass."""
    hanging: Mean = field(default_factory=Mean)
    """Seconds of making what hangs under a chain."""
    passes: int = 0
    """Inner passes so far."""

    def worth(self, scores: SequenceOf[float], guessed: float) -> float:
        """Tokens that one more inner pass is expected to add to a chain of tokens with these confidences.

        `guessed` tokens of what hangs under the chain are expected to be right: without the pass they are accepted
        all the same; with it they, and one more, are part of the chain, and the usual number hangs under its new end.
        """
        rate = self.confidence.acceptance.value
        survives: float = rate ** (1 + guessed)
        gained = rate * (1 - survives) / (1 - rate) if rate < 1 else 1 + guessed
        return self.confidence.path(scores) * (gained + survives * self.guessed.value - guessed)

    def hangs(self) -> bool:
        """Whether trees are made under the ends of this pass: a token that they guess right saves a pass.

        On text that repeats nothing they would take a tenth of the time. Now and then they are made all the same.
        """
        self.passes += 1
        if self.passes <= TRUSTED or self.passes % LOOK_EVERY == 0:
            return True
        return self.guessed.value * self.time.at(1) >= self.hanging.value
