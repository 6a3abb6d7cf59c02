"""One engine for any number of threads: their requests share its steps, and whoever waits for an answer runs them.

There is no thread of its own. One caller at a time runs a step, of everybody's requests; between two steps all whose
wait is over read what they waited for. A caller that is busy elsewhere (a stream that nobody reads) holds nobody up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

from selfdraft.core.sequence import Sequence
from selfdraft.engine.engine import Engine
from selfdraft.errors import EngineError

NO_OWNERS: Mapping[Sequence, str] = {}
T = TypeVar("T")
Done = Callable[[], bool]


class SharedEngine:
    """Steps of `engine` for many callers. Only through here may an engine be used by more than one thread.

    `owner`: all requests may reuse what earlier ones prefilled; None: none may.
    """

    def __init__(self, engine: Engine, owner: str | None = None) -> None:
        self.engine, self.owner = engine, owner
        self.errors: WeakKeyDictionary[Sequence, EngineError] = WeakKeyDictionary()
        """Why a request was aborted, where its own step failed."""
        self._changed = threading.Condition()
        """Guards everything here. It is free while a step runs."""
        self._runs: int | None = None
        """The thread that runs a step now."""
        self._waits: list[Done] = []
        self._submitted: deque[tuple[Sequence, str | None]] = deque()
        self._aborted: deque[Sequence] = deque()

    def submit(self, sequences: SequenceOf[Sequence], owners: Mapping[Sequence, str] = NO_OWNERS) -> None:
        """Let requests wait for a slot; they are in the next step. Errors: those of `Engine.check`; then none is.

        `owners`: who may reuse what one of them prefilled, where it is not the owner of all.
        """
        self._not_inside()
        for sequence in sequences:
            self.engine.check(sequence)
        with self._changed:
            self._submitted += ((sequence, owners.get(sequence, self.owner)) for sequence in sequences)
            self._changed.notify_all()

    def abort(self, sequences: SequenceOf[Sequence]) -> None:
        """End what is not finished of these, before the next step; what has ended stays as it is."""
        with self._changed:
            self._aborted += sequences
            if self._runs is None:
                self._sort()
            self._changed.notify_all()

    def run(self, sequences: SequenceOf[Sequence]) -> None:
        """Return when all of these have ended. They must have been submitted; they are aborted if this raises.

        Errors: EngineError for a fault that belongs to no request alone; `errors` has the others.
        """
        try:
            self.until(lambda: all(sequence.finished for sequence in sequences), lambda: None)
        except BaseException:
            self.abort(sequences)
            raise

    def until(self, done: Done, read: Callable[[], T]) -> T:
        """What `read` says when `done` holds. Both are called while no step runs.

        Errors: EngineError when called from inside a step, or when a step fails for all.
        """
        self._not_inside()
        with self._changed:
            self._waits.append(done)
            try:
                while not (self._runs is None and done()):
                    if self._runs is None and not any(wait() for wait in self._waits):
                        self._step()
                    else:  # a step runs, or somebody has to read first
                        self._changed.wait()
                return read()
            finally:
                self._waits.remove(done)
                self._changed.notify_all()

    @contextmanager
    def idle(self, what: str) -> Iterator[None]:
        """A block during which no step runs. Errors: EngineError when there are requests, which forbid `what`."""
        self._not_inside()
        with self._changed:
            while self._runs is not None:
                self._changed.wait()
            self._sort()
            count = len(self.engine.running) + len(self.engine.waiting)
            if count:
                raise EngineError(f"{what} while {count} requests run: wait for them, or close their streams")
            yield

    def _step(self) -> None:
        """One step of all requests, the lock set free meanwhile."""
        self._sort()
        if not self.engine.running and not self.engine.waiting:
            if any(wait() for wait in self._waits):
                return  # what was waited for has been aborted
            raise EngineError("a request waits that the engine does not know: it was never submitted")
        self._runs = threading.get_ident()
        self._changed.release()
        try:
            self._advance()
        finally:
            self._changed.acquire()
            self._runs = None
            self._sort()
            self._changed.notify_all()

    def _advance(self) -> None:
        try:
            self.engine.advance()
        except EngineError as error:
            if not isinstance(error.request, Sequence):
                raise
            self.errors[error.request] = error
            self.engine.fail(error.request)
        except Exception:
            raise
        except BaseException:  # Ctrl-C may have come between two writes: what the others have is not certain any more
            for sequence in [*self.engine.running]:
                self.errors[sequence] = EngineError("the step was interrupted in the thread that ran it", sequence)
                self.engine.fail(sequence)
            raise

    def _sort(self) -> None:
        """Hand on to the engine what came in during a step."""
        while self._submitted:  # one by one: a stream that is collected as garbage may come in between
            sequence, owner = self._submitted.popleft()
            self.engine.submit(sequence, owner=owner)
        while self._aborted:
            sequence = self._aborted.popleft()
            if not sequence.finished:
                self.engine.abort(sequence)

    def _not_inside(self) -> None:
        if self._runs == threading.get_ident():
            raise EngineError(
                "a step is running in this thread: a logits processor, a stopping criterion or a drafter cannot ask "
                "the same LLM for another answer"
            )
