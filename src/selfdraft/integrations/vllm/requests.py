"""vLLM's batch as our drafters see it: rows of token ids become sequences, and what was verified becomes results.

vLLM hands a proposer the tokens of every batch row after each step, without names of requests; rows are moved and
used again. So a request is known by its text: it is the one whose tokens the row begins with, and behind which stand
exactly the tokens of this step. Where the worker tells names (`Known`), these are used instead. Needs no vLLM.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result, walk
from selfdraft.protocols import Drafter
from selfdraft.types import Budget, SamplingParams

Tokens = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
PATIENCE = 16
"""Steps without a row after which a request has ended, where nobody tells: one that comes back is read anew."""
READING = Sequence([], 0, SamplingParams())
"""Stands for all requests whose prompts are still being read."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the worker knows of a request beside its tokens."""

    prompt_length: int
    limit: int
    """Most tokens, prompt and output together."""
    prediction: tuple[int, ...] = ()
    """Token ids of the text that the answer is expected to resemble."""


class Known(Protocol):
    """The requests by name, as the worker has them."""

    def names(self) -> SequenceOf[str]:
        """Names of the batch rows, in order."""
        ...

    def lives(self, name: str) -> bool:
        """Whether the request has not ended; one that waits to go on lives."""
        ...

    def facts(self, name: str) -> Facts: ...


class Request:
    """One request: its sequence, its last draft, and its tokens as an array, to be compared with rows."""

    def __init__(self, sequence: Sequence, name: str | None) -> None:
        self.sequence, self.name = sequence, name
        self.draft = EMPTY
        self.idle = 0
        """Steps since it had a row."""
        self._tokens: Tokens = np.array(sequence.tokens, dtype=np.int32)
        self._size = len(sequence.tokens)

    def __len__(self) -> int:
        return self._size

    def continues(self, tokens: Tokens, new: int) -> bool:
        """Whether `tokens` are those of this request and `new` more."""
        size = len(tokens) - new
        return size == self._size and np.array_equal(self._tokens[:size], tokens[:size])

    def read(self, tokens: Tokens) -> None:
        """Take over the tokens behind those that it has."""
        if len(tokens) > len(self._tokens):
            self._tokens = np.concatenate([tokens, np.zeros(len(tokens), dtype=np.int32)])
        else:
            self._tokens[self._size : len(tokens)] = tokens[self._size :]
        self.sequence.tokens += tokens[self._size :].tolist()
        self.sequence.num_cached = len(tokens) - 1
        self._size = len(tokens)


class Requests:
    """The requests of a vLLM batch, and the drafter that drafts for them.

    `most`: candidates of a draft; `context`: tokens that the model can hold. `room`: how many tokens may be drafted by
    passes that write behind the end of a sequence; None: there are no such passes.
    """

    def __init__(
        self,
        drafter: Drafter,
        most: int,
        context: int,
        known: Known | None = None,
        room: Callable[[Sequence], int] | None = None,
    ) -> None:
        self.drafter, self.most, self.context = drafter, most, context
        self.known, self.room = known, room
        self._rows: list[Request | None] = []
        """By batch row, as they were in the last step."""
        self._idle: list[Request] = []
        """Those that had no row in the last step, but may come back."""

    def __len__(self) -> int:
        """Requests that are remembered."""
        return sum(request is not None for request in self._rows) + len(self._idle)

    @torch.inference_mode()
    def propose(self, sampled: SequenceOf[SequenceOf[int]], lengths: SequenceOf[int], table: Tokens) -> list[list[int]]:
        """A chain for every row, empty where there is none.

        `sampled`: the tokens of this step by row, none while a prompt is read. `lengths`: tokens of each row, these
        included. `table` [rows, context]: token ids of the rows.
        """
        rows = [table[place, : int(length)] for place, length in zip(range(len(sampled)), lengths, strict=False)]
        names = list(self.known.names()) if self.known is not None else [None] * len(sampled)
        found = self._match([len(new) for new in sampled], rows, names)
        results: list[tuple[Sequence, Result]] = []
        for place, (new, tokens) in enumerate(zip(sampled, rows, strict=True)):
            request = found[place]
            if not new:
                results.append((READING, Result(EMPTY)))
            elif request is None:
                request = found[place] = self._open(tokens, len(new), names[place])
                results.append((request.sequence, Result(EMPTY, (), tuple(map(int, new)))))
            else:
                results.append((request.sequence, verified(request.draft, new)))
                _count(request.sequence, results[-1][1])
                request.read(tokens)
        self._rows, before = found, [*self._rows, *self._idle]
        results += [(sequence, Result(EMPTY)) for sequence in self._ended(before)]
        if results:
            self.drafter.observe(*map(list, zip(*results, strict=True)))
        return self._draft()

    def _match(self, new: list[int], rows: list[Tokens], names: SequenceOf[str | None]) -> list[Request | None]:
        """The request of every row; None for a new one, and while a prompt is read."""
        found: list[Request | None] = [None] * len(rows)
        free = {id(request): request for request in [*self._rows, *self._idle] if request is not None}
        places = [place for place, count in enumerate(new) if count]
        for place in places:  # most have stayed where they were
            request = self._rows[place] if place < len(self._rows) else None
            if request is not None and request.name == names[place] and request.continues(rows[place], new[place]):
                found[place] = free.pop(id(request))
        moved = [place for place in places if found[place] is None]
        if not (moved and free):
            return found
        by_size = defaultdict[int, list[Request]](list)
        for request in free.values():
            by_size[len(request)].append(request)
        for place in moved:
            same = by_size[len(rows[place]) - new[place]]
            for request in same:
                if request.name == names[place] and request.continues(rows[place], new[place]):
                    found[place] = request
                    same.remove(request)
                    break
        return found

    def _open(self, tokens: Tokens, new: int, name: str | None) -> Request:
        """A request that was not seen before."""
        facts = Facts(len(tokens) - new, self.context)
        if self.known is not None and name is not None:
            facts = self.known.facts(name)
        sequence = Sequence(
            tokens.tolist(),
            facts.prompt_length,
            SamplingParams(prediction=facts.prediction),
            max_length=min(facts.limit, self.context),
            num_cached=len(tokens) - 1,
        )
        return Request(sequence, name)

    def _ended(self, before: Iterable[Request | None]) -> list[Sequence]:
        """Those of `before` that have ended; the others without a row are kept."""
        present = {id(request) for request in self._rows}
        names = {request.name for request in self._rows if request is not None}
        self._idle, ended = [], []
        for request in before:
            if request is None or id(request) in present:
                continue
            request.draft = EMPTY  # it will not be verified
            request.idle += 1
            if self.known is not None and request.name is not None:
                lives = self.known.lives(request.name) and request.name not in names  # else it was read anew
            else:
                lives = request.idle < PATIENCE
            if lives:
                self._idle.append(request)
            else:
                request.sequence.finish_reason = "stop"
                ended.append(request.sequence)
        return ended

    def _draft(self) -> list[list[int]]:
        at = [place for place, request in enumerate(self._rows) if request is not None]
        asked = [request for request in self._rows if request is not None]
        for place, request in zip(at, asked, strict=True):
            request.idle, request.sequence.slot = 0, place
        sequences = [request.sequence for request in asked]
        drafts = self.drafter.draft(sequences, list(map(self._budget, sequences))) if asked else []
        proposed: list[list[int]] = [[] for _ in self._rows]
        for place, request, draft in zip(at, asked, drafts, strict=True):
            request.draft = draft
            proposed[place] = list(draft.tokens)
        return proposed

    def _budget(self, sequence: Sequence) -> Budget:
        """Accepted tokens and the one behind them must fit into the room of the request."""
        depth = sequence.remaining - 1
        if self.room is not None:
            depth = min(depth, self.room(sequence))
        return Budget(self.most, max(depth, 0), 0, chain=True)


def verified(draft: Draft, tokens: SequenceOf[int]) -> Result:
    """What a step said: the target chose `tokens`, so all but the last of them may be of the draft."""
    chosen = [int(token) for token in tokens]
    says = iter(chosen)
    behind = -1  # no token
    path, _ = walk(draft, lambda node: next(says, behind))
    return Result(draft, tuple(path[: len(chosen) - 1]), tuple(chosen))


def _count(sequence: Sequence, result: Result) -> None:
    """Book the step in the statistics of the request; vLLM has counters of its own beside them."""
    sequence.stats.count(result.draft.num_candidates, len(result.path), len(result.tokens))
