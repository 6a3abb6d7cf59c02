"""Plain decoding and verification on this CPU: transformers' greedy, our plain path and our fast path, in alternation.

    python recipes/plain.py                         # pocket, 135m and 1b shapes, bfloat16, two threads
    python recipes/plain.py --shape 1b --tokens 16
    python recipes/plain.py --llama ~/llama/bin/python    # llama.cpp, too: a Python that has llama-cpp-python

Random weights made in memory (pocket: its own). One process, warmed up, medians; the conditions are printed. T(n) is
one pass of n rows behind 64 tokens, all of them answered. llama.cpp is timed on its own clock, in its own process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from selfdraft.bench.peers import gguf
from selfdraft.bench.peers.foreign import Foreign, edition
from selfdraft.core.rows import pack
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import Draft
from selfdraft.drafters import build
from selfdraft.engine.engine import Engine
from selfdraft.models import reference
from selfdraft.models.load import load_model, open_target
from selfdraft.models.pocket import POCKET
from selfdraft.models.target import HFTarget
from selfdraft.prove.doctor import machine
from selfdraft.types import SamplingParams

SHAPES = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False},
    "llama32-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
}  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 64)
PREFIX = 64
PROMPT = 4
"""Tokens before the timed text: few, so that decoding is timed and not prefill."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main(
    shape: Annotated[list[str], typer.Option(help=f"pocket, {', '.join(SHAPES)}")] = ["pocket", "135m", "1b"],  # noqa: B006
    dtype: str = "bfloat16",
    threads: int = 2,
    tokens: int = 32,
    runs: int = 3,
    llama: str = "",
) -> None:
    torch.set_num_threads(threads)
    peer = edition("llama.cpp", llama) if llama else None
    print(json.dumps({**machine(torch.device("cpu")), "dtype": dtype, "tokens": tokens, "runs": runs, "peer": peer}))
    speed = bandwidth()
    print(f"memory: {speed:.1f} GB/s read by {threads} threads")
    for name in shape:
        model = load_model(POCKET, dtype=DTYPES[dtype]) if name == "pocket" else random_model(name, DTYPES[dtype])
        with llama_cpp(model, llama, threads) as ways:
            measure(name, model, ways, tokens, runs, speed)
        del model


def bandwidth() -> float:
    """GB/s at which all threads together read memory, the best of five."""
    block = torch.ones(2**27)  # 0.5 GB
    times = []
    for _ in range(6):
        began = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - began)
    return block.numel() * 4 / min(times[1:]) / 1e9


def random_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=2048, bos_token_id=None, eos_token_id=None)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no weights
    model.tie_weights()
    drawn = torch.empty(2**20 + 7).uniform_(-0.035, 0.035, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            flat = weight.view(-1)
            for start in range(0, len(flat), len(drawn)):  # to draw a billion numbers takes longer than to time them
                part = flat[start : start + len(drawn)]
                part.fill_(1.0) if "norm" in path else part.copy_(drawn[: len(part)])
    return model.eval()


Way = Callable[[list[int], int], tuple[list[int], float]]
"""Tokens behind a prompt, and the seconds they took."""


@contextmanager
def llama_cpp(model: PreTrainedModel, python: str, threads: int) -> Iterator[dict[str, Way]]:
    """llama.cpp over the same weights, if there is a Python that has it."""
    if not python:
        yield {}
        return
    settings = {"dtype": str(model.dtype).removeprefix("torch."), "threads": threads, "context": 512, "device": "cpu"}
    with TemporaryDirectory() as folder:
        path = gguf.cached(model, Path(folder))
        peer = Foreign("llama.cpp", "llama.cpp", python, {**settings, "model": str(path), "options": {}}, 600.0)
        path.unlink()  # it is loaded

        def say(prompt: list[int], count: int) -> tuple[list[int], float]:
            answer = peer.answer(prompt, count)
            return list(answer.tokens), answer.seconds

        try:
            yield {"llama.cpp": say}
        finally:
            peer.close()


def timed(say: Callable[[list[int], int], list[int]]) -> Way:
    def way(prompt: list[int], count: int) -> tuple[list[int], float]:
        began = time.perf_counter()
        text = say(prompt, count)
        return text, time.perf_counter() - began

    return way


def measure(name: str, model: PreTrainedModel, peers: dict[str, Way], tokens: int, runs: int, speed: float) -> None:
    read = sum(p.numel() * p.element_size() for p in set(model.parameters()))
    if not model.config.tie_word_embeddings:
        table = model.get_input_embeddings().weight
        read -= table.numel() * table.element_size()  # of these only a row is read
    bound = read / speed / 1e6
    began = time.perf_counter()
    fast = open_target(model, slots=1, runner="fast")
    opened = time.perf_counter() - began
    targets = {"plain": open_target(model, slots=1, runner="plain"), "fast": fast}
    print(f"\n{name}: {read / 1e6:.0f} MB for a token: {bound:.2f} ms or more; the fast path opened in {opened:.1f} s")
    prompt = torch.randint(0, fast.vocab, (PREFIX,), generator=torch.Generator().manual_seed(1)).tolist()
    ways = {
        "transformers": timed(lambda prompt, count: reference.greedy(model, prompt, count, frozenset())),
        **{way: timed(partial(decode, target)) for way, target in targets.items()},
        **peers,
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    texts: dict[str, list[int]] = {}
    for _ in range(runs + 1):
        for way, say in ways.items():
            texts[way], seconds = say(prompt[:PROMPT], tokens)
            times[way].append(seconds)
    each = {way: 1e3 * median(found[1:]) / tokens for way, found in times.items()}
    for way, found in each.items():
        same = next((i for i in range(tokens) if texts[way][i] != texts["plain"][i]), tokens)
        print(f"  {way:12} {found:7.2f} ms a token, {each['transformers'] / found:.2f}x transformers; "
              f"the first {same} of {tokens} tokens as plain")  # fmt: skip
    for way, target in targets.items():
        rows = passes(target, prompt, runs)
        shares = "  ".join(f"T({n}) {ms:.2f}" for n, ms in rows.items())
        print(f"  {way:6} {shares} ms; T(8) = {rows[8] / rows[1]:.2f} T(1); {100 * bound / rows[1]:.0f} % of the bound")


def decode(target: HFTarget, prompt: list[int], tokens: int) -> list[int]:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    sequence = open_sequence(prompt, sampling, seed=0, eos=frozenset(), context=target.context)
    for _ in Engine(target, build("none", target)).generate([sequence]):
        pass
    return sequence.output


def passes(target: HFTarget, prompt: list[int], runs: int) -> dict[int, float]:
    """Milliseconds of a pass by its number of rows, in alternation; each behind one like it, whose memory is near."""
    sequence = Sequence([*prompt, 1], PREFIX, SamplingParams(), slot=0, num_cached=PREFIX)
    found: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(5 * runs):
        for count, times in found.items():
            rows = pack([(sequence, 1, Draft.chain([2] * (count - 1), "x"))])
            target.forward(rows)
            began = time.perf_counter()
            target.forward(rows)
            times.append(time.perf_counter() - began)
    return {rows: 1e3 * median(times[1:]) for rows, times in found.items()}


if __name__ == "__main__":
    typer.run(main)
