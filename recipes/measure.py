"""The figures of docs/log.md: plain decoding against transformers, every drafter against plain, memory of long prompts.

    python recipes/measure.py speed  --dtype bfloat16
    python recipes/measure.py prefill

Everything in one process, warmed up, in alternation, medians; texts are compared, and conditions printed.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Annotated, Literal

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from selfdraft import LLM, SamplingParams
from selfdraft.drafters import NAMES
from selfdraft.models import reference
from selfdraft.prove.compare import compare
from selfdraft.prove.doctor import machine
from selfdraft.prove.record import decode

COPY = (
    "The little dog ran over the hill to see the big red barn. The farmer gave the dog a bone and a bowl of water.",
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a - b",
    "Lily has 12 apples. She gives 5 apples to her friend and buys 7 more apples at the market in the afternoon.",
)
OPEN = ("def fibonacci(n):\n", "Once upon a time there was a little dog who liked", "The answer is")
app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def speed(
    dtype: str = "float32",
    exactness: Annotated[str, typer.Option(help="bitwise or token")] = "bitwise",
    tokens: int = 128,
    runs: int = 5,
) -> None:
    """Pocket model: plain against transformers' greedy, then each drafter against plain."""
    level: Literal["bitwise", "token"] = "token" if exactness == "token" else "bitwise"
    llm = LLM("pocket", drafter="none", dtype=dtype, exactness=level, max_num_seqs=1)
    print(
        json.dumps(
            {
                **machine(torch.device("cpu")),
                "dtype": dtype,
                "exactness": llm.exactness.level,
                "shapes": str(llm.target.shapes),
            }
        )
    )
    against_transformers(llm, tokens, runs)
    copying = [llm.render([{"role": "user", "content": f"Repeat the following text exactly.\n{t}"}]) for t in COPY]
    for kind, prompts in (("copy", copying), ("open", [llm.encode(text) for text in OPEN])):
        for name in NAMES:
            if name != "none":
                against_plain(llm, kind, name, prompts, tokens, runs)


def against_transformers(llm: LLM, tokens: int, runs: int) -> None:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    ratios, equal = [], True
    for text in OPEN:
        ids = llm.encode(text)
        own, theirs = [], []
        for _ in range(runs + 1):
            record = decode(llm.engine, llm.requests(ids, sampling)[0])
            own.append(record.seconds)
            began = time.perf_counter()
            said = reference.greedy(llm.model, ids, tokens, frozenset())
            theirs.append(time.perf_counter() - began)
            equal &= said == list(record.tokens)
        ratios.append(median(theirs[1:]) / median(own[1:]))
        print(f"plain {tokens / median(own[1:]):.1f} tokens/s, transformers {tokens / median(theirs[1:]):.1f} tokens/s")
    print(f"plain against transformers' greedy: {median(ratios):.2f}x, same texts: {equal}")


def against_plain(llm: LLM, kind: str, name: str, prompts: list[list[int]], tokens: int, runs: int) -> None:
    sampling = SamplingParams(max_tokens=tokens)
    engine = llm.engine_for(name)
    ratios, lengths, equal = [], [], True
    for ids in prompts:
        result = compare(llm.engine, engine, lambda ids=ids: llm.requests(ids, sampling)[0], runs)  # type: ignore[misc]
        lengths.append(decode(engine, llm.requests(ids, sampling)[0]).stats.mean_acceptance_length)
        ratios.append(result.drafted_tokens_per_second / result.plain_tokens_per_second)
        equal &= result.texts_equal
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"{kind} {name}: {median(ratios):.2f}x plain ({each}), {median(lengths):.2f} tokens a step, equal: {equal}")


@app.command()
def prefill(lengths: str = "1000,2000,4000,8000") -> None:
    """Peak memory and time to the first token of long prompts, each in a process of its own."""
    for length in lengths.split(","):
        subprocess.run([sys.executable, __file__, "one-prefill", length], check=True)


@app.command()
def one_prefill(length: int) -> None:
    """One long prompt on a random LLaMA of 4 blocks, width 256."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlamaConfig(
        vocab_size=1000, num_key_value_heads=2, max_position_embeddings=16384, eos_token_id=None, **sizes
    )
    llm = LLM(LlamaForCausalLM(config).eval(), drafter="none", max_num_seqs=1)
    sampling = SamplingParams(max_tokens=1)
    llm.generate([[1, 2, 3]], sampling)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    llm.generate([torch.randint(0, 1000, (length,)).tolist()], sampling)
    seconds = time.perf_counter() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    cache = llm.target.cache.bytes / 2**20
    print(f"{length} tokens: {grown:.0f} MiB more at the peak, cache {cache:.0f} MiB, {seconds:.2f} s")


if __name__ == "__main__":
    app()
