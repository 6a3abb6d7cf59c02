"""Short passes over the last token and mask tokens: what their rows say of the places ahead, and when a step runs one.

Source: Zhong and Bharadwaj, "S3D" (arXiv 2405.20314), which makes its whole draft so. Beside other sources such a pass
is worth what the masks alone bring, and is run where that is more than its seconds cost (`MaskPasses`).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import accumulate
from operator import mul

from selfdraft.core.rows import group_rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft, chances_of
from selfdraft.core.verify import Result
from selfdraft.drafting.cost_guard import CostGuard
from selfdraft.drafting.estimators import Mean
from selfdraft.drafting.inner_passes import TOGETHER, PassRule, Runs
from selfdraft.drafting.mask_prediction import Ahead, MaskTokens
from selfdraft.drafting.mask_source import MASKS
from selfdraft.drafting.mask_tables import foresee
from selfdraft.drafting.source_tree import SourceTree, only_from
from selfdraft.drafting.step_timer import StepTimer
from selfdraft.types import Budget, JsonObject, middle, within

FIRST_GAIN = 1.0
"""Tokens that masks of unknown acceptance are thought to bring in a step before any was seen."""
EXPECTED = 4
"""Classes of trees without masks: those expected to bring less than 1 token, less than 2, less than 3, and others."""


class ShortPass:
    """A pass over the last token of each sequence and masks behind it, without `skip_width` of `layers` blocks.

    `trained`: the masks of `method`. Options that are None come from `advice`, what the adapter's card says; without it
    half of the blocks are left out, and all masks are used. `branches`: guesses for each place.
    Errors: OptionError for values out of range.
    """

    def __init__(
        self,
        target: Runs,
        trained: MaskTokens,
        method: str,
        branches: int,
        *,
        layers: int,
        advice: JsonObject,
        num_masks: int | None = None,
        skip_width: int | None = None,
    ) -> None:
        self.target, self.trained, self.method, self.branches = target, trained, method, branches
        count = advice.get("num_masks", len(trained.ids)) if num_masks is None else num_masks
        width = advice.get("skip_width", layers // 2) if skip_width is None else skip_width
        within("num_masks", count, 1, len(trained.ids))
        self.ids = trained.ids[:count]
        self.skip = middle(layers, width)

    def rows(self, budget: Budget) -> int:
        """Rows that the pass has for a sequence; 0 where nothing can be drafted."""
        if budget.max_depth <= 0 or budget.max_nodes <= 0:
            return 0
        return 1 + min(len(self.ids), budget.max_depth - 1, budget.max_probe_depth)

    def run(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[list[Ahead]]:
        """What the pass says of the places behind the last token of each; each has room for a row at least."""
        groups = []
        for sequence, budget in zip(sequences, budgets, strict=True):
            masks = self.ids[: self.rows(budget) - 1]
            groups.append((sequence.slot, sequence.num_cached, sequence.tokens[-1], masks))
            sequence.stats.num_draft_passes += 1
        rows = group_rows(groups, self.method)
        logits = self.target.forward(rows, self.skip)
        said = [
            (logits[span.start : span.start + span.size], sequence)
            for span, sequence in zip(rows.spans, sequences, strict=True)
        ]
        return foresee(said, self.trained, self.branches)


class MaskPasses:
    """Trees of `tree`, in whose making a short pass has a say where it pays. `guard` prices rows and hands the clock.

    A pass pays iff what masks alone brought, beside trees that were expected to bring as much as this one, is more
    than the tokens that come anyway in its time. The drafter's trees have masks as a source without groups.
    """

    def __init__(self, short: ShortPass, tree: SourceTree, guard: CostGuard) -> None:
        self.short, self.tree, self.guard = short, tree, guard
        shares = short.trained.acceptance[: len(short.ids) + 1]
        self.rule = PassRule(hope=1.0) if shares else PassRule()
        first = sum(accumulate(shares, mul)) if shares else FIRST_GAIN
        self.gains = [Mean(first, 3.0, 0.995) for _ in range(EXPECTED)]
        """Tokens that only masks named, by the class of the tree without them."""
        self.seconds = 0.0
        """Seconds that the pass of this step took."""
        self._asked: dict[Sequence, int] = {}
        """Whom the pass of this step was run for, and the class of the tree without masks."""
        self._opened = False
        self._timer = StepTimer(guard.clock)

    def start(self, sequences: SequenceOf[Sequence]) -> None:
        """Begin a step, before anything of it is timed: at the first one the short pass is run once."""
        if not self._opened:
            self.short.run(sequences, [Budget(1, 1, 0)] * len(sequences))
            self._opened = True
        self._asked, self.seconds = {}, 0.0
        self._timer.start(len(sequences))

    def draft(
        self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget], row_costs: SequenceOf[float]
    ) -> list[Draft]:
        """Trees of all sources; where a short pass pays, masks are one of them."""
        drafts = self.tree.draft(sequences, budgets, row_costs)
        asked = self._worth_asking(sequences, budgets, drafts)
        if not asked:
            return drafts
        began = self.guard.clock()
        found = self.short.run([sequences[i] for i in asked], [budgets[i] for i in asked])
        self.seconds = self.guard.clock() - began
        self.rule.time.observe(sum(self.short.rows(budgets[i]) for i in asked), self.seconds)
        for i, ahead in zip(asked, found, strict=True):
            self._asked[sequences[i]] = expected(drafts[i])
            self.tree.foresee(sequences[i], ahead)
            drafts[i] = self.tree.tree(sequences[i], budgets[i], row_costs)
        return drafts

    def _worth_asking(
        self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget], drafts: SequenceOf[Draft]
    ) -> list[int]:
        """Numbers of the sequences that a short pass is run for; none where it does not pay."""
        rows = {i: self.short.rows(budget) for i, budget in enumerate(budgets)}
        able = [i for i, count in rows.items() if count]
        if not able or len(sequences) > TOGETHER:
            return []
        plain = self.guard.plain_seconds(sequences)
        least = len(sequences) / plain if plain else 0.0
        worth = {i: self.gains[expected(drafts[i])].value for i in able}
        row_cost = self.rule.throughput.cost(self.rule.time.per_row, least)
        own = [i for i in able if worth[i] > row_cost * rows[i]]
        if own and self.rule.pays(sum(worth[i] for i in own), self.rule.cost(sum(rows[i] for i in own), least)):
            self.rule.paid()
            return own
        return able if self.rule.tries(sum(worth.values()), self.rule.cost(sum(rows.values()), least)) else []

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        """Learn what the masks of this step brought, and what the step took."""
        for sequence, result in zip(sequences, results, strict=True):
            if sequence in self._asked and result.tokens:
                self.gains[self._asked[sequence]].observe(only_from(MASKS, result))
        if (took := self._timer.seconds(results)) is not None:
            self.rule.throughput.observe(sum(len(result.tokens) for result in results), took)
        self._asked = {}


def expected(tree: Draft) -> int:
    """The class of a tree by the tokens that are expected of it."""
    return min(int(sum(chances_of(tree))), EXPECTED - 1) if tree is not EMPTY else 0
