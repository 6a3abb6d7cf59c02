"""Which exactness level this machine reaches, found by trying it on a real model."""

from __future__ import annotations

import platform
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from importlib.metadata import version

import torch

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.core.verify import Result
from selfdraft.engine.engine import Engine
from selfdraft.errors import RunnerUnavailable
from selfdraft.models.device import bfloat16_units, gpu_facts
from selfdraft.models.runner import kernel_build
from selfdraft.protocols import Drafter, Target
from selfdraft.prove.record import Record, decode
from selfdraft.types import Budget


class HalfRight:
    """A drafter for probing: knows the plain text, guesses some of it right and some wrong, in two branches.

    So the trial sees accepted rows, rejected rows that must be forgotten, and paths that are out of place.
    """

    def __init__(self, text: SequenceOf[int], vocab: int) -> None:
        self.text, self.vocab = text, vocab

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        drafts = []
        for sequence in sequences:
            done = sequence.num_output_tokens
            right = list(self.text[done : done + 1 + done % 6])
            wrong = [(token + 7) % self.vocab for token in self.text[done : done + 3]]
            drafts.append(Draft.branches([wrong, [*right, *wrong[:2]]], "half_right"))
        return drafts

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Trial:
    """Plain against drafted rows of one dtype and one rule of shapes."""

    dtype: str
    shapes: str
    tokens: int
    tokens_equal: int
    rows: int
    rows_bitwise_equal: int

    @property
    def level(self) -> str:
        """The strictest level that held on every row."""
        if self.rows_bitwise_equal == self.rows == self.tokens:
            return "bitwise"
        return "token" if self.tokens_equal == self.tokens else "none"


def trial(
    target: Target, none: Drafter, requests: SequenceOf[Callable[[], Sequence]], dtype: str, shapes: str
) -> Trial:
    """Decode every request plainly and with drafts, and compare tokens and the bits of their logits."""
    tokens = equal = rows = same = 0
    for request in requests:
        plain = decode(Engine(target, none), request(), bits=True)
        drafted = decode(Engine(target, HalfRight(plain.tokens, target.vocab)), request(), bits=True)
        tokens += len(plain.tokens)
        equal += _common(plain, drafted)
        rows += len(plain.digests)
        same += sum(a == b for a, b in zip(plain.digests, drafted.digests, strict=False))
    return Trial(dtype, shapes, tokens, equal, rows, same)


def _common(one: Record, other: Record) -> int:
    return sum(a == b for a, b in zip(one.tokens, other.tokens, strict=False))


def _instructions() -> str | None:
    try:
        return kernel_build.instructions()
    except RunnerUnavailable:
        return None


def machine(device: torch.device) -> dict[str, object]:
    """The conditions that can change bits or speed of a model on `device`."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_units": bfloat16_units(),
        "kernels": _instructions(),
        "threads": torch.get_num_threads(),
        "gpu": None,
        **gpu_facts(device),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
