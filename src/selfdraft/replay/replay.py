"""Replay: any drafter that reads only tokens, run over recorded answers as live decoding would run it, with no model.

The log says what the target chooses; sequences, drafts, budgets, the walk, the commit and what the drafter observes
are those of a live step. So accepted counts are those of the live run, as integers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor

from selfdraft.core.commit import commit
from selfdraft.core.rows import Rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result, walk
from selfdraft.drafters import build, find, table
from selfdraft.engine.scheduler import share
from selfdraft.engine.step import budget
from selfdraft.errors import OptionError
from selfdraft.files.token_log import FAR, Logged
from selfdraft.protocols import Drafter
from selfdraft.replay.reliability import Reliability
from selfdraft.types import SamplingParams, Short, Stats, within

BEHIND = -1
"""What the log says behind its end: no token."""


class LogTarget:
    """Stands where the model stands. Knows no logits, so a drafter that asks for a pass is refused."""

    vocab = FAR
    masks = 0
    layers = 1

    def __init__(self, logged: Logged | None = None) -> None:
        self.context = logged.context if logged else FAR
        self._edge = logged.edge if logged else FAR

    def masks_of(self, method: str) -> range:
        return range(0)

    def link(self, method: str, token: int, ids: Tensor) -> Tensor | None:
        return None

    @staticmethod
    def clock() -> float:
        return 0.0  # no pass is run: `replay` hands its own to a drafter with a clock

    @property
    def profile(self) -> None:
        return None

    def advice(self, method: str) -> Mapping[str, object]:
        return {}

    def forward(self, rows: Rows, short: Short | None = None) -> Tensor:
        raise OptionError("this drafter runs the model; a log holds tokens only")

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        pass

    def edge(self, position: int) -> int:
        return (position // self._edge + 1) * self._edge


@dataclass(slots=True)
class Replayed:
    """What a replay counted."""

    stats: Stats = field(default_factory=Stats)
    accepted: list[int] = field(default_factory=list)
    """Accepted draft tokens of every step, in order; a prefill accepts none."""
    rows: Counter[int] = field(default_factory=Counter)
    """Rows of a decode step (1 + candidates) -> number of steps."""
    host: list[float] = field(default_factory=list)
    """Seconds of drafting and observing, for every decode step."""
    drafting: list[float] = field(default_factory=list)
    """Of these, the seconds of drafting."""
    reliability: Reliability = field(default_factory=Reliability)
    requests: int = 0

    @property
    def tokens_per_forward(self) -> float:
        return self.stats.mean_acceptance_length

    @property
    def by_depth(self) -> list[float]:
        """Share of the decode steps that accepted a token of depth 1, 2, ... (not given that they got there)."""
        steps, histogram = sum(self.rows.values()), self.stats.acceptance_histogram
        deepest = max(histogram, default=0)
        return [sum(n for size, n in histogram.items() if size >= d) / steps for d in range(1, deepest + 1)]

    def speedup(self, times: Mapping[int, float]) -> float:
        """Projected speed-up over plain decoding on a machine where a pass with n rows takes `times[n]` seconds.

        Between two measured n the time is a straight line, and goes on as one behind the last. Prefill is left out.
        The drafter's own time here is counted.
        """
        seconds = sum(steps * time_of(times, rows) for rows, steps in self.rows.items()) + sum(self.host)
        tokens = sum(self.rows.values()) + self.stats.num_accepted_draft_tokens
        return tokens * time_of(times, 1) / seconds if seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        steps = sum(self.rows.values())
        learning = [both - one for both, one in zip(self.host, self.drafting, strict=False)]
        ratio = self.reliability.ratio
        return {
            "requests": self.requests,
            "tokens_per_forward": round(self.tokens_per_forward, 4),
            "rows_per_step": round(sum(n * count for n, count in self.rows.items()) / max(steps, 1), 2),
            "acceptance_by_depth": [round(value, 4) for value in self.by_depth],
            "host_us_median": middle(self.host),
            "host_us_mean": round(1e6 * sum(self.host) / len(self.host), 1) if self.host else 0.0,
            "host_us_draft": middle(self.drafting),
            "host_us_observe": middle(learning),
            "predicted_by_actual": None if ratio is None else round(ratio, 4),
            **self.stats.as_dict(),
        }


def middle(seconds: SequenceOf[float]) -> float:
    """The median, in microseconds."""
    return round(1e6 * median(seconds), 1) if seconds else 0.0


def time_of(times: Mapping[int, float], rows: int) -> float:
    """T(rows) out of measured points, as straight lines. One point alone counts for every size."""
    known = sorted(times)
    if rows in times or len(known) == 1:
        return times.get(rows, times[known[0]])
    right = next((place for place, size in enumerate(known) if size > rows), len(known) - 1)
    low, high = known[max(right, 1) - 1], known[max(right, 1)]
    return max(times[low] + (times[high] - times[low]) * (rows - low) / (high - low), 0.0)


def open_drafter(name: str, options: Mapping[str, object] | None = None) -> Drafter:
    """The drafter `name`, without a model; options that make it read logits are off unless they are given.

    Errors: OptionError when drafter or options need a model; as `drafters.build`.
    """
    factory, wanted = find(name, options or {}), dict(options or {})
    if getattr(factory, "reads", None) != "tokens":
        able = ", ".join(known for known, factory in table().items() if getattr(factory, "reads", None) == "tokens")
        raise OptionError(f"drafter {name!r} reads what the model says; a log holds tokens only. Replay takes: {able}")
    for option in getattr(factory, "logit_options", ()):
        if wanted.setdefault(option, False):
            raise OptionError(f"{option} of drafter {name!r} reads logits; a log holds tokens only: leave it out")
    return build(name, LogTarget(), wanted)


def check_times(times: Mapping[int, float]) -> None:
    """Errors: OptionError for times that cannot be those of passes."""
    if not times:
        raise OptionError("the step times are empty; give at least that of one row")
    for rows, seconds in times.items():
        within("rows of a step time", rows, 1, FAR)
        within(f"step time of {rows} rows", seconds, 0.0, float("inf"), open_low=True)


def replay(
    requests: SequenceOf[Logged],
    drafter: Drafter,
    nodes: int,
    *,
    times: Mapping[int, float] | None = None,
    now: Callable[[], float] = time.perf_counter,
    done: Callable[[], None] = lambda: None,
) -> Replayed:
    """Run the requests one after the other, drafts of at most `nodes` candidates.

    A drafter with a `clock` sees a made-up one: every pass takes `times`, or nothing when none are given. `done` is
    called after each request. Errors: OptionError for `nodes` out of range or a drafter that runs the model.
    """
    within("max_nodes", nodes, 1, 2**16)
    found, virtual = Replayed(), [0.0]
    if hasattr(drafter, "clock"):
        drafter.clock = lambda: virtual[0]
    for logged in requests:
        sampling = SamplingParams(max_tokens=logged.limit - len(logged.prompt))
        sequence = Sequence([*logged.prompt], len(logged.prompt), sampling, ends=logged.ends, limit=logged.limit)
        target = LogTarget(logged)
        while not sequence.finished:
            _step(target, drafter, sequence, logged, nodes, found, times, virtual, now)
        found.stats.add(sequence.stats)
        found.requests += 1
        done()
    return found


def _step(
    target: LogTarget,
    drafter: Drafter,
    sequence: Sequence,
    logged: Logged,
    nodes: int,
    found: Replayed,
    times: Mapping[int, float] | None,
    virtual: list[float],
    now: Callable[[], float],
) -> None:
    """What `engine.step` does, with the log in the place of the pass."""
    size, pending = share(sequence, logged.chunk), len(sequence.tokens) - sequence.cached
    draft = proposed = EMPTY
    which: tuple[int, ...] = ()
    began = now()
    if pending == 1:
        room = budget(target, sequence, nodes)
        (proposed,) = drafter.draft([sequence], [room])
        took = now() - began
        draft, which = proposed.clip(room, target.vocab, target.masks)
    result = _verified(draft, logged.output[sequence.written :]) if size == pending else Result(draft)
    emitted = commit(sequence, result)
    if sequence.written == len(logged.output):
        sequence.finish_reason = sequence.finish_reason or "stop"  # what ended it is not in the tokens
    sequence.cached += size + len(result.path[: max(emitted - 1, 0)])
    if pending == 1:
        result.proposed, result.nodes = proposed, which
        found.reliability.book(draft, result.path, emitted)
        found.rows[1 + len(draft)] += 1
        virtual[0] += time_of(times, 1 + len(draft)) if times else 0.0
    began = now()
    drafter.observe([sequence], [result])
    if pending == 1:
        found.host.append(took + now() - began)
        found.drafting.append(took)
    if emitted:
        found.accepted.append(min(emitted, len(result.path)))


def _verified(draft: Draft, rest: SequenceOf[int]) -> Result:
    """The walk, with the log's next tokens `rest` as what the target says."""
    says = iter([*rest, BEHIND])
    path, tokens = walk(draft, lambda node: next(says))
    return Result(draft, tuple(path), tuple(tokens[: len(rest)]))
