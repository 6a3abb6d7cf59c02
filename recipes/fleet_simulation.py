"""Replicas of the server as a discrete simulation: their steps, slots, queues and routing, on a clock of its own.

Who is admitted, what is in a step and what a slot still holds are decided by the engine's own code
(`engine/scheduler.py`, `engine/slots.py`), and a conversation goes where the router of Ray Serve sends it
(`integrations/ray/conversation.py`). Two things stand in for the model: a pass takes the seconds that a measured
profile says (`drafting/cost_model.py`), and a draft is accepted as often as in kept rows of `selfdraft bench`. So no
text is made, and a fleet of a thousand replicas runs in minutes on one core. Times are in seconds.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import simpy
from recipes.fleet_host import Desk, Front, Host, Waiting

from selfdraft.bench.load.arrivals import Ask
from selfdraft.bench.load.client import Answer
from selfdraft.core.sequence import Sequence
from selfdraft.drafting.cost_model import Profile
from selfdraft.engine import scheduler
from selfdraft.engine.slots import Reuse, Slots
from selfdraft.integrations.ray.conversation import preferred
from selfdraft.types import JsonObject, SamplingParams

ROUTINGS = ("conversation", "round-robin", "fewest")
POLICIES = ("none", "always", "pays")
RANKED = 16
"""Replicas of a conversation that are remembered in their order; behind them the whole order is made again."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What one answer of the kept rows was: its lengths, and what became of its drafts."""

    prompt: int
    """Tokens of the prompt, the chat template included."""
    output: int
    """Tokens of the answer."""
    drafted: float = 0.0
    """Share of the decoding steps that had a draft."""
    accepted: Mapping[int, int] = field(default_factory=dict)
    """Accepted tokens of a draft -> number of drafts."""
    rejected: float = 0.0
    """Draft tokens beside the accepted ones, on average of the steps that had a draft."""

    @property
    def gain(self) -> float:
        """Accepted tokens that a decoding step brings, on average."""
        drafts = sum(self.accepted.values())
        return self.drafted * sum(size * count for size, count in self.accepted.items()) / drafts if drafts else 0.0

    @property
    def rows(self) -> float:
        """Draft tokens of a decoding step, on average."""
        return self.gain + self.drafted * self.rejected


def kind_of(row: JsonObject) -> Kind:
    """The kind of a kept row of `selfdraft bench`."""
    stats = row["stats"]
    drafts, steps = stats["num_spec_steps"], stats["num_steps"] - 1  # the first token comes with the prompt
    accepted = {int(size): count for size, count in stats["acceptance_histogram"].items()}
    wrong = stats["num_draft_tokens"] - stats["num_accepted_draft_tokens"]
    drafted = min(drafts / steps, 1.0) if steps else 0.0
    return Kind(row["prompt_tokens"], row["tokens"], drafted, accepted, wrong / drafts if drafts else 0.0)


@dataclass(frozen=True, slots=True)
class Serving:
    """How a replica serves, and what it costs beside its passes."""

    profile: Profile
    slots: int = 16
    chunk: int = 256
    rows: int = 1024
    queue: int = 64
    """Requests that may wait for a slot; more are refused."""
    policy: str = "none"
    """When a step drafts: never, always as the kept rows did, or for those requests for which it pays at this batch."""
    reuse: Reuse = "all"
    host: Host | None = None
    """The machine that all replicas, the way to them and the client share; None: nothing but the passes takes time."""
    pace: float = 0.0
    """Seconds from one part of an answer to the next (`selfdraft serve --stream-pace`); 0: each step's as it comes."""
    beside: Profile | None = None
    """Seconds of passes while the neighbour on the same processor works, too."""

    @property
    def per_answer(self) -> float:
        """Seconds that each running answer adds to a step beside the pass."""
        return self.host.per_answer if self.host else 0.0

    @property
    def unasked(self) -> float:
        """Seconds that a row saves of a pass when it is not asked for logits."""
        return self.host.unasked if self.host else 0.0


@dataclass(eq=False, slots=True)
class Request:
    """One request on its way."""

    ask: Ask
    kind: Kind
    conversation: int
    sequence: Sequence
    done: simpy.Event
    draw: random.Random
    answer: Answer
    weights: tuple[SequenceOf[int], SequenceOf[int]]
    """Accepted tokens of a draft, and how many drafts had at most so many."""
    first: float | None = None
    """When its first part came to the client."""
    sending: bool = False
    """Whether a part is to be sent next: what is new goes with it."""

    def drafts(self) -> tuple[int, int]:
        """Draft tokens of a step and how many of them are accepted, drawn as they were in the kept row."""
        kind = self.kind
        if not self.weights[1] or self.draw.random() >= kind.drafted:
            return 0, 0
        number = self.draw.random() * self.weights[1][-1]
        place = next(i for i, upto in enumerate(self.weights[1]) if number < upto)
        accepted = self.weights[0][place]
        whole = int(kind.rejected)
        return accepted + whole + (self.draw.random() < kind.rejected - whole), accepted


class Replica:
    """One process with an engine: takes requests in, and runs step after step while it has any."""

    def __init__(self, env: simpy.Environment, name: str, serving: Serving, front: Front | None = None) -> None:
        self.env, self.name, self.serving, self.front = env, name, serving, front
        self.desk: Desk | None = front.desk() if front is not None else None
        self.slots = Slots(serving.slots, serving.chunk, serving.reuse)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.owners: dict[Sequence, str] = {}
        self.requests: dict[Sequence, Request] = {}
        self.neighbour: Replica | None = None
        """The replica on the other core of the same processor."""
        self.busy = 0.0
        """Seconds of all steps."""
        self.steps = 0
        self.decoded = 0
        """Answers in all steps together that moved on: by steps, the mean batch."""
        self._wake: simpy.Event | None = None
        self._drafting: tuple[frozenset[Request], frozenset[Request]] = (frozenset(), frozenset())
        env.process(self._run())

    @property
    def load(self) -> int:
        """Requests that run or wait."""
        return len(self.requests)

    @property
    def works(self) -> bool:
        """Whether a step is running."""
        return bool(self.running)

    def submit(self, request: Request) -> bool:
        """Take a request in; False when too many wait."""
        if len(self.waiting) >= self.serving.queue + len(self.slots.free):
            return False
        sequence = request.sequence
        self.requests[sequence], self.owners[sequence] = request, str(request.conversation)
        self.waiting.append(sequence)
        if self.serving.pace:
            self.env.process(self._paced(request))
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None
        return True

    def _run(self) -> Waiting:
        while True:
            if not self.requests:
                self._wake = self.env.event()
                yield self._wake
            for sequence, _ in scheduler.admit(self.waiting, self.slots, self.owners, self.running):
                self.running.append(sequence)
            work = scheduler.plan(self.running, self.serving.chunk, self.serving.rows)
            drafts = self._drafts([one for one, size in work if size == 1])
            seconds, begun = self._seconds(work, drafts), self.env.now
            self.steps += 1
            yield self.env.timeout(seconds) if self.front is None else self.front.processors.run(seconds)
            self.busy += self.env.now - begun
            for sequence, size in work:
                self._move(sequence, size, drafts.get(sequence, (0, 0))[1])

    def _drafts(self, decoding: SequenceOf[Sequence]) -> dict[Sequence, tuple[int, int]]:
        """Draft tokens, and how many of them are accepted, of those that draft in this step."""
        self.decoded += len(decoding)
        if self.serving.policy == "none" or not decoding:
            return {}
        requests = [self.requests[sequence] for sequence in decoding]
        if self.serving.policy == "pays":
            before, chosen = self._drafting
            if before != frozenset(requests):
                tokens = sum(sequence.num_cached for sequence in decoding)
                worth = worth_drafting(self.serving, [one.kind for one in requests], tokens)
                chosen = frozenset(requests[place] for place in worth)
                self._drafting = frozenset(requests), chosen
            requests = [one for one in requests if one in chosen]
        room = {one: one.sequence.remaining - 1 for one in requests}
        drawn = {one: one.drafts() for one in requests}
        return {one.sequence: (min(n, room[one]), min(ok, room[one])) for one, (n, ok) in drawn.items()}

    def _seconds(self, work: SequenceOf[tuple[Sequence, int]], drafts: Mapping[Sequence, tuple[int, int]]) -> float:
        """Seconds of a step: its pass by the profile, the host's work, and what the running answers add."""
        rows = sum(size for _, size in work) + sum(size for size, _ in drafts.values())
        tokens = sum(sequence.num_cached for sequence, _ in work)
        serving, profile = self.serving, self.serving.profile
        if serving.beside is not None and self.neighbour is not None and self.neighbour.works:
            profile = serving.beside
        unasked = sum(size - 1 for _, size in work)  # rows of prompts but for their last ones
        return profile.step(rows, tokens, len(work)) + serving.per_answer * len(work) - serving.unasked * unasked

    def _move(self, sequence: Sequence, size: int, accepted: int) -> None:
        """What a step has brought to one sequence."""
        sequence.num_cached += size
        if sequence.num_cached < len(sequence.tokens):
            return
        request = self.requests[sequence]
        new = 1 + accepted  # a draft is never longer than what may still be written
        sequence.tokens += [request.conversation] * new
        sequence.num_cached += new - 1
        if sequence.remaining == 0:
            self._end(request)
        if not (self.serving.pace or request.sending):
            request.sending = True
            self.env.process(self._send(request))

    def _end(self, request: Request) -> None:
        sequence = request.sequence
        sequence.finish_reason = "length"
        self.running.remove(sequence)
        self.slots.give(sequence.slot, scheduler.held_by(sequence, self.owners.pop(sequence)))
        del self.requests[sequence]

    def _paced(self, request: Request) -> Waiting:
        """Parts at an even pace, news or not."""
        while not request.sequence.finished:
            yield self.env.timeout(self.serving.pace)
            self.env.process(self._send(request))

    def _send(self, request: Request) -> Waiting:
        """A part of an answer on its way to the client; while it waits for the replica's own threads, it grows."""
        some = last = False

        def begins() -> None:
            nonlocal some, last
            request.sending = False
            some, last = request.sequence.num_output_tokens > 0, request.sequence.finished

        if self.front is None or self.desk is None:
            begins()
        else:
            yield from self.front.back(self.desk, begins)
        answer, sequence, now = request.answer, request.sequence, self.env.now
        if some and request.first is None:
            request.first = now
        if last and request.first is not None and not request.done.triggered:
            answer.chunks, answer.end = [request.first, now], now
            answer.tokens, answer.prompt_tokens = sequence.num_output_tokens, sequence.prompt_length
            answer.cached_tokens = sequence.stats.num_cached_tokens
            request.done.succeed()


def worth_drafting(serving: Serving, kinds: SequenceOf[Kind], tokens: int) -> list[int]:
    """Of the answers of a step those whose drafts bring the most tokens per second of the whole step, as places.

    It is the rule of `drafting/cost_model.py` for whole drafts: those that bring most a row come first, and as many
    are taken as bring most. `tokens`: cached tokens of all of them.
    """
    order = sorted((i for i, one in enumerate(kinds) if one.gain), key=lambda i: kinds[i].rows / kinds[i].gain)
    count = len(kinds)
    gains = [0.0, *accumulate(kinds[i].gain for i in order)]
    rows = [0.0, *accumulate(kinds[i].rows for i in order)]
    speeds = [(count + gain) / _step(serving, count, more, tokens) for gain, more in zip(gains, rows, strict=True)]
    return order[: speeds.index(max(speeds))]


def _step(serving: Serving, count: int, drafted: float, tokens: int) -> float:
    """Seconds of a step of so many answers with so many draft tokens, which need be no whole number."""
    low = count + int(drafted)
    near, far = (_pass(serving.profile, rows, tokens // 256 * 256, count) for rows in (low, low + 1))
    return near + (drafted - int(drafted)) * (far - near) + serving.per_answer * count


@lru_cache(2**16)
def _pass(profile: Profile, rows: int, tokens: int, sequences: int) -> float:
    return profile.step(rows, tokens, sequences)


class Fleet:
    """Replicas behind one gateway. `routing`: by conversation as the router does it, in turn, or to the fewest."""

    def __init__(self, count: int, serving: Serving, *, routing: str = "conversation", seed: int = 0) -> None:
        self.env = simpy.Environment()
        self.serving, self.routing, self.seed = serving, routing, seed
        self.front = Front(self.env, serving.host) if serving.host is not None else None
        names = [f"r{n}" for n in range(count)]
        self.replicas = {name: Replica(self.env, name, serving, self.front) for name in names}
        self.answers: list[Answer] = []
        self._names = [*self.replicas]
        self._turn = self._number = 0
        self._ranked: dict[int, list[str]] = {}

    def pair_up(self) -> None:
        """Let the replicas be neighbours, two and two, on processors that they share (`Serving.beside`)."""
        for left, right in zip(self._names[::2], self._names[1::2], strict=False):
            self.replicas[left].neighbour = self.replicas[right]
            self.replicas[right].neighbour = self.replicas[left]

    def ask(self, kind: Kind, conversation: int, key: str = "") -> Request:
        """A request, on its way to a replica; its `done` comes with its end, or at once when it is refused.

        Prompts of one conversation begin with one another; others have nothing in common.
        """
        number, self._number = self._number, self._number + 1
        sampling = SamplingParams(max_tokens=kind.output)
        sequence = Sequence([conversation] * kind.prompt, kind.prompt, sampling, max_length=kind.prompt + kind.output)
        ask, env = Ask(number, key, "", kind.output, 0), self.env
        sizes = sorted(kind.accepted)
        weights = sizes, [*accumulate(kind.accepted[size] for size in sizes)]
        draw = random.Random(f"{self.seed} {number}")
        request = Request(ask, kind, conversation, sequence, env.event(), draw, Answer(ask, sent=env.now), weights)
        self.answers.append(request.answer)
        replica = self._place(conversation)
        if self.front is None:
            self._submit(request, replica)
        else:
            env.process(self._bring(request, replica, self.front))
        return request

    def _bring(self, request: Request, replica: Replica, front: Front) -> Waiting:
        """A request on its way to a replica."""
        assert replica.desk is not None
        yield from front.to(replica.desk)
        self._submit(request, replica)

    def _submit(self, request: Request, replica: Replica) -> None:
        if not replica.submit(request):
            request.answer.error, request.answer.end = "429", self.env.now
            request.done.succeed()

    def _place(self, conversation: int) -> Replica:
        if self.routing == "round-robin":
            self._turn += 1
            return self.replicas[self._names[(self._turn - 1) % len(self._names)]]
        if self.routing == "fewest":
            return min(self.replicas.values(), key=lambda one: one.load)
        return self.replicas[self._by_conversation(str(conversation))]

    def _by_conversation(self, key: str) -> str:
        """The router's choice, with its first replicas remembered: to rank a thousand for each turn takes long."""
        slots, number = self.serving.slots, int(key)
        if number not in self._ranked:
            whole = preferred(key, dict.fromkeys(self._names, 0), slots)
            self._ranked[number] = [name for group in whole for name in group][:RANKED]
        free = next((name for name in self._ranked[number] if self.replicas[name].load < slots), None)
        if free is not None:
            return free
        loads = {name: replica.load for name, replica in self.replicas.items()}
        return min(preferred(key, loads, slots)[0], key=loads.__getitem__)

    # Loads

    def closed(self, asks: Iterable[tuple[str, Kind]], clients: int, apart: float = 0.0) -> None:
        """So many clients ask one request after the other, each its own conversation, until all have ended.

        `apart`: seconds between the first requests of two clients. A server reads them one after the other, and the
        first one's prompt is read before the others are there.
        """
        left = enumerate(asks, self.seed << 32)  # other conversations, and so other replicas, with another seed

        def client(begins: float) -> Waiting:
            yield self.env.timeout(begins)
            for number, (key, kind) in left:
                yield self.ask(kind, number, key).done

        for number in range(clients):
            self.env.process(client(number * apart))
        self.env.run()

    def arriving(self, conversations: Iterable[tuple[float, SequenceOf[tuple[float, Kind]]]]) -> None:
        """Conversations that come at times of their own, each with turns: (seconds before it, what it is).

        The prompts of later turns are whole: what was said before and what is new.
        """

        def one(number: int, begins: float, turns: SequenceOf[tuple[float, Kind]]) -> Waiting:
            yield self.env.timeout(begins)
            for rest, kind in turns:
                yield self.env.timeout(rest)
                yield self.ask(kind, number).done
            self._ranked.pop(number, None)

        for number, (begins, turns) in enumerate(conversations):
            self.env.process(one(number, begins, turns))
        self.env.run()


def chats(
    kinds: SequenceOf[Kind], rate: float, seconds: float, seed: int, *, turns: int, think: float, most: int
) -> list[tuple[float, list[tuple[float, Kind]]]]:
    """Conversations for `Fleet.arriving`: `rate` requests a second on average, for so many seconds.

    Conversations begin at random times (Poisson) and have 1 to 2 `turns` - 1 turns, all equally likely; between two the
    user takes `think` seconds on average (exponential). A turn adds the prompt of a kept row to all that was said. A
    conversation ends before it is longer than `most` tokens.
    """
    draw, at, found = random.Random(f"chats {seed}"), 0.0, []
    while (at := at + draw.expovariate(rate / turns)) < seconds:
        said, mine = 0, list[tuple[float, Kind]]()
        for turn in range(draw.randint(1, 2 * turns - 1)):
            rest, kind = draw.expovariate(1 / think) if turn and think else 0.0, draw.choice(kinds)
            if said + kind.prompt + kind.output > most:
                break
            mine.append((rest, Kind(said + kind.prompt, kind.output, kind.drafted, kind.accepted, kind.rejected)))
            said += kind.prompt + kind.output
        found.append((at, mine))
    return found


def steady_speed(
    serving: Serving, kinds: SequenceOf[Kind], count: int, remembered: int, *, draws: int = 200, seed: int = 0
) -> float:
    """Tokens per second of steps of `count` answers, drawn from the kinds; no prompts are read.

    `remembered`: cached tokens of each. Every answer is in as many steps as its kind takes.
    """
    draw, tokens, seconds = random.Random(seed), 0.0, 0.0
    for _ in range(draws):
        group = draw.choices(kinds, [one.output / (1 + one.gain) for one in kinds], k=count)
        drafting = {"none": [], "always": [*range(count)]}.get(serving.policy)
        if drafting is None:
            drafting = worth_drafting(serving, group, count * remembered)
        tokens += count + sum(group[i].gain for i in drafting)
        seconds += _step(serving, count, sum(group[i].rows for i in drafting), count * remembered)
    return tokens / seconds
