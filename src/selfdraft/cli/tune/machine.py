"""`tune machine`: what a pass costs here by its rows, and what pays at that cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from selfdraft.cli import terminal
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    AsJson,
    Conditions,
    Device,
    Dtype,
    Exact,
    Lora,
    Model,
    Quantized,
    Threads,
    conditions,
    open_llm,
)

if TYPE_CHECKING:
    from selfdraft.drafting.cost_model import Profile
    from selfdraft.llm import LLM
    from selfdraft.models.machine_state import Span


def tune_machine(
    model: Model = DEFAULT_MODEL,
    lora: Lora = None,
    quantization: Quantized = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    exactness: Exact = "bitwise",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure what a pass costs on this machine, and say what pays.

    A pass is timed by its rows. The result is kept in the user's cache folder, where the drafter auto finds it. Under
    a minute.
    """
    llm = open_llm(model, "none", None, dtype, exactness, threads, lora=lora, quantization=quantization, device=device)
    from selfdraft.models.machine_state import Watch
    from selfdraft.tune import machine as profiles
    from selfdraft.tune.advice import explain, paragraph

    watch = Watch()
    profile = measured(llm, quiet=as_json)
    state = watch.span()
    verdicts = explain(llm.target, profile)
    kept = profiles.keep(profile, llm.target, terminal.note, state=state)
    facts = conditions(llm, model)
    if as_json:
        found = {"profile": asdict(profile), "kept": str(kept) if kept else None}
        told = [asdict(verdict) for verdict in verdicts]
        terminal.print_json(
            {"conditions": facts.as_dict(), "machine_state": state.as_dict(), **found, "verdicts": told}
        )
    else:
        show_profile(facts, state, profile, profiles.SHORT, profiles.LONG)
        show_advice(paragraph(profile, verdicts), kept)


def measured(llm: LLM, *, quiet: bool) -> Profile:
    """The cost of a pass by its rows, timed now."""
    from selfdraft.drafting.cost_model import Profile
    from selfdraft.tune.machine import measure

    found: Profile | None = None
    with share_bar("measuring passes", quiet=quiet) as report:
        for part in measure(llm.target):
            if isinstance(part, Profile):
                found = part
            else:
                report(part)
    assert found is not None, "measuring ends with a profile"
    return found


@contextmanager
def share_bar(what: str, *, quiet: bool) -> Iterator[Callable[[float], None]]:
    """A bar on the error stream that moves by itself until a share of the work is told."""
    from rich.progress import BarColumn, Progress, TextColumn

    columns, err = (TextColumn("{task.description}"), BarColumn()), terminal.err
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done: bar.update(task, total=1.0, completed=done)


def show_profile(facts: Conditions, state: Span, profile: Profile, short: int, long: int) -> None:
    """Conditions, the machine's state, and milliseconds of a pass by its rows behind few and many remembered tokens."""
    from rich.table import Table

    terminal.out.print(
        Text(
            f"{facts.model}, {facts.dtype}, exactness {facts.exactness.level}, runner {facts.runner}, "
            f"{facts.machine['cpu_capability']}, {terminal.counted(facts.machine['threads'], 'thread')}"
        )
    )
    terminal.out.print(Text(str(state)))
    table = Table("rows", f"ms behind {short} tokens", f"behind {long:,}", "times one row", box=None, pad_edge=False)
    for rows in profile.rows:
        near, far = profile.at(rows, short), profile.at(rows, long)
        table.add_row(str(rows), f"{1e3 * near:.2f}", f"{1e3 * far:.2f}", f"{near / profile.at(1, short):.2f}")
    terminal.out.print(table)


def show_advice(paragraph: str, kept: Path | None) -> None:
    """What pays and why, and where the profile is kept."""
    terminal.out.print(Text(paragraph))
    if kept is not None:
        terminal.out.print(Text(f"Kept in {kept}"))
