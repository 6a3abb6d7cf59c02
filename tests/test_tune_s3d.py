"""The relation of skip width, number of masks and speed-up: solved from measurements, and checked by decoding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from selfdraft.core.sequence import open_sequence
from selfdraft.drafters.s3d import S3D
from selfdraft.engine.engine import Engine
from selfdraft.errors import MissingMasks, OptionError
from selfdraft.models.target import HFTarget
from selfdraft.tune import s3d
from selfdraft.tune.s3d import Curve, Width
from selfdraft.types import SamplingParams
from tests.models import tiny_llama, tiny_target
from tests.terminal import typed

LAYERS, POWER = 12, float(s3d.POWERS[30])
TOPS = (0.8, 0.6, 0.5)
VERIFY = (1.05, 1.1)


def drawn(width: int) -> Width:
    """What a model that obeys the relation shows at a width."""
    rates = tuple(top * (1 - (width / LAYERS) ** POWER) for top in TOPS)
    return Width(width, rates, (100, 80, 50), tuple(0.9 + 0.02 * m - 0.06 * width for m in (1, 2)))


def by_hand(width: int, masks: int) -> float:
    """IF = E / (t_v + beta) without any of the module's code."""
    tokens = path = 1.0
    for top in TOPS[: masks + 1]:
        path *= top * (1 - (width / LAYERS) ** POWER)
        tokens += path
    return tokens / (VERIFY[masks - 1] + 0.9 + 0.02 * masks - 0.06 * width)


def test_the_curve_goes_through_what_obeys_it() -> None:
    curve = s3d.solve(LAYERS, [drawn(width) for width in (8, 4)], VERIFY)
    choices = curve.all()
    assert [(c.width, c.masks) for c in sorted(choices, key=lambda c: (c.width, c.masks))] == [
        (width, masks) for width in range(4, 9) for masks in (1, 2)
    ]
    for choice in choices:
        assert choice.speed == pytest.approx(by_hand(choice.width, choice.masks), abs=1e-6)
    best = max(((w, m) for w in range(4, 9) for m in (1, 2)), key=lambda pair: by_hand(*pair))
    assert (choices[0].width, choices[0].masks) == best
    assert curve.as_dict()["best"] == {"skip_width": best[0], "num_masks": best[1]}


def test_a_rate_of_few_tokens_weighs_little() -> None:
    """One accepted token of one at a place says next to nothing beside fifty at another width."""
    widths = [drawn(width) for width in (4, 6, 8)]
    odd = replace(widths[2], acceptance=(*widths[2].acceptance[:2], 1.0), tried=(100, 80, 1))
    fair = s3d.solve(LAYERS, widths, VERIFY)
    swayed = s3d.solve(LAYERS, [*widths[:2], odd], VERIFY)
    heavy = s3d.solve(LAYERS, [*widths[:2], replace(odd, tried=(100, 80, 50))], VERIFY)

    def distance(curve: Curve) -> float:
        return max(abs(curve.accepted(w, 2)[2] - fair.accepted(w, 2)[2]) for w in (4, 6, 8))

    assert distance(swayed) < 0.02 < 0.1 < distance(heavy)


def test_one_width_is_no_curve() -> None:
    with pytest.raises(OptionError, match="1 skip width measured; the curve needs at least 2"):
        s3d.solve(LAYERS, [drawn(4)], VERIFY)


def test_acceptance_is_what_the_engine_counts() -> None:
    """Against the engine's own statistics of the same decoding."""
    target = tiny_target()
    sampling = SamplingParams(temperature=0.0, max_tokens=40)

    def request() -> object:
        return open_sequence([1, 2, 3], sampling, seed=0, eos=frozenset(), context=target.max_length)

    rates, tried = s3d.acceptance(target, [request], 2)  # type: ignore[list-item]
    sequence = request()
    for _ in Engine(target, s3d.chain(target, 2, 3)).generate([sequence]):  # type: ignore[list-item]
        pass
    stats = sequence.stats  # type: ignore[attr-defined]
    assert sum(round(rate * count) for rate, count in zip(rates, tried, strict=True)) == stats.num_accepted_draft_tokens
    assert len(rates) == 4
    assert list(tried) == sorted(tried, reverse=True), "a place is tried only if those before it held"


def test_the_advice_of_the_adapter_is_the_default_setting() -> None:
    model = tiny_llama()
    target = tiny_target()
    adapter = next(a for a in target.adapters if a.method == "s3d")
    advised = HFTarget(
        model, adapters=[replace(adapter, advice={"skip_widths": [3, 1], "skip_width": 1, "num_masks": 2})]
    )
    assert s3d.default_widths(advised) == [1, 3]
    assert s3d.default_widths(target) == [1, 2]
    drafter = S3D(advised)
    assert len(drafter.short.ids) == 2
    assert len(drafter.short.skip.mlp) == 1
    with pytest.raises(MissingMasks, match="s3d cannot be tuned without mask tokens"):
        s3d.default_widths(HFTarget(model))


def test_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Widths of the bundled adapter; the sweep has every setting, and the document says what is best."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.jsonl").write_text('{"prompt": "def add(a, b):"}')
    small = "tune s3d --model pocket --prompts one.jsonl --max-new-tokens 6 --runs 1 --dtype float32 --sweep"
    done = typed(monkeypatch, capsys, *small.split(), "--json")
    assert done.code == 0, done.err
    document = done.said
    assert json.loads((tmp_path / "s3d-pocket.json").read_text())["best"] == document["best"]
    settings = {(one["width"], one["masks"]) for one in document["settings"]}
    assert settings == {(one["width"], one["masks"]) for one in document["sweep"]}
    assert settings == {(width, masks) for width in range(4, 9) for masks in range(1, 5)}
