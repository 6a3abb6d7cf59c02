"""The engine: slots, waiting requests, and two drivers over the one step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from functools import partial
from weakref import WeakKeyDictionary

from selfdraft.core.sequence import Sequence
from selfdraft.core.verify import Result, verify
from selfdraft.engine import scheduler
from selfdraft.engine.slots import ONE_PROMPT, Reuse, Slots
from selfdraft.engine.step import Choose, step
from selfdraft.errors import EngineError, PromptTooLong, RequestError
from selfdraft.protocols import Drafter, Target, beside_of, needs_of, search_of
from selfdraft.types import within


class Engine:
    """Runs sequences on `slots` slots of a target; more than that wait.

    `chunk`: tokens of one piece of a prefill; `rows`: about how many rows one pass may have;
    `nodes`: most draft candidates of one sequence in one step; `reuse`: how much of what a slot holds of an earlier
    request may be reused by one of the same owner.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        *,
        slots: int = 1,
        chunk: int = 256,
        rows: int = 1024,
        nodes: int = 128,
        reuse: Reuse = "chunks",
    ) -> None:
        for name, value in (("slots", slots), ("chunk", chunk), ("rows", rows)):
            within(name, value, 1, 2**20)
        within("nodes", nodes, 0, 2**16)
        self.target, self.drafter = target, drafter
        self.chunk, self.rows, self.nodes = chunk, rows, nodes
        self.choose: Choose | None = None
        """Says what the target chooses along each tree, where ranks share the rows of a pass; else `verify` does."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.slots = Slots(slots, chunk, reuse)
        self._owners: WeakKeyDictionary[Sequence, str] = WeakKeyDictionary()
        self._drafters: WeakKeyDictionary[Sequence, Drafter] = WeakKeyDictionary()
        self._last, self._verify = drafter, verify_for(drafter, target)
        """The drafter of the last step, and what follows the target's choices for it."""

    def submit(self, sequence: Sequence, *, owner: str | None = None, drafter: Drafter | None = None) -> None:
        """Let a sequence wait for a slot; one that was aborted before is not run. Errors: those of `check`.

        `owner`: whose earlier requests may have prefilled the beginning of this one's prompt, and whose later ones may
        find it prefilled; None reuses and leaves nothing. `drafter`: another one than the engine's.
        """
        self.check(sequence)
        if sequence.finished:
            return
        self._drafters[sequence] = drafter or self.drafter
        if owner is not None:
            self._owners[sequence] = owner
        self.waiting.append(sequence)

    def check(self, sequence: Sequence) -> None:
        """Errors: RequestError for an empty prompt, PromptTooLong for one that leaves no room for an answer."""
        if not sequence.tokens:
            raise RequestError("the prompt is empty: give at least one token")
        if sequence.remaining <= 0:
            raise PromptTooLong(f"a prompt of {sequence.prompt_length} tokens leaves no room in {sequence.max_length}")

    def abort(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; doing so twice, or after its end, changes nothing."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if not sequence.finished:
            sequence.finish_reason = "abort"
        self._release()

    def fail(self, sequence: Sequence) -> None:
        """Abort a sequence whose own step failed: nothing of what it left in its slot is reused."""
        self._owners.pop(sequence, None)
        self.abort(sequence)

    def advance(self) -> list[tuple[Sequence, Result]]:
        """One step of whoever is next.

        When it raises the engine stays usable. No sequence has moved; or all have, where a drafter raises in `observe`;
        or, where a stopping criterion raises, those before its own, which cannot go on: abort it. Those that are
        finished have left their slots. Errors: EngineError, with the request that it belongs to, if it is one's alone.
        """
        for sequence, taken in scheduler.admit(self.waiting, self.slots, self._owners, self.running):
            self.running.append(sequence)
            if taken.count:
                self.target.reuse(taken.slot, taken.source, taken.count)
        group = scheduler.next_group(self.running, self._drafters, self._last) if self.running else []
        work = scheduler.plan(group, self.chunk, self.rows)
        if not work:
            if self.running or self.waiting:
                raise EngineError(f"{len(self.waiting)} requests wait and none runs, but no slot is free")
            return []
        if (turn := self._drafters[work[0][0]]) is not self._last:
            self._last, self._verify = turn, verify_for(turn, self.target)
        try:
            results = step(self.target, self._last, work, self.nodes, self.choose or self._verify)
        finally:
            self._release()
        return [(sequence, result) for (sequence, _), result in zip(work, results, strict=True)]

    def generate(self, sequences: SequenceOf[Sequence]) -> Iterator[tuple[Sequence, Result]]:
        """Run a closed set to its end, step by step. Leaving early (break, exception) aborts what is left."""
        try:
            for sequence in sequences:
                self.submit(sequence)
            while not all(sequence.finished for sequence in sequences):
                if not self.running and not self.waiting:
                    raise EngineError("a request has left the engine without an end: it was used from elsewhere, too")
                yield from self.advance()
        finally:
            for sequence in sequences:
                self.abort(sequence)

    def serve(self, requests: Iterable[Sequence | None]) -> Iterator[Sequence]:
        """Continuous batching over an open stream of requests; yields each sequence as it ends.

        One item is read before each step; None means nothing has come in meanwhile. After the last one the rest runs
        out. A request at which a step fails (NaN, every token banned) is aborted and yielded; the others go on.
        Leaving early aborts what is left.
        """
        source = iter(requests)
        more = True
        try:
            while more or self.waiting or self.running:
                try:
                    request = next(source)
                except StopIteration:
                    more, request = False, None
                if request is not None:
                    self.submit(request)
                yield from self._advance_healthy()
        finally:
            for sequence in [*self.waiting, *self.running]:
                self.abort(sequence)

    def _advance_healthy(self) -> list[Sequence]:
        """One step; the sequences that ended by it, one that made it fail among them."""
        try:
            return [sequence for sequence, _ in self.advance() if sequence.finished]
        except EngineError as error:
            if not isinstance(error.request, Sequence):
                raise
            self.fail(error.request)
            return [error.request]

    def _release(self) -> None:
        for sequence in [s for s in self.running if s.finished]:
            self.running.remove(sequence)
            owner = self._owners.get(sequence)
            self.slots.give(sequence.slot, scheduler.held_by(sequence, owner) if owner is not None else None)
            if owner is not None and owner.startswith(ONE_PROMPT) and not self._has(owner):
                self.slots.forget(owner)

    def _has(self, owner: str) -> bool:
        return any(self._owners.get(one) == owner for one in (*self.running, *self.waiting))


def verify_for(drafter: Drafter, target: Target) -> Choose:
    """What follows the target's choices, and asks along with them what this drafter reads."""
    return partial(verify, top=needs_of(drafter).runners_up, beside=beside_of(drafter), search=search_of(target))
