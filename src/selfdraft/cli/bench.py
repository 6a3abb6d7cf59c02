"""The verb `bench`: drafters and other engines measured on the field's tasks; `serve` below it loads a server."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_type_hints

import typer
from rich.text import Text

from selfdraft.cli import bench_serve, terminal
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    Adapters,
    AsJson,
    Configs,
    Device,
    Dtype,
    Exact,
    KvCacheDtype,
    Log,
    Lora,
    MaxNew,
    Model,
    NoCache,
    Pin,
    Quantized,
    Threads,
    as_verb,
    chosen_drafters,
    conditions,
    open_llm,
    runnable,
    weights_in_words,
)
from selfdraft.cli.peers import (
    Files,
    FoundPeer,
    PeerConfigs,
    Peers,
    PeerTimeout,
    Pythons,
    check_merged,
    find_peers,
    running_peers,
)
from selfdraft.cli.rejections import explain_all, show_rejections
from selfdraft.errors import OptionError, RequestError
from selfdraft.types import JsonObject, SamplingParams

if TYPE_CHECKING:
    from selfdraft.bench.rows import Ledger, Row
    from selfdraft.bench.run import Bench, Contender
    from selfdraft.bench.tasks import Item
    from selfdraft.core.sequence import Sequence as Request
    from selfdraft.llm import LLM

TASKS = """Names with commas between, 'all', or a jsonl file. Inside this package: quick, humaneval, gsm8k, mt-bench;
the others (spec-bench, mbpp, classeval, cnn-dailymail, xsum) are read from --data-dir or with the package datasets."""
CHAT = "Wrap prompts in the checkpoint's chat template, or continue them. Default: the template, if there is one."

STAGES = ("target", "drafting", "rest")
"""What a decode step goes into: passes of the target, guessing and learning, the host's other work."""
FIGURES = ("tok/s", "vs plain", "decode", "tok/pass", "accept", "+MiB", "/memory", "same")
"""Heads of the table; docs/bench.md says what they mean."""

Names = Annotated[str | None, typer.Option(help="Names with commas, or 'all'; 'none' always runs. Default: all.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder with tasks' files; goes before this package's own.")]
Limit = Annotated[int | None, typer.Option(help="Take at most this many prompts of each task or part.", min=1)]
Samples = Annotated[int, typer.Option(help="Answers to each coding task, for pass@k.", min=1)]
Runs = Annotated[int, typer.Option(help="Timed runs of each prompt, in alternation; medians count.", min=1)]
Turns = Annotated[Literal["first", "all"], typer.Option(help="all: later turns too, after the model's own answers.")]
Output = Annotated[
    Path | None, typer.Option(help="A jsonl file for one row per prompt and drafter; goes on where it ends.")
]
Explain = Annotated[
    int | None,
    typer.Option(
        help="Also say why drafts were rejected, with at most so many examples for each drafter. One more run of each "
        "prompt, behind all that is timed.",
        min=0,
        max=10_000,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """The options of the verb, in the order of its help."""

    tasks: Annotated[str, typer.Option(help=TASKS)] = "quick"
    model: Model = DEFAULT_MODEL
    adapter: Adapters = None
    lora: Lora = None
    quantization: Quantized = "auto"
    drafters: Names = None
    speculative_config: Configs = None
    peers: Peers = None
    peer_config: PeerConfigs = None
    peer_python: Pythons = None
    peer_model: Files = None
    peer_timeout: PeerTimeout = 900.0
    data_dir: DataDir = None
    limit: Limit = None
    max_new_tokens: MaxNew = 128
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0
    samples: Samples = 1
    seed: Annotated[int, typer.Option(help="Prompt i is sampled with seed + i.")] = 0
    runs: Runs = 3
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help=CHAT, show_default=False)] = None
    turns: Turns = "first"
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")] = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    exactness: Exact = "bitwise"
    kv_cache_dtype: KvCacheDtype = "auto"
    output: Output = None
    pictures: Annotated[Path | None, typer.Option(help="A folder for pictures (PNG).")] = None
    log: Log = None
    profile: Annotated[bool, typer.Option("--profile", help="Also show what a step's time goes into.")] = False
    explain: Explain = None
    threads: Threads = None
    pin_threads: Pin = False
    no_cache: NoCache = False
    as_json: AsJson = False


def bench(given: BenchOptions) -> None:
    """Measure drafters on the field's tasks.

    Without --tasks, on 64 prompts that are part of this package. Every prompt is decoded by every drafter several
    times: begin with --limit 1. Exit code 1 if a text of ours differs.
    """
    sampling = SamplingParams(
        temperature=given.temperature, top_p=given.top_p, max_tokens=given.max_new_tokens, ignore_eos=given.ignore_eos
    )
    plan = Plan(
        sampling, given.samples, given.seed, given.runs, bool(given.chat), given.turns == "all", given.pin_threads
    )
    contenders = contenders_of(given.drafters, given.speculative_config or [])
    found_peers = find_peers(
        given.peers,
        given.peer_config,
        given.peer_python,
        given.peer_model,
        given.model,
        contenders,
    )
    check_merged(found_peers, given.model, given.lora)
    source = Source(given.tasks, given.data_dir, given.limit, as_template=given.chat is None)
    subject = Subject(
        given.model,
        given.adapter or [],
        given.lora,
        contenders,
        found_peers,
        given.drafters not in (None, "all"),
        given.peer_timeout,
    )
    items, draw = gather_items(source, plan), drawing_to(given.pictures)
    loading = partial(
        open_llm,
        device=given.device,
        no_cache=given.no_cache,
        lora=given.lora,
        quantization=given.quantization,
        kv_cache_dtype=given.kv_cache_dtype,
    )
    opening = partial(loading, given.model, "none", None, given.dtype, given.exactness, given.threads, given.adapter)
    extras = Extras(given.output, given.log, given.explain, quiet=given.as_json)
    records = measured(opening, subject, plan, source, items, extras)
    show_results(records, given.output, draw, profile=given.profile, as_json=given.as_json)


def measured(
    opening: Callable[..., LLM],
    subject: Subject,
    plan: Plan,
    source: Source,
    items: dict[str, list[Item]],
    extras: Extras,
) -> list[JsonObject]:
    """The records of everything that was asked for. The files are checked before the model is opened."""
    from selfdraft.bench.rows import Ledger
    from selfdraft.files.token_log import check_log
    from selfdraft.models.machine_state import Watch

    check_log(extras.log)
    with Ledger(extras.output) as ledger:
        llm = opening(pin=plan.pin)
        if source.as_template and getattr(llm.tokenizer, "chat_template", None):
            plan = replace(plan, chat=True)
            items = gather_items(source, plan)  # prompts and stops of some tasks are others then
        setting = set_up(llm, subject, plan, extras.log)
        with running_peers(setting, subject, llm, items, plan.sampling):
            watch = Watch()
            rows = measure_all(setting, items, ledger, quiet=extras.quiet)
            state = watch.span().as_dict() if setting.measured else None
        records = reported(setting, rows, llm.target.max_length)
        if extras.explain is not None:  # after all that is timed, and after other engines have ended
            found = explain_all(setting, items, ledger, llm, extras.explain, quiet=extras.quiet)
            records = [one | {"rejections": found.get((one["task"], one["drafter"]))} for one in records]
    return [record | {"machine_state": state} for record in records]


def reported(setting: Bench, rows: dict[str, list[Row]], context: int) -> list[JsonObject]:
    """The records of all rows; what was skipped is said. Errors: RequestError when nothing was measured."""
    for reason in setting.skipped:
        terminal.note(f"skipped: {reason}")
    records = report(rows, [one.label for one in setting.contenders])
    if not records:
        raise RequestError(f"nothing was measured: none of the prompts fits into the context of {context}")
    return records


def show_results(
    records: list[JsonObject],
    output: Path | None,
    draw: Callable[[Sequence[JsonObject]], list[Path]],
    *,
    profile: bool,
    as_json: bool,
) -> None:
    """Pictures and tables; ends the command, with 1 if a text of ours differs."""
    for path in draw(records):  # before the table: whoever reads that may leave early
        terminal.note(f"wrote {path}")
    if as_json:
        terminal.print_json(records)
    else:
        show_evaluation(records, output)
        if profile:
            show_stages(records)
        if "rejections" in records[0]:
            show_rejections(records)
    own = [record for record in records if record["peer"] is None]
    own += [explained for record in own if (explained := record.get("rejections"))]
    raise typer.Exit(0 if all(one["texts_equal"] for one in own) else 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """How every drafter is measured: sampling, samples, seed, runs, template, turns."""

    sampling: SamplingParams
    samples: int
    seed: int
    runs: int
    chat: bool
    all_turns: bool
    pin: bool
    """Whether each thread of a pass is kept on a core."""

    @property
    def facts(self) -> dict[str, object]:
        """What can change a result."""
        return {
            "max_new_tokens": self.sampling.max_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "ignore_eos": self.sampling.ignore_eos,
            "chat": self.chat,
            "batch": 1,
            **({"pin_threads": True} if self.pin else {}),
        }


@dataclass(frozen=True, slots=True)
class Extras:
    """What is kept of a run, and what is done beside it."""

    output: Path | None
    log: Path | None
    explain: int | None
    """Most examples of rejections for each drafter; None: nothing is explained."""
    quiet: bool
    """No bars of progress."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the prompts come from."""

    tasks: str
    data_dir: Path | None
    limit: int | None
    as_template: bool
    """Whether the checkpoint's chat template, if there is one, decides how they are read."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is measured: the model, our drafters over it, and other engines."""

    model: str
    adapters: Sequence[Path]
    lora: Path | None
    contenders: Sequence[Contender]
    found_peers: Sequence[FoundPeer]
    by_name: bool
    """Whether the drafters were named one by one; of 'all', those that lack mask tokens are left out."""
    timeout: float
    """Most seconds for another engine to load, and for each answer."""

    def drafters_for(self, llm: LLM) -> list[Contender]:
        """The drafters that can run over the open model. Errors: MissingMasks when a named one cannot."""
        wanted = ((one, self.by_name or bool(one.options)) for one in self.contenders)
        return [one for one, named in wanted if runnable(llm, one.method, one.options, named=named)]


def contenders_of(drafters: str | None, configs: Sequence[str]) -> list[Contender]:
    """Plain decoding first, then who was named, each under a label of its own. Errors: OptionError."""
    from selfdraft.bench.run import Contender

    return [Contender(*one) for one in chosen_drafters(drafters, configs, plain_first=True)]


def gather_items(source: Source, plan: Plan) -> dict[str, list[Item]]:
    """The items of all tasks, read and checked before a model is loaded. Errors: OptionError, RequestError."""
    from selfdraft.bench import tasks
    from selfdraft.bench.scores import need_rouge

    names, data_dir = tasks.names_of(source.tasks), source.data_dir
    if data_dir is not None and not data_dir.is_dir():
        files = [task.files[0] for task in map(tasks.task_of, names) if task is not None and task.files]
        layout = f"; expected in it: {', '.join(files)}" if files else ""
        raise RequestError(f"there is no data folder {str(data_dir)!r}{layout}")
    if plan.samples > 1 and plan.sampling.greedy:
        raise OptionError(f"--samples {plan.samples} at temperature 0 are the same text; give --temperature")
    known = {name: tasks.task_of(name) for name in names}
    if plan.samples > 1 and not any(task is not None and task.code for task in known.values()):
        raise OptionError(f"--samples {plan.samples} is for coding tasks; of {', '.join(names)} none is one")
    if any(task is not None and task.summary for task in known.values()):
        need_rouge()
    return {name: tasks.load(name, data_dir, chat=plan.chat, limit=source.limit) for name in names}


def drawing_to(folder: Path | None) -> Callable[[Sequence[JsonObject]], list[Path]]:
    """What draws the records into a folder; tried now, so that it does not fail after hours. Errors: OptionError."""
    if folder is None:
        return lambda _: []
    from selfdraft.bench import charts as pictures

    pictures.need_matplotlib()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".selfdraft"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OptionError(f"--pictures {folder} cannot be written: {error.strerror}") from error
    return lambda records: pictures.draw(records, folder)


def logger(llm: LLM, log: Path | None) -> Callable[[Request, Sequence[int]], None] | None:
    """Writes a line of a token log for every request, if there is a log."""
    from selfdraft.files.token_log import append

    if log is None:
        return None
    return lambda request, said: append(log, llm.logged(request.tokens, said, request.sampling))


def set_up(llm: LLM, subject: Subject, plan: Plan, log: Path | None) -> Bench:
    """The bench around an open model."""
    from importlib.metadata import version

    from selfdraft.bench import measure
    from selfdraft.bench.run import Bench, Footprint
    from selfdraft.models.machine_state import latency_now

    def open_request(history: Sequence[str], stop: tuple[str, ...], seed: int) -> Request:
        if plan.chat:
            roles = ("user", "assistant")
            ids = llm.render([{"role": roles[i % 2], "content": said} for i, said in enumerate(history)])
        else:
            ids = llm.encode("\n\n".join(history))
        return llm.requests(ids, replace(plan.sampling, stop=stop, seed=seed))[0]

    device = next(llm.model.parameters()).device
    merged = [subject.lora] if subject.lora is not None else []
    weights = identity(subject.model, llm, [*subject.adapters, *merged])
    own = {"weights": weights, "selfdraft": version("selfdraft")}
    facts = {**conditions(llm, subject.model, subject.lora).as_dict(), **plan.facts, **own}
    adapters = {adapter.method: adapter.bytes for adapter in getattr(llm.target, "adapters", ())}
    return Bench(
        engines=lambda them: {one.label: llm.engine_for(one.method, one.options) for one in them},
        open=open_request,
        contenders=subject.drafters_for(llm),
        conditions=facts,
        footprint=Footprint(
            measure.weights_bytes(llm.model),
            lambda: llm.target.cache.bytes,
            adapters,
            lambda: {bits: copy.bytes for bits, copy in llm.target.copies.items()},
        ),
        gauge=measure.Gauge(device),
        settle=measure.settler(device),
        runs=plan.runs,
        seed=plan.seed,
        samples=plan.samples,
        all_turns=plan.all_turns,
        greedy=plan.sampling.greedy,
        distance=lambda: None if (now := latency_now()) is None else now.distance,
        log=logger(llm, log),
    )


def identity(model: str, llm: LLM, adapters: Sequence[Path]) -> str:
    """What tells two states of a checkpoint and its adapters apart: names, sizes and dates of the files, or the hub's
    commit.
    """
    import hashlib

    from selfdraft.models.checkpoint.embedded import checkpoint

    facts: list[object] = []
    for folder in (Path(checkpoint(model)), *adapters):
        if not folder.is_dir():
            facts.append(getattr(llm.model.config, "_commit_hash", None))
            continue
        files = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json"))
        facts += [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()


def measure_all(setting: Bench, items: dict[str, list[Item]], ledger: Ledger, *, quiet: bool) -> dict[str, list[Row]]:
    """The rows of all tasks. After Ctrl-C those that are finished stand in the output."""
    from selfdraft.bench.run import run

    rows: dict[str, list[Row]] = {name: [] for name in items}
    try:
        with terminal.progress(sum(map(len, items.values())), quiet=quiet, what="measuring") as advance:
            for name, questions in items.items():
                for found in run(setting, name, questions, ledger):
                    rows[name] += found
                    advance()
    except KeyboardInterrupt:
        if ledger.path is not None:
            terminal.note(f"{ledger.path} keeps {len(ledger.rows)} rows; the same command goes on from there")
        raise
    return rows


def report(rows: dict[str, list[Row]], labels: Sequence[str]) -> list[JsonObject]:
    """One record for each task and drafter, made of the rows."""
    from selfdraft.bench.report import records
    from selfdraft.bench.tasks import task_of

    made = []
    for name, found in rows.items():
        task = task_of(name)
        made += records(name, found, labels, task.unscored if task is not None else "a file of prompts has no score")
    return made


def show_evaluation(records: Sequence[JsonObject], output: Path | None) -> None:
    """The bench's conditions, its table, and a line of scores for each task."""
    from rich.table import Table

    facts = records[0]["conditions"]
    machine = ", ".join(f"{name} {value}" for name, value in facts["machine"].items() if value is not None)
    names = ("max_new_tokens", "temperature", "top_p", "chat", "batch")
    settings = ", ".join(f"{name.replace('_', ' ')} {facts[name]}" for name in names)
    weights = weights_in_words(facts.get("blocks", {}), facts["dtype"])
    terminal.out.print(f"{facts['model']}, {weights}, exactness {facts['exactness']['level']}, {settings}")
    terminal.out.print(machine.replace("_", " "))
    if records[0]["machine_state"] is not None:
        terminal.out.print(records[0]["machine_state"]["words"])
    for task in dict.fromkeys(record["task"] for record in records):
        rows = [record for record in records if record["task"] == task]
        terminal.out.print(Text(f"\n{task}", style="bold"), _summary(rows[0]))
        table = Table(box=None, pad_edge=False)
        wide = max([12, *(len(row["drafter"]) for row in rows if row["peer"] is not None)])
        table.add_column("drafter", width=wide, overflow="fold")
        for head in FIGURES:
            table.add_column(head, justify="right", no_wrap=True, min_width=len(head))
        for record in rows:
            table.add_row(record["drafter"], *_figures_of(record))
        terminal.out.print(table)
        if any(record["peer"] is not None for record in rows):
            show_apart(rows, wide)
    peers = {record["drafter"]: record for record in records if record["peer"] is not None}
    if peers:
        terminal.out.print(
            f"\nother engines, as many tokens each: {', '.join(_engine(peer) for peer in peers.values())}"
        )
    if any(record["texts_equal"] is None for record in peers.values()):
        terminal.out.print("same -: not compared with our text, because of other weights or other random numbers")
    load = max(record["load_average_max"] for record in records)
    terminal.out.print(f"\nload average up to {load:.1f}" + (f"; rows in {output}" if output is not None else ""))
    if not all(record["texts_equal"] for record in records if record["peer"] is None):
        terminal.show_red("some texts DIFFER from plain decoding: no speed-up is given there")


def show_apart(rows: Sequence[JsonObject], wide: int) -> None:
    """Decoding and reading of the prompt apart, for all engines, each beside its own plain decoding."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("\ntokens per second", width=max(wide, 17), overflow="fold")
    for head in ("\ndecode", "\nprompt", "decode vs\nown plain", "\naccept", "texts equal to\nown plain"):
        table.add_column(head, justify="right", no_wrap=True)
    marked = False
    for record in rows:
        ours, plain = record["peer"] is None, record["drafter"] == "none"
        ratio = record["decode_speedup_vs_plain"] if ours else record["decode_speedup_vs_own_plain"]
        equal = record["texts_equal"] if ours else record["texts_equal_own_plain"]
        differ = 0 if ours else len(record["prompts_different_own_plain"] or ())
        mark = "*" if not ours and ratio is not None and not equal else ""
        marked |= bool(mark)
        rate, speeds = record["draft_acceptance_rate"], ("decode_tokens_per_second", "prompt_tokens_per_second")
        table.add_row(
            record["drafter"],
            *("-" if record[name] is None else f"{record[name]:.1f}" for name in speeds),
            "" if plain or ratio is None else f"{ratio:.2f}x{mark}",
            "" if plain or rate is None else f"{100 * rate:.0f} %",
            "" if plain or equal is None else "yes" if equal else f"no in {differ} of {record['prompts']}",
        )
    terminal.out.print("")
    terminal.out.print(table)
    if marked:
        terminal.out.print(
            "* some of its texts are not its own plain texts, or drawn with other random numbers: it did other work, "
            "so this is no speed-up",
            soft_wrap=True,
        )


def show_stages(records: Sequence[JsonObject]) -> None:
    """Milliseconds of a decode step of every drafter by what they went into, from the run through stopwatches."""
    from rich.table import Table

    for task in dict.fromkeys(record["task"] for record in records):
        table = Table(box=None, pad_edge=False)
        table.add_column(f"{task}, ms per step", min_width=12)
        for head in STAGES:
            table.add_column(head, justify="right", no_wrap=True)
        for record in records:
            if record["task"] == task and record["peer"] is None:
                spent = record["ms_per_step"]
                table.add_row(record["drafter"], *(_milliseconds(spent[stage]) for stage in STAGES))
        terminal.out.print(table)


def _milliseconds(value: float | None) -> str:
    """A figure of the table of stages; a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"


def _engine(peer: JsonObject) -> str:
    """A peer with its package and options."""
    options = "".join(f", {name} {value}" for name, value in peer["options"].items())
    file = f", over {peer['peer_file']['name']}" if peer["peer_file"] else ""
    return f"{peer['drafter']} ({peer['peer']}{file}{options})"


def _figures_of(record: JsonObject) -> list[str]:
    """The cells of a drafter's row behind its name, in the order of FIGURES."""
    plain = record["drafter"] == "none"
    ratios = (record["speedup_vs_plain"], record["decode_speedup_vs_plain"])
    speed = [
        f"{record['tokens_per_second']:.1f}",
        *("" if plain else f"{ratio:.2f}x" if ratio else "-" for ratio in ratios),
    ]
    if record["peer"] is not None:
        if record["texts_equal"] is None:
            return [*speed, "", "", "", "", "-"]
        same = "yes" if record["texts_equal"] else f"{100 * record['equal_tokens'] / record['tokens']:.0f} %"
        return [*speed, "", "", "", "", same]
    return [
        *speed,
        f"{record['tokens_per_pass']:.2f}",
        "" if plain else f"{100 * record['draft_acceptance_rate']:.0f} %",
        f"{record['extra_bytes'] / 2**20:.1f}",
        "" if plain else f"{record['speed_memory_ratio']:.2f}" if record["speed_memory_ratio"] else "-",
        "yes" if record["texts_equal"] else "NO",
    ]


def _summary(record: JsonObject) -> str:
    """Counts, scores and the memory that all drafters share."""
    scores = ", ".join(f"{name} {value:.3f}" for name, value in (record["scores"] or {}).items())
    counts = f"{terminal.counted(record['prompts'], 'prompt')}, {terminal.counted(record['tokens'], 'token')}"
    kinds = [what for what in ("weights", "cache", "resident") if record[f"{what}_bytes"] is not None]
    shared = [f"{what} {record[f'{what}_bytes'] / 2**20:.0f} MiB" for what in kinds]
    return f"{counts}; {scores or 'no score: ' + record['unscored']}; {', '.join(shared)}"


def with_sub_commands(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that runs when none of its sub-commands is named. Errors: OptionError for its options before one."""
    signature, hints = inspect.signature(verb), get_type_hints(verb, include_extras=True)

    def entry(ctx: typer.Context, **given: object) -> None:
        if ctx.invoked_subcommand is None:
            verb(**given)
        elif odd := [name for name, value in given.items() if value != signature.parameters[name].default]:
            option, command = f"--{odd[0].replace('_', '-')}", f"bench {ctx.invoked_subcommand}"
            raise OptionError(f"{option} belongs to 'bench' alone: options of '{command}' stand behind {command!r}")

    kind = inspect.Parameter.KEYWORD_ONLY
    context = inspect.Parameter("ctx", kind, annotation=typer.Context)
    parameters = [
        parameter.replace(kind=kind, annotation=hints[name]) for name, parameter in signature.parameters.items()
    ]
    entry.__name__, entry.__doc__ = verb.__name__, verb.__doc__
    entry.__annotations__ = {"ctx": typer.Context, **hints}
    entry.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    return entry


app = typer.Typer(add_completion=False, rich_markup_mode=None, invoke_without_command=True)
app.callback(invoke_without_command=True)(with_sub_commands(as_verb(BenchOptions, bench)))
app.command("serve")(bench_serve.verb)
