"""S3D: one short pass over the last token and mask tokens, its middle blocks left out, guesses several tokens at once.

Source: Zhong and Bharadwaj, "S3D" (arXiv 2405.20314): a symmetric middle range is skipped, prediction is simultaneous.
The weights are untouched (`models/adapters.py`): the adapter acts in the drafting pass only, whose answers are never
text.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.drafting.cost_model import RowCost
from selfdraft.drafting.mask_passes import ShortPass
from selfdraft.drafting.mask_prediction import Guesser
from selfdraft.drafting.step_timer import StepTimer
from selfdraft.protocols import Target
from selfdraft.types import Budget

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
        extras = target.extras
        self.short = ShortPass(
            target,
            extras.masks_for(SOURCE),
            SOURCE,
            branches,
            layers=extras.num_layers,
            advice=extras.tuned_options.get(SOURCE, {}),
            num_masks=num_masks,
            skip_width=skip_width,
        )
        self.timer = StepTimer(target.extras.clock)

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        able = [i for i, budget in enumerate(budgets) if self.short.rows(budget)]
        drafts = [EMPTY] * len(sequences)
        if able:
            found = self.short.run([sequences[i] for i in able], [budgets[i] for i in able])
            for i, ahead in zip(able, found, strict=True):
                last = sequences[i].tokens[-1]
                drafts[i] = self.guesser.tree(last, ahead, self.short.trained.shift, budgets[i], SOURCE)
        self.timer.start(len(sequences))
        return drafts

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        self.guesser.observe(results, self.timer.seconds(results))
