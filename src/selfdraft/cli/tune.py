"""The verb that searches: tune. Each method of the table has its own function."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from selfdraft.cli import terminal
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    Adapters,
    AsJson,
    Dtype,
    Exact,
    Lora,
    Model,
    Threads,
    conditions,
    encode_all,
    open_llm,
    repeatable,
)
from selfdraft.errors import OptionError

if TYPE_CHECKING:
    from selfdraft.llm import LLM
    from selfdraft.tune.layer_skip.tuner import Options, Subject, Tuning

PROMPTS = (
    *terminal.SAMPLE_PROMPTS,
    "The old man looked at the sea and",
    "import os\nimport sys\n\n\ndef main():\n",
    "### Instruction:\nWrite a short poem about rain.\n\n### Response:\n",
    "Question: A train travels 60 miles in 2 hours. How fast is it?\nAnswer:",
    "class Stack:\n    def __init__(self):\n",
)
"""Stories, code, instructions and sums, when no prompts are given."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a method's function needs beside the model."""

    model: str
    output: Path
    evidence: Path | None
    costs: Path | None
    check: tuple[str, ...]
    draft_lengths: tuple[int, ...]
    sweep: bool
    quiet: bool


Method = Annotated[
    Literal["auto", "layer_skip", "s3d", "lookahead"],
    typer.Option(help="auto: measure this machine. Or the drafter to tune."),
]
Prompts = Annotated[
    Path | None, typer.Option(help="A jsonl file with prompt, turns, question or text in each line; some are built in.")
]
Limit = Annotated[int | None, typer.Option(help="Only the first so many prompts.", min=1)]
Output = Annotated[
    Path | None, typer.Option(help="Where the result goes. Default: METHOD-MODEL.json here; skip-MODEL.json for a set.")
]
Study = Annotated[
    Path | None,
    typer.Option(help="layer_skip: the search's memory; a stopped search goes on from it. Default: beside --output."),
]
Trials = Annotated[int, typer.Option(help="layer_skip: sets to try after every sublayer was left out alone.")]
Sampler = Annotated[str, typer.Option(help="layer_skip: Optuna's sampler: tpe, or gp (needs scipy).")]
Longest = Annotated[int, typer.Option(help="layer_skip: longest draft to consider.")]
MaxCost = Annotated[
    float | None,
    typer.Option(
        help="layer_skip: seek the best agreement among sets of at most this cost, not the best speed. "
        "0.65: a drafting pass takes 65 % of a full one."
    ),
]
Confirm = Annotated[int, typer.Option(help="layer_skip: decode for real with so many of the best; 0: with none.")]
Evidence = Annotated[
    Path | None,
    typer.Option(help="layer_skip: also try all pairs, and write singles, pairs and the best sets to this file."),
]
Costs = Annotated[Path | None, typer.Option(help="layer_skip: a file of an earlier tune; its measured times are used.")]
Check = Annotated[
    list[str] | None,
    typer.Option(help="layer_skip: no search; predict and measure this set, FILE or FILE#NAME. May be repeated."),
]
Lengths = Annotated[str, typer.Option(help="layer_skip: draft lengths to --check, with commas between.")]
Sweep = Annotated[
    bool, typer.Option("--sweep", help="s3d: also decode for real with every setting, to check the formula.")
]

OF_SEARCH = frozenset({"layer_skip"})
SEARCHES = frozenset({"layer_skip", "s3d", "lookahead"})
HONOURED = {
    **dict.fromkeys(
        ("prompts", "limit", "chat", "max_new_tokens", "temperature", "seed", "output"),
        SEARCHES,
    ),
    **dict.fromkeys(("study", "trials", "sampler", "num_speculative_tokens", "max_cost", "confirm"), OF_SEARCH),
    **dict.fromkeys(("evidence", "costs", "check", "draft_lengths"), OF_SEARCH),
    "sweep": frozenset({"s3d"}),
    "adapter": frozenset({"s3d"}),
    "runs": frozenset({"layer_skip", "s3d"}),
}
"""Options that not every method can honour, and the methods that can."""


def tune(
    context: typer.Context,
    method: Method = "auto",
    model: Model = DEFAULT_MODEL,
    prompts: Prompts = None,
    limit: Limit = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap prompts in the checkpoint's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the model's own text for each prompt.")] = 48,
    temperature: Annotated[float, typer.Option(help="The own text is sampled at this; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, measured times and prompts: same search.")] = 0,
    output: Output = None,
    trials: Trials = 1000,
    num_speculative_tokens: Longest = 8,
    max_cost: MaxCost = None,
    confirm: Confirm = 3,
    runs: Annotated[int, typer.Option(help="Timed runs of each prompt, in alternation with plain decoding.")] = 3,
    study: Study = None,
    evidence: Evidence = None,
    costs: Costs = None,
    sampler: Sampler = "tpe",
    check: Check = None,
    draft_lengths: Lengths = "2,4",
    adapter: Adapters = None,
    lora: Lora = None,
    sweep: Sweep = False,
    dtype: Dtype = "auto",
    exactness: Exact = "bitwise",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine, or tune a drafter.

    auto: what a pass costs by its rows, kept in the user's cache folder, and what pays at that cost. Under a minute.

    layer_skip: which sublayers to leave out, and how long to draft. A search that was stopped goes on when the same
    command is given again. s3d: blocks and masks; needs --adapter. lookahead: window and pool. Give these prompts like
    those you will ask. What the figures mean: docs/tune.md.
    """
    _refuse_foreign(context, method)
    if method == "auto":
        _auto(open_llm(model, "none", None, dtype, exactness, threads, None, lora=lora), model, as_json)
        return
    from selfdraft.files.records import read_prompts
    from selfdraft.tune.layer_skip.study import needs_optuna
    from selfdraft.tune.layer_skip.tuner import Options, Subject

    if method == "layer_skip":
        needs_optuna()
    terminal.hush()  # its notices: the first import switches them on
    output = output or Path(f"{'skip' if method == 'layer_skip' else method}-{Path(model).name}.json")
    names = ("trials", "seed", "sampler", "max_new_tokens", "temperature", "num_speculative_tokens", "max_cost")
    given = locals()
    settings = {name: given[name] for name in (*names, "confirm", "runs")}
    options = Options(study=study or output.parent / f"{output.stem}.db", **settings)
    lengths = _lengths(draft_lengths)
    job = Job(model, output, evidence, costs, tuple(check or ()), lengths, sweep, as_json)
    texts = list(PROMPTS[:limit]) if prompts is None else read_prompts(prompts, limit)
    llm = open_llm(model, "none", None, dtype, exactness, threads, adapter, lora=lora)
    ids = encode_all(llm, texts, chat, options.sampling)
    METHODS[method](llm, Subject(llm.model, llm.target, ids, llm.eos, conditions(llm, model, lora)), job, options)


def _auto(llm: LLM, model: str, as_json: bool) -> None:
    """Measure what passes cost, keep it, and say what pays."""
    from selfdraft.drafting.cost_model import Profile
    from selfdraft.tune import machine as profiles
    from selfdraft.tune.advice import explain, paragraph

    found: Profile | None = None
    with terminal.share("measuring passes", quiet=as_json) as report:
        for part in profiles.measure(llm.target):
            if isinstance(part, Profile):
                found = part
            else:
                report(part)
    assert found is not None, "measuring ends with a profile"
    verdicts = explain(llm.target, found)
    kept = profiles.keep(found, llm.target, terminal.note)
    facts = conditions(llm, model)
    if as_json:
        place = str(kept) if kept else None
        terminal.document(
            {"conditions": facts, "profile": asdict(found), "kept": place, "verdicts": [asdict(v) for v in verdicts]}
        )
    else:
        terminal.setting(facts)
        terminal.profile(found, profiles.SHORT, profiles.LONG)
        terminal.prose(paragraph(found, verdicts))
        if kept is not None:
            terminal.prose(f"Kept in {kept}")


def _refuse_foreign(context: typer.Context, method: str) -> None:
    """Refuse what only another method can honour. Errors: OptionError names the option."""
    for name, methods in HONOURED.items():
        source = context.get_parameter_source(name)
        if method not in methods and source is not None and source.name == "COMMANDLINE":
            of = " and ".join(f"--method {each}" for each in sorted(methods))
            raise OptionError(f"--{name.replace('_', '-')} belongs to {of}, not to {method}: leave it out")


def _layer_skip(llm: LLM, subject: Subject, job: Job, options: Options) -> None:
    from selfdraft.files.skip_sets import check_writable, save_set, write_json
    from selfdraft.tune.layer_skip.tuner import Tuning

    if job.check:
        _check_layer_skip(subject, job, options)
        return
    for path in (job.output, options.study, job.evidence):
        if path is not None:
            check_writable(path)
    with terminal.waiting("measuring what drafting costs"):
        tuning = Tuning(subject, options, _costs(job.costs))
    with terminal.progress(tuning.search.total, quiet=job.quiet, what="trying skip sets") as advance:
        for _ in tuning.search.run():
            advance()
    if job.evidence is not None:
        pairs = tuning.search.layers * (2 * tuning.search.layers - 1)
        with terminal.progress(pairs, quiet=job.quiet, what="trying pairs") as advance:
            for _ in tuning.search.pairs():
                advance()
        write_json(job.evidence, tuning.evidence())
    best = _best(tuning, options, job)
    name = Path(job.model).name
    save_set(job.output, name, best)
    if job.quiet:
        terminal.document({"output": str(job.output), "name": name, **best})
    else:
        terminal.skip_set(best, name, job.output)


def _lookahead(llm: LLM, subject: Subject, job: Job, options: Options) -> None:
    """Fixed sizes of a grid, then adaptation from the fastest of them."""
    from selfdraft.files.skip_sets import check_writable, write_json
    from selfdraft.tune import lookahead

    check_writable(job.output)
    requests = [repeatable(llm, options.sampling, options.seed, ids) for ids in map(list, subject.prompts)]
    measure = partial(lookahead.measure, partial(llm.engine_for, "lookahead"), requests)
    points = []
    with terminal.progress(len(lookahead.GRID) + 1, quiet=job.quiet, what="trying sizes") as advance:
        for _ in measure([(7, 5, 7)]):
            pass  # warms up; not counted
        for point in measure():
            points.append(point)
            advance()
        best = lookahead.recommend(points)
        for point in measure([(best.window_size, best.ngram_size, best.guess_set_size)], adaptive=True):
            points.append(point)
            advance()
    found = lookahead.document(points, subject.facts)
    write_json(job.output, found)
    if job.quiet:
        terminal.document({"output": str(job.output), **found})
    else:
        terminal.scaling(found, job.output)


def _s3d(llm: LLM, subject: Subject, job: Job, options: Options) -> None:
    """Measure a few widths, solve for the best, and with --sweep decode with every setting."""
    from selfdraft.files.skip_sets import check_writable, write_json
    from selfdraft.tune import s3d

    check_writable(job.output)
    widths = s3d.default_widths(llm.target)
    requests = [repeatable(llm, options.sampling, options.seed, ids) for ids in map(list, subject.prompts)]
    found: dict[int, s3d.Width] = {}
    verify: tuple[float, ...] = ()
    with terminal.progress(2 * len(widths) + 1, quiet=job.quiet, what="measuring widths") as advance:
        for part in s3d.measure(llm.target, requests, widths):
            if isinstance(part, s3d.Width):
                found[part.width] = part
            else:
                verify = part
            advance()
    curve = s3d.solve(llm.target.layers, list(found.values()), verify)
    document = {**subject.facts, "method": "s3d", **curve.as_dict()}
    if job.sweep:
        choices = [(choice.width, choice.masks) for choice in curve.all()]
        with terminal.waiting(f"decoding with {len(choices)} settings"):
            document["sweep"] = [asdict(choice) for choice in s3d.sweep(llm.target, requests, choices, options.runs)]
    write_json(job.output, document)
    if job.quiet:
        terminal.document({"output": str(job.output), **document})
    else:
        terminal.curve(document, job.output)


def _best(tuning: Tuning, options: Options, job: Job) -> dict[str, Any]:
    """The set with the highest measured speed; with nothing measured the best predicted one."""
    with terminal.waiting("looking at the deeper drafts of the best"):
        found = tuning.finalists()
    if options.confirm:
        some = found[: options.confirm]
        found = []
        with terminal.progress(len(some), quiet=job.quiet, what="confirming") as advance:
            for record in tuning.confirmed(some):
                found.append(record)
                advance()
        if options.max_cost is None:
            found.sort(key=lambda record: -record["measured"])
    return tuning.record(found[0])


def _check_layer_skip(subject: Subject, job: Job, options: Options) -> None:
    from selfdraft.files.skip_sets import read_skip
    from selfdraft.tune.layer_skip.tuner import check_sets

    sets = {place: read_skip(place, subject.target.layers) for place in job.check}
    rows = []
    with terminal.progress(
        len(sets) * len(job.draft_lengths), quiet=job.quiet, what="predicting and measuring"
    ) as advance:
        for row in check_sets(subject, sets, job.draft_lengths, options.sampling, options.runs):
            rows.append(row.as_dict())
            advance()
    if job.quiet:
        terminal.document({**subject.facts, "checks": rows})
    else:
        terminal.predictions(rows)


def _costs(path: Path | None) -> object:
    """Measured costs out of a set's file or an evidence file."""
    if path is None:
        return None
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"--costs {path} cannot be read: give a file that 'selfdraft tune' wrote") from error
    records = [document, *document.values()] if isinstance(document, dict) else []
    return next((r["costs"] for r in records if isinstance(r, dict) and "costs" in r), {})


def _lengths(given: str) -> tuple[int, ...]:
    parts = [part.strip() for part in given.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and 1 <= int(part) <= 64 for part in parts):
        raise OptionError(f"--draft-lengths {given!r}: give whole numbers from 1 to 64 with commas between")
    return tuple(dict.fromkeys(map(int, parts)))


METHODS: dict[str, Callable[[LLM, Subject, Job, Options], None]] = {
    "layer_skip": _layer_skip,
    "s3d": _s3d,
    "lookahead": _lookahead,
}
"""What can be tuned."""
