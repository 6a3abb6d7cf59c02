"""The run `check`: do graphs say what the plain path says, and which rows have equal bits?"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from gpu_runs.bench import Bench, copy_speed, product_speed, random_model, read_bytes
from gpu_runs.parts import CheckFailed, Figure, Run
from gpu_runs.passes import best_settings, figure, fuses, opened
from selfdraft.core.sequence import open_sequence
from selfdraft.drafters import build
from selfdraft.engine.engine import Engine
from selfdraft.errors import MissingMasks, RunnerUnavailable
from selfdraft.models.adapters import find_adapters, load_adapters
from selfdraft.models.load import load_model
from selfdraft.models.pocket import POCKET
from selfdraft.models.proof.one_class import equal_rows
from selfdraft.models.target import HFTarget
from selfdraft.types import SamplingParams

SUITE_SECONDS = 200
WIDTHS = (16, 32, 64, 128)


def check(run: Run, shapes: SequenceOf[str]) -> int:
    """All parts; the exit code."""
    bench = run.bench
    run.do("machine", partial(machine, bench))
    run.do("tests on the device", partial(suite, bench))
    run.do("every drafter says the plain text, pocket", partial(texts, bench))
    for shape in shapes:
        run.do(f"bits of products, {shape}", partial(products, bench, shape))
    for shape in shapes:
        run.do(f"bits of passes, {shape}", partial(bits, bench, shape))
    for shape in shapes:
        run.do(f"plain decoding, {shape}", partial(plain, bench, shape))
    return run.end()


def machine(bench: Bench) -> Iterator[Figure]:
    """How fast the card copies and multiplies."""
    yield figure("copy", copy_speed(bench) / 1e9, "GB/s")
    yield figure("product", product_speed(bench, 8192 if bench.device.type == "cuda" else 64) / 1e12, "TFLOP/s")


def suite(bench: Bench) -> Iterator[Figure]:
    """The tests of the repository that want a GPU, in a process of their own. Errors: CheckFailed."""
    try:
        done = subprocess.run(bench.suite, capture_output=True, text=True, timeout=SUITE_SECONDS)
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"the tests did not end in {SUITE_SECONDS} s") from None
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    yield {**figure("tests passed", counts.get("passed", 0)), **counts}
    if done.returncode:
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))][:8]
        yield {**figure("tests failed", counts.get("failed", 0)), "which": failed, "end": done.stdout[-1500:]}
        raise CheckFailed(f"{counts.get('failed', 0)} tests failed, exit code {done.returncode}")


def texts(bench: Bench) -> Iterator[Figure]:
    """Every drafter through graphs of one class and of many, greedy and sampled. Errors: CheckFailed."""
    model = load_model(POCKET, dtype=torch.float32).to(bench.device)
    settings, level = best_settings(bench, model, 2)
    yield figure("level", level.level, shape="pocket, float32")
    wrong = []
    with opened(
        bench, model, settings, 256, slots=2, adapters=load_adapters(find_adapters(POCKET), model), level=level
    ) as (target, _):
        plain = said(target, "none", bench.text)
        for name in bench.drafters:
            if name == "none":
                continue
            try:
                found = said(target, name, bench.text)
            except (RunnerUnavailable, MissingMasks) as error:
                yield figure("text", f"refused: {error}", drafter=name)
                continue
            same = sum(one == other for one, other in zip(found, plain, strict=True))
            yield figure("text", f"{same} of {len(plain)} texts are the plain ones", drafter=name)
            if same < len(plain):
                wrong.append(name)
    if wrong:
        raise CheckFailed(f"other texts than plain decoding: {', '.join(wrong)}")


def said(target: HFTarget, drafter: str, tokens: int) -> list[list[int]]:
    """Texts behind two prompts, greedy and sampled, two at a time."""
    prompts = [[(7 * i + 3 * j) % 89 + 40 for j in range(6)] * 4 for i in range(2)]
    engine = Engine(target, build(drafter, target), slots=2)
    ways = (SamplingParams(max_tokens=tokens), SamplingParams(max_tokens=tokens, temperature=0.8, top_p=0.9))
    sequences = [
        open_sequence(prompt, sampling, seed=seed, eos=frozenset(), context=target.max_length)
        for seed, (prompt, sampling) in enumerate((p, s) for p in prompts for s in ways)
    ]
    for _ in engine.generate(sequences):
        pass
    return [sequence.output for sequence in sequences]


def products(bench: Bench, shape: str) -> Iterator[Figure]:
    """For every matrix of a model: has a row the same bits anywhere among other rows, and in wider products?"""
    sizes = bench.shapes[shape]
    hidden, inner = int(sizes["hidden_size"]), int(sizes["intermediate_size"])
    narrow = hidden // int(sizes["num_attention_heads"]) * int(sizes["num_key_value_heads"])
    matrices = {
        "q, o": (hidden, hidden), "k, v": (hidden, narrow), "gate, up": (hidden, inner), "down": (inner, hidden),
        "head": (hidden, int(sizes["vocab_size"])),
    }  # fmt: skip
    draw = torch.Generator(bench.device).manual_seed(1)
    for name, (wide, out) in matrices.items():
        weight = torch.empty(out, wide, dtype=bench.dtype, device=bench.device).normal_(0, 0.02, generator=draw)
        rows = torch.empty(2 * WIDTHS[-1], wide, dtype=bench.dtype, device=bench.device).normal_(generator=draw)
        alone = F.linear(rows[:1], weight)[0]
        anywhere, as_alone = {}, {}
        for count in WIDTHS:
            ways = [(place, shift) for place in (0, count // 2, count - 1) for shift in (0, 1)]
            found = [_among(rows, weight, count, *way) for way in ways]
            anywhere[count] = all(torch.equal(one, found[0]) for one in found)
            as_alone[count] = torch.equal(found[0], alone)
        held = [count for count in WIDTHS if anywhere[count]]
        yield {
            **figure("rows whose bits do not depend on the others", held, shape=shape, matrix=f"{name} {wide} x {out}"),
            "as_one_row": [count for count in WIDTHS if as_alone[count]],
        }


def _among(rows: Tensor, weight: Tensor, count: int, place: int, shift: int) -> Tensor:
    """What row 0 becomes at a place of a product of `count` rows, among these or other neighbours."""
    batch = rows[1 + shift * (WIDTHS[-1] - 1) :][:count].clone()
    batch[place] = rows[0]
    return F.linear(batch, weight)[place]


def bits(bench: Bench, shape: str) -> Iterator[Figure]:
    """Two blocks, plain and drafted, through graphs of one class of each size; and of many classes."""
    model = random_model(bench, shape)
    for count in bench.tried:
        equal, rows = equal_rows(model, bench.graphs((count,)))
        yield figure("rows of equal bits", f"{equal} of {rows}", shape=shape, rows=count)
    equal, rows = equal_rows(model, bench.graphs((1, 2, 4, 8, 16, 32, 64, 128)))
    yield figure("rows of equal bits", f"{equal} of {rows}", shape=shape, rows="1 to 128")


def plain(bench: Bench, shape: str) -> Iterator[Figure]:
    """Milliseconds a token of plain decoding: transformers as it is and compiled, ours call by call and as graphs."""
    model = random_model(bench, shape)
    bound = read_bytes(model) / copy_speed(bench)
    yield figure("bound", 1e3 * bound, "ms", shape=shape)
    ways: dict[str, Callable[[int], object]] = {
        "transformers": partial(generated, model, None, bench.prompt),
        "ours, call by call": partial(decoded, HFTarget(model, clock=bench.clock), bench.prompt),
    }
    for name, say in ways.items():
        yield _plain_figure(bench, name, shape, say, bound)
    settings, level = best_settings(bench, model, 1)
    graphs_of = {
        "ours, graphs": replace(settings, glue=None),
        "ours, graphs, fused glue": replace(settings, glue=bench.glue),
        "ours, graphs of one row": bench.graphs((1,)),
        "ours, graphs of one row, fused glue": replace(bench.graphs((1,)), glue=bench.glue),
    }
    for name, graphs in graphs_of.items():
        with opened(bench, model, graphs, bench.prompt + bench.tokens + 1) as (target, _):
            if name.endswith("fused glue") and not fuses(target):
                continue
            yield {
                **_plain_figure(bench, name, shape, partial(decoded, target, bench.prompt), bound),
                "level": level.level,
            }
    if bench.compiles:  # last: it takes longest, and may fail
        yield _plain_figure(
            bench,
            "transformers, static cache, compiled",
            shape,
            partial(generated, model, "static", bench.prompt),
            bound,
        )


def _plain_figure(bench: Bench, name: str, shape: str, say: Callable[[int], object], bound: float) -> Figure:
    each = token_seconds(bench, say)
    return {**figure(name, 1e3 * each, "ms", shape=shape), "percent_of_bound": percent(bound, each)}


def percent(part: float, whole: float) -> float | None:
    """A share in percent; None where a clock has not moved."""
    return round(100 * part / whole, 1) if whole > 0 else None


def token_seconds(bench: Bench, say: Callable[[int], object], runs: int = 3) -> float:
    """Seconds of one more token: a long text less a short one, the median of some runs after one."""
    found = []
    for _ in range(runs + 1):
        times = []
        for count in (1, 1 + bench.tokens):
            bench.wait()
            began = bench.clock()
            say(count)
            bench.wait()
            times.append(bench.clock() - began)
        found.append((times[1] - times[0]) / bench.tokens)
    return median(found[1:])


def prompt_of(vocab: int, tokens: int) -> list[int]:
    return torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(3)).tolist()


@torch.inference_mode()
def generated(model: PreTrainedModel, cache: str | None, prompt: int, count: int) -> object:
    """transformers' own greedy text."""
    ids = torch.tensor([prompt_of(model.config.vocab_size, prompt)], device=model.device)
    settings = GenerationConfig(
        do_sample=False, pad_token_id=0, max_new_tokens=count, min_new_tokens=count, cache_implementation=cache
    )
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)


def decoded(target: HFTarget, prompt: int, count: int) -> list[int]:
    """Our plain text."""
    sampling = SamplingParams(max_tokens=count, ignore_eos=True)
    sequence = open_sequence(
        prompt_of(target.vocab, prompt), sampling, seed=0, eos=frozenset(), context=target.max_length
    )
    for _ in Engine(target, build("none", target), chunk=2048, rows=4096).generate([sequence]):
        pass
    return sequence.output
