"""User-supplied prediction: follow the text that the answer is expected to resemble, re-aligned after each difference.

`SamplingParams(prediction=...)` brings the text, request by request; a request without one is decoded plainly.
Idea: OpenAI's predicted outputs. Here a prediction can cost time, never the text.
"""

from __future__ import annotations

from typing import ClassVar

from selfdraft.drafting.source_tree import Sources, SourceTreeDrafter
from selfdraft.protocols import Needs, Target


class Prediction(SourceTreeDrafter):
    """Candidates: where the prediction goes on, near the last agreement and behind the longest match."""

    needs: ClassVar[Needs] = Needs(tokens_only=True, prediction=True)

    def __init__(
        self, target: Target, *, num_speculative_tokens: int = 64, min_probability: float | None = None
    ) -> None:
        super().__init__(Sources(prediction=True), num_speculative_tokens, min_probability, target.extras.clock)
