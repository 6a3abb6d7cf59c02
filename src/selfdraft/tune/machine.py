"""Measures what a pass costs on this machine, and keeps the answer in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from selfdraft.core.rows import Rows, pack
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import EMPTY, ROOT, Draft
from selfdraft.drafting.cost_model import Profile
from selfdraft.errors import OptionError
from selfdraft.files.atomic import cache_folder, write_record
from selfdraft.models.machine import machine_of
from selfdraft.models.machine_state import Span
from selfdraft.models.runner import kernel_build
from selfdraft.models.target import HFTarget
from selfdraft.tune.passes import Bench, beside_the_pass
from selfdraft.tune.sublayer_times import clock_of
from selfdraft.types import PassVariant, SamplingParams

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of rows that are timed."""
SHORT, LONG = 32, 1024
"""Remembered tokens while they are timed; LONG where the context has room for it."""
SECONDS, LEAST, MOST = 15.0, 3, 25
"""Seconds that the rounds take about, and the least and most of them."""
FIRST = ((0, 1), (0, 2), (0, 4), (0, 5), (0, 8), (1, 1), (1, 8), (0, 16), (1, 16), (0, 32))
"""What is timed before the first answer, in this order: (behind SHORT or LONG tokens, number of rows)."""
ENOUGH = 7
"""Measured sizes of a pass that are enough for a profile."""
BRIEFLY, ROUNDS = 1.0, 8
"""At the first start, no pass begins later than 1 s after the first one; at most 8 rounds."""
REPEATS, BRIEF = 4, 0.01
"""A pass is repeated 4 times before its time counts, but not longer than 0.01 s."""
STEADY = 2.0
"""A profile is kept when passes of one row varied by less than a factor of 2."""
BATCH = 4
"""Sequences of the pass by which the price of a further sequence is measured."""


def identity(target: HFTarget) -> dict[str, object]:
    """Everything that a profile depends on: model, types, shapes, device, threads, versions."""
    return {
        "model": target.facts.config,
        "shapes": str(target.shapes),
        "runner": runner_of(target),
        "kv_cache_dtype": target.cache.dtype,
        **machine_of(target.facts.dtype, target.facts.device),
    }


def runner_of(target: HFTarget) -> str:
    """What runs the passes of a target: kernels by the mark of their source, graphs by their classes."""
    if target.graphs is not None:
        return str(target.graphs.settings)
    return "plain" if target.runner is None else kernel_build.fingerprint()


def place_of(target: HFTarget, folder: Path | None = None) -> Path:
    """Where the profile of this target is kept."""
    key = hashlib.blake2b(json.dumps(identity(target), sort_keys=True).encode(), digest_size=12).hexdigest()
    return (folder or cache_folder("profiles")) / f"{key}.json"


def load(target: HFTarget, folder: Path | None = None) -> tuple[Profile | None, str]:
    """(the kept profile or None, a note about a file that cannot be used or '')."""
    place = place_of(target, folder)
    try:
        record = json.loads(place.read_text("utf-8"))
        if record["identity"] != identity(target):
            return None, f"{place} is of another model or machine: measuring again"
        given = record["profile"]
        lists = {name: tuple(given[name]) for name in ("rows", "seconds", "per_token")}
        rest = (float(given[name]) for name in ("per_sequence", "host", "spread"))
        profile = Profile(lists["rows"], lists["seconds"], lists["per_token"], *rest)
        _check(profile)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, TypeError, LookupError) as error:
        return None, f"{place} cannot be used ({str(error).partition(chr(10))[0]}): measuring again"
    return profile, ""


def _check(profile: Profile) -> None:
    """Errors: ValueError when the numbers are no profile."""
    counts = {len(getattr(profile, name)) for name in ("rows", "seconds", "per_token")}
    numbers = [*profile.rows, *profile.seconds, *profile.per_token, abs(profile.per_sequence), profile.host]
    if len(counts) != 1 or len(profile.rows) < 2 or list(profile.rows) != sorted(set(profile.rows)):
        raise ValueError("its lists do not fit together")
    if not all(isinstance(x, int | float) and 0 <= x < 1e6 for x in numbers) or min(profile.seconds) <= 0:
        raise ValueError("a number in it is out of range")


def save(profile: Profile, target: HFTarget, folder: Path | None = None, state: Span | None = None) -> Path:
    """Keep a profile, and the state of the machine while it was measured, for a reader.

    Errors: OptionError when the folder cannot be written; nothing half-written is left.
    """
    place = place_of(target, folder)
    try:
        write_record(
            place, identity(target), profile=asdict(profile), machine_state=None if state is None else state.as_dict()
        )
    except OSError as error:
        raise _unwritable(place, error) from error
    return place


def _unwritable(place: Path, error: OSError) -> OptionError:
    why = f"{error.strerror}; it is used now and will be measured again"
    return OptionError(f"the profile {place} cannot be written: {why}")


def measure(target: HFTarget, seconds: float = SECONDS) -> Iterator[float | Profile]:
    """Time passes of all numbers of rows; yields the share done, and the profile last.

    Every round times all of them once, so that another user of the machine disturbs all alike.
    """
    long = min(LONG, target.max_length - max(ROWS) - 2)
    if long < 2 * SHORT:
        least = 2 * SHORT + max(ROWS) + 2
        raise OptionError(f"a context of {target.max_length} tokens is too short to measure a pass; it needs {least}")
    benches = [_bench(target, size) for size in (SHORT, long)]
    beside = beside_the_pass(target, lambda: _request(target, benches[0].tokens))
    benches[-1].prefill()  # the short one reads the beginning of the same tokens
    found: dict[tuple[int, int], list[float]] = {}
    several: list[float] = []
    began, done = target.clock(), 0
    while done < LEAST + 1 or (done < MOST and target.clock() - began < seconds):
        for number, bench in enumerate(benches):
            bench.sequence.num_cached = bench.context
            for rows in ROWS:
                found.setdefault((number, rows), []).append(_time(bench, rows))
        several.append(_several(target, benches[0]))
        done += 1
        yield min(max((target.clock() - began) / max(seconds, 1e-9), done / MOST), 0.99)
    times = {kind: quiet(values[1:]) for kind, values in found.items()}  # the first round warms up
    profile = _profile(ROWS, times, [bench.context for bench in benches], quiet(several[1:]), beside)
    ones = sorted(found[0, 1][1:])
    yield replace(profile, spread=max(ones[9 * len(ones) // 10] / quiet(ones), 1.0))


def measure_briefly(
    target: HFTarget, seconds: float = BRIEFLY, now: Callable[[], float] | None = None
) -> Profile | None:
    """A coarse profile before the first answer: FIRST, in at most `seconds` and one pass more.

    The first passes warm up. What is timed sees zeros in the cache, which takes as long to read as text.
    None where a model is so slow that not even ENOUGH were timed: rows are priced while decoding.
    Errors: OptionError where the context is too short.
    """
    clock, most = now or clock_of(target), max(rows for _, rows in FIRST)
    long = min(LONG, target.max_length - most - 2)
    if long < 2 * SHORT:
        least = 2 * SHORT + most + 2
        raise OptionError(f"a context of {target.max_length} tokens is too short to measure a pass; it needs {least}")
    benches = [_bench(target, size) for size in (SHORT, long)]
    for bench in benches:
        bench.sequence.num_cached = bench.context
    found: dict[tuple[int, int], list[float]] = {}
    began = clock()
    for bench in benches:  # weights come from their file when they are first read
        _once(bench, 2, clock)
    target.cache.touch(0, long)
    for number, rows in FIRST * ROUNDS:
        if clock() - began >= seconds:
            break
        found.setdefault((number, rows), []).append(_once(benches[number], rows, clock))
    return _coarse(found, [bench.context for bench in benches]) if len(found) >= ENOUGH else None


def _coarse(found: dict[tuple[int, int], list[float]], contexts: list[int]) -> Profile:
    """The profile of what was timed: what disturbs a pass only ever adds to it, so the least of few counts."""
    times = {kind: min(values) for kind, values in found.items()}
    counts = sorted(rows for number, rows in times if number == 0)
    both = [rows for rows in counts if (1, rows) in times]
    slope, start = _line(both, [times[1, rows] - times[0, rows] for rows in both])
    behind = {(1, rows): times[0, rows] + start + slope * rows for rows in counts}
    ones = found[0, 1]
    spread = max(ones) / min(ones) if len(ones) > 1 else STEADY + 1.0  # one pass alone tells nothing about it
    return replace(_profile(counts, times | behind, contexts, several=0.0, beside=0.0), spread=spread)


def _once(bench: Bench, rows: int, clock: Callable[[], float]) -> float:
    """Seconds of one pass over the last token and `rows` - 1 candidates for the next one."""
    packed = _rows(bench, rows)
    began = clock()
    bench.target.forward(packed)
    return clock() - began


def quiet(times: SequenceOf[float]) -> float:
    """The lower quartile: what disturbs a measurement only ever adds to it."""
    return sorted(times)[len(times) // 4]


def _profile(
    counts: SequenceOf[int], times: dict[tuple[int, int], float], contexts: list[int], several: float, beside: float
) -> Profile:
    """Smooth what was measured: a pass never gets cheaper by a row, and a token's price is a line over the rows."""
    near, far = contexts
    raw = [(times[1, rows] - times[0, rows]) / (far - near) for rows in counts]
    slope, start = _line(counts, raw)
    per_token = [max(float(start + slope * rows), 0.0) for rows in counts]
    short = [max(times[0, rows] - price * near, 1e-9) for rows, price in zip(counts, per_token, strict=True)]
    profile = Profile(tuple(counts), tuple(accumulate(short, max)), tuple(per_token), host=beside)
    if not several:
        return profile
    return replace(profile, per_sequence=(several - profile.at(BATCH, BATCH * near, BATCH)) / (BATCH - 1))


def _line(counts: SequenceOf[int], values: SequenceOf[float]) -> tuple[float, float]:
    """(slope, start) of the line that is nearest by relative error: steps of few rows are the most frequent ones."""
    slope, start = np.polyfit(counts, values, 1, w=[1 / rows for rows in counts])
    return float(slope), float(start)


def _request(target: HFTarget, tokens: list[int]) -> Sequence:
    sampling = SamplingParams(max_tokens=16)
    return open_sequence(tokens, sampling, seed=0, eos=frozenset(), context=target.max_length)


def _bench(target: HFTarget, size: int) -> Bench:
    tokens = [(7 * i + 3) % target.vocab for i in range(size)]
    return Bench(target, tokens, 2)


def _time(bench: Bench, rows: int) -> float:
    """Seconds of a pass over the last token and `rows` - 1 candidates for the next one, behind others like it."""
    return settled(bench.target, _rows(bench, rows))


def _rows(bench: Bench, rows: int) -> Rows:
    """The last token and `rows` - 1 candidates for the next one."""
    last = bench.sequence.tokens[-1]
    tokens = tuple((last + i) % bench.target.vocab for i in range(rows - 1))
    return pack([(bench.sequence, 1, Draft(tokens, (ROOT,) * len(tokens), ("x",) * len(tokens), len(tokens)))])


def _several(target: HFTarget, bench: Bench) -> float:
    """Seconds of a pass with one row for each of BATCH sequences; they all read slot 0."""
    return settled(target, pack([(bench.sequence, 1, EMPTY)] * BATCH))


def settled(target: HFTarget, rows: Rows, short: PassVariant | None = None) -> float:
    """Seconds of a pass behind others like it: decoding finds a small model in the processor's caches."""
    now = clock_of(target)
    spent = took = 0.0
    for _ in range(REPEATS):
        began = now()
        target.forward(rows, short)
        took = now() - began
        spent += took
        if spent > BRIEF:
            break
    return took


def profile_of(
    target: HFTarget, *, folder: Path | None = None, note: Callable[[str], None] = lambda _: None
) -> Profile | None:
    """The kept profile; where there is none a coarse one, measured now in about a second, kept if it was steady.

    None where nothing could be measured in that time. Errors: OptionError where the context is too short.
    """
    known, why = load(target, folder)
    if why:
        note(why)
    if known is not None:
        return known
    found = measure_briefly(target)
    if found is not None and found.spread <= STEADY:  # else the next start measures again
        keep(found, target, note, folder)
    return found


def keep(
    profile: Profile,
    target: HFTarget,
    note: Callable[[str], None],
    folder: Path | None = None,
    state: Span | None = None,
) -> Path | None:
    """Save a profile; where that cannot be done, or should not, say so and go on."""
    if profile.spread > STEADY:
        note(
            f"the machine is busy: the same pass took up to {profile.spread:.1f} times as long; what was measured is "
            "used now and not kept. For good figures run 'selfdraft tune' when nothing else runs"
        )
        return None
    try:
        return save(profile, target, folder, state)
    except OptionError as error:
        note(str(error))
        return None
