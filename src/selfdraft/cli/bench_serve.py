"""The sub-command `bench serve`: load on one or more servers of OpenAI's API, compared in turns."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from selfdraft.cli import terminal
from selfdraft.cli.options import as_verb, parse_config
from selfdraft.errors import OptionError, RequestError, ServerError
from selfdraft.remote import Address, checked_key, need_httpx, read_key, url_of
from selfdraft.types import JsonObject, comma_separated

if TYPE_CHECKING:
    from selfdraft.bench.load.arrivals import Ask, Point
    from selfdraft.bench.load.client import Server
    from selfdraft.bench.load.rows import Rows
    from selfdraft.bench.load.run import Load, Wanted

Option = typer.Option
DEFAULT_URL = "http://127.0.0.1:8000/v1"
DEFAULT_CONCURRENCY = "1,4,16"
EACH = "May be repeated, and begin with NAME= for one of several servers."

Urls = Annotated[
    list[str] | None,
    Option("--url", help=f"The server, or NAME=URL for each of several, asked in turns. Default: {DEFAULT_URL}."),
]
Models = Annotated[
    list[str] | None, Option("--model", help=f"The model to ask for. Default: the one that the server has. {EACH}")
]
Keys = Annotated[
    list[str] | None,
    Option("--api-key", help=f"The API key; other users of this machine can read it. {EACH}", metavar="KEY"),
]
KeyFile = Annotated[
    Path | None, Option(help="A file with the API key for all servers; or set SELFDRAFT_API_KEY.", metavar="FILE")
]
Concurrency = Annotated[
    str | None,
    Option(help=f"How many requests at a time, one point for each number. Default: {DEFAULT_CONCURRENCY}."),
]
Rate = Annotated[
    str | None, Option(help="Instead: requests a second on average, at random times (Poisson); one point for each.")
]
Requests = Annotated[int, Option(help="Requests of a point, in each round.", min=1)]
Rounds = Annotated[int, Option(help="Rounds of a point; several servers change their order in each.", min=1)]
Warmup = Annotated[int, Option(help="Requests to each server before, which do not count.", min=0)]
Dataset = Annotated[str, Option(help="Tasks of 'bench' with commas between, such as quick/code, or a jsonl file.")]
DataDir = Annotated[Path | None, Option(help="Folder with tasks' files; goes before this package's own.")]
PromptTokens = Annotated[
    str | None, Option(help="Lengths of prompts, drawn at random: each is cut or filled up to about so many tokens.")
]
MaxTokens = Annotated[str, Option(help="Most tokens of an answer; of several numbers one is drawn for each request.")]
Temperature = Annotated[float, Option(help="0 is greedy.", min=0.0)]
Seed = Annotated[int, Option(help="Draws order, lengths and times; request i is sampled with seed + i.", min=0)]
IgnoreEos = Annotated[bool, Option("--ignore-eos", help="Ask for all tokens, past the end of the text (ours, vLLM).")]
Reuse = Annotated[
    bool, Option("--prefix-reuse", help="Leave it to ours, vLLM and llama.cpp to reuse prompts that they have read.")
]
Endpoint = Annotated[Literal["chat", "completions"], Option(help="chat/completions, or completions without template.")]
Speculative = Annotated[
    list[str] | None, Option(help=f"The drafter, as JSON, sent in each request (ours). {EACH}", metavar="JSON")
]
Extra = Annotated[list[str] | None, Option(help=f"Further fields of each request, as JSON. {EACH}", metavar="JSON")]
Goodput = Annotated[
    str | None, Option(help="Limits in ms, such as ttft:500,tpot:50 (or e2el:2000): shows the share within them.")
]
Retry = Annotated[
    bool, Option("--retry", help="Ask again after 429 or 503, when Retry-After says; otherwise they count as errors.")
]
Timeout = Annotated[float, Option(help="Most seconds without a byte of an answer.", min=0.1)]
Json = Annotated[Path | None, Option("--json", help="Write all figures to this file.", metavar="FILE")]
Save = Annotated[Path | None, Option(help="Append one row for each request to this jsonl file.", metavar="FILE")]
Plot = Annotated[Path | None, Option(help="Draw the figures over the load into this file (PNG).", metavar="FILE")]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The options of the sub-command, in the order of its help."""

    url: Urls = None
    model: Models = None
    api_key: Keys = None
    api_key_file: KeyFile = None
    concurrency: Concurrency = None
    rate: Rate = None
    requests: Requests = 32
    rounds: Rounds = 3
    warmup: Warmup = 2
    dataset: Dataset = "quick"
    data_dir: DataDir = None
    prompt_tokens: PromptTokens = None
    max_tokens: MaxTokens = "64"
    temperature: Temperature = 0.0
    seed: Seed = 0
    ignore_eos: IgnoreEos = False
    prefix_reuse: Reuse = False
    endpoint: Endpoint = "chat"
    speculative_config: Speculative = None
    body: Extra = None
    goodput: Goodput = None
    retry: Retry = False
    timeout: Timeout = 600.0
    json: Json = None
    save: Save = None
    plot: Plot = None


def serve(given: LoadOptions) -> None:
    """Measure servers of OpenAI's API under load.

    They run already: selfdraft serve, vLLM, llama.cpp's server, transformers serve. Exit code 1 if a server of ours
    gave two texts to one greedy question.
    """
    from selfdraft.bench.load.rows import Rows

    check_outputs(given)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    with Rows(given.save, date) as rows:
        load = load_of(given, rows)
        facts: JsonObject = {}
        try:
            run(load, given, facts, date)
        except (ServerError, KeyboardInterrupt):
            if any(found.answers for found in load.measured):
                finish(load, given, facts)
                terminal.note("the run ended early: the figures are of what was answered until then")
            raise
        finish(load, given, facts)
    if any(differing(load.report()["texts"], server.name) for server in load.servers if server.exact):
        raise typer.Exit(1)


def load_of(given: LoadOptions, rows: Rows) -> Load:
    """The run that the options ask for, checked before the first request. Errors: OptionError, RequestError."""
    from selfdraft.bench.load.figures import parse_goodput
    from selfdraft.bench.load.run import Load

    asks = asks_of(given)
    return Load(
        servers_of(given),
        points_of(given),
        asks[: given.requests],
        asks[given.requests :],
        given.rounds,
        given.seed,
        rows,
        chat=given.endpoint == "chat",
        fresh=not given.prefix_reuse,
        greedy=given.temperature == 0,
        retry=given.retry,
        seconds=given.timeout,
        limits=parse_goodput(given.goodput),
    )


def check_outputs(given: LoadOptions) -> None:
    """Errors: OptionError when a package is missing, or a file's folder, so that it is not found out at the end."""
    from selfdraft.bench.charts import need_matplotlib

    need_httpx("bench serve")
    if given.plot is not None:
        need_matplotlib("--plot")
    for option, path in (("--json", given.json), ("--plot", given.plot)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise OptionError(f"{option} {path} cannot be written: give a file in a folder that is there")


def numbers(option: str, text: str, least: float, kind: type[int] | type[float]) -> list[int] | list[float]:
    """The numbers of a list with commas, each once. Errors: OptionError."""
    try:
        found = [kind(part) for part in comma_separated(text)]
    except ValueError:
        found = []
    if not found or not all(least <= one < 1e9 for one in found):
        what = "whole numbers" if kind is int else "numbers"
        raise OptionError(f"{option} {text!r} must be {what} with commas between, each at least {least:g}")
    return found


def wholes(option: str, text: str) -> list[int]:
    """The whole numbers of a list with commas. Errors: OptionError."""
    return [int(one) for one in numbers(option, text, 1, int)]


def points_of(given: LoadOptions) -> list[Point]:
    """The points, each once. Errors: OptionError."""
    from selfdraft.bench.load.arrivals import Point

    if given.rate is not None:
        if given.concurrency is not None:
            raise OptionError("--rate and --concurrency are two ways to load a server: give one of them")
        rates = dict.fromkeys(numbers("--rate", given.rate, 0.001, float))
        return [Point(rate=float(one)) for one in rates]
    sizes = dict.fromkeys(wholes("--concurrency", given.concurrency or DEFAULT_CONCURRENCY))
    if given.requests < max(sizes):
        most = max(sizes)
        raise OptionError(f"--requests {given.requests} are fewer than --concurrency {most}: give {most} or more")
    return [Point(concurrency=one) for one in sizes]


def asks_of(given: LoadOptions) -> list[Ask]:
    """The requests of a point, and behind them those of the warm-up. Errors: OptionError, RequestError."""
    from selfdraft.bench import tasks
    from selfdraft.bench.load.arrivals import plan

    names = tasks.names_of(given.dataset)
    loaded = [(name, tasks.load(name, given.data_dir, chat=given.endpoint == "chat", limit=None)) for name in names]
    items = [tasks.Item(f"{name} {item.key}", item.turns) for name, found in loaded for item in found]
    lengths = wholes("--prompt-tokens", given.prompt_tokens) if given.prompt_tokens is not None else []
    count = given.requests + given.warmup
    return plan(items, count, wholes("--max-tokens", given.max_tokens), lengths, given.seed)


def servers_of(given: LoadOptions) -> list[Wanted]:
    """The servers of the options, each under a name of its own. Errors: OptionError."""
    from selfdraft.bench.load.run import Wanted

    urls: dict[str, str] = {}
    for told in given.url or [DEFAULT_URL]:
        before, sign, behind = told.partition("=")
        url = url_of(behind if sign and "://" not in before else told)
        name = before.strip() if sign and "://" not in before else Address(url).host
        if name in urls or not name:
            raise OptionError(f"--url {told}: two servers are called {name!r}; give each NAME=URL")
        urls[name] = url
    models, keys = by_name("--model", given.model, urls), by_name("--api-key", given.api_key, urls)
    configs = by_name("--speculative-config", given.speculative_config, urls)
    bodies = by_name("--body", given.body, urls)
    shared = read_key(given.api_key_file)
    common = {"temperature": given.temperature, **({"ignore_eos": True} if given.ignore_eos else {})}
    found = []
    for name, url in urls.items():
        config = parse_config(configs.get(name))
        options = {**common, **({"speculative_config": config} if config is not None else {})}
        key = checked_key(keys[name]) if name in keys else shared
        extra = parse_config(bodies.get(name), "--body") or {}
        if taken := sorted({"stream", "messages", "prompt", "n", "max_tokens"} & extra.keys()):
            raise OptionError(f"--body: {taken[0]!r} is what bench serve sets itself; leave it out")
        found.append(Wanted(name, Address(url, key), models.get(name), {**options, **extra}))
    return found


def by_name(option: str, values: Sequence[str] | None, urls: Mapping[str, str]) -> dict[str, str]:
    """The value for each server: NAME=VALUE for one of them, a value alone for all others. Errors: OptionError."""
    found: dict[str, str] = {}
    shared: str | None = None
    for value in values or ():
        name, sign, rest = value.partition("=")
        if sign and name in urls and name not in found:
            found[name] = rest
        elif (sign and name in urls) or shared is not None:
            raise OptionError(f"{option} is given twice for one server; begin it with one of {', '.join(urls)} and =")
        else:
            shared = value
    return found if shared is None else {name: found.get(name, shared) for name in urls}


def run(load: Load, given: LoadOptions, facts: JsonObject, date: str) -> None:
    """Measure, with a bar of progress; `facts` becomes the conditions as soon as the servers are known."""
    from selfdraft.bench.load.conditions import conditions
    from selfdraft.models.machine_state import Span, Watch

    watch = Watch()
    plan = {
        **{name: getattr(given, name) for name in ("requests", "rounds", "warmup", "dataset", "endpoint", "seed")},
        **{name: getattr(given, name) for name in ("prompt_tokens", "max_tokens", "temperature", "ignore_eos")},
        **{name: getattr(given, name) for name in ("prefix_reuse", "goodput", "retry")},
    }

    def ready(servers: list[Server]) -> None:
        begun = Span(watch.before, None, watch.why).as_dict()
        facts.update({**conditions(servers, plan, date), "machine_state": begun})
        load.rows.begin(facts)
        show_conditions(facts)

    total = len(load.points) * load.rounds * len(load.wanted) * len(load.asks)
    with terminal.progress(total, quiet=False, what="asking") as advance:
        try:
            asyncio.run(load.measure(ready, advance))
        finally:
            facts["machine_state"] = watch.span().as_dict()


def finish(load: Load, given: LoadOptions, facts: JsonObject) -> None:
    """The tables and files of what was measured. Errors: RequestError."""
    report = load.report()
    terminal.out.print(facts["machine_state"]["words"])
    show_points(report["points"], load)
    show_notes(report, load)
    if given.json is not None:
        write(given.json, {"selfdraft_load": 1, "conditions": facts, **report})
    if given.plot is not None:
        from selfdraft.bench.charts import draw_load

        draw_load(report["points"], given.plot, foot_of(facts))
        terminal.note(f"wrote {given.plot}")
    if given.save is not None:
        terminal.note(f"{given.save} has {terminal.counted(load.rows.count, 'row')} more")


def write(path: Path, document: JsonObject) -> None:
    """A JSON document, whole or not at all. Errors: RequestError."""
    from selfdraft.files.atomic import whole_file

    try:
        with whole_file(path) as part:
            part.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise RequestError(f"--json {path} cannot be written: {error.strerror}") from error
    terminal.note(f"wrote {path}")


# What is shown


def told(server: JsonObject) -> str:
    """A server on one line."""
    about = dict(server["about"])
    exactness = about.pop("exactness", None) or {}
    words = [f"{server['url']}, model {server['model']}"]
    words += [f"{name.replace('_', ' ')} {value}" for name, value in about.items() if name in SAID]
    words += [f"exactness {exactness['level']}"] if "level" in exactness else []
    sent = {name: value for name, value in server["options"].items() if name not in ("temperature", "ignore_eos")}
    return ", ".join([*words, *([f"sent: {json.dumps(sent)}"] if sent else [])])


SAID = ("engine", "server", "version", "drafter", "max_batch")
"""What is shown of what a server says of itself; the rest is in --json."""


def drawn(facts: JsonObject) -> str:
    """How the requests were made, in words."""
    words = f"{facts['requests']} requests a point and round, {terminal.counted(facts['rounds'], 'round')}"
    words += f", {facts['dataset']}, {facts['endpoint']}"
    words += f", prompts of about {facts['prompt_tokens']} tokens" if facts["prompt_tokens"] else ""
    words += f", at most {facts['max_tokens']} tokens, temperature {facts['temperature']:g}, seed {facts['seed']}"
    return words + (", past the end of the text" if facts["ignore_eos"] else "")


def client_of(facts: JsonObject) -> str:
    """The load generator's machine, in words."""
    client = facts["client"]
    return f"load from {client['processor'] or client['system']}, {client['cores']} cores, {facts['date']}"


def foot_of(facts: JsonObject) -> list[str]:
    """The conditions under a picture."""
    return [drawn(facts), f"{'; '.join(server['url'] for server in facts['servers'])}; {client_of(facts)}"]


def show_conditions(facts: JsonObject) -> None:
    """The lines above the tables."""
    width = max(len(server["name"]) for server in facts["servers"])
    for server in facts["servers"]:
        terminal.out.print(f"{server['name']:<{width}}  {told(server)}")
        if not server["tells_usage"]:
            terminal.note(f"{server['name']} tells no usage in a stream: its chunks are counted as tokens")
    terminal.out.print(drawn(facts))
    terminal.out.print(client_of(facts))


def show_points(points: Sequence[JsonObject], load: Load) -> None:
    """One table for each point, and one of ratios behind it where there are several servers."""
    from rich.table import Table

    for point in load.points:
        records = [one for one in points if (one["concurrency"], one["rate"]) == (point.concurrency, point.rate)]
        if not records:
            continue
        terminal.out.print(Text(f"\n{point.label}", style="bold"))
        table = Table(box=None, pad_edge=False)
        table.add_column("\nserver", overflow="fold", min_width=6)
        heads = ("\ntok/s", "\nreq/s", "TTFT ms\np50", "\np95", "TPOT ms\np50", "\np95")
        for head in (*heads, *(["\ngood"] if load.limits else []), "\nerrors"):
            table.add_column(head, justify="right", no_wrap=True)
        for record in records:
            table.add_row(record["server"], *cells(record))
        terminal.out.print(table)
        show_ratios(records)


def cells(record: JsonObject) -> list[str]:
    """The cells of a server's row behind its name."""
    times = [record[name][part] for name in ("ttft_ms", "tpot_ms") for part in ("p50", "p95")]
    good = record["goodput"]
    errors = ", ".join(f"{count} x {kind}" for kind, count in record["errors"].items())
    return [
        figure(record["tokens_per_second"], 1),
        figure(record["requests_per_second"], 2),
        *(figure(value, 1) for value in times),
        *([] if good is None else [figure(None if good["share"] is None else 100 * good["share"], 0) + " %"]),
        errors or "0",
    ]


def figure(value: float | None, digits: int) -> str:
    """A figure in a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def show_ratios(records: Sequence[JsonObject]) -> None:
    """Each further server by the first one: the median of the rounds, and the range."""
    for record in records:
        found = record["by_first"]
        if found is None:
            continue
        said = []
        for name, words in (("tokens_per_second", "tok/s"), ("ttft_p50", "TTFT p50"), ("tpot_p50", "TPOT p50")):
            one = found[name]
            if one["median"] is not None:
                spread = f" ({one['lowest']:.2f} to {one['highest']:.2f})" if record["rounds"] > 1 else ""
                said.append(f"{words} {one['median']:.2f}x{spread}")
        if said:
            terminal.out.print(f"{record['server']} by {records[0]['server']}: {', '.join(said)}")


def differing(texts: JsonObject | None, name: str) -> list[str]:
    """The greedy questions to which a server gave more than one text."""
    return list(texts[name]["with_several_texts"]) if texts is not None else []


def show_notes(report: JsonObject, load: Load) -> None:
    """What has to be known to read the tables: equal texts, reused prompts, a load generator that is busy or late."""
    texts, names = report["texts"], [server.name for server in load.servers]
    if texts is not None:
        terminal.out.print("")
    for name in names if texts is not None else ():
        found, odd = texts[name], differing(texts, name)
        if found["asked_more_than_once"]:
            words = f"no: {len(odd)} of {found['asked_more_than_once']} differ, such as {odd[0]!r}" if odd else "yes"
            terminal.out.print(f"{name}: the same text to the same question each time: {words}")
        if name != names[0] and found["compared_with_first"]:
            equal = f"{found['equal_to_first']} of {found['compared_with_first']}"
            terminal.out.print(f"{name}: texts equal to those of {names[0]}: {equal}")
    for server in load.servers:
        if server.exact and differing(texts, server.name):
            terminal.show_red(f"texts of {server.name} DIFFER, though it says that it is exact: please report it")
    points = report["points"]
    for name in names:
        cached = [one["cached_share"] for one in points if one["server"] == name and one["cached_share"]]
        if cached:
            terminal.note(
                f"{name} had read up to {100 * max(cached):.0f} % of the prompt tokens before (prefix reuse): "
                "its TTFT is that of known prompts"
            )
    busy = max((one["client_processor_share"] or 0.0 for one in points), default=0.0)
    if busy > BUSY:
        terminal.note(f"the load generator itself used {100 * busy:.0f} % of a core: times are too long by its share")
    late = max((one["late_ms_max"] or 0.0 for one in points), default=0.0)
    if late > LATE:
        terminal.note(f"requests were sent up to {late:.0f} ms late: the load generator could not keep the rate")


BUSY, LATE = 0.5, 50.0
"""From here on a reader is told: share of a core, milliseconds."""

verb = as_verb(LoadOptions, serve)
