"""Noise that is a pure function of (seed, position, token id): a counter-based generator, no state.

Because nothing is consumed, rejected drafts, batches and chunks cannot shift it: sampled text is as testable as
greedy text. Idea: drafter-invariant speculative sampling (arXiv 2408.07978).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def gumbel(seed: int, position: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, one value per token id in `tokens` (int64, any shape)."""
    return -torch.log(-torch.log(uniform(seed, position, tokens)))


def gumbel_rows(seed: int, positions: Sequence[int], tokens: Tensor) -> Tensor:
    """The same for many positions at once: noise of `tokens` [n, k] at `positions` [n]."""
    return gumbel_at([(seed, position) for position in positions], tokens)


def gumbel_at(places: Sequence[tuple[int, int]], tokens: Tensor) -> Tensor:
    """The same where each row has its own (seed, position): noise of `tokens` [n, k] at `places` [n]."""
    keys = torch.tensor([_signed(_key(seed, position)) for seed, position in places], device=tokens.device)
    return -torch.log(-torch.log(_uniform(keys[:, None], tokens)))


def uniform(seed: int, position: int, tokens: Tensor) -> Tensor:
    """Uniform noise in the open interval (0, 1), float64, one value per token id."""
    return _uniform(_signed(_key(seed, position)), tokens)


def _key(seed: int, position: int) -> int:
    return _mix_int(_mix_int(seed & _MASK) ^ (position & _MASK))


def _uniform(key: int | Tensor, tokens: Tensor) -> Tensor:
    bits = _mix(_mix(tokens.to(torch.int64) ^ key))
    return (_shift(bits, 11).to(torch.float64) + 0.5) * 2.0**-53


def _mix_int(x: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on a Python int."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix(x: Tensor) -> Tensor:
    """The same on int64 tensors, whose arithmetic wraps."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
