"""One row of scores on the CPU, by numpy: what is done for every token of a sampled text.

torch shares work on a whole vocabulary out among threads and waits for them; on a busy machine each of these waits
takes longer than all the arithmetic. Beside that, noise is drawn for the tokens alone that it can still lift to the
top. What is said here is what `sampler.py` says of many rows on another device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfdraft.core.noise import BITS, gumbel_rows, random_bits
from selfdraft.types import SamplingParams

Ids: TypeAlias = NDArray[np.int64]
"""Token ids [n]."""
Scores: TypeAlias = NDArray[np.floating]
"""Scores [vocab], float32 or wider."""
Top: TypeAlias = tuple[Tensor, Tensor]
"""The likeliest tokens of rows: logits float64 and ids int64, both [n, k], best first, on the CPU."""
Contenders: TypeAlias = Callable[[Scores, int, int], Ids]
"""`contenders` of one token, or what says as much: (scores, seed, position) -> ids, ascending."""
BANNED = float("-inf")
FIRST = 64
"""Likeliest tokens that are sorted first, to see whether they reach top-p; then 16 times as many."""
REACH = 42.0
"""How far one token's noise can lie above another's: it lies between -3.7 and 37.5."""
SLACK = 1.01
"""What is certainly more than the rounding of float32 takes from a bound."""


def apart(logits: Tensor) -> bool:
    """Whether looking at them makes the host wait."""
    return logits.device.type != "cpu"


def widened(logits: Tensor) -> Scores:
    """Logits [..., vocab] as float32 or wider; the same memory where they are that already."""
    if logits.dtype != torch.bfloat16:
        found: Scores = logits.numpy()
        return found if found.dtype.kind == "f" and found.itemsize >= 4 else found.astype(np.float32)
    bits = logits.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def leading(scores: Scores, count: int) -> Ids:
    """Ids of the `count` best scores, best first, of equals the lowest id first."""
    if count >= len(scores):
        return np.argsort(-scores, kind="stable")
    if not count:
        return np.empty(0, np.int64)
    ids = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    return ids[np.argsort(-scores[ids], kind="stable")][:count]


def alive(scores: Scores, count: int) -> Ids:
    """Ids of the `count` best scores that are not banned, best first, of equals the lowest id first."""
    best = leading(scores, count) if count > 1 else np.array([scores.argmax()])
    left: Ids = best[np.isfinite(scores[best])]
    return left


def cooled(scores: Scores, sampling: SamplingParams) -> Scores:
    """Scores at the temperature of a sampled request, the best one 0, and truncated: a copy."""
    best = scores.max()
    if not np.isfinite(best):
        return np.full_like(scores, BANNED)
    coolest = max(sampling.temperature, float(np.finfo(scores.dtype).tiny))
    with np.errstate(over="ignore"):
        scores = (scores - best) / coolest
    if 0 < sampling.top_k < len(scores):
        scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = BANNED
    if sampling.top_p < 1.0:
        scores = _nucleus(scores, sampling.top_p)
    if sampling.min_p > 0.0:
        scores[np.exp(scores, dtype=np.float64) < sampling.min_p] = BANNED
    return scores


def _nucleus(scores: Scores, top_p: float) -> Scores:
    """Only the shortest run of likeliest tokens that reaches `top_p`: the others score -inf."""
    chances = np.exp(scores, dtype=np.float64)
    chances /= chances.sum()
    count = FIRST
    while True:
        ids = leading(scores, count)
        reached = chances[ids].cumsum()
        if reached[-1] >= top_p or count >= len(scores):
            break
        count *= 16
    kept = ids[reached - chances[ids] < top_p]
    left = np.full_like(scores, BANNED)
    left[kept] = scores[kept]
    return left


def contenders(scores: Scores, seed: int, position: int, count: int = 1) -> Ids:
    """Ids, ascending, among which are the `count` largest sums of score and noise; empty where nothing is left.

    Noise is -log(-log(u)), so a sum reaches a floor where u >= exp(-exp(score - floor)), and then it is true that
    1 - u <= exp(score - floor). The floor is what some tokens certainly reach: those where that ratio is least.
    """
    count = min(count, len(scores))
    least = float(np.partition(scores, -count)[-count] if count > 1 else scores.max())
    if not np.isfinite(least):
        return np.sort(alive(scores, count))
    ids, near = np.arange(len(scores)), scores >= least - REACH
    if 2 * np.count_nonzero(near) < len(scores):  # to pick them out of more costs more than it saves
        ids = np.flatnonzero(near)
        scores = scores[ids]
    bits = random_bits(seed, [position], ids[None])[0]
    bits ^= (1 << BITS) - 1
    ratios = bits.astype(np.float32)
    ratios += 0.5  # now (1 - u) * 2**BITS
    with np.errstate(over="ignore", divide="ignore"):
        ratios /= np.exp((scores - least).astype(np.float32, copy=False))
    best = np.argpartition(ratios, count - 1)[:count] if count > 1 else ratios.argmin(keepdims=True)
    floor = (scores[best] + gumbel_rows(seed, [position], ids[best][None])[0]).min()
    return ids[np.flatnonzero(ratios <= SLACK * 2.0**BITS * np.exp(least - floor))]


class Search(NamedTuple):
    """How rows on a CPU are looked through: by numpy, or quicker where a target's machine can."""

    contenders: Contenders = contenders
    likeliest: Callable[[Tensor, int], Top | None] = lambda logits, count: None
    """(logits [n, vocab], count) -> the likeliest tokens, a row's first id NAN where it holds NaN; None: cannot."""


BY_NUMPY = Search()


def drawn(scores: Scores, seed: int, position: int, search: Contenders = contenders) -> int | None:
    """The id whose sum of score and noise is largest, of equals the lowest; None where all tokens are banned."""
    ids = search(scores, seed, position)
    if not len(ids):
        return None
    return int(ids[(scores[ids] + gumbel_rows(seed, [position], ids[None])[0]).argmax()])
