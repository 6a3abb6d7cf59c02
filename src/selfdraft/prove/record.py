"""One decoding with everything that can be compared: tokens, and the bits of the logits each was chosen from."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from selfdraft.core.sequence import Sequence
from selfdraft.core.verify import Result
from selfdraft.engine.engine import Engine
from selfdraft.types import Stats


@dataclass(frozen=True, slots=True)
class Record:
    """What one sequence said. `digests[i]` is a hash of the logits that output token i was chosen from."""

    tokens: tuple[int, ...]
    digests: tuple[bytes, ...]
    sources: tuple[str, ...]
    stats: Stats
    seconds: float


def decode(engine: Engine, sequence: Sequence, *, bits: bool = False) -> Record:
    """Run one sequence alone to its end; with `bits` the logits of every output token are hashed."""
    digests: list[bytes] = []
    began = time.perf_counter()
    for _, result in engine.generate([sequence]):
        if bits and result.tokens:
            new = sequence.num_output_tokens - len(digests)
            digests += [digest(row) for row in _rows(result, new)]
    seconds = time.perf_counter() - began
    return Record(tuple(sequence.output), tuple(digests), tuple(sequence.sources), sequence.stats, seconds)


def _rows(result: Result, count: int) -> list[Tensor]:
    """The logits rows behind the first `count` emitted tokens of a step."""
    assert result.logits is not None
    nodes = (-1, *result.path)
    return [result.logits[node + 1] for node in nodes[:count]]


def digest(row: Tensor) -> bytes:
    """Hash of the exact bits of a tensor."""
    return hashlib.blake2b(row.contiguous().view(torch.uint8).cpu().numpy().tobytes(), digest_size=12).digest()


def first_difference(one: SequenceOf[object], other: SequenceOf[object]) -> int | None:
    """Index of the first difference, the shorter one's end included; None when they are equal."""
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
