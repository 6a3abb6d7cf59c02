"""Capturing: what makes a function over fixed memory run again without Python, as a CUDA graph does."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import torch
from torch import Tensor

WARM_UPS = 2
"""Times that a function is run before it is captured: libraries make their plans, Triton compiles."""


class Replay(Protocol):
    """A captured function."""

    def __call__(self) -> None:
        """Run it again; what it says lies in the tensors that it was captured with."""

    def close(self) -> None:
        """Give its memory back. It is not run again."""


class Capture(Protocol):
    """Captures functions over fixed memory."""

    def __call__(self, run: Callable[[], None], outputs: SequenceOf[Tensor]) -> Replay:
        """Run `run` a few times, then capture it. `outputs` are the tensors that it writes its answers into.

        Errors: RuntimeError where it does what cannot be captured.
        """


class CudaCapture:
    """Captures CUDA graphs, on a stream of its own; all share one pool of memory, so the largest should come first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None], outputs: SequenceOf[Tensor]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(self._stream)
            # thread_local: other threads of a server may use the device meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                run()
        return CudaReplay(graph)


class CudaReplay:
    """A CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def __call__(self) -> None:
        self._graph.replay()

    def close(self) -> None:
        self._graph.reset()
