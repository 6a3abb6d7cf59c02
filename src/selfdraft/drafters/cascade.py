"""A cascade: the tree of `merged`, verified by the model with rounded weights, whose chain the model then verifies.

Source: ML-SpecQD (arXiv 2503.13565). Where no inner pass pays (`drafting/inner_passes.py`), as on a model whose passes
are all overhead, this is `merged`, and where nothing pays, plain decoding. `auto` does the same with the option `bits`.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import ClassVar

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.drafting.cost_guard import CostGuard
from selfdraft.drafting.inner_passes import InnerPasses
from selfdraft.drafting.output_memory import Memory
from selfdraft.drafting.source_tree import SourceTree, every_source
from selfdraft.files.task_profiles import read_task_profile
from selfdraft.protocols import Needs, Target, search_of
from selfdraft.types import Budget

SOURCE = "cascade"


class Cascade:
    """A chain that inner passes with weights of `bits` bits agreed to, and what costs no pass under its end.

    `memory`, `recycling` and `task_profile` are those of `merged`. The rounded copy is made with the drafter.
    Errors: OptionError for values out of range.
    """

    needs: ClassVar[Needs] = Needs(logits_options=("recycling",), prediction=True, pass_cost=True)

    def __init__(
        self,
        target: Target,
        *,
        bits: int = 4,
        num_speculative_tokens: int = 64,
        memory: int = 0,
        recycling: bool = True,
        task_profile: str | Path | None = None,
    ) -> None:
        self.memory = Memory(memory) if memory else None
        before = read_task_profile(task_profile)
        clock, sources = target.extras.clock, every_source(recycling)
        self.tree = SourceTree(sources, num_speculative_tokens, clock, self.memory, before=before)
        self.guard = CostGuard(target.extras.pass_cost, clock)
        short = target.extras.rounded(SOURCE, bits)
        self.inner = InnerPasses(target, short, self.tree, self.guard, search_of(target).contenders, SOURCE)

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        self.inner.start(sequences)
        if not self.guard.drafts(sequences, budgets):
            return [EMPTY] * len(sequences)
        with self.guard.timed():
            costs = self.guard.row_costs(sequences, self.tree.most)
            return self.guard.cut(sequences, self.inner.draft(sequences, budgets, costs))

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        self.inner.observe(sequences, results)
        if self.guard.drafting:
            with self.guard.timed():
                self.tree.learn(sequences, results)
        plain = self.guard.book(sequences, results)
        if plain:
            self.tree.book(results, plain)
        self.tree.forget(sequences)
