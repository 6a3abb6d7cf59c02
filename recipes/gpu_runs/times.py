"""The run `time`: what passes take by rows and context, what they consist of, and what graphs take in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from transformers import PreTrainedModel

from gpu_runs.bench import Bench, random_model, read_bytes
from gpu_runs.check import machine
from gpu_runs.parts import CheckFailed, Figure, Run
from gpu_runs.passes import ROWS, figure, fill, fuses, opened, pass_seconds, row_times, rows_at, timed_figure
from selfdraft.models.graph.graph_runner import CLASSES, GraphSettings
from selfdraft.models.target import HFTarget
from selfdraft.types import middle

PIECES = (256, 512, 1024)
FEW = (1, 16, 64)
FUSED = ", fused glue"
"""Behind the name of a figure whose passes have their small kernels fused."""
KINDS = {
    "attention": ("whole_pieces", "rest_of_path"),
    "product": ("gemm", "cutlass", "nvjet", "splitk", "gemv", "matmul"),
}
"""Words in the names of kernels; all others are small operations."""


def time(run: Run, shapes: SequenceOf[str]) -> int:
    """All parts; the exit code."""
    bench = run.bench
    run.do("machine", partial(machine, bench))
    for shape in shapes:
        run.do(f"rows and contexts, {shape}", partial(rows_and_contexts, bench, shape))
    for shape in shapes[-1:]:
        run.do(f"one class, {shape}", partial(classes, bench, shape))
        run.do(f"pieces of keys, {shape}", partial(pieces, bench, shape))
    for shape in shapes:
        run.do(f"kernels of a pass, {shape}", partial(kernels, bench, shape))
    for shape in shapes:
        run.do(f"half the blocks, {shape}", partial(half, bench, shape))
        run.do(f"graphs in memory, {shape}", partial(memory, bench, shape))
    for shape in shapes:
        run.do(f"small operations compiled, {shape}", partial(compiled, bench, shape))
    return run.end()


def rows_and_contexts(bench: Bench, shape: str) -> Iterator[Figure]:
    """T(n) behind every context, with many classes of rows."""
    model = random_model(bench, shape)
    yield figure("bytes a token", read_bytes(model) / 1e9, "GB", shape=shape)
    with opened(bench, model, bench.graphs(CLASSES), bench.lengths[-1] + 1) as (target, notes):
        fill(target)
        for base in bench.lengths:
            times = row_times(bench, target, notes, base)
            first = median(times[1])
            for count in ROWS:
                told = timed_figure("T(n)", times[count], shape=shape, tokens=base, rows=count)
                yield {**told, "by_T(1)": round(median(times[count]) / first, 3)}
    fused = replace(bench.graphs(CLASSES), glue=bench.glue)
    with opened(bench, model, fused, bench.lengths[-1] + 1) as (target, notes):
        fill(target)
        for base in bench.lengths if fuses(target) else ():
            for count, found in row_times(bench, target, notes, base, FEW).items():
                yield timed_figure(f"T(n){FUSED}", found, shape=shape, tokens=base, rows=count)


def classes(bench: Bench, shape: str) -> Iterator[Figure]:
    """What a row costs where all passes have one shape."""
    model = random_model(bench, shape)
    base = bench.lengths[1]
    for size in (1, 16, 32, 64, 128):
        with opened(bench, model, bench.graphs((size,)), base + 1) as (target, notes):
            fill(target)
            found = pass_seconds(bench, target, notes, base, 1)
            yield timed_figure("T(1) in one class", found, shape=shape, tokens=base, rows=size)


def pieces(bench: Bench, shape: str) -> Iterator[Figure]:
    """Attention over a long context with keys in larger pieces."""
    model = random_model(bench, shape)
    base = bench.lengths[-1]
    for size in PIECES:
        with opened(bench, model, replace(bench.graphs(CLASSES), piece=size), base + 1) as (target, notes):
            fill(target)
            for count in (64, 16, 1):
                found = pass_seconds(bench, target, notes, base, count)
                yield timed_figure("T(n)", found, shape=shape, tokens=base, rows=count, piece=size)


def kernels(bench: Bench, shape: str) -> Iterator[Figure]:
    """What one replay of one row consists of, as torch's profiler sees it. Errors: CheckFailed where it sees none."""
    model = random_model(bench, shape)
    for more, glue in (("", None), (FUSED, bench.glue)):
        yield from _kernels(bench, shape, model, replace(bench.graphs((1,)), glue=glue), more)


def _kernels(bench: Bench, shape: str, model: PreTrainedModel, settings: GraphSettings, more: str) -> Iterator[Figure]:
    from torch.autograd.profiler import DeviceType
    from torch.profiler import ProfilerActivity, profile

    base, blocks = bench.lengths[0], int(bench.shapes[shape]["num_hidden_layers"])
    with opened(bench, model, settings, base + 1) as (target, notes):
        if more and not fuses(target):
            return
        fill(target)
        whole = median(pass_seconds(bench, target, notes, base, 1))
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.device.type == "cuda" else [])]
        with profile(activities=kinds) as seen:
            pass_seconds(replace(bench, warm=1, times=1), target, notes, base, 1)
    counts, seconds = defaultdict[str, int](int), defaultdict[str, float](float)
    events = [event for event in seen.events() or () if event.device_type == DeviceType.CUDA]
    for event in events:
        kind = next((kind for kind, words in KINDS.items() if any(w in event.name.lower() for w in words)), "small")
        counts[kind] += 1
        seconds[kind] += event.device_time / 1e6
    if not events:
        raise CheckFailed("the profiler saw no kernels")
    runs = 3  # `pass_seconds` with warm=1 and times=1
    for kind in counts:
        told = figure(f"kernels: {kind}{more}", counts[kind] / runs / blocks, "a block", shape=shape)
        yield {**told, "ms": 1e3 * seconds[kind] / runs}
    yield figure(f"gaps{more}", 1e3 * (whole - sum(seconds.values()) / runs), "ms", shape=shape)


def half(bench: Bench, shape: str) -> Iterator[Figure]:
    """What a pass over half the blocks costs beside a whole one: `c` of layer_skip and s3d."""
    model = random_model(bench, shape)
    base, blocks = bench.lengths[0], int(bench.shapes[shape]["num_hidden_layers"])
    with opened(bench, model, bench.graphs(CLASSES), base + 1) as (target, notes):
        fill(target)
        whole = median(pass_seconds(bench, target, notes, base, 1))
        short = median(pass_seconds(bench, target, notes, base, 1, middle(blocks, blocks // 2)))
    yield figure("half the blocks by all", short / whole, shape=shape, tokens=base)


def memory(bench: Bench, shape: str) -> Iterator[Figure]:
    """Seconds and bytes of every graph of the warm-up, the largest first."""
    model = random_model(bench, shape)
    with opened(bench, model, bench.graphs(CLASSES), bench.lengths[0] + 1) as (target, _):
        assert target.graphs is not None
        left = iter(target.graphs.warm_up())
        for size in sorted(CLASSES, reverse=True):
            began, before = bench.clock(), bench.memory()
            next(left)
            bench.wait()
            seconds, taken = bench.clock() - began, bench.memory() - before
            yield {**figure("a graph", seconds, "s", shape=shape, rows=size), "MB": taken / 1e6}


def compiled(bench: Bench, shape: str) -> Iterator[Figure]:
    """An experiment: the forward pass compiled by torch, then captured. Errors: CheckFailed where torch cannot."""
    if not bench.compiles:
        raise CheckFailed(f"torch compiles no graphs for {bench.device.type} here")
    model = random_model(bench, shape)
    base = bench.lengths[0]
    for name in ("as it is", "compiled"):
        with opened(bench, model, bench.graphs((1,)), base + 1) as (target, notes):
            fill(target)
            began = bench.clock()
            if name == "compiled":
                _compile(target)
            target.forward(rows_at(target, base, 1))
            bench.wait()
            built = bench.clock() - began
            found = pass_seconds(bench, target, notes, base, 1)
            yield {**timed_figure(f"T(1), {name}", found, shape=shape, tokens=base), "built_s": built}


def _compile(target: HFTarget) -> None:
    """From now on passes of this target's own view go through torch's compiler."""
    view: PreTrainedModel = target.view_for(None, gated=False)
    view.forward = torch.compile(view.forward, dynamic=False)  # type: ignore[method-assign]
