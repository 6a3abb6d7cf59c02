"""The run `speed`: plain decoding against the bound of memory, wide passes, recorded answers, batches, exactness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

from gpu_runs.bench import Bench, copy_speed, random_model, read_bytes
from gpu_runs.check import decoded, machine, percent, said, token_seconds
from gpu_runs.forced import Speed, decode_forced, flat, replayed_counts
from gpu_runs.parts import CheckFailed, Figure, Run
from gpu_runs.passes import best_settings, figure, fill, opened, profile_of, row_times, timed_figure
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.drafters import build
from selfdraft.engine.engine import Engine
from selfdraft.errors import MissingMasks, RunnerUnavailable
from selfdraft.files.token_log import Logged, read_logs
from selfdraft.models.adapters import find_adapters, load_adapters
from selfdraft.models.graph.graph_runner import CLASSES
from selfdraft.models.load import load_model
from selfdraft.models.pocket import POCKET
from selfdraft.models.target import HFTarget
from selfdraft.prove.doctor import HalfRight
from selfdraft.prove.record import decode
from selfdraft.types import SamplingParams

DRAFTERS: dict[str, dict[str, object]] = {
    "none": {}, "lookup": {}, "auto": {"recycling": False}, "merged": {"recycling": False},
}  # fmt: skip
"""Those that read tokens alone: what random weights say of other tokens means nothing."""


@dataclass(frozen=True)
class Settings:
    """What `speed` is asked for. `answers`: recorded ones by name; `verified`: tokens that are compared."""

    answers: dict[str, list[Logged]]
    model: Path | None = None
    verified: int = 20_000


def read_answers(folder: Path, requests: int, tokens: int, context: int) -> dict[str, list[Logged]]:
    """The first requests of every log of a folder whose prompts leave room, their answers cut to `tokens`."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        fitting = [one for one in read_logs([path]) if len(one.prompt) + tokens < context]
        found[path.stem] = [_cut(one, tokens) for one in fitting[:requests]]
    return found


def _cut(logged: Logged, tokens: int) -> Logged:
    output = logged.output[:tokens]
    return replace(logged, output=output, limit=len(logged.prompt) + len(output))


def speed(run: Run, shapes: SequenceOf[str], settings: Settings) -> int:
    """All parts; the exit code."""
    bench = run.bench
    run.do("machine", partial(machine, bench))
    for shape in shapes:
        run.do(f"plain decoding and wide passes, {shape}", partial(plain_and_wide, bench, shape))
    for shape in reversed(shapes):
        run.do(f"recorded answers, {shape}", partial(answers, bench, shape, settings.answers))
    run.do("tokens compared", partial(verified, bench, shapes[0], settings.verified))
    for shape in shapes:
        run.do(f"batches, {shape}", partial(batches, bench, shape, settings.answers))
    if bench.drafters:
        run.do("every drafter, pocket", partial(drafters, bench))
    if settings.model is not None:
        run.do(f"checkpoint {settings.model.name}", partial(checkpoint, bench, settings.model))
    return run.end()


def plain_and_wide(bench: Bench, shape: str) -> Iterator[Figure]:
    """Milliseconds a token of plain decoding by the bound; T(16) and T(64) by T(1) in a middling context."""
    model = random_model(bench, shape)
    bound = read_bytes(model) / copy_speed(bench)
    yield figure("bound", 1e3 * bound, "ms", shape=shape)
    with opened(bench, model, bench.graphs(CLASSES), 1024) as (target, _):
        each = token_seconds(bench, partial(decoded, target, bench.prompt))
    yield figure("plain", 1e3 * each, "ms", shape=shape)
    yield figure("plain by bound", percent(bound, each), "%", shape=shape)
    settings, level = best_settings(bench, model, 1)
    yield {**figure("level", level.level, shape=shape), "why": level.why}
    base = bench.lengths[1]
    for name, graphs in (("classes", bench.graphs(CLASSES)), ("as opened", settings)):
        with opened(bench, model, graphs, base + 1) as (target, notes):
            fill(target)
            times = row_times(bench, target, notes, base, (1, 16, 64))
        for count in (1, 16, 64):
            told = timed_figure(f"T(n), {name}", times[count], shape=shape, tokens=base, rows=count)
            yield {**told, "by_T(1)": round(median(times[count]) / median(times[1]), 3)}


def answers(bench: Bench, shape: str, logs: dict[str, list[Logged]]) -> Iterator[Figure]:
    """Recorded answers with every drafter that reads tokens alone. Errors: CheckFailed for other texts or counts."""
    if not logs:
        raise CheckFailed("there are no recorded answers: give their folder with --traces")
    model = random_model(bench, shape)
    settings, _ = best_settings(bench, model, 1)
    wrong = []
    longest = max(one.limit for log in logs.values() for one in log)
    with opened(bench, model, settings, longest + 1) as (target, notes):
        profile = profile_of(row_times(bench, target, notes, min(512, longest // 2)))
        ways = [(log, name, 0.0) for log in logs for name in DRAFTERS]
        ways += [(log, name, 0.8) for log in logs for name in ("none", "auto")]
        plain: dict[tuple[str, float], float] = {}
        for log, name, heat in ways:
            asked, options = _known(bench, target, logs[log]), DRAFTERS[name]
            found = decode_forced(bench, target, notes, asked, name, options, profile=profile, temperature=heat)
            if name == "none":
                plain[log, heat] = found.rate
            counted = replayed_counts(target, asked, name, options, found, profile)
            told = _speed_figure(found, plain[log, heat], shape=shape, log=log, drafter=name, temperature=heat)
            same = counted == flat(found.accepted)
            yield {**told, "accepted_as_replay": same, "accepted": sum(counted)}
            if not (same and found.equal):
                wrong.append(f"{log} {name} at {heat}")
    if wrong:
        raise CheckFailed(f"other texts, or other counts than those of replay: {', '.join(wrong)}")


def _known(bench: Bench, target: HFTarget, log: SequenceOf[Logged]) -> list[Logged]:
    """The answers with ids that a model of random weights has: a smaller vocabulary folds them."""
    if all(max((*one.prompt, *one.output)) < target.vocab for one in log):
        return list(log)

    def folded(tokens: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(token % target.vocab for token in tokens)

    return [replace(one, prompt=folded(one.prompt), output=folded(one.output)) for one in log]


def _speed_figure(found: Speed, plain: float, **of: object) -> Figure:
    return {
        **figure("recorded answers", found.rate, "tokens/s", **of),
        "times_plain": round(found.rate / plain, 3) if plain else None,
        "tokens_a_step": round(found.tokens / max(found.steps, 1), 3),
        "ms_a_step": 1e3 * found.seconds / max(found.steps, 1),
        "host_share": round(found.host_share, 4),
        "texts_equal": found.equal,
    }


def batches(bench: Bench, shape: str, logs: dict[str, list[Logged]]) -> Iterator[Figure]:
    """Several recorded answers at a time. Errors: CheckFailed for other texts."""
    if not logs:
        raise CheckFailed("there are no recorded answers: give their folder with --traces")
    model = random_model(bench, shape)
    log = next(iter(logs))
    longest = max(one.limit for one in logs[log])
    for slots in bench.slots:
        settings, _ = best_settings(bench, model, slots)
        with opened(bench, model, settings, longest + 1, slots=slots) as (target, notes):
            asked = _known(bench, target, (logs[log] * slots)[: 2 * slots])
            plain = 0.0
            for name in ("none", "auto"):
                found = decode_forced(bench, target, notes, asked, name, DRAFTERS[name], profile=None, slots=slots)
                plain = plain or found.rate
                yield _speed_figure(found, plain, shape=shape, log=log, drafter=name, slots=slots)
                if not found.equal:
                    raise CheckFailed(f"{name} with {slots} slots says another text")


def verified(bench: Bench, shape: str, tokens: int) -> Iterator[Figure]:
    """Plain against drafted decoding, token by token and bit by bit. Errors: CheckFailed where tokens differ."""
    model = random_model(bench, shape)
    settings, level = best_settings(bench, model, 1)
    each = min(512, tokens)
    compared = different = rows = equal = 0
    with opened(bench, model, settings, 2 * each + 32, level=level) as (target, _):
        number = 0
        while compared < tokens:
            request = partial(_fresh, target, number, each)
            wanted = decode(Engine(target, build("none", target)), request(), bits=True)
            half = HalfRight(wanted.tokens, target.vocab)
            got = decode(Engine(target, half), request(), bits=True)
            compared += len(wanted.tokens)
            different += sum(one != other for one, other in zip(wanted.tokens, got.tokens, strict=True))
            rows += len(wanted.digests)
            equal += sum(one == other for one, other in zip(wanted.digests, got.digests, strict=True))
            number += 1
    told = figure("tokens that differ", different, shape=shape, tokens=compared)
    yield {**told, "rows_of_equal_bits": f"{equal} of {rows}", "level": level.level}
    if different and level.level == "bitwise":
        raise CheckFailed(f"{different} of {compared} tokens differ")
    if equal < rows and level.level == "bitwise":
        raise CheckFailed(f"{rows - equal} of {rows} rows have other bits, and the level is bitwise")


def _fresh(target: HFTarget, number: int, tokens: int) -> Sequence:
    """A request: every second one is sampled."""
    prompt = torch.randint(0, target.vocab, (24,), generator=torch.Generator().manual_seed(number)).tolist()
    sampling = SamplingParams(max_tokens=tokens, temperature=0.7 * (number % 2), ignore_eos=True)
    return open_sequence(prompt, sampling, seed=number, eos=frozenset(), context=target.max_length)


def drafters(bench: Bench) -> Iterator[Figure]:
    """Every drafter on the pocket model with its own adapters. Errors: CheckFailed for other texts."""
    model = load_model(POCKET, dtype=bench.dtype).to(bench.device)
    yield from _against_plain(bench, model, POCKET, bench.drafters)


def checkpoint(bench: Bench, place: Path) -> Iterator[Figure]:
    """A real checkpoint: plain and `auto`. Errors: CheckFailed for other texts."""
    model = load_model(place, dtype=bench.dtype).to(bench.device)
    yield from _against_plain(bench, model, place, ("none", "auto"))


def _against_plain(bench: Bench, model: PreTrainedModel, place: Path, names: SequenceOf[str]) -> Iterator[Figure]:
    settings, level = best_settings(bench, model, 2)
    wrong = []
    with opened(
        bench, model, settings, 256, slots=2, adapters=load_adapters(find_adapters(place), model), level=level
    ) as (target, _):
        wanted = said(target, "none", bench.text)
        plain = _seconds(bench, lambda: said(target, "none", bench.text))
        for name in names:
            try:
                same = said(target, name, bench.text) == wanted
            except (RunnerUnavailable, MissingMasks) as error:
                yield figure("times plain", f"refused: {error}", drafter=name)
                continue
            took = _seconds(bench, partial(said, target, name, bench.text))
            yield {**figure("times plain", round(plain / took, 3), drafter=name), "texts_equal": same}
            if not same and level.level == "bitwise":
                wrong.append(name)
    if wrong:
        raise CheckFailed(f"other texts than plain decoding: {', '.join(wrong)}")


def _seconds(bench: Bench, run: Callable[[], object]) -> float:
    """Median of three."""
    found = []
    for _ in range(3):
        bench.wait()
        began = bench.clock()
        run()
        bench.wait()
        found.append(bench.clock() - began)
    return median(found)
