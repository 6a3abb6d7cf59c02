"""What the host does in a step beside the pass, in a text of any length: a pass is nothing here, and is answered alike.

Decoding passes are graphs whose replay does nothing, over a model on the device that is not there (`far.py`) or over a
tiny one on the CPU. The texts that are compared end alike and have nothing else in common with what is said, so what a
step drafts, runs and learns is the same; only the text before it is longer.
"""

from __future__ import annotations

import copy
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cache
from types import FrameType

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.drafters import build
from selfdraft.engine.engine import Engine
from selfdraft.models.attention import Scores
from selfdraft.models.graph.graph_runner import GraphSettings
from selfdraft.models.graph.plain_tree_attention import Reach
from selfdraft.models.target import HFTarget
from selfdraft.types import Rounded, SamplingParams
from tests.clocks import Machine
from tests.far import FAR, HOME
from tests.models import VOCAB, random_adapters, tiny_llama

LONGEST = 2**17
END = [1, 2, 3, 4, 5, 1, 2, 3, 6, 2, 5, 4, 1, 2, 3] * 16
"""What every text ends with; what the device that is not there says has ids below 7, too."""
SAID = 7
OPTIONS: dict[str, dict[str, object]] = {
    "lookahead": {"adaptive": False},
    "merged": {"masks": True},
    "auto": {"masks": True},
}


def unseen(
    query: Tensor, keys: Tensor, values: Tensor, sheet: Mapping[str, Tensor], reach: Reach, scores: Scores
) -> Tensor:
    """Attention that looks at nothing: what a pass says is of no interest."""
    return query.new_zeros(*query.shape[:2], values.shape[3])


class Still:
    """A capture whose replays do nothing: the answers are what they were made."""

    def __call__(self, run: Callable[[], None], outputs: SequenceOf[Tensor]) -> StillReplay:
        for output in outputs:
            if output.device.type != FAR:  # as `far.answer` says: each row another small id
                output.zero_()
                output[range(len(output)), [row % SAID for row in range(len(output))]] = 1.0
        return StillReplay()


class StillReplay:
    """A pass of `Still`."""

    def __call__(self) -> None:
        pass

    def close(self) -> None:
        pass


@cache
def long_llama() -> LlamaForCausalLM:
    """Two blocks, and room for a long text."""
    config = copy.deepcopy(tiny_llama(torch.float32).config)
    config.num_hidden_layers, config.max_position_embeddings = 2, LONGEST
    return LlamaForCausalLM(config).eval()


def still_target(device: str) -> HFTarget:
    """A target whose decoding passes are nothing, with adapters and prices of its own."""
    stock = long_llama()
    model, adapters = copy.deepcopy(stock).to(device), random_adapters(stock)
    graphs = GraphSettings(Still(), unseen, (32,), shortest=LONGEST, places=LONGEST)
    target = Machine(0.01, 0.0001).run(HFTarget(model, adapters=adapters, graphs=graphs))
    for bits in (4, 8):  # rounding weights is work of the host; a pass over them asks no more than one over these
        target._views[Rounded(bits)] = target._view
    return target


def text_of(length: int) -> list[int]:
    """A text of this length: tokens that are never said, then END."""
    drawn = torch.randint(10, VOCAB, (length - len(END),), generator=torch.Generator().manual_seed(length))
    return [*drawn.tolist(), *END]


def decoding(
    target: HFTarget, drafter: str, sampling: SamplingParams, length: int, options: dict[str, object] | None = None
) -> Engine:
    """An engine that decodes behind a text which the cache has: nothing was prefilled, as nothing is looked at."""
    engine = Engine(target, build(drafter, target, OPTIONS.get(drafter, {}) if options is None else options))
    sequence = open_sequence(text_of(length), sampling, seed=1, eos=frozenset(), context=target.max_length)
    engine.submit(sequence)
    engine.waiting.clear()
    taken = engine.slots.take(sequence.tokens, None, [])
    sequence.slot, sequence.num_cached = taken.slot, length - 1
    engine.running.append(sequence)
    return engine


@dataclass(frozen=True)
class Work:
    """Of one step: lines of ours that were run, and most bytes that were taken meanwhile."""

    lines: int
    bytes: int


def work_of(step: Callable[[], object]) -> Work:
    """What a step does. Lines of torch and of the standard library are not counted."""
    lines = 0

    def inside(frame: FrameType, event: str, _: object) -> object:
        nonlocal lines
        lines += event == "line"
        return inside

    def entered(frame: FrameType, event: str, _: object) -> object:
        return inside if frame.f_code.co_filename.startswith(HOME) else None

    before = sys.gettrace()
    tracemalloc.start()
    began = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    sys.settrace(entered)  # type: ignore[arg-type]
    try:
        step()
    finally:
        sys.settrace(before)
        taken = tracemalloc.get_traced_memory()[1] - began
        tracemalloc.stop()
    return Work(lines, taken)


def sequence_of(engine: Engine) -> Sequence:
    (sequence,) = engine.running
    return sequence
