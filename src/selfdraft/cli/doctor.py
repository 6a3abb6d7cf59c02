"""The verb `doctor`: which exactness this machine reaches, found by trying."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfdraft.cli import terminal
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    SAMPLE_PROMPTS,
    AsJson,
    Lora,
    MaxNew,
    Model,
    Quantized,
    Threads,
    open_llm,
    repeatable,
)

if TYPE_CHECKING:
    from selfdraft.prove.doctor import Trial
    from selfdraft.types import Quantization


def doctor(
    model: Model = DEFAULT_MODEL,
    lora: Lora = None,
    quantization: Quantized = "auto",
    max_new_tokens: MaxNew = 48,
    threads: Threads = None,
    prove: Annotated[bool, typer.Option("--prove", help="Do the proof at load again, kept or not.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find the exactness this machine reaches. It is tried, with two dtypes: fast in any shape, plain in two rules."""
    from selfdraft.models.machine_state import Watch
    from selfdraft.prove.doctor import machine

    watch = Watch()
    findings = [*examine(model, max_new_tokens, threads, lora, quantization, prove=prove)]
    state = watch.span()
    if as_json:
        trials = [finding.as_dict() for finding in findings]
        terminal.print_json({"machine": machine(), "machine_state": state.as_dict(), "model": model, "trials": trials})
    else:
        show_findings(machine(), str(state), findings)


@dataclass(frozen=True, slots=True)
class Finding:
    """One trial: what was asked for, what the load promised, what was found."""

    runner: str
    exactness: str
    """The level that was asked for."""
    trial: Trial
    promised: str
    why: str

    def as_dict(self) -> dict[str, object]:
        """One object of the JSON document."""
        asked = {"runner": self.runner, "exactness": self.exactness}
        return {**asked, **asdict(self.trial), "level": self.trial.level, "promised": self.promised, "why": self.why}


def examine(
    model: str,
    max_new_tokens: int,
    threads: int | None,
    lora: Path | None,
    quantization: Quantization = "auto",
    *,
    prove: bool,
) -> Iterator[Finding]:
    """Open the model with every dtype, runner and level, and compare drafted with plain decoding in each."""
    from selfdraft.prove.doctor import trial
    from selfdraft.types import SamplingParams

    sampling = SamplingParams(max_tokens=max_new_tokens, ignore_eos=True)
    for dtype in ("float32", "bfloat16"):
        for runner, exactness in (("auto", "bitwise"), ("plain", "bitwise"), ("plain", "token")):
            llm = open_llm(
                *(model, "none", None, dtype, exactness, threads),
                runner=runner,
                no_cache=prove,
                lora=lora,
                quantization=quantization,
            )
            if runner == "auto" and llm.target.runner is None:
                continue  # the plain path comes next anyway
            requests = [repeatable(llm, sampling, 0, llm.encode(text)) for text in SAMPLE_PROMPTS]
            shapes = str(llm.target.shapes) if runner == "plain" else "any, fast runner"
            found = trial(llm.target, llm.engine.drafter, requests, dtype, shapes)
            yield Finding(llm.target.runs, exactness, found, llm.exactness.level, llm.exactness.why)


def show_findings(machine: Mapping[str, object], state: str, findings: Sequence[Finding]) -> None:
    """The machine and its state, a table of the trials, and what was promised beside what was found."""
    from rich.table import Table

    known = [f"{name.replace('_', ' ')} {value}" for name, value in machine.items() if value is not None]
    terminal.out.print(", ".join(known))
    terminal.out.print(state)
    heads = ("dtype", "asked", "shapes", "tokens equal", "logit bits equal", "found")
    table = Table(*heads, box=None, pad_edge=False)
    for finding in findings:
        trial = finding.trial
        tokens, rows = f"{trial.tokens_equal}/{trial.tokens}", f"{trial.rows_bitwise_equal}/{trial.rows}"
        table.add_row(trial.dtype, finding.exactness, trial.shapes, tokens, rows, trial.level)
    terminal.out.print(table)
    for finding in findings:
        if finding.exactness == "bitwise":
            trial = finding.trial
            terminal.out.print(f"{trial.dtype}: {finding.promised} promised, {trial.level} found; {finding.why}")
