"""A cascade: the tree of `merged`, verified by the model with rounded weights, whose chain the model then verifies.

Source: ML-SpecQD (arXiv 2503.13565), which puts a small model under a 4-bit one; here what costs no pass is under it.
How many inner passes a step has, if any, is decided by measured times (`core/rounds.py`): where none pays, as on a
model whose passes are all overhead, this is `merged`, and where nothing pays, plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from selfdraft.core.chain import Chain
from selfdraft.core.guarded import Guarded
from selfdraft.core.rounds import Rounds
from selfdraft.core.rows import chain_rows, tree_rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import ROOT, Draft, chances_of
from selfdraft.core.verify import Result
from selfdraft.errors import OptionError
from selfdraft.protocols import Target
from selfdraft.types import Budget, Rounded

SOURCE = "cascade"
INNER = 16
"""Most nodes of a tree that an inner pass verifies: more rows cost it what the model itself costs."""


class Cascade(Guarded):
    """A chain that inner passes with weights of `bits` bits agreed to, and what costs no pass under its end.

    `memory` and `recycling` are those of `merged`. The rounded copy is made when it is first drafted with.
    """

    predicts = True

    def __init__(
        self,
        target: Target,
        *,
        bits: int = 4,
        num_speculative_tokens: int = 64,
        memory: int = 0,
        recycling: bool = True,
    ) -> None:
        if not isinstance(recycling, bool):
            raise OptionError(f"recycling={recycling!r} is neither True nor False")
        super().__init__(num_speculative_tokens, memory, recycling)
        self.target, self.short = target, Rounded(bits)
        self.rounds = Rounds()
        self._ready = False
        self._chains: dict[Sequence, Chain] = {}
        self._whole = 0.0

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        if not self._ready:  # the copy is made, and its first pass, before anything is timed
            self.target.forward(chain_rows([(s.slot, s.cached, s.tokens[-1]) for s in sequences]), self.short)
            self._ready = True
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

    def _trees(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        most = self._room()
        chains = [
            Chain(sequence, min(most, budget.nodes, budget.depth))
            for sequence, budget in zip(sequences, budgets, strict=True)
        ]
        trees = [self._tree(chain, self._price(chain)) for chain in chains]
        first = True
        while going := self._going(chains, trees, first):
            self._round([(chain, trees[i]) for i, chain in going])
            for i, chain in going:
                trees[i] = self._tree(chain, self._price(chain))
            first = False
        self._chains = {chain.sequence: chain for chain in chains if chain.tokens}
        self._began, self._drafted = self.clock(), len(sequences)
        return [_hung(chain, tree) for chain, tree in zip(chains, trees, strict=True)]

    def _tree(self, chain: Chain, price: float) -> Draft:
        """What costs no pass, under the chain's end."""
        left = chain.most - len(chain.tokens) if chain.going else 0
        return self._note(chain.sequence).merger.tree(Budget(left, left, left), price, chain.tokens)

    def _price(self, chain: Chain) -> float:
        """What a node behind the chain must be likely, if the chain is right, for its row to pay."""
        path = self.rounds.confidence.path(chain.scores)
        return min(1.0, self.pace.price / path) if path else 1.0

    def _going(self, chains: list[Chain], trees: list[Draft], first: bool) -> list[tuple[int, Chain]]:
        """The chains that one more inner pass extends, with their numbers; none when it does not pay."""
        going = [(i, chain) for i, chain in enumerate(chains) if chain.going]
        if not going:
            return []
        rows = sum(1 + min(len(trees[i]), INNER) for i, _ in going)
        worth = sum(self.rounds.worth(chain.scores, sum(chances_of(trees[i]))) for i, chain in going)
        seconds = self.pace.time.at(len(chains))
        if self.rounds.pays(worth, rows, self.rounds.rho(len(chains) / seconds if seconds else 0.0)):
            self.rounds.paid()
            return going
        return going if first and self.rounds.tries() else []

    def _round(self, work: list[tuple[Chain, Draft]]) -> None:
        """One inner pass: every chain goes on along its tree as far as the pass agrees, and by one token more."""
        items = []
        for chain, tree in work:
            sequence = chain.sequence
            items.append((sequence.slot, sequence.cached + len(chain.tokens), chain.path[-1], tree.first(INNER)))
        began = self.clock()
        rows = tree_rows(items)
        logits = self.target.forward(rows, self.short)
        for (chain, _), span in zip(work, rows.spans, strict=True):
            children = span.draft.children()
            node: int | None = ROOT
            order = [0]
            while node is not None:
                token = chain.extend(logits[span.start + 1 + node])
                node = children.get((node, token)) if chain.going else None
                if node is not None:
                    order.append(1 + node)
            self.target.keep(span.slot, span.base, order)
            chain.sequence.stats.num_draft_passes += 1
        self.rounds.time.observe(len(rows), self.clock() - began)


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
