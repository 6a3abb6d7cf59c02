"""What an answer costs: plain and drafted runs in alternation, where their time goes, and the memory they take."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from selfdraft.bench.peers import Peer
from selfdraft.core.rows import Rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.core.verify import Result
from selfdraft.engine.engine import Engine
from selfdraft.errors import PeerError
from selfdraft.protocols import Drafter, Target
from selfdraft.prove.record import first_difference
from selfdraft.types import Budget, PassVariant, Stats

P = ParamSpec("P")
T = TypeVar("T")
Request = Callable[[], Sequence]
"""Makes the same fresh request every time."""


@dataclass(frozen=True, slots=True)
class Take:
    """One run of one request, alone on its engine."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: str | None
    stats: Stats
    seconds: float
    first_token_seconds: float
    """Until the first token: the prefill."""

    def same(self, other: Take) -> bool:
        """Same token ids, and ended for the same reason."""
        return self.tokens == other.tokens and self.finish_reason == other.finish_reason


@dataclass(frozen=True, slots=True)
class Split:
    """Seconds of one answer by what they went into; they add up to all of it."""

    prefill: float
    """Until the first token."""
    target: float
    """Afterwards: forward passes of the target over its rows, and moving what it remembers."""
    drafting: float
    """Guessing and learning, passes of the drafter's own included."""
    rest: float
    """The host's work: layout of rows, the walk, stop rules, text."""


@dataclass(slots=True)
class Measured:
    """All runs of one engine on one request."""

    takes: list[Take]
    """The timed runs; the one of the split is not among them."""
    split: Split | None
    """None of a peer: nobody looks inside."""
    working_bytes: int | None
    """Peak memory of the run of the split beyond what was there before it; None where it cannot be read."""
    resident_bytes: int | None
    """Peak resident memory of the whole process in that run, libraries and weights included; None as above."""
    equal: bool
    """Every run, that of the split included, said what the first plain run said."""
    difference: int | None
    """Index of the first token that differs; None when all are equal."""

    @property
    def median(self) -> Take:
        """The run with the median time (of an even number the faster of the middle two)."""
        return sorted(self.takes, key=lambda take: take.seconds)[(len(self.takes) - 1) // 2]


def measure(
    engines: Mapping[str, Engine],
    request: Request,
    runs: int,
    gauge: Gauge,
    settle: Callable[[], None],
    peers: Mapping[str, Peer] | None = None,
    lost: dict[str, PeerError] | None = None,
    *,
    backwards: bool = False,
) -> dict[str, Measured]:
    """Run a request through all engines: once to split its time and warm up, then `runs` rounds with clean clocks.

    The first engine is the yardstick (plain decoding). Every second round goes backwards, so that none of them
    always runs after the same neighbour; `backwards`: the first one does. `settle` waits for the accelerator. Peers
    write as many tokens as the first engine did, whatever ends a text there. One that fails is not in the result, and
    why goes into `lost`; without that, errors: PeerError.
    """
    peers = dict(peers or {})
    found: dict[str, Measured] = {}
    plain: Take | None = None
    for name, engine in engines.items():
        gauge.start()
        taken, split = take_apart(engine, request(), settle)
        plain = plain or taken
        found[name] = Measured([], split, gauge.stop(), gauge.resident, True, None)
        _compare(found[name], taken, plain)
    assert plain is not None
    for name in [*peers]:
        found[name] = Measured([], None, None, None, True, None)
        _guest(found, name, peers, request(), plain, lost)
        if name in found:
            found[name].takes.clear()  # the first one warms up
    for number in range(runs):
        for name in [*engines, *peers][:: -1 if bool(number % 2) != backwards else 1]:
            if name in engines:
                taken = take(engines[name], request(), settle)
                found[name].takes.append(taken)
                _compare(found[name], taken, plain)
            else:
                _guest(found, name, peers, request(), plain, lost)
    return found


def _guest(
    found: dict[str, Measured],
    name: str,
    peers: dict[str, Peer],
    sequence: Sequence,
    plain: Take,
    lost: dict[str, PeerError] | None,
) -> None:
    """One more run of a peer; one that fails is taken out of `found` and `peers`."""
    try:
        taken = take_peer(name, peers[name], sequence, plain)
    except PeerError as error:
        if lost is None:
            raise
        lost[name] = error
        del found[name], peers[name]
        return
    found[name].takes.append(taken)
    _compare(found[name], taken, plain)


def _compare(measured: Measured, taken: Take, plain: Take) -> None:
    if not taken.same(plain):
        measured.equal = False
        if measured.difference is None:
            measured.difference = first_difference(taken.tokens, plain.tokens)


def take(
    engine: Engine, sequence: Sequence, settle: Callable[[], None], notice: Callable[[], None] | None = None
) -> Take:
    """One run on the clock; `notice` is called when the first token is out."""
    settle()
    began, first = time.perf_counter(), 0.0
    for _ in engine.generate([sequence]):
        if not first and sequence.num_output_tokens:
            settle()
            first = time.perf_counter() - began
            if notice is not None:
                notice()
    settle()
    seconds = time.perf_counter() - began
    text = sequence.stream.text if sequence.stream is not None else ""
    return Take(tuple(sequence.output), text, sequence.finish_reason, sequence.stats, seconds, first or seconds)


def take_peer(name: str, peer: Peer, sequence: Sequence, plain: Take) -> Take:
    """One run of another engine, on its own clock, as long as a plain run. Errors: PeerError."""
    said = peer.answer(sequence.tokens, len(plain.tokens), sequence.seed)
    if len(said.tokens) != len(plain.tokens):
        raise PeerError(f"peer {name}: it wrote {len(said.tokens)} tokens where {len(plain.tokens)} were asked for")
    stats = Stats()
    if said.drafts is not None:
        stats.num_draft_tokens, stats.num_accepted_draft_tokens = said.drafts
    return Take(said.tokens, "", plain.finish_reason, stats, said.seconds, said.first_token_seconds)


def take_apart(engine: Engine, sequence: Sequence, settle: Callable[[], None]) -> tuple[Take, Split]:
    """One run through stopwatches around target and drafter."""
    watch = Stopwatch(settle)
    target = cast(Target, TimedTarget(engine.target, watch))
    timed = Engine(
        target, TimedDrafter(engine.drafter, watch), chunk=engine.chunk, rows=engine.rows, nodes=engine.nodes
    )
    taken = take(timed, sequence, settle, watch.seconds.clear)
    after = taken.seconds - taken.first_token_seconds
    forward, drafting = watch.seconds.get("target", 0.0), watch.seconds.get("drafting", 0.0)
    return taken, Split(taken.first_token_seconds, forward, drafting, max(after - forward - drafting, 0.0))


@dataclass(slots=True)
class Stopwatch:
    """Adds up seconds by name; waits for the accelerator at both ends."""

    settle: Callable[[], None]
    seconds: dict[str, float] = field(default_factory=dict)

    def time(self, name: str, call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        self.settle()
        began = time.perf_counter()
        result = call(*arguments, **options)
        self.settle()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        return result


class TimedTarget:
    """A target with a stopwatch, as the engine sees it; drafters keep the bare one, so their passes are theirs."""

    def __init__(self, target: Target, watch: Stopwatch) -> None:
        self._target, self._watch = target, watch

    def forward(self, rows: Rows, short: PassVariant | None = None) -> Tensor:
        return self._watch.time("target", self._target.forward, rows, short)

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        self._watch.time("target", self._target.keep, slot, base, order)

    def __getattr__(self, name: str) -> object:
        return getattr(self._target, name)


class TimedDrafter:
    """A drafter with a stopwatch; what it needs is known through it, or its steps would be others."""

    def __init__(self, drafter: Drafter, watch: Stopwatch) -> None:
        self._drafter, self._watch = drafter, watch

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return self._watch.time("drafting", self._drafter.draft, sequences, budgets)

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        self._watch.time("drafting", self._drafter.observe, sequences, results)

    def __getattr__(self, name: str) -> object:
        return getattr(self._drafter, name)


def settler(device: torch.device) -> Callable[[], None]:
    """What waits until a device has done all that it was given; nothing on a CPU."""
    if device.type != "cuda":
        return lambda: None
    return lambda: torch.cuda.synchronize(device)


class Gauge:
    """Peak memory of a stretch of work beyond what was there before it, in bytes.

    On a GPU: what torch allocated at the peak. On Linux: resident memory of the whole process (VmHWM, reset before),
    after freed pages were given back; so it is coarse, and what the C library keeps and reuses is not seen.
    Elsewhere None.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None
        self.resident: int | None = None
        """Peak resident memory of the whole process in the last stretch, on a GPU that of the host."""
        # glibc's; others do without
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if STATUS.exists() else None

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        if self._trim is not None:
            self._trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
            self._before = _status("VmRSS")
        except OSError:
            self._before = None

    def stop(self) -> int | None:
        self.resident = None
        if self._before is None:
            return None
        peak = self.resident = _status("VmHWM") if STATUS.exists() else None
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device)) - self._before
        return None if peak is None else max(peak - self._before, 0)


STATUS = Path("/proc/self/status")


def _status(name: str) -> int | None:
    """A figure of /proc/self/status in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def weights_bytes(model: torch.nn.Module) -> int:
    """Memory of a model's parameters and buffers; tied ones, and views of one another, count once.

    What lies beside a weight in the same piece of memory does not count: packed weights share large ones.
    """
    spans = sorted(
        (plain.data_ptr(), plain.data_ptr() + _reach(plain))
        for tensor in (*model.parameters(), *model.buffers())
        for plain in _plain(tensor)
    )
    total = end = 0
    for start, stop in spans:
        total += max(stop - max(start, end), 0)
        end = max(end, stop)
    return total


def _reach(tensor: Tensor) -> int:
    """Bytes from the first number of a tensor to behind its last one."""
    if not tensor.numel():
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the bytes: a quantised weight is a shell around several."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))
