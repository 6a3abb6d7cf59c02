"""`tune layer-skip`: which sublayers to leave out of a drafting pass, searched and confirmed by decoding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfdraft.cli import terminal
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    AsJson,
    Device,
    Dtype,
    Exact,
    Lora,
    Model,
    Quantized,
    Threads,
    conditions,
    encode_all,
    open_llm,
)
from selfdraft.cli.tune.prompts import (
    InTemplate,
    Limit,
    OwnTokens,
    Prompts,
    Runs,
    Temperature,
    output_of,
    read_prompts,
)
from selfdraft.errors import OptionError
from selfdraft.types import JsonObject, comma_separated

if TYPE_CHECKING:
    from selfdraft.tune.layer_skip.tuner import Check, Options, Subject, Tuning

Output = Annotated[Path | None, typer.Option(help="Where the set goes. Default: skip-MODEL.json here.")]
Study = Annotated[
    Path | None,
    typer.Option(help="The search's memory; a stopped search goes on from it. Default: beside --output."),
]
Trials = Annotated[int, typer.Option(help="Sets to try after every sublayer was left out alone.")]
Sampler = Annotated[str, typer.Option(help="Optuna's sampler: tpe, or gp (needs scipy).")]
Longest = Annotated[int, typer.Option(help="Longest draft to consider.")]
MaxCost = Annotated[
    float | None,
    typer.Option(
        help="Seek the best agreement among sets of at most this cost, not the best speed. "
        "0.65: a drafting pass takes 65 % of a full one."
    ),
]
Confirm = Annotated[int, typer.Option(help="How many of the best sets are confirmed by decoding; 0: none.")]
Evidence = Annotated[
    Path | None, typer.Option(help="Also try all pairs, and write singles, pairs and the best sets to this file.")
]
Costs = Annotated[Path | None, typer.Option(help="A file of an earlier tune; its measured times are used.")]
Checked = Annotated[
    list[str] | None,
    typer.Option(help="No search; predict and measure this set, FILE or FILE#NAME. May be repeated."),
]
Lengths = Annotated[str, typer.Option(help="Draft lengths to --check, with commas between.")]


def tune_layer_skip(
    model: Model = DEFAULT_MODEL,
    prompts: Prompts = None,
    limit: Limit = None,
    chat: InTemplate = False,
    max_new_tokens: OwnTokens = 48,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, measured times and prompts: same search.")] = 0,
    output: Output = None,
    trials: Trials = 1000,
    num_speculative_tokens: Longest = 8,
    max_cost: MaxCost = None,
    confirm: Confirm = 3,
    runs: Runs = 3,
    study: Study = None,
    evidence: Evidence = None,
    costs: Costs = None,
    sampler: Sampler = "tpe",
    check: Checked = None,
    draft_lengths: Lengths = "2,4",
    lora: Lora = None,
    quantization: Quantized = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    exactness: Exact = "bitwise",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Find which sublayers layer_skip should leave out.

    And how long to draft. A search that was stopped goes on when the same command is given again. Give prompts like
    those you will ask.
    """
    from selfdraft.tune.layer_skip.study import needs_optuna
    from selfdraft.tune.layer_skip.tuner import Options, Subject

    needs_optuna()
    terminal.silence_libraries()  # its notices: the first import switches them on
    output = output_of(output, "skip", model)
    options = Options(study=study or output.parent / f"{output.stem}.db", trials=trials, seed=seed, sampler=sampler)
    options = replace(options, max_new_tokens=max_new_tokens, temperature=temperature, confirm=confirm, runs=runs)
    options = replace(options, num_speculative_tokens=num_speculative_tokens, max_cost=max_cost)
    lengths, texts = lengths_of(draft_lengths), read_prompts(prompts, limit)
    llm = open_llm(model, "none", None, dtype, exactness, threads, lora=lora, quantization=quantization, device=device)
    ids = encode_all(llm, texts, chat, options.sampling)
    subject = Subject(llm.model, llm.target, ids, llm.eos, conditions(llm, model, lora).as_dict())
    if check:
        check_sets(subject, check, lengths, options, quiet=as_json)
    else:
        search(subject, options, Path(model).name, output, evidence, costs, quiet=as_json)


def search(
    subject: Subject,
    options: Options,
    name: str,
    output: Path,
    evidence: Path | None,
    costs: Path | None,
    *,
    quiet: bool,
) -> None:
    """Search the best set, confirm it and write it under `name` into the output."""
    from selfdraft.files.skip_sets import check_writable, save_set, write_json
    from selfdraft.tune.layer_skip.tuner import Tuning

    for path in (output, options.study, evidence):
        if path is not None:
            check_writable(path)
    with terminal.waiting("measuring what drafting costs"):
        tuning = Tuning(subject, options, costs_of(costs))
    with terminal.progress(tuning.search.total, quiet=quiet, what="trying skip sets") as advance:
        for _ in tuning.search.run():
            advance()
    if evidence is not None:
        pairs = tuning.search.layers * (2 * tuning.search.layers - 1)
        with terminal.progress(pairs, quiet=quiet, what="trying pairs") as advance:
            for _ in tuning.search.pairs():
                advance()
        write_json(evidence, tuning.evidence())
    best = best_of(tuning, options, quiet=quiet)
    save_set(output, name, best)
    if quiet:
        terminal.print_json({"output": str(output), "name": name, **best})
    else:
        show_set(best, name, output)


def best_of(tuning: Tuning, options: Options, *, quiet: bool) -> JsonObject:
    """The set with the highest measured speed; with nothing measured the best predicted one."""
    with terminal.waiting("looking at the deeper drafts of the best"):
        found = tuning.finalists()
    if options.confirm:
        some = found[: options.confirm]
        found = []
        with terminal.progress(len(some), quiet=quiet, what="confirming") as advance:
            for record in tuning.confirmed(some):
                found.append(record)
                advance()
        if options.max_cost is None:
            found.sort(key=lambda record: -record["measured"])
    return tuning.record(found[0])


def check_sets(
    subject: Subject, places: Sequence[str], lengths: tuple[int, ...], options: Options, *, quiet: bool
) -> None:
    """Predict and measure the speed-up of given sets, without a search."""
    from selfdraft.files.skip_sets import read_skip
    from selfdraft.tune.layer_skip.tuner import check_sets as checked

    sets = {place: read_skip(place, subject.target.layers) for place in places}
    found = []
    with terminal.progress(len(sets) * len(lengths), quiet=quiet, what="predicting and measuring") as advance:
        for check in checked(subject, sets, lengths, options.sampling, options.runs):
            found.append(check)
            advance()
    if quiet:
        terminal.print_json({**subject.facts, "checks": [check.as_dict() for check in found]})
    else:
        show_checks(found)


def costs_of(path: Path | None) -> object:
    """The measured costs in a set's file or an evidence file; None without a file. Errors: OptionError."""
    if path is None:
        return None
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"--costs {path} cannot be read: give a file that 'selfdraft tune' wrote") from error
    records = [document, *document.values()] if isinstance(document, dict) else []
    return next((r["costs"] for r in records if isinstance(r, dict) and "costs" in r), {})


def lengths_of(given: str) -> tuple[int, ...]:
    """The draft lengths of a list with commas. Errors: OptionError."""
    parts = comma_separated(given)
    if not parts or not all(part.isdecimal() and 1 <= int(part) <= 64 for part in parts):
        raise OptionError(f"--draft-lengths {given!r}: give whole numbers from 1 to 64 with commas between")
    return tuple(dict.fromkeys(map(int, parts)))


def show_set(record: JsonObject, name: str, path: Path) -> None:
    """A set that was found: what it leaves out, what it is worth, how to use it."""
    blocks = [f"{kind} of blocks {', '.join(map(str, record[kind])) or '-'}" for kind in ("attention", "mlp")]
    terminal.out.print(f"left out: {'; '.join(blocks)}")
    line = f"agreement {record['agreement']:.3f} at c {record['c']:.3f}, predicted {record['predicted']:.2f}x"
    if "measured" in record:
        line += f", measured {record['measured']:.2f}x (c {record['c_measured']:.3f})"
    tried = terminal.counted(record["sets_tried"], "set")
    terminal.out.print(f"{line}; {tried} tried, {record['positions']} positions each")
    draft = {key: record[key] for key in ("num_speculative_tokens", "confidence_threshold")}
    options = {"method": "layer_skip", "skip_set": f"{path}#{name}", **draft}
    options["adaptive"] = False  # so it was predicted and confirmed
    terminal.out.print(f"use it: --speculative-config '{json.dumps(options)}'")


def show_checks(checks: Sequence[Check]) -> None:
    """Predicted beside measured speed-ups."""
    from rich.table import Table

    heads = ("set", "draft tokens", "agreement", "c", "predicted", "measured", "error", "acceptance (predicted)")
    table = Table(*heads, box=None, pad_edge=False)
    for check in checks:
        table.add_row(
            check.name,
            str(check.num_speculative_tokens),
            f"{check.agreement:.3f}",
            f"{check.c:.3f}",
            f"{check.predicted:.3f}x",
            f"{check.measured:.3f}x",
            f"{100 * check.error:+.1f} %",
            f"{check.measured_acceptance:.3f} ({check.predicted_acceptance:.3f})",
        )
    terminal.out.print(table)
