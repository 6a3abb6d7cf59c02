"""Quantised self-drafting: the target drafts for itself with the weights of its linear layers rounded.

Source: ML-SpecQD (arXiv 2503.13565), SubSpec (arXiv 2509.18344): the same weights at 4 bits draft, the model verifies.
Here both share one memory of keys and values, so a prompt is read once.
"""

from __future__ import annotations

from selfdraft.drafting.autoregressive import Chaining, exit_of
from selfdraft.drafting.draft_length import AGREED
from selfdraft.protocols import Target, search_of

SOURCE = "quantised"


class Quantised(Chaining):
    """A chain of up to `num_speculative_tokens`, one pass with rounded weights per link (`drafting/autoregressive.py`).

    The rounded copy is made with the drafter.
    """

    def __init__(
        self,
        target: Target,
        *,
        bits: int = 4,
        num_speculative_tokens: int = 8,
        confidence_threshold: float = 0.4,
        exit_policy: str = "throughput",
        target_acceptance_rate: float = 0.9,
        adaptive: bool = True,
    ) -> None:
        rule = exit_of(exit_policy, confidence_threshold, target_acceptance_rate, adaptive, AGREED)
        self.short = target.extras.rounded(SOURCE, bits)
        super().__init__(
            lambda rows: target.forward(rows, self.short),
            SOURCE,
            num_speculative_tokens,
            rule,
            target.extras.clock,
            search_of(target).contenders,
        )
