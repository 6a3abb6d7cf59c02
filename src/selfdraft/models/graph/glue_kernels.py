"""What kernels of `glue_source.py` call, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Without overflow, and without a difference of nearly equal numbers: a series where x is small."""
    decayed = tl.exp(-2.0 * tl.abs(x))
    bent = (1.0 - decayed) / (1.0 + decayed)
    y = x * x
    series = x - x * y * (0.3333333333 - y * (0.1333333333 - y * (0.0539682540 - y * 0.0218694885)))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -bent, bent))
