"""Replay: any drafter that reads only tokens, run over recorded answers as live decoding would run it, with no model.

The log says what the target chooses; sequences, drafts, budgets, the walk, the commit and what the drafter observes
are those of a live step. So accepted counts are those of the live run, as integers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from selfdraft.core.rows import Rows
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.core.verify import Result, walk
from selfdraft.drafters import build, find, table
from selfdraft.drafting.cost_model import Profile
from selfdraft.engine.scheduler import share
from selfdraft.engine.step import step
from selfdraft.errors import OptionError
from selfdraft.files.token_log import FAR, Logged
from selfdraft.protocols import Drafter, DraftExtras, needs_of
from selfdraft.replay.reliability import Reliability
from selfdraft.types import Budget, PassVariant, SamplingParams, Stats, within

BEHIND = -1
"""What the log says behind its end: no token."""


class LogTarget:
    """A log in the place of the model: it knows what comes, but no logits, so a drafter's own pass is refused.

    `times`: seconds of a pass by its rows, on which its clock goes on; without them the clock stands still.
    Errors: OptionError for times that cannot be those of passes.
    """

    vocab = FAR
    num_mask_ids = 0

    def __init__(self, times: Mapping[int, float] | None = None, pass_cost: Profile | None = None) -> None:
        if times is not None:
            check_times(times)
        self.times = times
        self.now = 0.0
        """What its clock shows, in seconds."""
        self.extras = DraftExtras(lambda: self.now, pass_cost)
        self.max_length = self._edge = FAR
        self._output: tuple[int, ...] = ()
        self._drafting = False

    def open(self, logged: Logged) -> Sequence:
        """The request of a log entry, to be answered as the log says."""
        self.max_length, self._edge, self._output = logged.context, logged.edge, logged.output
        sampling = SamplingParams(max_tokens=logged.limit - len(logged.prompt))
        return Sequence([*logged.prompt], len(logged.prompt), sampling, stop_ids=logged.ends, max_length=logged.limit)

    def forward(self, rows: Rows, short: PassVariant | None = None) -> Tensor:
        if self._drafting:
            raise OptionError("this drafter runs the model; a log holds tokens only")
        if self.times and all(span.pending == 1 for span in rows.spans):  # prefill is left out
            self.now += time_of(self.times, len(rows))
        return torch.empty(0)

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        pass

    def reuse(self, slot: int, source: int, count: int) -> None:
        """Nothing is cached, so there is nothing to copy."""

    def next_boundary(self, position: int) -> int:
        return (position // self._edge + 1) * self._edge

    def choose(self, rows: Rows, logits: Tensor, sequences: SequenceOf[Sequence]) -> list[Result]:
        """What `verify` is for a model: the walk, with the log's next tokens as what the target says."""
        results = []
        for span, sequence in zip(rows.spans, sequences, strict=True):
            if not span.num_logits:
                results.append(Result(span.draft))
                continue
            rest = self._output[sequence.num_output_tokens :]
            says = iter([*rest, BEHIND])
            path, tokens = walk(span.draft, _next_of(says))
            results.append(Result(span.draft, tuple(path), tuple(tokens[: len(rest)])))
        return results

    @contextmanager
    def drafter_at_work(self) -> Iterator[None]:
        """Inside, a pass would be the drafter's own, and is refused."""
        self._drafting = True
        try:
            yield
        finally:
            self._drafting = False


class Timed:
    """A drafter, its work timed with `now`; passes of its own are refused."""

    def __init__(self, drafter: Drafter, target: LogTarget, now: Callable[[], float]) -> None:
        self.drafter, self.target, self.now = drafter, target, now
        self.drafting = self.learning = 0.0
        """Seconds of the last step."""

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        began = self.now()
        with self.target.drafter_at_work():
            drafts = self.drafter.draft(sequences, budgets)
        self.drafting = self.now() - began
        return drafts

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        began = self.now()
        with self.target.drafter_at_work():
            self.drafter.observe(sequences, results)
        self.learning = self.now() - began


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

    def as_dict(self) -> dict[str, object]:
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


def open_drafter(name: str, options: Mapping[str, object] | None = None, target: LogTarget | None = None) -> Drafter:
    """The drafter `name`, without a model; options that make it read logits are off unless they are given.

    Errors: OptionError when drafter or options need a model; as `drafters.build`.
    """
    factory, wanted = find(name, options or {}), dict(options or {})
    if not needs_of(factory).tokens_only:
        able = ", ".join(known for known, factory in table().items() if needs_of(factory).tokens_only)
        raise OptionError(f"drafter {name!r} reads what the model says; a log holds tokens only. Replay takes: {able}")
    for option in needs_of(factory).logits_options:
        if wanted.setdefault(option, False):
            raise OptionError(f"{option} of drafter {name!r} reads logits; a log holds tokens only: leave it out")
    return build(name, target or LogTarget(), wanted)


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
    target: LogTarget | None = None,
    now: Callable[[], float] = time.perf_counter,
    done: Callable[[], None] = lambda: None,
) -> Replayed:
    """Run the requests one after the other, drafts of at most `nodes` candidates.

    `target`: the one that the drafter was made for, if its clock shall go on. `done` is called after each request.
    Errors: OptionError for `nodes` out of range or a drafter that runs the model.
    """
    within("max_nodes", nodes, 1, 2**16)
    found, target = Replayed(), target or LogTarget()
    timed = Timed(drafter, target, now)
    for logged in requests:
        sequence = target.open(logged)
        while not sequence.finished:
            _step(target, timed, sequence, logged, nodes, found)
        found.stats.add(sequence.stats)
        found.requests += 1
        done()
    return found


def _step(target: LogTarget, timed: Timed, sequence: Sequence, logged: Logged, nodes: int, found: Replayed) -> None:
    """One decode step of the engine, with the log in the place of the pass, and what is counted of it."""
    decodes = len(sequence.tokens) - sequence.num_cached == 1
    written = sequence.num_output_tokens
    (result,) = step(target, timed, [(sequence, share(sequence, logged.chunk))], nodes, target.choose)
    emitted = sequence.num_output_tokens - written
    if sequence.num_output_tokens == len(logged.output):
        sequence.finish_reason = sequence.finish_reason or "stop"  # what ended it is not in the tokens
    if decodes:
        found.reliability.book(result.draft, result.path, emitted)
        found.rows[1 + len(result.draft)] += 1
        found.host.append(timed.drafting + timed.learning)
        found.drafting.append(timed.drafting)
    if emitted:
        found.accepted.append(min(emitted, len(result.path)))


def _next_of(tokens: Iterator[int]) -> Callable[[int], int]:
    return lambda node: next(tokens)
