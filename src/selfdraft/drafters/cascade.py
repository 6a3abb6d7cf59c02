"""A cascade: the tree of `merged`, verified by the model with rounded weights, whose chain the model then verifies.

Source: ML-SpecQD (arXiv 2503.13565), which puts a small model under a 4-bit one; here what costs no pass is under it.
How many inner passes a step has, if any, is decided by measured times (`drafting/inner_passes.py`): where none pays,
as on a model whose passes are all overhead, this is `merged`, and where nothing pays, plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from selfdraft.core.rows import chain_rows, tree_rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft, chances_of
from selfdraft.core.verify import Result
from selfdraft.drafting.autoregressive import Chain
from selfdraft.drafting.cost_guard import Guarded
from selfdraft.drafting.inner_passes import Rounds
from selfdraft.protocols import Target
from selfdraft.types import Budget, Rounded

SOURCE = "cascade"
INNER = 16
"""Most nodes of a tree that an inner pass verifies: more rows cost it what the model itself costs."""


class Cascade(Guarded):
    """A chain that inner passes with weights of `bits` bits agreed to, and what costs no pass under its end.

    `memory` and `recycling` are those of `merged`. The rounded copy is made when it is first drafted with.
    """

    def __init__(
        self,
        target: Target,
        *,
        bits: int = 4,
        num_speculative_tokens: int = 64,
        memory: int = 0,
        recycling: bool = True,
    ) -> None:
        super().__init__(target.profile, num_speculative_tokens, memory, recycling, target.clock)
        self.target, self.short = target, Rounded(bits)
        self.rounds = Rounds()
        self._opened = False
        self._chains: dict[Sequence, Chain] = {}
        self._price: SequenceOf[float] = []
        """Of each node of a tree in this step."""
        self._whole = 0.0

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        if not self._opened:  # the copy is made, and its first pass, before anything is timed
            self.target.forward(chain_rows([(s.slot, s.cached, s.tokens[-1]) for s in sequences]), self.short)
            self._opened = True
        self._chains = {}
        self._whole = self.clock()
        return super().draft(sequences, budgets)

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        for sequence, result in zip(sequences, results, strict=True):
            if sequence in self._chains:
                scores = self._chains[sequence].scores[: result.draft.candidates]
                in_chain = sum(node < len(scores) for node in result.path)
                self.rounds.confidence.observe(scores, in_chain)
        if all(len(result.answers) == 1 + len(result.draft) for result in results):  # no prefill beside it
            self.rounds.tokens.observe(sum(len(result.tokens) for result in results))
            self.rounds.seconds.observe(self.clock() - self._whole)
        self._chains = {}
        super().observe(sequences, results)

    def _make(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        most = self._room()
        self._price = self._prices(sequences, most)
        links = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            self._ready(sequence)
            room = Budget(min(most, budget.nodes), budget.depth, budget.reach)
            links.append(Link(Chain(sequence, min(room.nodes, room.depth)), room))
        count, remembered = len(sequences), sum(s.cached for s in sequences)
        plain = self.pace.time.at(count) if self.cost is None else self.cost.at(count, count, remembered)
        rho = self.rounds.rho(count / plain if plain else 0.0)
        first = True
        for link in links:
            self._guess(link)
        while going := self._going(links, rho, first):
            began = self.clock()
            rows = self._round(going)
            for link in going:
                self._guess(link)
                self.rounds.guessed.observe(sum(link.chances))
            self.rounds.time.observe(rows, self.clock() - began)
            first = False
        self._chains = {link.chain.sequence: link.chain for link in links if link.chain.tokens}
        self._began = self.clock()  # what rows cost the model is not blurred by inner passes
        return [_hung(link.chain, link.tree) for link in links]

    def _guess(self, link: Link) -> None:
        """What costs no pass, under the chain's end."""
        chain, room = link.chain, link.room
        path, done = self.rounds.confidence.path(chain.scores), len(chain.tokens)
        prices = [min(1.0, price / path) if path else 1.0 for price in self._price[done:]]
        left = Budget(room.nodes - done, room.depth - done, room.reach) if chain.going else Budget(0, 0, 0)
        link.tree = self._note(chain.sequence).merger.tree(left, prices, chain.tokens)
        link.chances = chances_of(link.tree)

    def _going(self, links: list[Link], rho: float, first: bool) -> list[Link]:
        """The chains that one more inner pass extends; none when it does not pay."""
        going = [link for link in links if link.chain.going]
        if not going:
            return []
        for link in going:
            path = self.rounds.confidence.path(link.chain.scores)
            dear = rho * self.rounds.time.per_row
            link.rows = 1 + sum(path * chance >= dear for chance in link.chances[:INNER])
        worth = sum(self.rounds.worth(link.chain.scores, sum(link.chances)) for link in going)
        rows = sum(link.rows for link in going)
        if self.rounds.pays(worth, rows, rho):
            self.rounds.paid()
            return going
        return going if first and self.rounds.tries(worth, rows, rho) else []

    def _round(self, links: list[Link]) -> int:
        """One inner pass: every chain goes on along its tree as far as the pass agrees, and by one token more.

        Returns how many rows it had.
        """
        items = []
        for link in links:
            chain, tree = link.chain, link.tree.first(link.rows - 1)
            place = chain.sequence.cached + len(chain.tokens)
            items.append((chain.sequence.slot, place, chain.path[-1], tree))
        rows = tree_rows(items)
        logits = self.target.forward(rows, self.short)
        for link, span in zip(links, rows.spans, strict=True):
            children = span.draft.children()
            node: int | None = ROOT
            order = [0]
            while node is not None:
                token = link.chain.extend(logits[span.start + 1 + node])
                node = children.get((node, token)) if link.chain.going else None
                if node is not None:
                    order.append(1 + node)
            self.target.keep(span.slot, span.base, order)
            link.chain.sequence.stats.num_draft_passes += 1
        return len(rows)


@dataclass(slots=True)
class Link:
    """A chain with what hangs under its end."""

    chain: Chain
    room: Budget
    tree: Draft = EMPTY
    chances: list[float] = field(default_factory=list)
    """Of every node of the tree, if the chain is right."""
    rows: int = 1
    """Of the next inner pass: the chain's end, and the nodes that pay."""


def _hung(chain: Chain, tree: Draft) -> Draft:
    """The chain, and the tree under its end."""
    size = len(chain.tokens)
    if not size:
        return tree
    return Draft(
        (*chain.tokens, *tree.tokens),
        (*range(-1, size - 1), *(parent + size for parent in tree.parents)),
        ((SOURCE,) * size) + tree.sources,
        size + len(tree),
        (*chain.scores, *tree.scores),
    )
