"""Formulas of speculative decoding. Times are in units of one plain decode step, so a result is a speed-up.

E is the expected number of tokens of a round of m draft tokens, the bonus token included. Sources: Leviathan et al.
(arXiv 2211.17192), section 3.1; Zhang et al., "Draft & Verify" (arXiv 2309.08168), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf


def expected_tokens(acceptance: float, drafts: int) -> float:
    """E(a, m) = (1 - a^(m+1)) / (1 - a): every draft token is accepted with probability a if all before it were."""
    return sum(acceptance**i for i in range(drafts + 1))


def expected_by_depth(acceptance: Iterable[float]) -> float:
    """E = 1 + sum over j of the product of a_i for i <= j: acceptance that differs from depth to depth."""
    tokens = path = 1.0
    for rate in acceptance:
        path *= rate
        tokens += path
    return tokens


def draft_speed(expected: float, drafts: float, cost: float, verify: float = 1.0) -> float:
    """Speed-up E / (m c + t_v): m drafting passes of cost c, then verification, which takes t_v = T(m+1) / T(1)."""
    return expected / (drafts * cost + verify)


def single_pass_speed(expected: float, pass_cost: float, verify: float = 1.0) -> float:
    """S3D's improvement factor E / (t_v + beta): all drafts of a round come out of one pass of cost beta."""
    return expected / (verify + pass_cost)


def best_length(
    expected: Callable[[int], float], cost: float, verify: SequenceOf[float], most: int
) -> tuple[int, float]:
    """(m, speed-up) at the optimum over 1 <= m <= most; `verify[m]` is t_v of m drafts, the shortest m wins ties."""
    speeds = {m: draft_speed(expected(m), m, cost, verify[m]) for m in range(1, most + 1)}
    best = max(speeds, key=lambda m: speeds[m])
    return best, speeds[best]
