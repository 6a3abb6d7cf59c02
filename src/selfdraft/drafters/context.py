"""What followed the last one to six tokens in the request's own text, weighed by how often, as a tree.

The copy behind the longest match is in it, and where that copy goes on behind a difference. Sources: prediction by
partial matching (Cleary and Witten 1984); SuffixDecoding (arXiv 2411.04975) for frequency-weighted trees. Each guess is
worth what its kind was worth so far (`drafting/mixing.py`).
"""

from __future__ import annotations

from typing import ClassVar

from selfdraft.drafting.source_tree import Sources, SourceTreeDrafter
from selfdraft.protocols import Needs, Target


class Context(SourceTreeDrafter):
    """Candidates: the likeliest continuations out of the request's own text, best first."""

    needs: ClassVar[Needs] = Needs(tokens_only=True)

    def __init__(
        self, target: Target, *, num_speculative_tokens: int = 64, min_probability: float | None = None
    ) -> None:
        super().__init__(Sources(request=True), num_speculative_tokens, min_probability, target.extras.clock)
