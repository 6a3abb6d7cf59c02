"""Graphs on an NVIDIA GPU: what is put together there, and what it needs."""

from __future__ import annotations

import torch

from selfdraft.errors import RunnerUnavailable
from selfdraft.models.graph.capture import CudaCapture
from selfdraft.models.graph.graph_runner import CLASSES, PIECE, GraphSettings

ONE_CLASS = ((1, 32), (4, 64))
"""(slots up to, rows): the one class of bitwise decoding."""


def one_class(slots: int) -> tuple[int, ...]:
    """Rows of the only class there is where bits are promised; wider passes are cut into several."""
    return (next((rows for most, rows in ONE_CLASS if slots <= most), CLASSES[-1]),)


def cuda_settings(device: torch.device, dtype: torch.dtype, classes: tuple[int, ...] = CLASSES) -> GraphSettings:
    """CUDA graphs with the attention of `tree_kernels.py` and fused glue, in a cache that is small at first.

    Errors: RunnerUnavailable without a GPU, without Triton, or for a type that the kernels do not compute in.
    """
    if device.type != "cuda":
        raise RunnerUnavailable(f"graphs are replayed by an NVIDIA GPU; the model is on {device}")
    if dtype == torch.float64:
        raise RunnerUnavailable("attention on a GPU computes in float32 at most; take another dtype than float64")
    try:
        from selfdraft.models.graph.fused_glue import fused_glue
        from selfdraft.models.graph.tree_attention import attend_fused
    except ImportError as error:
        raise RunnerUnavailable(f"graphs need Triton ({error}): pip install 'selfdraft[gpu]'") from error
    places, event = 2 * PIECE, torch.cuda.Event
    return GraphSettings(CudaCapture(device), attend_fused, classes, places=places, event=event, glue=fused_glue)
