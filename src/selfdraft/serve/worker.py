"""The engine worker: one thread that owns the engine, takes calls in and hands out what each step brought.

Nothing else touches the engine. A call waits in a bounded queue, gets slots in a fair order, and ends exactly once:
with an answer, with an error, or aborted. What a step brings is put into the call's own list, which is bounded by the
length of the answer; so a client that reads slowly holds nobody up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from selfdraft.core.sequence import Sequence
from selfdraft.core.verify import Result
from selfdraft.engine.engine import Engine
from selfdraft.errors import EngineError, SelfdraftError
from selfdraft.outputs import Piece, PieceReader
from selfdraft.protocols import Drafter
from selfdraft.serve.metrics import Metrics
from selfdraft.types import Clock

_log = logging.getLogger("selfdraft.serve")
FAILURES = 3
"""Steps in a row that fail for all: then the engine is given up, and the process ends."""


class Refused(SelfdraftError):
    """A call that is not taken, or not finished, for no fault of its own. `status` 429 or 503; `wait` seconds."""

    def __init__(self, message: str, *, status: int = 503, code: str = "server_overloaded", wait: int = 1) -> None:
        super().__init__(message)
        self.status, self.code, self.wait = status, code, wait


@dataclass(frozen=True, slots=True)
class Update:
    """What a step brought to answer `index` of a call."""

    index: int
    piece: Piece
    result: Result | None = None
    """The step itself, for a call that wants to see its token tree."""


def together(updates: SequenceOf[Update]) -> list[Update]:
    """Updates of one moment: what came for the same answer is one update; one that shows its step stays alone."""
    found: list[Update] = []
    open_at: dict[int, int | None] = {}  # of each answer the place of the update that the next one joins
    for update in updates:
        place = open_at.get(update.index)
        if place is not None and update.result is None:
            found[place] = replace(update, piece=found[place].piece.and_then(update.piece))
        else:
            open_at[update.index] = len(found) if update.result is None else None
            found.append(update)
    return found


@dataclass(eq=False, slots=True)
class Call:
    """One request of a client on its way through the engine: `n` sequences, and what they have got so far."""

    sequences: SequenceOf[Sequence]
    caller: str = "anybody"
    owner: str | None = None
    """Whose prefilled prompts may be reused; None: nobody's."""
    drafter: Drafter | None = None
    notify: Callable[[], None] = lambda: None
    """Called in the worker's thread when `updates`, `error` or `done` changed."""
    wants_trees: bool = False
    queue_timeout: float = float("inf")
    timeout: float = float("inf")
    updates: deque[Update] = field(default_factory=deque)
    error: Exception | None = None
    done: bool = False
    arrived: float = 0.0
    admitted: float | None = None
    first_token: float | None = None
    readers: list[PieceReader] = field(default_factory=list)
    predicted: int = 0
    """Draft tokens that came from the request's prediction."""

    @property
    def tokens(self) -> int:
        """Most tokens that the call's sequences hold together."""
        return sum(sequence.max_length for sequence in self.sequences)

    @property
    def ended(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)


def from_prediction(source: str) -> bool:
    """Whether a token was drafted from the request's prediction, alone or beside other sources."""
    return any(part.startswith("prediction") for part in source.split("+"))


class EngineWorker:
    """The thread that runs an engine for calls. `clock` in seconds is what deadlines are counted by."""

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics | None = None,
        *,
        max_queue: int = 64,
        kv_tokens: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.engine, self.metrics, self.clock = engine, metrics or Metrics(), clock
        self.max_queue, self.kv_tokens = max_queue, kv_tokens
        self.draining = False
        self.failed: Exception | None = None
        """Why the engine was given up."""
        self._changed = threading.Condition()
        """Guards the four below."""
        self._incoming: deque[Call] = deque()
        self._cancelled: deque[Call] = deque()
        self._stopping = False
        self._count = 0
        """Calls that have not ended."""
        self._waiting: list[Call] = []
        self._active: list[Call] = []
        self._stepping_since: float | None = None
        self._failures = 0
        self.metrics.running.set_function(lambda: len(engine.running))
        self.metrics.waiting.set_function(lambda: self.waiting)
        self._thread = threading.Thread(target=self._run, name="selfdraft-engine", daemon=True)

    # From any thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Abort everything and end the thread."""
        with self._changed:
            self._stopping = self.draining = True
            self._changed.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def submit(self, call: Call) -> None:
        """Take a call in. Errors: Refused when the queue is full, or the server ends; RequestError of its sequences."""
        for sequence in call.sequences:
            self.engine.check(sequence)
        with self._changed:
            if self.failed is not None or self.draining:
                raise Refused("the server is going down; ask again later", code="server_draining", wait=5)
            room = self.max_queue + len(self.engine.slots.free) - len(self._incoming) - len(self._waiting)
            if room <= 0:
                raise Refused(
                    f"{self._count} requests run or wait, and no more may: ask again later",
                    status=429,
                    wait=max(1, min(30, self._count // 4)),
                )
            call.arrived = self.clock()
            call.readers = [PieceReader(sequence) for sequence in call.sequences]
            self._count += 1
            self._incoming.append(call)
            self._changed.notify_all()

    def cancel(self, call: Call) -> None:
        """End a call before the next step; one that has ended stays as it is."""
        with self._changed:
            self._cancelled.append(call)
            self._changed.notify_all()

    @property
    def busy(self) -> int:
        """Calls that have not ended."""
        return self._count

    @property
    def tokens(self) -> int:
        """Most tokens, prompt and answer together, that the calls which have not ended can come to hold."""
        with self._changed:
            calls = [*self._incoming, *self._waiting, *self._active]
        return sum(call.tokens for call in calls)

    @property
    def waiting(self) -> int:
        """Calls that have no slot yet."""
        return len(self._incoming) + len(self._waiting)

    def stalled(self, limit: float) -> bool:
        """Whether one step has been running for longer than `limit` seconds."""
        since = self._stepping_since
        return since is not None and self.clock() - since > limit

    # In the worker's own thread

    def _run(self) -> None:
        try:
            while self._next():
                self.turn()
        except BaseException as error:  # a fault of ours: nobody may wait for an answer that never comes
            _log.exception("the engine worker failed")
            self.failed = error if isinstance(error, Exception) else EngineError(f"the engine worker ended: {error!r}")
        finally:
            self.draining = True
            self._take_in()
            for call in [*self._waiting, *self._active]:
                self._end(call, Refused("the server went down before the answer was whole", code="server_draining"))

    def turn(self) -> None:
        """One round: who has come or gone, whose time is over, who gets a slot, one step."""
        self._take_in()
        self._expire()
        self._admit()
        if self.engine.running or self.engine.waiting:
            self._step()

    def _next(self) -> bool:
        """Wait until there is something to do; False at the end."""
        with self._changed:
            while not (self._stopping or self._incoming or self._cancelled or self._waiting or self._active):
                self._changed.wait()
            return not self._stopping

    def _take_in(self) -> None:
        with self._changed:
            self._waiting += self._incoming
            self._incoming.clear()
            gone = [*self._cancelled]
            self._cancelled.clear()
        for call in gone:
            if not call.done:
                self.metrics.cancelled.inc()
                self._end(call, None)

    def _expire(self) -> None:
        now = self.clock()
        for call in [*self._waiting]:
            if now - call.arrived > min(call.queue_timeout, call.timeout):
                self._end(call, Refused("no slot was free in time; ask again later", code="queue_timeout"))
        for call in [*self._active]:
            if now - call.arrived > call.timeout:
                self._end(call, Refused("the answer took longer than a request may", code="request_timeout"))

    def _admit(self) -> None:
        """Give free slots to waiting calls: the caller with the fewest running calls first, then who came first."""
        while self._waiting and len(self.engine.slots.free) > len(self.engine.waiting):
            running = Counter(call.caller for call in self._active)
            call = min(self._waiting, key=lambda one: running[one.caller])
            if self._active and self.kv_tokens is not None:
                taken = sum(one.tokens for one in self._active)
                if taken + call.tokens > self.kv_tokens:
                    return
            self._waiting.remove(call)
            self._active.append(call)
            call.admitted = self.clock()
            self.metrics.queue_seconds.observe(call.admitted - call.arrived)
            for sequence in call.sequences:
                self.engine.submit(sequence, owner=call.owner, drafter=call.drafter)

    def _step(self) -> None:
        """One step, and what it brought, also where it failed for one request: others may have ended in it."""
        results: dict[Sequence, Result] = {}
        self._stepping_since = self.clock()
        try:
            results = dict(self.engine.advance())
            self._failures = 0
        except EngineError as error:
            if isinstance(error.request, Sequence):
                self._fail_one(error.request, error)
            else:
                self._fail_all(error)
        except Exception as error:
            self._fail_all(error)
        finally:
            self._stepping_since = None
        self.metrics.steps.inc()
        self._hand_out(results)

    def _hand_out(self, results: Mapping[Sequence, Result]) -> None:
        """Give every call what is new in its answers. `results`: what the step said of those that it moved."""
        for call in [*self._active]:
            moved = False
            for index, (sequence, reader) in enumerate(zip(call.sequences, call.readers, strict=True)):
                result = results.get(sequence)
                if result is not None:
                    drafted = result.draft.sources[: result.draft.num_candidates]
                    call.predicted += sum(map(from_prediction, drafted))
                if reader.moved:
                    moved = True
                    self._update(call, index, reader, result)
            if call.ended:  # all answers of a call have what the step brought before one of them ends it
                self._end(call, None)
            elif moved:
                call.notify()

    def _update(self, call: Call, index: int, reader: PieceReader, result: Result | None) -> None:
        if call.first_token is None:
            call.first_token = self.clock()
            self.metrics.first_token_seconds.observe(call.first_token - call.arrived)
        self.metrics.saw_answer(result, reader.sequence.num_output_tokens - reader.written)
        tree = replace(result, logits=None) if result is not None and call.wants_trees else None
        call.updates.append(Update(index, reader.read(), tree))

    def _fail_one(self, sequence: Sequence, error: EngineError) -> None:
        self.engine.fail(sequence)
        for call in [call for call in self._active if sequence in call.sequences]:
            self._end(call, error)

    def _fail_all(self, error: Exception) -> None:
        """A step failed, and it is no single request's fault: all that run end with it, but for what is whole."""
        _log.error("a step failed for all requests: %s: %s", type(error).__name__, error)
        self._failures += 1
        for sequence in [*self.engine.running]:
            self.engine.fail(sequence)
        for call in [call for call in self._active if any(one.finish_reason == "abort" for one in call.sequences)]:
            self._end(call, EngineError(f"the step failed: {type(error).__name__}"))
        if self._failures >= FAILURES:
            raise EngineError(f"{FAILURES} steps in a row failed, the last with {type(error).__name__}: {error}")

    def _end(self, call: Call, error: Exception | None) -> None:
        """The end of a call, whichever it is; what still runs of it is aborted."""
        if call.done:
            return
        for sequence in call.sequences:
            self.engine.abort(sequence)
        for calls in (self._waiting, self._active):
            if call in calls:
                calls.remove(call)
        call.error, call.done = error, True
        with self._changed:
            self._count -= 1
        self.metrics.saw_end(call.arrived, call.first_token, self.clock(), call.sequences, error)
        call.notify()
