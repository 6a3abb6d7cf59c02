"""Token recycling: what the model thought likely after a token is guessed when that token comes again.

Source: Luo et al., "Turning Trash into Treasure" (arXiv 2408.08696). Unlike the paper's fixed tree, the tree grows by
measured acceptance of each rank and depth, and a sampled request's runners-up are ordered with the noise of the place.
"""

from __future__ import annotations

from typing import ClassVar

from selfdraft.drafting.source_tree import Sources, SourceTreeDrafter
from selfdraft.drafting.successors import RUNNERS_UP
from selfdraft.protocols import Needs, Target


class Recycling(SourceTreeDrafter):
    """Candidates: the eight runners-up behind each token, from every row that the target answered."""

    needs: ClassVar[Needs] = Needs(runners_up=RUNNERS_UP)

    def __init__(
        self, target: Target, *, num_speculative_tokens: int = 64, min_probability: float | None = None
    ) -> None:
        super().__init__(Sources(recycling=True), num_speculative_tokens, min_probability, target.extras.clock)
