"""Processors that passes share with the work beside them, and the processes that a request and its answer go through.

On one machine the passes of all replicas, the server's own work for each part of an answer, Ray's gateway and proxy,
and the client that asks have the same cores. `Processors` are these cores: each that works gets as much as the others,
and never more than one core. `Host` says what the work beside the passes takes, as `recipes/fleet_costs.py` has
measured it. Times are in seconds, of a core that is had alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from pathlib import Path

import simpy

Waiting = Generator[simpy.Event, object, None]
"""A process of SimPy."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one process takes of the processors beside passes."""

    request: float = 0.0
    """Of each request."""
    part: float = 0.0
    """Of each part of an answer that is streamed."""


@dataclass(frozen=True, slots=True)
class Host:
    """A machine on which everything runs, and what it costs beside the passes."""

    processors: float
    """Cores."""
    replica: Cost = field(default_factory=Cost)
    """Of the threads of a replica that do not run passes."""
    way: tuple[tuple[str, Cost], ...] = ()
    """The other processes in the order in which an answer reaches them; the last one is the client."""
    beside: Cost = field(default_factory=Cost)
    """Of processes for which no answer waits."""
    always: float = 0.0
    """Cores that are taken all the time, requests or not."""
    per_answer: float = 0.0
    """That a running answer adds to a step, in the thread that runs the passes."""
    unasked: float = 0.0
    """That a row of a prompt saves of a pass: it is not asked for logits, and the rows of a profile are."""


def read_host(path: Path) -> Host:
    """What `python -m recipes.fleet costs` has written. Errors: SystemExit."""
    try:
        given = json.loads(path.read_text("utf-8"))["host"]
        way = tuple((name, Cost(**cost)) for name, cost in given.pop("way"))
        replica, beside = Cost(**given.pop("replica")), Cost(**given.pop("beside"))
        return Host(way=way, replica=replica, beside=beside, **given)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise SystemExit(f"{path} has no costs: give what 'recipes.fleet costs' has written ({error})") from error


class Processors:
    """Cores of a machine. What runs on them has an equal share of them, at most one core each."""

    def __init__(self, env: simpy.Environment, cores: float) -> None:
        self.env, self.cores = env, cores
        self._given = 0.0
        """Seconds of a core that each one which ran all the time has had."""
        self._since = env.now
        self._running: list[tuple[float, int, simpy.Event]] = []
        """As a heap: what `_given` is when it ends, a number that orders equals, its end."""
        self._numbers = count()
        self._plans = 0

    @property
    def speed(self) -> float:
        """Of each that runs, in cores."""
        return min(1.0, self.cores / max(len(self._running), 1))

    def run(self, seconds: float) -> simpy.Event:
        """Work of so many seconds of a core; the event is its end."""
        self._look()
        ended = self.env.event()
        heappush(self._running, (self._given + seconds, next(self._numbers), ended))
        self._plan()
        return ended

    def _look(self) -> None:
        """Note what has been given until now."""
        self._given += (self.env.now - self._since) * self.speed
        self._since = self.env.now

    def _plan(self) -> None:
        """Wake up when the next one ends, unless another one comes before."""
        self._plans += 1
        plan, (upto, _, _) = self._plans, self._running[0]
        after = self.env.timeout(max(upto - self._given, 0.0) / self.speed)
        assert after.callbacks is not None
        after.callbacks.append(lambda _: self._end(upto) if plan == self._plans else None)

    def _end(self, upto: float) -> None:
        self._look()
        self._given = upto  # not what rounding has made of it
        while self._running and self._running[0][0] <= upto:
            heappop(self._running)[2].succeed()
        if self._running:
            self._plan()


class Desk:
    """One process that does its work for requests and parts one after the other, on processors that it shares."""

    def __init__(self, env: simpy.Environment, processors: Processors, cost: Cost) -> None:
        self.cost = cost
        self._processors = processors
        self._turn = simpy.Resource(env)

    def does(self, seconds: float, begins: Callable[[], None] | None = None) -> Waiting:
        """Wait for its turn and for its work. `begins` is called between the two."""
        with self._turn.request() as turn:
            yield turn
            if begins is not None:
                begins()
            yield self._processors.run(seconds)


class Front:
    """The way of requests to the replicas of one machine and of answers back."""

    def __init__(self, env: simpy.Environment, host: Host) -> None:
        self.env, self.host = env, host
        self.processors = Processors(env, host.processors - host.always)
        self.desks = [Desk(env, self.processors, cost) for _, cost in host.way]

    def desk(self) -> Desk:
        """Another replica: that of its threads beside the passes."""
        return Desk(self.env, self.processors, self.host.replica)

    def to(self, desk: Desk) -> Waiting:
        """A request on its way from the client to a replica, whose desk this is."""
        self._aside(self.host.beside.request)
        for one in (*reversed(self.desks), desk):
            yield from one.does(one.cost.request)

    def back(self, desk: Desk, begins: Callable[[], None]) -> Waiting:
        """A part of an answer on its way from a replica to the client. What is new until `begins` is in this part."""
        yield from desk.does(desk.cost.part, begins)
        self._aside(self.host.beside.part)
        for one in self.desks:
            yield from one.does(one.cost.part)

    def _aside(self, seconds: float) -> None:
        if seconds:
            self.processors.run(seconds)


def as_json(host: Host) -> dict[str, object]:
    """What `read_host` reads."""
    costs = {"replica": host.replica, "beside": host.beside}
    return {
        "processors": host.processors,
        "always": host.always,
        "per_answer": host.per_answer,
        "unasked": host.unasked,
        "way": [[name, _cost(cost)] for name, cost in host.way],
        **{name: _cost(cost) for name, cost in costs.items()},
    }


def _cost(cost: Cost) -> dict[str, float]:
    return {"request": cost.request, "part": cost.part}


def solved(few: SequenceOf[float], many: SequenceOf[float]) -> Cost:
    """The cost of a process from two runs, each (requests, parts, seconds of processors that it took).

    Errors: SystemExit when the runs do not differ in parts of a request.
    """
    (requests, parts, seconds), (others, further, spent) = few, many
    whole = requests * further - others * parts
    if not whole:
        raise SystemExit("both runs have as many parts in a request: give answers of different lengths")
    part = (requests * spent - others * seconds) / whole
    return Cost(max((seconds - part * parts) / requests, 0.0), max(part, 0.0))
