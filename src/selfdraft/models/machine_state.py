"""The state of the machine: how far its cores are apart, and how many bytes a second come from memory.

On a virtual machine both change within minutes, when the hypervisor moves the cores, and the same pass takes up to 1.5
times as long. So a state stands beside every timing, measured before and after it. Needs the compiled kernels; without
them there is a reason instead. Nothing here depends on the clock rate of the cores.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from selfdraft.errors import RunnerUnavailable
from selfdraft.models.runner import kernel_build
from selfdraft.types import JsonObject

Distance: TypeAlias = Literal["near", "far", "busy", "one core"]
FAR_FROM = 110.0
"""Nanoseconds one way from which on cores are far: below one cache they answered in 50 to 80 (EPYC, Xeon), on two dies
in 250; this is about the geometric mean of 50 and 250."""
BUSY_FROM = 2000.0
"""Nanoseconds one way that no cache takes: another process had a core, and nothing is known of the distance."""
MOST_CORES = 5
"""Cores that are paired: 10 pairs; of more cores as many, evenly spread."""
ROUNDS, PING_SECONDS = 100, 0.008
"""Round trips of a batch, of which the quickest counts, and how long a pair is tried."""
READ_SECONDS = 0.03
"""How long memory is read with one thread, and with all; at least twice through the buffer."""
LEAST_BUFFER, MOST_BUFFER, PART = 2**26, 2**28, 8
"""Bytes of the buffer: twice the largest cache, within these limits and an eighth of what is free."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Nanoseconds that a cache line takes from one core to another, over pairs of the cores that may be used."""

    nearest: float
    farthest: float
    cores: int
    """Cores that the process may use; with one there is no pair, and both figures are 0."""

    @property
    def distance(self) -> Distance:
        """What the farthest pair says: a pass waits for its slowest thread."""
        if self.cores < 2:
            return "one core"
        if self.farthest >= BUSY_FROM:
            return "busy"
        return "far" if self.farthest >= FAR_FROM else "near"


@dataclass(frozen=True, slots=True)
class MachineState:
    """How far the cores are apart, and bytes a second that are read from memory, at one moment."""

    latency: Latency
    read_one: float
    """Bytes a second with one thread."""
    read_all: float
    """Bytes a second with one thread on each core."""
    buffer: int
    """Bytes that were read."""
    large_pages: bool
    """Whether the system gave large pages to at least half of the buffer."""

    @property
    def distance(self) -> Distance:
        """Whether the cores are near one another or far."""
        return self.latency.distance

    def as_dict(self) -> JsonObject:
        """The figures as they stand in files; bandwidths in bytes a second, latencies in nanoseconds."""
        return {"distance": self.distance, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Span:
    """The states before and after timed runs; None where none could be measured, and `why`."""

    before: MachineState | None
    after: MachineState | None
    why: str = ""

    def as_dict(self) -> JsonObject:
        """Both states for a file, why there is none, and all of it in words."""
        states = {"before": self.before, "after": self.after}
        told: JsonObject = {name: None if state is None else state.as_dict() for name, state in states.items()}
        return told | {"words": str(self)} | ({"why": self.why} if self.why else {})

    def __str__(self) -> str:
        """One line: the distance and the figures, as `before -> after` where that is another."""
        if self.before is None:
            return f"state of the machine unknown: {self.why}"
        states = [self.before] if self.after is None else [self.before, self.after]
        said = [f"cores {flip([state.distance for state in states])}"]
        if self.before.latency.cores > 1:
            said.append(f"{flip([f'{state.latency.farthest:.0f}' for state in states])} ns apart")
        one, both = (
            flip([f"{getattr(state, name) / 1e9:.1f}" for state in states]) for name in ("read_one", "read_all")
        )
        said.append(f"reading {one} GB/s with one thread, {both} with {self.before.latency.cores}")
        said.append(f"in {flip(['large' if state.large_pages else 'small' for state in states])} pages")
        return ", ".join(said)


def flip(values: SequenceOf[str]) -> str:
    """The values as `one -> other`, equal neighbours once."""
    kept = [value for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    return " -> ".join(kept)


def state_now() -> tuple[MachineState | None, str]:
    """(the state of the machine, or None and why): measured in about 0.3 s, more where memory is slow or in use."""
    try:
        library, cores = kernel_build.machine_library(), _cores()
        latency = _latency(library, cores)
        return _measured(library, cores, latency), ""
    except (RunnerUnavailable, OSError, ValueError) as error:
        return None, str(error)


def latency_now() -> Latency | None:
    """How far the cores are apart: milliseconds of work. None without compiled kernels, or where threads stay free."""
    try:
        return _latency(kernel_build.machine_library(), _cores())
    except (RunnerUnavailable, OSError):
        return None


class Watch:
    """States of the machine around timed runs: begun where it is made, ended by `span`."""

    def __init__(self) -> None:
        self.before, self.why = state_now()

    def span(self) -> Span:
        """The state before, and the state now."""
        after, why = (None, self.why) if self.before is None else state_now()
        return Span(self.before, after, why)


def _cores() -> list[int]:
    """The cores that this process may use. Errors: RunnerUnavailable where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        raise RunnerUnavailable("threads can only be pinned to cores on Linux")
    return sorted(os.sched_getaffinity(0))


def _spread(cores: SequenceOf[int]) -> list[int]:
    """At most MOST_CORES of the cores, evenly spread, the first and the last among them."""
    if len(cores) <= MOST_CORES:
        return list(cores)
    return [cores[i * (len(cores) - 1) // (MOST_CORES - 1)] for i in range(MOST_CORES)]


def _latency(library: ctypes.CDLL, cores: SequenceOf[int]) -> Latency:
    """Errors: RunnerUnavailable where a thread cannot be pinned."""
    pairs = combinations(_spread(cores), 2)
    found = [float(library.selfdraft_ping(one, other, ROUNDS, PING_SECONDS)) for one, other in pairs]
    if 0.0 in found:
        raise RunnerUnavailable("the system lets no thread be pinned to a core")
    return Latency(round(min(found, default=0.0), 1), round(max(found, default=0.0), 1), len(cores))


def _measured(library: ctypes.CDLL, cores: SequenceOf[int], latency: Latency) -> MachineState:
    size = _buffer_size()
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        view = np.frombuffer(memory, np.uint8)
        place, all_cores = view.ctypes.data, (ctypes.c_int * len(cores))(*cores)
        del view  # else the memory could not be given back
        large = _large_bytes()
        library.selfdraft_fill(place, size, all_cores, len(cores))
        given = _large_bytes() - large
        one = float(library.selfdraft_read(place, size, all_cores, 1, READ_SECONDS))
        several = float(library.selfdraft_read(place, size, all_cores, len(cores), READ_SECONDS))
    return MachineState(latency, round(one), round(several), size, given >= size // 2)


def _buffer_size() -> int:
    """Bytes to read, in whole large pages."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = min(max(2 * _largest_cache(), LEAST_BUFFER), MOST_BUFFER, max(free // PART, 2**22))
    return size // 2**21 * 2**21


def _largest_cache() -> int:
    """Bytes of the largest cache of the first core; 0 where the system does not tell."""
    found = [0]
    for place in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        told = place.read_text("utf-8").strip()
        if told.endswith("K") and told[:-1].isdigit():
            found.append(int(told[:-1]) * 1024)
    return max(found)


def _large_bytes() -> int:
    """Bytes of this process that lie in large pages; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages:")), 0)
