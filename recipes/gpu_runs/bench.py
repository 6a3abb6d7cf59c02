"""What the runs need of a machine: a device, how passes become graphs there, and a clock; all of it is handed in."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Protocol

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from selfdraft.drafters import NAMES
from selfdraft.models.graph.capture import Capture, Replay
from selfdraft.models.graph.cuda import cuda_settings
from selfdraft.models.graph.graph_runner import GraphSettings
from selfdraft.models.graph.plain_glue import Glue

SHAPES: dict[str, dict[str, int | bool]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
"""Shapes of Llama 3.2 1B and Llama 3.1 8B."""
CONTEXT = 32768
WARM, TIMES = 5, 30
"""Calls before a figure is taken, and calls that it is the median of."""
COPIED = 2**30
"""Bytes of the copy that tells how fast memory is, where there is room."""


class Mark(Protocol):
    """A moment in the work of a device."""

    def until(self, later: Mark) -> float:
        """Seconds from here to there. Waits for neither: see `Bench.wait`."""


class CudaMark:
    """A moment in the work of a GPU."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def until(self, later: Mark) -> float:
        assert isinstance(later, CudaMark)
        return self.event.elapsed_time(later.event) / 1e3


@dataclass(frozen=True, slots=True)
class ClockMark:
    """A moment of a clock, where the host does all the work itself."""

    at: float

    def until(self, later: Mark) -> float:
        assert isinstance(later, ClockMark)
        return later.at - self.at


@dataclass(frozen=True)
class Bench:
    """A machine. `compiles`: whether torch compiles for it; `suite`: the command that runs the tests for a GPU.

    `shapes`: sizes of models by name; `lengths`: contexts, in tokens, at which passes are timed.
    """

    device: torch.device
    dtype: torch.dtype
    graphs: Callable[[tuple[int, ...]], GraphSettings]
    """How passes become graphs of these classes of rows, without glue."""
    clock: Callable[[], float]
    """Seconds, of the host."""
    mark: Callable[[], Mark]
    wait: Callable[[], None]
    """Wait until the device has done all that it was asked for."""
    suite: tuple[str, ...]
    compiles: bool = False
    glue: Glue | None = None
    """What fuses small kernels."""
    shapes: Mapping[str, Mapping[str, int | bool]] = field(default_factory=lambda: SHAPES)
    lengths: tuple[int, ...] = (512, 4096, 16384)
    context: int = CONTEXT
    prompt: int = 512
    tokens: int = 64
    """Of a text whose plain decoding is timed, behind `prompt` tokens."""
    tried: tuple[int, ...] = (16, 32, 64, 128)
    """Sizes of the one class of rows that are tried for equal bits."""
    slots: tuple[int, ...] = (1, 4, 16)
    """Sizes of batches."""
    drafters: tuple[str, ...] = tuple(NAMES)
    """Those whose texts are compared."""
    text: int = 48
    """Tokens of a text that is compared."""
    known: dict[tuple[object, ...], tuple[int, int]] = field(default_factory=dict)
    """Rows of equal bits, and rows that were compared, for models and classes that were tried."""
    quicker: dict[tuple[object, ...], Glue | None] = field(default_factory=dict)
    """The glue that passes of models and classes use, None where they are quicker without."""
    copied: int = COPIED
    warm: int = WARM
    times: int = TIMES

    def timed(self, run: Callable[[], object]) -> list[float]:
        """Seconds of each of some calls, on the device, after some that do not count."""
        for _ in range(self.warm):
            run()
        pairs = []
        for _ in range(self.times):
            began = self.mark()
            run()
            pairs.append((began, self.mark()))
        self.wait()
        return [began.until(ended) for began, ended in pairs]

    def memory(self) -> int:
        """Bytes that are taken on the device; 0 where it is not asked."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def let_go(self) -> None:
        """Give back what is not used any more."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def cuda_bench(suite: tuple[str, ...], dtype: torch.dtype) -> Bench:
    """The first GPU; it is not asked for anything yet."""
    device = torch.device("cuda", 0)
    return Bench(
        device,
        dtype,
        lambda classes: replace(cuda_settings(device, dtype, classes), glue=None),
        time.perf_counter,
        CudaMark,
        torch.cuda.synchronize,
        suite,
        compiles=True,
        glue=cuda_settings(device, dtype).glue,
    )


class Timed:
    """A capture whose replays are timed one by one."""

    def __init__(self, capture: Capture, mark: Callable[[], Mark]) -> None:
        self.capture, self.mark = capture, mark
        self.passes: list[tuple[Mark, Mark]] = []

    def __call__(self, run: Callable[[], None], outputs: SequenceOf[Tensor]) -> TimedReplay:
        return TimedReplay(self.capture(run, outputs), self)

    def seconds(self) -> float:
        """Of all replays since the last time that it was asked; the device must have done them."""
        found, self.passes = self.passes, []
        return sum(began.until(ended) for began, ended in found)


class TimedReplay:
    """A graph that notes when it runs."""

    def __init__(self, replay: Replay, notes: Timed) -> None:
        self._replay, self._notes = replay, notes

    def __call__(self) -> None:
        began = self._notes.mark()
        self._replay()
        self._notes.passes.append((began, self._notes.mark()))

    def close(self) -> None:
        self._replay.close()


def random_model(bench: Bench, name: str) -> PreTrainedModel:
    """A model of this shape with random weights, made on the device: nothing is loaded."""
    config = LlamaConfig(
        **bench.shapes[name],
        max_position_embeddings=bench.context,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(bench.dtype).to_empty(device=bench.device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(bench.device)  # its frequencies are no weights
    model.tie_weights()
    draw = torch.Generator(bench.device).manual_seed(0)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "norm" in path:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02, generator=draw)
    return model.eval()


def read_bytes(model: PreTrainedModel) -> int:
    """Bytes that decoding one token reads: blocks and output layer, and of a table of its own one row."""
    size = sum(p.numel() * p.element_size() for p in set(model.parameters()))
    if not model.config.tie_word_embeddings:
        table = model.get_input_embeddings().weight
        size -= table.numel() * table.element_size()
    return size


def copy_speed(bench: Bench) -> float:
    """Bytes that memory reads and writes in a second while a large block is copied."""
    numbers = torch.empty(bench.copied // 4, dtype=torch.float32, device=bench.device).normal_()
    other = torch.empty_like(numbers)
    seconds = bench.timed(lambda: other.copy_(numbers))
    return 2 * numbers.numel() * 4 / median(seconds)


def product_speed(bench: Bench, size: int) -> float:
    """Sums and products a second of a square product in the bench's type."""
    one, other = (torch.empty(size, size, dtype=bench.dtype, device=bench.device).normal_() for _ in range(2))
    return 2 * size**3 / median(bench.timed(lambda: one @ other))
