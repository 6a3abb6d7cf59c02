"""S3D: one short pass over the last token and mask tokens, its middle blocks left out, guesses several tokens at once.

Source: Zhong and Bharadwaj, "S3D" (arXiv 2405.20314): a symmetric middle range is skipped, prediction is simultaneous.
The weights are untouched (`models/adapters.py`): the adapter acts in the drafting pass only, whose answers are never
text.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from selfdraft.core.rows import group_rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.drafting.cost_model import RowCost
from selfdraft.drafting.mask_prediction import Guesser
from selfdraft.drafting.mask_tables import foresee
from selfdraft.drafting.step_timer import StepTimer
from selfdraft.protocols import Target
from selfdraft.types import Budget, middle, within

SOURCE = "s3d"


class S3D:
    """Candidates: a tree over what the last token's row and the mask rows of the short pass say."""

    def __init__(
        self,
        target: Target,
        *,
        skip_width: int | None = None,
        num_masks: int | None = None,
        num_speculative_tokens: int = 12,
        branches: int = 3,
        min_probability: float | None = None,
    ) -> None:
        self.guesser = Guesser(num_speculative_tokens, branches, RowCost(min_probability))
        self.target = target
        masks = target.extras.masks_for(SOURCE)
        self.masks = masks.ids
        tuned = target.extras.tuned_options.get(SOURCE, {})
        count = num_masks if num_masks is not None else tuned.get("num_masks", len(self.masks))
        width = skip_width if skip_width is not None else tuned.get("skip_width", target.extras.num_layers // 2)
        within("num_masks", count, 1, len(self.masks))
        self.masks = self.masks[:count]
        self.skip = middle(target.extras.num_layers, width)
        self._trained = masks
        self.timer = StepTimer(target.extras.clock)

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        able = [i for i, budget in enumerate(budgets) if budget.max_depth > 0 and budget.max_nodes > 0]
        drafts = [EMPTY] * len(sequences)
        if able:
            groups = []
            for i in able:
                sequence = sequences[i]
                size = min(len(self.masks), budgets[i].max_depth - 1, budgets[i].max_probe_depth)
                groups.append((sequence.slot, sequence.num_cached, sequence.tokens[-1], self.masks[:size]))
                sequence.stats.num_draft_passes += 1
            rows = group_rows(groups, SOURCE)
            logits = self.target.forward(rows, self.skip)
            said = [
                (logits[span.start : span.start + span.size], sequences[i])
                for i, span in zip(able, rows.spans, strict=True)
            ]
            for i, ahead in zip(able, foresee(said, self._trained, self.guesser.branches), strict=True):
                last = sequences[i].tokens[-1]
                drafts[i] = self.guesser.tree(last, ahead, self._trained.shift, budgets[i], SOURCE)
        self.timer.start(len(sequences))
        return drafts

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        self.guesser.observe(results, self.timer.seconds(results))
