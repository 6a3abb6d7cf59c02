"""The verb `doctor`: which exactness this machine reaches, found by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from selfdraft.cli import terminal
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    SAMPLE_PROMPTS,
    AsJson,
    Device,
    KvCacheDtype,
    Lora,
    MaxNew,
    Model,
    Quantized,
    Threads,
    open_llm,
    repeatable,
    weights_in_words,
)

if TYPE_CHECKING:
    import torch

    from selfdraft.llm import LLM
    from selfdraft.models.kv_cache import KVCache
    from selfdraft.prove.doctor import Trial


def doctor(
    model: Model = DEFAULT_MODEL,
    lora: Lora = None,
    quantization: Quantized = "auto",
    max_new_tokens: MaxNew = 48,
    device: Device = "auto",
    threads: Threads = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    prove: Annotated[bool, typer.Option("--prove", help="Do the proof at load again, kept or not.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find the exactness this machine reaches. It is tried, with two dtypes: fast in any shape, plain in two rules."""
    from selfdraft.models.machine_state import Watch
    from selfdraft.prove.doctor import machine

    watch = Watch()
    opening = partial(open_llm, no_cache=prove, quantization=quantization, kv_cache_dtype=kv_cache_dtype, lora=lora)
    opening = partial(opening, device=device)
    findings = [*examine(opening, model, max_new_tokens, threads, quiet=as_json)]
    state, around = watch.span(), machine(findings[0].device)
    if as_json:
        trials = [finding.as_dict() for finding in findings]
        terminal.print_json({"machine": around, "machine_state": state.as_dict(), "model": model, "trials": trials})
    else:
        show_findings(around, str(state), findings)


@dataclass(frozen=True, slots=True)
class Finding:
    """One trial: what was asked for, what the load promised, what was found."""

    runner: str
    exactness: str
    """The level that was asked for."""
    trial: Trial
    promised: str
    why: str
    weights: str
    """In words, with the formats of block weights."""
    device: torch.device
    cache_bytes: int
    """Bytes of keys and values that a token of a request takes."""

    def as_dict(self) -> dict[str, object]:
        """One object of the JSON document."""
        asked = {"runner": self.runner, "exactness": self.exactness}
        said = {"promised": self.promised, "why": self.why, "weights": self.weights, "cache_bytes": self.cache_bytes}
        return {**asked, **asdict(self.trial), "level": self.trial.level, **said}


def examine(
    opening: Callable[..., LLM], model: str, max_new_tokens: int, threads: int | None, *, quiet: bool
) -> Iterator[Finding]:
    """Open the model with every dtype, runner and level, and compare drafted with plain decoding in each."""
    from selfdraft.prove.doctor import trial
    from selfdraft.types import SamplingParams

    sampling = SamplingParams(max_tokens=max_new_tokens, ignore_eos=True)
    for dtype in ("float32", "bfloat16"):
        for runner, exactness in (("auto", "bitwise"), ("plain", "bitwise"), ("plain", "token")):
            if not (quiet or terminal.err.is_terminal):  # six trials: a log must not be silent for minutes
                terminal.note(f"trying {dtype}, runner {runner}, exactness {exactness} ...")
            llm = opening(model, "none", None, dtype, exactness, threads, runner=runner)
            if runner == "auto" and llm.target.runner is None and llm.target.graphs is None:
                continue  # the plain path comes next anyway
            requests = [repeatable(llm, sampling, 0, llm.encode(text)) for text in SAMPLE_PROMPTS]
            shapes = str(llm.target.shapes) if runner == "plain" else "any, fast runner"
            found = trial(llm.target, llm.engine.drafter, requests, dtype, shapes)
            cached = bytes_per_token(llm.target.cache)
            level, why = llm.exactness.level, llm.exactness.why
            weights = weights_in_words(llm.target.facts.formats, dtype)
            yield Finding(llm.target.runs, exactness, found, level, why, weights, llm.target.facts.device, cached)


def bytes_per_token(cache: KVCache) -> int:
    """Bytes of keys and values that a token of a request takes, in all layers."""
    return cache.bytes // (cache.slots * cache.places)


def show_findings(machine: Mapping[str, object], state: str, findings: Sequence[Finding]) -> None:
    """The machine and its state, a table of the trials, and what was promised beside what was found."""
    from rich.table import Table

    known = [f"{name.replace('_', ' ')} {value}" for name, value in machine.items() if value is not None]
    terminal.out.print(", ".join(known))
    terminal.out.print(state)
    for weights in dict.fromkeys(finding.weights for finding in findings):
        terminal.out.print(f"weights: {weights}")
    heads = ("dtype", "asked", "shapes", "tokens equal", "logit bits equal", "found", "cache bytes")
    table = Table(*heads, box=None, pad_edge=False)
    for finding in findings:
        trial = finding.trial
        tokens, rows = f"{trial.tokens_equal}/{trial.tokens}", f"{trial.rows_bitwise_equal}/{trial.rows}"
        table.add_row(trial.dtype, finding.exactness, trial.shapes, tokens, rows, trial.level, str(finding.cache_bytes))
    terminal.out.print(table)
    for finding in findings:
        if finding.exactness == "bitwise":
            trial = finding.trial
            terminal.out.print(f"{trial.dtype}: {finding.promised} promised, {trial.level} found; {finding.why}")
