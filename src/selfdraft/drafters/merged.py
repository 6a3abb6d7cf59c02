"""One tree from all sources that cost no pass: the request's own text, earlier outputs, a prediction, the runners-up.

With the option `masks` trained mask tokens are one more source.

Duplicates are one node that keeps all its sources; how likely a node is follows from what it took to be right so far
(`drafting/mixing.py`); nodes are added best first until the next one is not worth its row.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from selfdraft.drafting.output_memory import Memory
from selfdraft.drafting.source_tree import SourceTreeDrafter, every_source, wanted_masks
from selfdraft.drafting.successors import RUNNERS_UP
from selfdraft.files.task_profiles import read_task_profile
from selfdraft.protocols import Needs, Target

MASKED = "space"
"""The method whose masks guess what comes behind the next token: they need no pass of their own."""


class Merged(SourceTreeDrafter):
    """Candidates: the best tree over everything that is known without a pass.

    `memory`: most tokens of earlier outputs that are remembered; 0 remembers nothing. It is this drafter's alone.
    `recycling`: the model's runners-up at every row that was run are guesses, too. `masks`: so are those of mask tokens
    trained with `selfdraft train --recipe space`, whose rows are hung where they are worth it. `task_profile`: a file
    of `selfdraft tune task`, what was learned earlier on text of the same kind.
    """

    needs: ClassVar[Needs] = Needs(
        tokens_only=True, logits_options=("recycling", "masks"), prediction=True, runners_up=RUNNERS_UP
    )

    def __init__(
        self,
        target: Target,
        *,
        num_speculative_tokens: int = 64,
        memory: int = 0,
        recycling: bool = True,
        masks: bool = False,
        task_profile: str | Path | None = None,
        min_probability: float | None = None,
    ) -> None:
        past = Memory(memory) if memory else None
        rows = wanted_masks(target.extras.mask_tokens.get(MASKED), masks)
        clock, sources = target.extras.clock, every_source(recycling)
        before = read_task_profile(task_profile)
        super().__init__(sources, num_speculative_tokens, min_probability, clock, past, rows, before)
