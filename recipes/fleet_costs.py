"""What a server takes of the processors beside its passes: processor seconds of every process, by requests and parts.

Three runs against a server that is there: short answers, long answers, nothing for some seconds; one request at a
time, so that no part waits for another one. What a process takes of a request and of a part of an answer follows from
the two loads, less what it takes without any. Seconds of processors are those of /proc: of each process below the one
that was started, and of each thread of a replica. The thread of a replica that has run most runs the passes.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from recipes.fleet_host import Cost, Host, solved

from selfdraft.bench.load.arrivals import Ask
from selfdraft.bench.load.rows import Rows
from selfdraft.cli.bench_serve import LoadOptions, load_of

ROLES = {"replica": r"ServeReplica:.*:replicas", "gateway": r"ServeReplica:.*:gateway", "proxy": r"ProxyActor"}
"""Titles of Ray's processes. Others are beside; a server without Ray is itself the replica."""
WAY = ("gateway", "proxy", "client")
"""Through whom an answer of a replica goes."""
LENGTHS = (2, 64)
"""Most tokens of short and of long answers."""
PLAIN = '{"method": "none"}'


@dataclass(frozen=True, slots=True)
class Process:
    """A process at one moment: its role, and seconds of processors, its own and those of its threads."""

    role: str
    seconds: float
    threads: Mapping[int, float]


@dataclass(slots=True)
class Spent:
    """What was asked between two moments, and what it took."""

    requests: int = 0
    parts: int = 0
    """Parts of answers with text."""
    wall: float = 0.0
    passes: float = 0.0
    """Seconds of processors of the threads that run passes."""
    beside: dict[str, float] = field(default_factory=dict)
    """Those of all others, by role."""


def processes(root: int, proc: Path = Path("/proc")) -> dict[int, Process]:
    """The process `root` and all below it."""
    parents, spent = dict[int, int](), dict[int, float]()
    for place in proc.glob("[0-9]*"):
        try:
            parents[int(place.name)], spent[int(place.name)] = _stat(place / "stat")
        except OSError:
            continue  # it has ended meanwhile
    ours, found = {root}, set[int]()
    while ours:
        found |= ours
        ours = {number for number, parent in parents.items() if parent in ours} - found
    titles = {number: _title(proc / str(number)) for number in found if number in parents}
    roles = {number: _role(title) for number, title in titles.items()}
    if "replica" not in roles.values():
        roles[root] = "replica"
    return {number: Process(role, spent[number], _threads(proc / str(number))) for number, role in roles.items()}


def _role(title: str) -> str:
    return next((name for name, words in ROLES.items() if re.search(words, title)), "beside")


def _stat(path: Path) -> tuple[int, float]:
    """Parent, and seconds of processors."""
    fields = path.read_text("utf-8", "replace").rpartition(")")[2].split()
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _title(place: Path) -> str:
    try:
        return (place / "cmdline").read_text("utf-8", "replace").replace("\0", " ")
    except OSError:
        return ""


def _threads(place: Path) -> dict[int, float]:
    found = {}
    for thread in place.glob("task/*"):
        try:
            found[int(thread.name)] = _stat(thread / "stat")[1]
        except OSError:
            continue
    return found


def between(before: Mapping[int, Process], after: Mapping[int, Process]) -> Spent:
    """What processes have spent; of one that has begun meanwhile, all of it."""
    spent, beside = Spent(), defaultdict[str, float](float)
    nobody = Process("", 0.0, {})
    for number, now in after.items():
        then = before.get(number, nobody)
        whole = now.seconds - then.seconds
        if now.role == "replica":
            gained = [seconds - then.threads.get(thread, 0.0) for thread, seconds in now.threads.items()]
            passes = min(max(gained, default=0.0), whole)
            spent.passes += passes
            whole -= passes
        beside[now.role] += whole
    spent.beside = dict(beside)
    return spent


def under_load(url: str, root: int, length: int, dataset: str, requests: int) -> tuple[Spent, list[Ask]]:
    """What requests for answers of at most so many tokens take, one after the other, and the requests."""
    given = LoadOptions([url], dataset=dataset, requests=requests, max_tokens=str(length), concurrency="1", rounds=1)
    given = replace(given, speculative_config=[PLAIN])
    before: dict[int, Process] = {}
    began = 0.0

    def ready(_: object) -> None:
        nonlocal began
        before.update(processes(root))
        began = time.perf_counter()

    with Rows(None, datetime.now(UTC).isoformat(timespec="seconds")) as rows:
        load = load_of(given, rows)
        asyncio.run(load.measure(ready, lambda: None))
    wall = time.perf_counter() - began
    spent = between(before, processes(root))
    answers = [answer for one in load.measured for answer in one.answers]
    if any(answer.error for answer in answers):
        raise SystemExit("some requests failed: costs are those of a server that answers all")
    spent.requests, spent.parts, spent.wall = len(answers), sum(len(answer.chunks) for answer in answers), wall
    spent.beside["client"] = sum(one.processor_seconds for one in load.measured)
    return spent, [*load.asks]


def at_rest(root: int, seconds: float) -> Spent:
    """What the server takes while nobody asks."""
    before, began = processes(root), time.perf_counter()
    time.sleep(seconds)
    spent = between(before, processes(root))
    spent.wall = time.perf_counter() - began
    return spent


@dataclass(frozen=True, slots=True)
class Passes:
    """What the profile says of the passes of both loads, in seconds."""

    few: float
    many: float
    prompts: float
    """Those that read prompts, the same ones in both loads."""
    rows: int
    """Rows of prompts but for their last ones."""


def host_from(rest: Spent, few: Spent, many: Spent, processors: float, passes: Passes) -> Host:
    """The costs of a machine."""
    shares = {role: seconds / rest.wall for role, seconds in rest.beside.items()}

    def cost(role: str) -> Cost:
        less = [one.beside.get(role, 0.0) - shares.get(role, 0.0) * one.wall for one in (few, many)]
        return solved(*((one.requests, one.parts, spent) for one, spent in zip((few, many), less, strict=True)))

    longer = (many.passes - few.passes - passes.many + passes.few) / (many.parts - few.parts)
    reading = few.passes - (passes.few - passes.prompts) - longer * (few.parts - few.requests)
    unasked = max((passes.prompts - reading) / passes.rows, 0.0)
    way = tuple((role, cost(role)) for role in WAY if role in many.beside)
    always = sum(shares.values())
    return Host(processors, cost("replica"), way, cost("beside"), always, max(longer, 0.0), unasked)
