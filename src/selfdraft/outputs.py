"""What a call gives back: answers to prompts, pieces of a stream, and the requests on their way to either."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from uuid import uuid4

from selfdraft.core.sequence import Sequence
from selfdraft.engine.slots import ONE_PROMPT
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

    Texts of all pieces add up to the text of the answer; a piece may have tokens and no text yet. A piece costs what is
    new in it, however long the answer is; `output` is made when it is asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    sources: tuple[str, ...]
    logprobs: tuple[Logprob, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    num_output_tokens: int
    """Tokens of the answer so far."""
    stats: Stats
    """Counts so far."""
    _sequence: Sequence = field(repr=False, compare=False)
    _size: int = field(repr=False, compare=False)
    """Characters of the answer so far."""

    def and_then(self, later: Piece) -> Piece:
        """This piece and the one behind it, as one."""
        return replace(
            later,
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            sources=self.sources + later.sources,
            logprobs=self.logprobs + later.logprobs,
        )

    @property
    def output(self) -> CompletionOutput:
        """The answer up to this piece; costs its length."""
        sequence, count = self._sequence, self.num_output_tokens
        first = sequence.prompt_length
        return CompletionOutput(
            0,
            sequence.stream.text[: self._size] if sequence.stream is not None else "",
            tuple(sequence.tokens[first : first + count]),
            tuple(sequence.sources[:count]),
            tuple(sequence.logprobs[:count]),
            self.finish_reason,
            self.stop_reason,
            self.stats,
        )


class PieceReader:
    """Reads a sequence piece by piece, each one once."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.written = self._shown = 0

    @property
    def moved(self) -> bool:
        """Whether there is something new."""
        return self.sequence.num_output_tokens > self.written or self.sequence.finished

    def read(self) -> Piece:
        """What has come since the last time; to be called while no step runs."""
        sequence, written, shown = self.sequence, self.written, self._shown
        stream, first = sequence.stream, sequence.prompt_length + written
        size, text = 0, ""
        if stream is not None:
            self._shown = stream.size if sequence.finished else stream.settled(sequence.sampling.stop)
            size, text = stream.size, stream.since(shown)[: max(self._shown - shown, 0)]
        self.written = sequence.num_output_tokens
        return Piece(
            text,
            tuple(sequence.tokens[first:]),
            tuple(sequence.sources[written:]),
            tuple(sequence.logprobs[written:]),
            sequence.finish_reason,
            sequence.stop_reason,
            self.written,
            replace(sequence.stats, acceptance_histogram=dict(sequence.stats.acceptance_histogram)),
            sequence,
            size,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """The requests of one call to `LLM.generate`: for each prompt its sequences, or why it has none."""

    prompts: list[ParsedPrompt]
    requests: list[list[Sequence] | SelfdraftError]
    return_errors: bool

    @property
    def sequences(self) -> list[Sequence]:
        return [sequence for one in self.requests if not isinstance(one, SelfdraftError) for sequence in one]

    def owners(self) -> dict[Sequence, str]:
        """The same owner for several answers to one prompt, so that it is prefilled once."""
        groups = [one for one in self.requests if not isinstance(one, SelfdraftError) and len(one) > 1]
        return {sequence: owner for group in groups for owner in [ONE_PROMPT + uuid4().hex] for sequence in group}


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
