"""The scaling law of lookahead decoding, measured: tokens per pass against the logarithm of the rows of a pass.

Source: Fu et al. (arXiv 2402.02057), section 4: steps fall linearly with log(rows). Their model: a guess that is good
appears once in f steps, and b guesses of g tokens give E(b, g) = (g + 1) - sum over i of (1 - a^i)^b tokens, so that
S = (f - 1 + E) / f with b = W and g = N - 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from math import log

from selfdraft.core.sequence import Sequence
from selfdraft.engine.engine import Engine

Sizes = tuple[int, int, int]
"""(W, N, G): window_size, ngram_size, guess_set_size."""

GRID: tuple[Sizes, ...] = ((1, 3, 1), (3, 3, 3), (5, 4, 5), (7, 5, 7), (10, 5, 10), (15, 5, 15))


@dataclass(frozen=True, slots=True)
class Point:
    """What fixed sizes gave over all requests."""

    window_size: int
    ngram_size: int
    guess_set_size: int
    tokens: int
    steps: int
    rows: int
    """Rows of all decode steps together, prefill left out."""
    seconds: float
    adaptive: bool = False
    """Whether the sizes were only where it started."""

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def rows_per_step(self) -> float:
        return self.rows / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def options(self) -> dict[str, object]:
        """Options of the drafter that run these sizes as they are."""
        sizes = {name: getattr(self, name) for name in ("window_size", "ngram_size", "guess_set_size")}
        return {**sizes, "adaptive": self.adaptive}

    def as_dict(self) -> dict[str, object]:
        rates = {name: round(getattr(self, name), 4) for name in ("tokens_per_pass", "rows_per_step")}
        return {**asdict(self), **rates, "tokens_per_second": round(self.tokens_per_second, 2)}


def measure(
    engine_for: Callable[[Mapping[str, object]], Engine],
    requests: SequenceOf[Callable[[], Sequence]],
    grid: Iterable[Sizes] = GRID,
    *,
    adaptive: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Point]:
    """Run every request with every (W, N, G), one at a time. `engine_for` takes the drafter's options."""
    for width, size, guesses in grid:
        empty = Point(width, size, guesses, 0, 0, 0, 0.0, adaptive)
        engine = engine_for(empty.options)
        began = clock()
        tokens, steps, rows = counted(engine, [request() for request in requests])
        yield Point(width, size, guesses, tokens, steps, rows, clock() - began, adaptive)


def counted(engine: Engine, sequences: Iterable[Sequence]) -> tuple[int, int, int]:
    """Tokens, steps, and rows of all decode steps (prefill left out) of requests that are run one at a time."""
    tokens = steps = rows = 0
    for sequence in sequences:
        for _, result in engine.generate([sequence]):
            rows += (1 + len(result.draft)) * bool(result.tokens)
        tokens += sequence.stats.num_output_tokens
        steps += sequence.stats.num_steps
    return tokens, steps, rows


@dataclass(frozen=True, slots=True)
class Line:
    """y = intercept + slope x by least squares, and how well it fits (Pearson's r; 0 when x or y never varies)."""

    slope: float
    intercept: float
    correlation: float


def fit_line(xs: SequenceOf[float], ys: SequenceOf[float]) -> Line:
    count = len(xs)
    x, y = sum(xs) / count, sum(ys) / count
    xx = sum((one - x) ** 2 for one in xs)
    yy = sum((one - y) ** 2 for one in ys)
    xy = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    slope = xy / xx if xx else 0.0
    return Line(slope, y - slope * x, xy / (xx * yy) ** 0.5 if xx and yy else 0.0)


def fit_log(points: SequenceOf[Point]) -> Line:
    """Tokens per pass against log(rows per step): `slope` tokens more for e times the rows."""
    return fit_line([log(point.rows_per_step) for point in points], [point.tokens_per_pass for point in points])


def expected_tokens(acceptance: float, guesses: int, length: int) -> float:
    """E(b, g) for b guesses of g tokens, each token right with probability a."""
    return length + 1 - sum((1 - acceptance**i) ** guesses for i in range(1, length + 1))


def compression(acceptance: float, period: float, guesses: int, length: int) -> float:
    """S = (f - 1 + E) / f: tokens per step when one step in f has good guesses."""
    return (period - 1 + expected_tokens(acceptance, guesses, length)) / period


@dataclass(frozen=True, slots=True)
class Law:
    """The paper's model, fitted: acceptance a, period f, and the root mean square error in tokens per pass."""

    acceptance: float
    period: float
    error: float

    def tokens_per_pass(self, width: int, size: int) -> float:
        """What the law says of a window of W columns and n-grams of N tokens."""
        return compression(self.acceptance, self.period, width, size - 1)


def fit_law(points: SequenceOf[Point]) -> Law:
    """(a, f) by least squares: for each a of a grid, 1/f has a closed form because S - 1 = (E - 1) / f."""
    best = Law(0.0, 1.0, float("inf"))
    for step in range(1, 100):
        a = step / 100
        gains = [expected_tokens(a, point.window_size, point.ngram_size - 1) - 1 for point in points]
        saved = [point.tokens_per_pass - 1 for point in points]
        share = sum(g * s for g, s in zip(gains, saved, strict=True)) / sum(g * g for g in gains)
        share = min(max(share, 1e-6), 1.0)  # f is at least 1
        squares = sum((share * g - s) ** 2 for g, s in zip(gains, saved, strict=True))
        error = (squares / len(points)) ** 0.5
        if error < best.error:
            best = Law(a, 1 / share, error)
    return best


def recommend(points: SequenceOf[Point]) -> Point:
    """The fastest; of equally fast ones the one with the fewest rows."""
    return max(points, key=lambda point: (point.tokens_per_second, -point.rows_per_step))


def document(points: SequenceOf[Point], facts: Mapping[str, object]) -> dict[str, object]:
    """What a file of results holds: the options to use, the laws fitted to the fixed sizes, every point, conditions."""
    fixed = [point for point in points if not point.adaptive]
    law = {"log_rows": asdict(fit_log(fixed)), "paper": asdict(fit_law(fixed))}
    options = {"method": "lookahead", **recommend(points).options}
    return {"speculative_config": options, "law": law, "points": [point.as_dict() for point in points], **facts}
