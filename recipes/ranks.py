"""Lookahead parallelism on real processes: are the texts equal, how many steps, and what does a step cost.

    torchrun --nproc_per_node N recipes/ranks.py check --model pocket --prompts 60
    torchrun --nproc_per_node N recipes/ranks.py steps --windows 5,10,20,40 --output FILE.jsonl
    torchrun --nproc_per_node 2 recipes/ranks.py moving
    python recipes/ranks.py picture FILE.jsonl ... PICTURE.png
    python recipes/ranks.py model FILE.jsonl ... --moving MOVING.jsonl --profile PROFILE.json

`check` compares every token with plain decoding, greedy and sampled. `steps` counts the steps and the rows of a rank by
the width of the window. `moving` times both ways to give accepted keys and values to all ranks: to send them, or to
compute them again in the next pass, and exchanges of hidden states. `model` puts these and T(n), a profile that
`selfdraft tune machine` has kept, into the formulas of docs/scaling.md. Rank 0 prints one line of JSON for each result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from selfdraft.bench.charts import steps_by_rows
from selfdraft.bench.tasks import load
from selfdraft.core.rows import text_rows
from selfdraft.core.sequence import Sequence
from selfdraft.llm import LLM
from selfdraft.models.reference import quiet
from selfdraft.parallel import join
from selfdraft.parallel.lookahead import LookaheadRanks
from selfdraft.parallel.ranks import Ranks
from selfdraft.types import JsonObject, SamplingParams

WAYS = {"greedy": 0.0, "sampled": 0.8}


def prompts_of(llm: LLM, given: argparse.Namespace) -> list[list[int]]:
    """Token ids of prompts of the bundled tasks `quick` and `gsm8k`; of a toy without such a task their first words."""
    items = [*load("quick", None, chat=False, limit=None), *load("gsm8k", None, chat=False, limit=60)]
    texts = [item.turns[0] for item in items]
    if given.model == "pocket":
        return [llm.encode(" ".join(text.split()[:12])) for text in texts][: given.prompts]
    chosen = texts[:: max(len(texts) // given.prompts, 1)] if given.spread else texts
    return [llm.render([{"role": "user", "content": text[:1200]}]) for text in chosen][: given.prompts]


def decode(llm: LLM, prompt: list[int], sampling: SamplingParams, *, plainly: bool = False) -> Sequence:
    (request,) = llm.requests(prompt, sampling)
    for _ in (llm.engine_for("none") if plainly else llm.engine).generate([request]):
        pass
    return request


def opened(ranks: Ranks, given: argparse.Namespace, width: int) -> LLM:
    config = {"method": "lookahead", "window_size": width, "ngram_size": given.ngram, "guess_set_size": width}
    return LLM(given.model, speculative_config=config, ranks=ranks, max_num_seqs=1, quantization=given.quantization)


def check(ranks: Ranks, given: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Every token against plain decoding."""
    llm = opened(ranks, given, given.width)
    prompts = prompts_of(llm, given)
    for way, temperature in WAYS.items():
        wrong, tokens, steps, digest = 0, 0, 0, hashlib.blake2b(digest_size=8)
        for number, prompt in enumerate(prompts):
            sampling = SamplingParams(temperature=temperature, max_tokens=given.tokens, seed=number, ignore_eos=True)
            drafted = decode(llm, prompt, sampling)
            wrong += drafted.output != decode(llm, prompt, sampling, plainly=True).output
            tokens, steps = tokens + len(drafted.output), steps + drafted.stats.num_steps
            digest.update(repr(drafted.output).encode())
        facts = {"prompts": len(prompts), "tokens": tokens, "steps": steps, "mismatches": wrong}
        yield {"way": way, **facts, "texts": digest.hexdigest(), **exchanged(llm, ranks)}


def exchanged(llm: LLM, ranks: Ranks) -> dict[str, object]:
    target = llm.engine.target
    assert isinstance(target, LookaheadRanks)
    return {"bytes_per_step": target.bytes_per_step, **ranks.as_dict()}


@contextmanager
def rows_counted(llm: LLM) -> Iterator[list[int]]:
    """The rows of this rank's decoding passes meanwhile."""
    found: list[int] = []
    inner, forward = llm.target, llm.target.forward

    def counting(rows, short=None):  # type: ignore[no-untyped-def]
        if rows.spans[0].pending == 1:
            found.append(len(rows))
        return forward(rows, short)

    inner.forward = counting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        inner.forward = forward  # type: ignore[method-assign]


def steps(ranks: Ranks, given: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Steps and rows by the width of the window."""
    llm = opened(ranks, given, 5)
    prompts = prompts_of(llm, given)
    sampling = SamplingParams(temperature=given.temperature, max_tokens=given.tokens, seed=0, ignore_eos=True)
    plain = [decode(llm, prompt, sampling, plainly=True).output for prompt in prompts]
    for width in map(int, given.windows.split(",")):
        llm.use(None, {"method": "lookahead", "window_size": width, "ngram_size": given.ngram, "guess_set_size": width})
        before, took = dict(ranks.as_dict()), 0
        with rows_counted(llm) as rows:
            for prompt, wanted in zip(prompts, plain, strict=True):
                request = decode(llm, prompt, sampling)
                assert request.output == wanted, "the text differs from plain decoding"
                took += request.stats.num_steps
        mean = torch.tensor([sum(rows) / len(rows)])
        moved = ranks.cache_bytes - before["cache_bytes"]
        yield {
            "model": given.model,
            "weights": given.quantization,
            "ranks": ranks.size,
            "window": width,
            "ngram": given.ngram,
            "prompts": len(prompts),
            "tokens": len(plain) * given.tokens,
            "steps": took,
            "tokens_per_step": round(len(plain) * given.tokens / took, 4),
            "rows_of_a_rank": [round(float(one), 1) for one in ranks.gather(mean).flatten()],
            "bytes_per_step": exchanged(llm, ranks)["bytes_per_step"],
            "cache_bytes_per_step": round(moved / took, 1),
        }


def moving(ranks: Ranks, given: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Seconds to send keys and values of accepted tokens, and to compute them again: medians, all ranks at work."""
    llm = opened(ranks, given, given.width)
    target, cache = llm.target, llm.target.cache
    tokens = [(7 * i + 3) % 1000 for i in range(256)]
    target.forward(text_rows(0, 0, tokens))
    for accepted in (1, 2, 4):
        times: dict[str, list[float]] = {"send": [], "pass": [], "longer": []}
        for _ in range(given.repeats):
            for name in times:
                ranks.gather(torch.zeros(1))
                began = time.perf_counter()
                if name == "send":
                    data = cache.packed(0, 256, accepted)
                    ranks.send(data, 0)
                    cache.unpack(0, 256, data)
                else:
                    target.forward(text_rows(0, 256, tokens[: 32 + accepted * (name == "longer")]))
                times[name].append(time.perf_counter() - began)
        found = {name: median(values) for name, values in times.items()}
        kib = cache.packed(0, 256, accepted).numel() / 1024
        again = found["longer"] - found["pass"]
        yield {"accepted": accepted, "KiB": kib, "send_ms": 1e3 * found["send"], "compute_again_ms": 1e3 * again}

    hidden = int(llm.model.config.hidden_size)
    for rows in (1, 32, 128):
        data = torch.zeros(rows, hidden)
        yield {"rows": rows, "hidden": hidden, "all_reduce_ms": 1e3 * _timed(given, partial(dist.all_reduce, data))}
    yield {"gather_ms": 1e3 * _timed(given, lambda: ranks.gather(torch.zeros(1, 12, dtype=torch.int32)))}


def _timed(given: argparse.Namespace, exchange: Callable[[], object]) -> float:
    times = []
    for _ in range(10 * given.repeats):
        began = time.perf_counter()
        exchange()
        times.append(time.perf_counter() - began)
    return median(times)


def records_of(files: list[Path]) -> list[JsonObject]:
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def model(given: argparse.Namespace) -> None:
    """Modelled milliseconds per token: lookahead parallel, tensor parallel and pipeline parallel."""
    profile = json.loads(given.profile.read_text())["profile"]
    moving = records_of([given.moving])
    reduces = [one for one in moving if "all_reduce_ms" in one]
    told = next(one["gather_ms"] for one in moving if "gather_ms" in one)
    per_kib = next(one["send_ms"] / one["KiB"] for one in moving if one.get("accepted") == 4)

    def line(xs: list[float], ys: list[float], x: float) -> float:
        right = min(max(bisect_left(xs, x), 1), len(xs) - 1)
        share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
        return ys[right - 1] + share * (ys[right] - ys[right - 1])

    def passes(rows: float) -> float:
        return 1e3 * line(profile["rows"], profile["seconds"], rows)

    def reduce(rows: float, ranks: int) -> float:
        two = line([one["rows"] for one in reduces], [one["all_reduce_ms"] for one in reduces], rows)
        return two * math.log2(ranks)

    print("| ranks | W | lookahead parallel | tensor parallel | pipeline parallel | plain, tensor parallel |")
    print("|---:|---:|---:|---:|---:|---:|")
    records = records_of(given.files)
    whole = {one["window"]: max(one["rows_of_a_rank"]) for one in records if one["ranks"] == 1}
    for one in sorted(records, key=lambda record: (record["ranks"], record["window"])):
        ranks, speed, rows = one["ranks"], one["tokens_per_step"], whole[one["window"]]
        moved = one["cache_bytes_per_step"] / 1024 * per_kib
        own = (passes(max(one["rows_of_a_rank"])) + told * (ranks > 1) + moved) / speed
        tensor, plain = (
            (passes(count) / ranks + (ranks > 1) * 2 * given.layers * reduce(count, ranks)) for count in (rows, 1)
        )
        pipe = (passes(rows) + (ranks - 1) * reduce(rows, 2) / 2) / speed
        print(f"| {ranks} | {one['window']} | {own:.1f} | {tensor / speed:.1f} | {pipe:.1f} | {plain:.1f} |")


def picture(files: list[Path], place: Path) -> None:
    """Draw what `steps` found, and print the table and the fitted law."""
    records = records_of(files)
    alone = [record for record in records if record["ranks"] == 1]
    points = [(math.log(1 + record["window"]), record["tokens_per_step"]) for record in alone]
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    print(f"tokens per step = {mean_y - slope * mean_x:.3f} + {slope:.3f} ln(1 + W)")
    print("| W | ranks | steps | tokens a step | rows of a rank | bytes of a message | KiB of keys and values a step |")
    print("|---:|---:|---:|---:|---|---:|---:|")
    for one in sorted(records, key=lambda record: (record["window"], record["ranks"])):
        rows = " / ".join(f"{count:.0f}" for count in one["rows_of_a_rank"])
        told = f"{one['steps']} | {one['tokens_per_step']:.2f} | {rows} | {one['bytes_per_step']}"
        print(f"| {one['window']} | {one['ranks']} | {told} | {one['cache_bytes_per_step'] / 1024:.1f} |")
    steps_by_rows(records, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "steps", "moving", "picture", "model"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quantization", default="auto", choices=["auto", "int8", "int4"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--spread", action="store_true", help="take prompts from all tasks, not the first ones")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--windows", default="5,10,20,40")
    parser.add_argument("--width", type=int, default=7)
    parser.add_argument("--ngram", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--moving", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--layers", type=int, default=30)
    given = parser.parse_args()
    if given.what == "picture":
        *files, place = given.files
        return picture(files, place)
    if given.what == "model":
        return model(given)
    quiet()
    with join() as ranks:
        for record in {"check": check, "steps": steps, "moving": moving}[given.what](ranks, given):
            if ranks.leads:
                print(line := json.dumps(record), flush=True)
                if given.output is not None:
                    with given.output.open("a") as file:
                        file.write(line + "\n")
    return None


if __name__ == "__main__":
    main()
