"""The default: one tree from everything that costs no pass, as large as this machine's passes make worth while."""

from __future__ import annotations

from selfdraft.core.guarded import Guarded
from selfdraft.protocols import Target


class Auto(Guarded):
    """`merged`, with trees cut where the measured cost of the pass says so, and plain decoding where that is best."""

    reads = "tokens"
    logit_options = ("recycling",)
    """Options that make it read logits."""

    def __init__(
        self, target: Target, *, num_speculative_tokens: int = 64, memory: int = 0, recycling: bool = True
    ) -> None:
        super().__init__(target.profile, num_speculative_tokens, memory, recycling)
