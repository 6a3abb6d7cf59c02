"""Noise that is a pure function of (seed, position, token id): a counter-based generator, no state.

Because nothing is consumed, rejected drafts, batches and chunks cannot shift it: sampled text is as testable as
greedy text. Idea: drafter-invariant speculative sampling (arXiv 2408.07978). On the CPU it is made by numpy, as torch
would share the work on a vocabulary out among threads and wait for them; on other devices by torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BITS = 53
"""Random bits of one number of noise."""
_MASK = (1 << 64) - 1
_ADDED, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Numbers of SplitMix64's finaliser (Steele, Lea, Flood 2014)."""


def gumbel(seed: int, position: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, one value per token id in `tokens` (int64, any shape)."""
    return -torch.log(-torch.log(_uniform(_signed(key_of(seed, position)), tokens)))


def gumbel_at(places: Sequence[tuple[int, int]], tokens: Tensor) -> Tensor:
    """The same where each row has its own (seed, position): noise of `tokens` [n, k] at `places` [n]."""
    keys = torch.tensor([_signed(key_of(seed, position)) for seed, position in places], device=tokens.device)
    return -torch.log(-torch.log(_uniform(keys[:, None], tokens)))


def gumbel_rows(seed: int, positions: Sequence[int], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """The same by numpy, for one seed: noise of `tokens` [n, k] at `positions` [n]."""
    noise: NDArray[np.float64] = -np.log(-np.log((random_bits(seed, positions, tokens) + 0.5) * 2.0**-BITS))
    return noise


def random_bits(seed: int, positions: Sequence[int], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The whole numbers below 2**53 that noise is made of: those of `tokens` [n, k] at `positions` [n]."""
    keys = np.array([key_of(seed, position) for position in positions], np.uint64)
    bits = tokens.view(np.uint64) ^ keys[:, None]
    spare = np.empty_like(bits)  # large arrays are dear to make
    for _ in range(2):
        bits += np.uint64(_ADDED)
        for shift, factor in ((30, _FIRST), (27, _SECOND)):
            bits ^= np.right_shift(bits, np.uint64(shift), out=spare)
            bits *= np.uint64(factor)
        bits ^= np.right_shift(bits, np.uint64(31), out=spare)
    bits >>= np.uint64(64 - BITS)
    return bits.view(np.int64)


def key_of(seed: int, position: int) -> int:
    """What the ids of tokens are mixed with: below 2**64."""
    return _mix_int(_mix_int(seed & _MASK) ^ (position & _MASK))


def _uniform(key: int | Tensor, tokens: Tensor) -> Tensor:
    bits = _mix(_mix(tokens.to(torch.int64) ^ key))
    return (_shift(bits, 64 - BITS).to(torch.float64) + 0.5) * 2.0**-BITS


def _mix_int(x: int) -> int:
    """The finaliser on a Python int."""
    x = (x + _ADDED) & _MASK
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def _mix(x: Tensor) -> Tensor:
    """The same on int64 tensors, whose arithmetic wraps."""
    x = x + _signed(_ADDED)
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
