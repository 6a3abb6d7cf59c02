"""The default: one tree from everything that costs no pass, as large as this machine's passes make worth while.

What pays is measured, before and while decoding (`drafting/cost_guard.py`);
what else there is, `selfdraft tune` explains.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.core.verify import Result
from selfdraft.drafting.cost_guard import Guarded
from selfdraft.drafting.suffix_copy import AHEAD, Copying
from selfdraft.protocols import Target
from selfdraft.types import Budget

TREE_FROM = 0.004
"""Seconds of a plain step from which on the tree of all sources is made: its work is then small beside it."""


class Auto(Guarded):
    """`merged`, with trees cut where the measured cost of the pass says so, and plain decoding where that is best.

    Where a plain step takes hardly longer than making a tree, copied chains take its place (`drafting/suffix_copy.py`).
    """

    reads = "tokens"

    def __init__(
        self, target: Target, *, num_speculative_tokens: int = 64, memory: int = 0, recycling: bool = True
    ) -> None:
        super().__init__(target.profile, num_speculative_tokens, memory, recycling, target.clock)
        self.copying = Copying()
        self._trees = True
        """Whether the tree of all sources is made, or copies."""

    def _make(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        if any(not self.copying.knows(s) and s not in self._notes for s in sequences):
            # by the clock, when a request begins: the profile may have been measured on a busier machine
            self._trees = self.cost is None or self.memory is not None or self.cost.at(1, 1, 0) >= TREE_FROM
        if self._trees:
            return super()._make(sequences, budgets)
        began = self.clock()
        drafts = self.copying.draft(sequences, budgets, self._prices(sequences, min(self.most, AHEAD)))
        self.node_time.observe(sum(map(len, drafts)), self.clock() - began)
        return drafts

    def _learn(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        if self._trees:
            super()._learn(sequences, results)
            return
        self.copying.observe(sequences)
        if len(sequences) == self._drafted and all(result.tokens for result in results):
            self.pace.tokens.observe(sum(len(result.tokens) for result in results))
        self._drafted = 0
        self._forget(sequences)
