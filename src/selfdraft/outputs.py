"""What a call gives back: answers to prompts, pieces of a stream, and the requests on their way to either."""

from __future__ import annotations

from dataclasses import dataclass, replace

from selfdraft.core.sequence import Sequence
from selfdraft.errors import SelfdraftError
from selfdraft.prompts import ParsedPrompt
from selfdraft.types import FinishReason, Logprob, Stats


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. `sources[i]` says who proposed token i: a drafter's name, or 'target'."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    sources: tuple[str, ...]
    logprobs: tuple[Logprob, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    stats: Stats


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answers to one prompt, in order of their index."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    error: SelfdraftError | None = None
    """Why there are no outputs, with `return_errors`."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a stream has got since its last piece: tokens with their sources, and the text that is certain by now.

    Texts of all pieces add up to the text of the answer; a piece may have tokens and no text yet.
    """

    text: str
    token_ids: tuple[int, ...]
    sources: tuple[str, ...]
    finish_reason: FinishReason | None
    output: CompletionOutput
    """The answer so far."""


@dataclass(frozen=True, slots=True)
class Job:
    """The requests of one call to `LLM.generate`: for each prompt its sequences, or why it has none."""

    prompts: list[ParsedPrompt]
    requests: list[list[Sequence] | SelfdraftError]
    return_errors: bool

    @property
    def sequences(self) -> list[Sequence]:
        return [sequence for one in self.requests if not isinstance(one, SelfdraftError) for sequence in one]


def completion(index: int, sequence: Sequence) -> CompletionOutput:
    """The answer of a sequence so far."""
    return CompletionOutput(
        index,
        sequence.stream.text if sequence.stream is not None else "",
        tuple(sequence.output),
        tuple(sequence.sources),
        tuple(sequence.logprobs),
        sequence.finish_reason,
        sequence.stop_reason,
        replace(sequence.stats, acceptance_histogram=dict(sequence.stats.acceptance_histogram)),
    )
