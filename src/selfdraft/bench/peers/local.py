"""transformers, which is in this process already: its own decoding of the same loaded weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from importlib.metadata import version

import torch

from selfdraft.bench.peers import Answer, Options
from selfdraft.errors import PeerError
from selfdraft.models import reference


def edition() -> str:
    return f"transformers {version('transformers')}"


@dataclass(frozen=True, slots=True)
class Transformers:
    """`generate`, with prompt lookup where there are options for it. `settle` waits for the accelerator.

    `sampled`: temperature and top_p of generate, by their names; empty: greedy.
    """

    label: str
    model: reference.Model
    options: Options
    settle: Callable[[], None]
    sampled: Mapping[str, float] = field(default_factory=dict)

    def answer(self, prompt: SequenceOf[int], count: int, seed: int) -> Answer:
        marks: list[float] = []

        def mark() -> None:
            if not marks:
                self.settle()
                marks.append(time.perf_counter())

        self.settle()
        began = time.perf_counter()
        try:
            with torch.random.fork_rng(enabled=bool(self.sampled)):
                if self.sampled:
                    torch.manual_seed(seed)
                tokens = reference.decode(self.model, prompt, count, self.options, mark, self.sampled)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            reason = str(error).strip().split("\n")[0]
            raise PeerError(f"peer {self.label}: {type(error).__name__}: {reason}") from error
        self.settle()
        seconds = time.perf_counter() - began
        return Answer(tuple(tokens), seconds, marks[0] - began if marks else seconds)

    def close(self) -> None:
        pass
