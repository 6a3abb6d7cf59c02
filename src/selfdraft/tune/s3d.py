"""How many middle blocks S3D should skip and how many tokens it should predict, solved from a few measurements.

Source: S3D (arXiv 2405.20314), whose claim is the relation of skip width, number of predictors and speed-up. The form
used here: improvement factor IF = E / (t_v + beta), with E from the acceptance of each place (`speedup.py`). Acceptance
is measured at a few widths and falls with the skipped share x as p (1 - x^u), the pass gets cheaper linearly in x.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from selfdraft.drafters.none import NoDrafter
from selfdraft.drafters.s3d import S3D
from selfdraft.engine.engine import Engine
from selfdraft.errors import MissingMasks, OptionError
from selfdraft.models.target import HFTarget
from selfdraft.tune.layer_skip.tuner import decode_seconds
from selfdraft.tune.passes import Bench, Request, beside_the_pass
from selfdraft.tune.speedup import expected_by_depth, single_pass_speed
from selfdraft.types import Budget, usual_widths

Numbers = NDArray[np.float64]
POWERS = np.geomspace(0.25, 16.0, 60)
"""Exponents that are tried for the curve of acceptance."""


@dataclass(frozen=True, slots=True)
class Width:
    """What was measured with `width` blocks skipped."""

    width: int
    acceptance: tuple[float, ...]
    """Of each place, given that all before it were accepted."""
    tried: tuple[int, ...]
    """On how many tokens that was measured."""
    passes: tuple[float, ...]
    """passes[m - 1]: a drafting pass with m masks, in plain steps."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting and its speed-up over plain decoding, by the formula or by the clock."""

    width: int
    masks: int
    speed: float

    @property
    def options(self) -> dict[str, int]:
        """Options of the drafter s3d."""
        return {"skip_width": self.width, "num_masks": self.masks}


@dataclass(frozen=True, slots=True)
class Curve:
    """Predicted speed-up of every width and number of masks."""

    layers: int
    widths: tuple[Width, ...]
    verify: tuple[float, ...]
    """verify[m - 1]: a step that verifies m + 1 tokens, in plain steps."""
    acceptance: tuple[tuple[float, float], ...]
    """(p, u) of each place."""
    passes: tuple[tuple[float, float], ...]
    """(at no skipped block, for each skipped block) of each number of masks."""

    def accepted(self, width: int, masks: int) -> list[float]:
        share = width / self.layers
        return [top * (1 - share**power) for top, power in self.acceptance[: masks + 1]]

    def speed(self, width: int, masks: int) -> float:
        whole, saved = self.passes[masks - 1]
        expected = expected_by_depth(self.accepted(width, masks))
        return single_pass_speed(expected, whole + saved * width, self.verify[masks - 1])

    def all(self) -> list[Choice]:
        """Every setting between the measured widths, the fastest first."""
        low, high = self.widths[0].width, self.widths[-1].width
        pairs = ((width, masks) for width in range(low, high + 1) for masks in range(1, len(self.verify) + 1))
        return sorted((Choice(*pair, self.speed(*pair)) for pair in pairs), key=lambda choice: -choice.speed)

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "best": self.all()[0].options, "settings": [asdict(choice) for choice in self.all()]}


def default_widths(target: HFTarget) -> list[int]:
    """The widths for which the adapter was trained; narrower ones run blocks without one. Errors: MissingMasks."""
    if not target.extras.num_masks("s3d"):
        raise MissingMasks("s3d cannot be tuned without mask tokens: give the folder of 'selfdraft train' as --adapter")
    trained = target.tuned.get("s3d", {}).get("skip_widths")
    if isinstance(trained, list) and trained:
        return sorted(int(width) for width in trained)
    return [*usual_widths(target.layers)]


def chain(target: HFTarget, width: int, masks: int) -> S3D:
    """The drafter with a fixed setting: one chain of masks + 1 tokens, always whole."""
    return S3D(
        target, skip_width=width, num_masks=masks, num_speculative_tokens=masks + 1, branches=1, min_probability=0.0
    )


def acceptance(
    target: HFTarget, requests: SequenceOf[Request], width: int
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Share of accepted tokens at each place while decoding `requests` for real, and how many steps came that far.

    A place that could not be drafted (the request or an attention length ends there) counts as not accepted, for it
    brings nothing; so E of these shares is what a step really brings.
    """
    masks = target.extras.num_masks("s3d")
    engine = Engine(target, chain(target, width, masks))
    tried, right = [0] * (masks + 1), [0] * (masks + 1)
    for request in requests:
        for sequence, result in engine.generate([request()]):
            if sequence.num_output_tokens == len(result.tokens):
                continue  # the prefill
            for place in range(min(masks, len(result.path)) + 1):
                tried[place] += 1
                right[place] += place < len(result.path)
    if not tried[0]:
        raise OptionError("the prompts get answers of one token, on which nothing can be measured: give other prompts")
    return tuple(good / max(count, 1) for good, count in zip(right, tried, strict=True)), tuple(tried)


def measure(
    target: HFTarget, requests: SequenceOf[Request], widths: SequenceOf[int], runs: int = 15
) -> Iterator[Width | tuple[float, ...]]:
    """Measure each width, then (last) the verification of 2, 3, ... tokens. All kinds of passes take turns."""
    rates = []
    for width in widths:
        rates.append(acceptance(target, requests, width))
        yield Width(width, *rates[-1], ())
    sequence = requests[0]()
    for _ in Engine(target, NoDrafter(target)).generate([sequence]):
        pass
    bench = Bench(target, sequence.tokens, target.extras.num_masks("s3d") + 1)
    bench.prefill()
    beside = beside_the_pass(target, requests[0])
    drafters = {(w, m): chain(target, w, m) for w in widths for m in range(1, target.extras.num_masks("s3d") + 1)}
    seen: dict[object, list[float]] = {}
    for run in range(-2, runs):
        plain = bench.time(bench.step)
        step = plain + beside
        for (width, masks), drafter in drafters.items():
            room = Budget(masks + 1, masks + 1, masks + 1)
            began = bench.now()
            (draft,) = drafter.draft([bench.sequence], [room])
            if run >= 0:
                seen.setdefault((width, masks), []).append((bench.now() - began) / step)
            if width == widths[0]:
                taken = bench.time(lambda draft=draft: bench.step(draft))  # type: ignore[misc]
                if run >= 0:
                    seen.setdefault(masks, []).append((taken - plain + step) / step)
    counts = sorted({masks for _, masks in drafters})
    for width, rate in zip(widths, rates, strict=True):
        yield Width(width, *rate, tuple(median(seen[width, masks]) for masks in counts))
    yield tuple(median(seen[masks]) for masks in counts)


def solve(layers: int, widths: SequenceOf[Width], verify: SequenceOf[float]) -> Curve:
    """Fit the curves through what was measured. Errors: OptionError for less than two widths."""
    if len(widths) < 2:
        raise OptionError(f"{len(widths)} skip width measured; the curve needs at least 2, such as --skip-widths 4,6,8")
    ordered = sorted(widths, key=lambda width: width.width)
    shares = np.array([width.width / layers for width in ordered])
    falls = _fit_falls(
        shares, *(np.array(found) for found in zip(*((w.acceptance, w.tried) for w in ordered), strict=True))
    )
    lines = []
    for times in zip(*(width.passes for width in ordered), strict=True):
        slope, start = np.polyfit([width.width for width in ordered], times, 1)
        lines.append((float(start), float(slope)))
    return Curve(layers, tuple(ordered), tuple(verify), falls, tuple(lines))


def _fit_falls(shares: Numbers, rates: Numbers, counts: Numbers) -> tuple[tuple[float, float], ...]:
    """(p, u) of p (1 - x^u) for each place, by least squares; p at most 1, and u is common to all places.

    `shares` [widths]; `rates` and `counts` [widths, places], each rate weighing by its count: the last places are
    seldom tried, and a power of their own would follow their chance.
    """
    best = float("inf"), np.zeros(rates.shape[1]), 1.0
    for power in POWERS:
        shape = (1 - shares**power)[:, None]
        tops = np.minimum((counts * rates * shape).sum(0) / np.maximum((counts * shape**2).sum(0), 1e-9), 1.0)
        error = float((counts * (tops * shape - rates) ** 2).sum())
        if error < best[0]:
            best = error, tops, float(power)
    return tuple((float(top), best[2]) for top in best[1])


def sweep(
    target: HFTarget, requests: SequenceOf[Request], choices: SequenceOf[tuple[int, int]], runs: int = 3
) -> Iterator[Choice]:
    """Decode for real with every (width, masks), in turns with plain decoding; the speed-up of each by the clock.

    Errors: OptionError when a text differs from the plain one, which must not happen.
    """
    drafters = {choice: chain(target, *choice) for choice in choices}
    ratios: dict[tuple[int, int], list[float]] = {choice: [] for choice in choices}
    for run in range(-1, runs):
        base, drafted = 0.0, dict.fromkeys(choices, 0.0)
        for request in requests:  # plain and drafted within seconds of each other: what else runs meets them all
            seconds, wanted = decode_seconds(target, NoDrafter(target), request)
            base += seconds
            for choice, drafter in drafters.items():
                seconds, found = decode_seconds(target, drafter, request)
                drafted[choice] += seconds
                if found.tokens != wanted.tokens:
                    raise OptionError(f"s3d with {choice} gave another text than plain decoding; see selfdraft verify")
        if run >= 0:
            for choice, seconds in drafted.items():
                ratios[choice].append(base / seconds)
    for choice, found_ratios in ratios.items():
        yield Choice(*choice, median(found_ratios))
