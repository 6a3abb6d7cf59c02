"""One request on its way: its tokens, how much of them the target remembers, and how it ends."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from selfdraft.core.detokenizer import TextStream
from selfdraft.types import FinishReason, Logprob, SamplingParams, Stats


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """Tokens of prompt and output; `pending` are those the target has not remembered yet.

    Only `commit` and the engine write to it. Compared and hashed by identity, so that drafters may keep notes
    about a sequence in a WeakKeyDictionary: they die with it.
    """

    tokens: list[int]
    prompt_length: int
    sampling: SamplingParams
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    """Token ids that end the output: end-of-sequence ids unless ignored, the request's stop ids and `stop_tokens`."""
    max_length: int = 0
    """Most tokens, prompt and output together: what the request and the context allow."""
    stream: TextStream | None = None
    slot: int = -1
    num_cached: int = 0
    """How many of `tokens` the target remembers; the only truth about it."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The token id or string that ended it; None at a limit."""
    sources: list[str] = field(default_factory=list)
    """Who said each output token first: a drafter's name, or 'target'."""
    logprobs: list[Logprob] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    stop_tokens: Mapping[int, str] = field(default_factory=dict)
    """Stop strings that are one special token, by its id: such a token has no text in which to find them."""

    @property
    def pending(self) -> list[int]:
        return self.tokens[self.num_cached :]

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def num_output_tokens(self) -> int:
        """Number of output tokens."""
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """How many more tokens may be written."""
        return self.max_length - len(self.tokens)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


def open_sequence(
    prompt: SequenceOf[int],
    sampling: SamplingParams,
    *,
    seed: int,
    eos: frozenset[int],
    context: int,
    stream: TextStream | None = None,
    stop_tokens: Mapping[int, str] | None = None,
) -> Sequence:
    """A fresh sequence; `context` is the most tokens the target can hold."""
    named = stop_tokens or {}
    ends = frozenset([*sampling.stop_token_ids, *named]) | (frozenset() if sampling.ignore_eos else eos)
    limit = min(context, len(prompt) + sampling.max_tokens)
    return Sequence(list(prompt), len(prompt), sampling, seed, ends, limit, stream, stop_tokens=named)
