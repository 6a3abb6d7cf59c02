"""Figures of a point: rates, percentiles of the times, goodput, errors; ratios between servers; equal texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from selfdraft.bench.load.arrivals import Point
from selfdraft.bench.load.client import Answer
from selfdraft.errors import OptionError
from selfdraft.types import JsonObject

LIMITS = ("ttft", "tpot", "e2el")
"""What --goodput can limit, with vLLM's names: time to first token, time per output token, the whole request."""
PERCENTILES = (50, 95, 99)
RATIOS: dict[str, Callable[[JsonObject], float | None]] = {
    "tokens_per_second": lambda record: record["tokens_per_second"],
    "ttft_p50": lambda record: record["ttft_ms"]["p50"],
    "tpot_p50": lambda record: record["tpot_ms"]["p50"],
}
"""Figures of a round that are compared between servers."""


@dataclass(slots=True)
class Round:
    """The answers of one server in one round of a point, and what the load generator itself used."""

    server: str
    point: Point
    number: int
    answers: list[Answer] = field(default_factory=list)
    began: float = 0.0
    """When the round began."""
    processor_seconds: float = 0.0
    """Of the load generator."""
    whole: bool = False
    """Whether every request has ended."""

    @property
    def seconds(self) -> float:
        """Seconds from the first request to the end of the last."""
        if not self.answers:
            return 0.0
        return max(one.end for one in self.answers) - min(one.sent for one in self.answers)


def percentile(values: SequenceOf[float], per_cent: float) -> float | None:
    """A percentile, on the straight line between the two nearest values, as numpy has it; None without values."""
    if not values:
        return None
    ordered, place = sorted(values), (len(values) - 1) * per_cent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def parse_goodput(text: str | None) -> dict[str, float]:
    """Milliseconds by limit, of a text such as 'ttft:500,tpot:50'. Errors: OptionError."""
    limits: dict[str, float] = {}
    for part in (text or "").replace(",", " ").split():
        name, _, number = part.partition(":")
        try:
            limit = float(number)
        except ValueError:
            limit = -1.0
        if name not in LIMITS or not 0 < limit < math.inf or name in limits:
            raise OptionError(f"--goodput {text!r} is not like ttft:500,tpot:50 in milliseconds; it takes {LIMITS}")
        limits[name] = limit
    return limits


def is_good(answer: Answer, limits: Mapping[str, float]) -> bool:
    """Whether an answer came whole and within all limits, in milliseconds; one token has no time per output token."""
    if answer.error is not None or answer.first is None:
        return False
    spent = {"ttft": answer.first, "tpot": answer.per_token or 0.0, "e2el": answer.end - answer.sent}
    return all(1000 * spent[name] <= limit for name, limit in limits.items())


def figures(rounds: SequenceOf[Round], limits: Mapping[str, float]) -> JsonObject:
    """The figures of one server at one point, all its rounds together. Times in milliseconds."""
    answers = [one for found in rounds for one in found.answers]
    whole = [one for one in answers if one.error is None]
    seconds, tokens = sum(found.seconds for found in rounds), sum(one.tokens for one in whole)
    good = sum(is_good(one, limits) for one in answers) if limits else None
    told = [one for one in whole if one.prompt_tokens is not None]
    cached = [one for one in told if one.cached_tokens is not None]
    late = [one.sent - found.began - one.ask.at for found in rounds for one in found.answers if one.ask.at is not None]
    counts = [one.counts for one in whole if one.counts is not None]
    steps = sum(int(one.get("num_steps", 0)) for one in counts)
    return {
        "rounds": len(rounds),
        "whole": all(found.whole for found in rounds),
        "requests": len(answers),
        "answered": len(whole),
        "errors": dict(sorted(Counter(one.error for one in answers if one.error is not None).items())),
        "asked_again": sum(one.tries for one in answers),
        "seconds": round(seconds, 6),
        "tokens": tokens,
        "tokens_per_second": _rate(tokens, seconds),
        "requests_per_second": _rate(len(whole), seconds),
        "ttft_ms": _spread([one.first for one in whole]),
        "tpot_ms": _spread([one.per_token for one in whole]),
        "chunk_gap_ms": _spread([gap for one in whole for gap in one.gaps]),
        "latency_ms": _spread([one.end - one.sent for one in whole]),
        "tokens_per_chunk": _rate(tokens, sum(len(one.chunks) for one in whole)),
        "tokens_per_pass": _rate(sum(int(one.get("num_output_tokens", 0)) for one in counts), steps),
        "prompt_tokens_p50": percentile([float(one.prompt_tokens or 0) for one in told], 50),
        "cached_share": _rate(
            sum(one.cached_tokens or 0 for one in cached), sum(one.prompt_tokens or 0 for one in cached)
        ),
        "goodput": None if good is None else {"share": _rate(good, len(answers)), "per_second": _rate(good, seconds)},
        "finish_reasons": dict(sorted(Counter(str(one.reason) for one in whole).items())),
        "late_ms_max": round(1000 * max(late), 3) if late else None,
        "client_processor_share": _rate(sum(found.processor_seconds for found in rounds), seconds),
    }


def _rate(count: float, by: float) -> float | None:
    return round(count / by, 6) if by > 0 else None


def _spread(seconds: SequenceOf[float | None]) -> JsonObject:
    """Mean and percentiles, in milliseconds."""
    values = [1000 * one for one in seconds if one is not None]
    spread: JsonObject = {"mean": round(sum(values) / len(values), 3) if values else None}
    for per_cent in PERCENTILES:
        found = percentile(values, per_cent)
        spread[f"p{per_cent}"] = None if found is None else round(found, 3)
    return spread


def ratios(mine: SequenceOf[Round], first: SequenceOf[Round]) -> JsonObject:
    """Figures of a server by those of the first one, round by round: the median, the lowest and the highest ratio."""
    made: JsonObject = {}
    pairs = [(figures([a], {}), figures([b], {})) for a, b in zip(mine, first, strict=False) if a.whole and b.whole]
    for name, of in RATIOS.items():
        both = [(of(one), of(other)) for one, other in pairs]
        found = [one / other for one, other in both if one is not None and other]
        made[name] = {
            "median": round(middle, 4) if (middle := percentile(found, 50)) is not None else None,
            "lowest": round(min(found), 4) if found else None,
            "highest": round(max(found), 4) if found else None,
        }
    return made


def compare_texts(rounds: SequenceOf[Round], servers: SequenceOf[str]) -> JsonObject:
    """Of each server: how many questions were asked more than once, in whatever round or point, which of them got more
    than one text, and how many texts are those of the first server.
    """
    said: dict[str, dict[str, set[str]]] = {name: {} for name in servers}
    asked: dict[str, Counter[str]] = {name: Counter() for name in servers}
    for found in rounds:
        for one in found.answers:
            if one.digest is not None and one.error is None:
                said[found.server].setdefault(one.ask.key, set()).add(f"{one.digest} {one.reason}")
                asked[found.server][one.ask.key] += 1
    made: JsonObject = {}
    for name in servers:
        shared = said[name].keys() & said[servers[0]].keys()
        made[name] = {
            "questions": len(said[name]),
            "asked_more_than_once": sum(count > 1 for count in asked[name].values()),
            "with_several_texts": sorted(key for key, texts in said[name].items() if len(texts) > 1),
            "compared_with_first": len(shared),
            "equal_to_first": sum(said[name][key] == said[servers[0]][key] for key in shared),
        }
    return made
