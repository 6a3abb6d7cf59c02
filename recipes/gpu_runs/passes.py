"""Targets over graphs whose replays are timed, and what a pass of so many rows takes behind so many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import torch
from transformers import PreTrainedModel

from gpu_runs.bench import Bench, Timed
from gpu_runs.parts import Figure
from selfdraft.core.rows import Rows, tree_rows
from selfdraft.core.tree import Draft
from selfdraft.drafting.cost_model import Profile
from selfdraft.models.adapters import MaskAdapter
from selfdraft.models.graph.cuda import one_class
from selfdraft.models.graph.graph_runner import CLASSES, SPARE, GraphSettings
from selfdraft.models.proof.one_class import equal_rows
from selfdraft.models.proof.quicker import quicker
from selfdraft.models.target import Exactness, HFTarget
from selfdraft.types import PassVariant

ROWS = (1, 2, 4, 8, 16, 32, 64)


@contextmanager
def opened(
    bench: Bench, model: PreTrainedModel, settings: GraphSettings, places: int, *, slots: int = 1,
    adapters: SequenceOf[MaskAdapter] = (), level: Exactness | None = None,
) -> Iterator[tuple[HFTarget, Timed]]:  # fmt: skip
    """A target whose decoding passes are timed graphs, with room for `places` tokens in every slot."""
    notes = Timed(settings.capture, bench.mark)
    settings = replace(settings, capture=notes)
    target = HFTarget(model, slots=slots, graphs=settings, adapters=adapters, clock=bench.clock)
    target.exactness = level or target.exactness
    target.hold(places, SPARE)
    assert target.graphs is not None
    try:
        yield target, notes
    finally:
        target.graphs.close()
        bench.let_go()


def best_settings(bench: Bench, model: PreTrainedModel, slots: int) -> tuple[GraphSettings, Exactness]:
    """What a target gets at load: one class of rows where that gives equal bits, else several, and glue where that is
    quicker. Tried once a shape.
    """
    classes, config = one_class(slots), model.config
    kind = config.hidden_size, config.num_hidden_layers, model.dtype, classes
    if kind not in bench.quicker:
        many = replace(bench.graphs(CLASSES), glue=bench.glue)
        bench.quicker[kind] = quicker(model, many, bench.clock)[0].glue
    one = replace(bench.graphs(classes), glue=bench.quicker[kind])
    if kind not in bench.known:
        bench.known[kind] = equal_rows(model, one)
    equal, rows = bench.known[kind]
    why = f"{equal} of {rows} rows of two blocks had the same bits plain and drafted"
    if equal == rows:
        return one, Exactness("bitwise", why)
    return replace(bench.graphs(CLASSES), glue=one.glue), Exactness("token", why)


def fuses(target: HFTarget) -> bool:
    """Whether its plain passes have their small kernels fused."""
    return target.graphs is not None and target.graphs.fused


def rows_at(target: HFTarget, base: int, count: int) -> Rows:
    """One sequence with `base` tokens in the cache, its last token, and a chain of `count` - 1 behind it."""
    draw = torch.Generator().manual_seed(base + count)
    ids = torch.randint(0, target.vocab, (count,), generator=draw).tolist()
    return tree_rows([(0, base, ids[0], Draft.chain(ids[1:], "timed"))])


@torch.inference_mode()
def fill(target: HFTarget) -> None:
    """Random keys and values in the whole cache: what a prompt would have left, as far as time is concerned."""
    assert target.graphs is not None
    for stack in target.graphs.cache.stacks:
        stack.normal_()


def pass_seconds(
    bench: Bench, target: HFTarget, notes: Timed, base: int, count: int, short: PassVariant | None = None
) -> list[float]:
    """Seconds of replays of one pass of `count` rows behind `base` tokens.

    Errors: RuntimeError where it is no graph.
    """
    rows = rows_at(target, base, count)
    for _ in range(1 + bench.warm):  # a graph of one of several classes is captured when it comes again
        target.forward(rows, short)
    bench.wait()
    notes.seconds()
    found = []
    for _ in range(bench.times):
        target.forward(rows, short)
        bench.wait()
        found.append(notes.seconds())
    if not target.runs.startswith("fast"):
        raise RuntimeError(f"the pass is no graph: {target.runs}")
    return found


def row_times(
    bench: Bench, target: HFTarget, notes: Timed, base: int, sizes: SequenceOf[int] = ROWS
) -> dict[int, list[float]]:
    """T(n) behind `base` tokens, the widest first."""
    return {count: pass_seconds(bench, target, notes, base, count) for count in sorted(sizes, reverse=True)}


def profile_of(times: dict[int, list[float]], host: float = 0.0) -> Profile:
    """What drafters are told of passes."""
    sizes = tuple(sorted(times))
    return Profile(sizes, tuple(median(times[n]) for n in sizes), (0.0,) * len(sizes), 0.0, host)


def figure(name: str, value: object, unit: str = "", **of: object) -> Figure:
    """See `Figure`."""
    return {"figure": name, **of, "value": value, **({"unit": unit} if unit else {})}


def timed_figure(name: str, seconds: SequenceOf[float], **of: object) -> Figure:
    """A median in milliseconds, the spread of the middle half, and all that was measured."""
    ms = sorted(1e3 * one for one in seconds)
    spread = ms[3 * len(ms) // 4] - ms[len(ms) // 4]
    return {**figure(name, median(ms), "ms", **of), "spread": spread, "all": [round(one, 5) for one in ms]}
