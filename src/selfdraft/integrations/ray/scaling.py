"""How many replicas are wanted, as a scaling rule of Ray Serve.

Ray sends this module by value to its controller: it imports nothing of this package.
"""

from __future__ import annotations

from ray.serve.config import AutoscalingContext

TOKENS_IN_FLIGHT = "tokens_in_flight"
"""What replicas report: most tokens, prompt and answer together, that their requests can come to hold."""


def wanted(requests: float, tokens: float, target_requests: float, target_tokens: float) -> float:
    """Replicas for so many requests, running and waiting, and tokens in flight: whichever needs more of them."""
    return max(requests / target_requests, tokens / target_tokens)


class LoadPolicy:
    """The rule. Ray keeps its result between the bounds, and waits for its delays, before it acts."""

    def __init__(self, target_requests: float, target_tokens: float) -> None:
        self.target_requests, self.target_tokens = target_requests, target_tokens

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, object]]:
        """The replicas that are wanted now, and no state."""
        tokens = sum((context.aggregated_metrics or {}).get(TOKENS_IN_FLIGHT, {}).values())
        return wanted(context.total_num_requests, tokens, self.target_requests, self.target_tokens), {}
