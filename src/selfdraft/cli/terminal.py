"""What a person sees: streamed text coloured by source, one line of figures, tables."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.color import ColorSystem
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from selfdraft.drafting.cost_model import Profile
    from selfdraft.llm import CompletionOutput, Piece
    from selfdraft.prove.compare import Comparison
    from selfdraft.types import Stats

STAGES = ("target", "drafting", "rest")
"""What a decode step goes into: passes of the target, guessing and learning, the host's other work."""
out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

COLOURS = {
    "lookup": "green",
    "suffix": "cyan",
    "lookahead": "magenta",
    "layer_skip": "yellow",
    "quantised": "bright_yellow",
    "cascade": "bright_cyan",
    "s3d": "bright_blue",
    "space": "bright_green",
}
"""Colour of accepted draft tokens by source; those of other drafters are blue."""

SAMPLE_PROMPTS = (
    "def fibonacci(n):\n",
    "Once upon a time there was a little dog who liked",
    "Natalia has 12 apples. She gives 5 apples to her friend. How many apples",
)


class Clock:
    """Seconds of one answer, those until its first tokens apart: they go with the length of the prompt."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.first: float | None = None
        """Seconds until the first tokens came; None before."""
        self._with_first = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def saw(self, output: CompletionOutput) -> None:
        """The answer has grown."""
        if self.first is None and output.token_ids:
            self.first, self._with_first = self.seconds, len(output.token_ids)

    def speed(self, tokens: int) -> float | None:
        """Tokens per second of an answer of so many tokens that ends now, after its first ones; None without others."""
        later = tokens - self._with_first
        return later / (self.seconds - self.first) if self.first is not None and later > 0 else None


def hush() -> None:
    """Keep the libraries' own progress bars and notices away from the text."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' reader of GGUF files has no other switch
    warnings.filterwarnings("ignore")
    for name in ("transformers", "torchao", "torch.utils._pytree", "bitsandbytes", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)


def tolerate() -> None:
    """Replace what the terminal or pipe cannot take, where its encoding is not UTF-8, instead of ending in an error."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def asked() -> bool:
    """Whether a person types what is read."""
    return sys.stdin is not None and sys.stdin.isatty()


def piece(new: Piece) -> None:
    """A piece of streamed text in the colour of its last accepted draft token."""
    drafted = [source for source in new.sources if source != "target"]
    colour = COLOURS.get(drafted[-1].split("+")[0], "blue") if drafted else ""
    plain = not colour or out.color_system is None
    # rich would widen tabs and drop control characters
    write(new.text if plain else Style(color=colour).render(new.text, color_system=ColorSystem.STANDARD))


def write(text: str) -> None:
    """Text to the output, as it is."""
    out.file.write(text)
    out.file.flush()


def heading(prompt: str) -> None:
    line = " ".join(prompt.split())
    out.print(Text(f"\n> {line[:100]}{'...' if len(line) > 100 else ''}", style="bold"))


def figures(stats: Stats, clock: Clock, drafter: str) -> None:
    """The one line of figures that ends an answer."""
    speed = clock.speed(stats.num_output_tokens)
    line = f"{counted(stats.num_output_tokens, 'token')} in {counted(stats.num_steps, 'step')}"
    line += f" ({stats.mean_acceptance_length:.2f} a step)"
    if clock.first is not None:
        line += f", first token after {clock.first:.2f} s"
    if speed is not None:
        line += f", then {speed:.1f} tokens/s"
    if stats.num_draft_tokens:
        line += f", {drafter}: {stats.num_accepted_draft_tokens} of {stats.num_draft_tokens} draft tokens accepted"
    else:
        line += f", {drafter}"
    write("\n")
    err.print(Text(line, style="dim"))


def counted(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}{ending if number != 1 else ''}"


def comparison(result: Comparison, drafter: str) -> None:
    """Speed against plain decoding, or why there is none to tell."""
    if not result.texts_equal:
        err.print(Text("the texts DIFFER from plain decoding: no speed-up is given", style="bold red"))
        return
    line = f"plain {result.plain_tokens_per_second:.1f} tokens/s, {drafter} {result.drafted_tokens_per_second:.1f}"
    line += f" tokens/s: {result.speedup:.2f}x; texts equal: yes (whole answers, median of {result.runs} runs each)"
    err.print(Text(line, style="dim"))
    if result.reason:
        err.print(Text(result.reason, style="dim"))


def verification(result: dict[str, Any], decode: Callable[[SequenceOf[int]], str]) -> None:
    """The verdict, and each mismatch with its place, both tokens and the logit gap."""
    for mismatch in result["mismatches"]:
        said = [f"{t} {decode([t])!r}" if t is not None else "the end" for t in (mismatch["expected"], mismatch["got"])]
        gap = f"{mismatch['gap']:.6g}" if mismatch["gap"] is not None else "unknown"
        out.print(
            f"prompt {mismatch['prompt']}, {mismatch['drafter']}: token {mismatch['position']} is {said[1]}, "
            f"expected {said[0]}; logit gap {gap}"
        )
    count = len(result["mismatches"])
    against = {"plain": "plain decoding", "hf": "transformers' greedy"}[result["against"]]
    out.print(
        f"{result['tokens_compared']} tokens compared with {against}, {counted(count, 'mismatch', 'es')} "
        f"({counted(result['prompts'], 'prompt')} x {', '.join(result['drafters'])}; {result['dtype']})"
    )
    if result["logit_rows_compared"]:
        out.print(f"logits bit-equal: {result['logit_rows_equal']} of {result['logit_rows_compared']} rows")
    if not result["mismatches"] and result["tokens_compared"]:
        out.print(f"95 % upper bound on mismatches per token: {3 / result['tokens_compared']:.1e}")


def diagnosis(result: dict[str, Any]) -> None:
    """The doctor's table."""
    facts = result["machine"]
    out.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if value is not None))
    heads = ("dtype", "asked", "shapes", "tokens equal", "logit bits equal", "found")
    table = Table(*heads, box=None, pad_edge=False)
    for trial in result["trials"]:
        table.add_row(
            trial["dtype"],
            trial["exactness"],
            trial["shapes"],
            f"{trial['tokens_equal']}/{trial['tokens']}",
            f"{trial['rows_bitwise_equal']}/{trial['rows']}",
            trial["level"],
        )
    out.print(table)
    for trial in result["trials"]:
        if trial["exactness"] == "bitwise":
            out.print(f"{trial['dtype']}: {trial['promised']} promised, {trial['level']} found; {trial['why']}")


FIGURES = ("tok/s", "vs plain", "decode", "tok/pass", "accept", "+MiB", "/memory", "same")
"""Heads of the bench's table; docs/bench.md says what they mean."""


def setting(facts: dict[str, Any]) -> None:
    """One line: model, dtype, exactness, runner, processor, threads."""
    machine = facts["machine"]
    line = (
        f"{facts['model']}, {facts['dtype']}, exactness {facts['exactness']['level']}, runner {facts['runner']}, "
        f"{machine['cpu_capability']}, {counted(machine['threads'], 'thread')}"
    )
    out.print(Text(line))


def evaluation(records: SequenceOf[dict[str, Any]], output: Path | None) -> None:
    """The bench's conditions, its table, and a line of scores for each task."""
    facts = records[0]["conditions"]
    machine = ", ".join(f"{name} {value}" for name, value in facts["machine"].items() if value is not None)
    names = ("max_new_tokens", "temperature", "top_p", "chat", "batch")
    settings = ", ".join(f"{name.replace('_', ' ')} {facts[name]}" for name in names)
    out.print(f"{facts['model']}, {facts['dtype']}, exactness {facts['exactness']['level']}, {settings}")
    out.print(machine.replace("_", " "))
    for task in dict.fromkeys(record["task"] for record in records):
        rows = [record for record in records if record["task"] == task]
        out.print(Text(f"\n{task}", style="bold"), _summary(rows[0]))
        table = Table(box=None, pad_edge=False)
        wide = max([12, *(len(row["drafter"]) for row in rows if row["peer"] is not None)])
        table.add_column("drafter", width=wide, overflow="fold")
        for head in FIGURES:
            table.add_column(head, justify="right", no_wrap=True, min_width=len(head))
        for record in rows:
            table.add_row(record["drafter"], *_figures_of(record))
        out.print(table)
        if any(record["peer"] is not None for record in rows):
            _apart(rows, wide)
    peers = {record["drafter"]: record for record in records if record["peer"] is not None}
    if peers:
        out.print(f"\nother engines, as many tokens each: {', '.join(_engine(peer) for peer in peers.values())}")
    load = max(record["load_average_max"] for record in records)
    out.print(f"\nload average up to {load:.1f}" + (f"; rows in {output}" if output is not None else ""))
    if not all(record["texts_equal"] for record in records if record["peer"] is None):
        err.print(Text("some texts DIFFER from plain decoding: no speed-up is given there", style="bold red"))


def _apart(rows: SequenceOf[dict[str, Any]], wide: int) -> None:
    """Decoding and reading of the prompt apart, for all engines, each beside its own plain decoding."""
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
        marked |= bool(differ)
        rate, speeds = record["draft_acceptance_rate"], ("decode_tokens_per_second", "prompt_tokens_per_second")
        table.add_row(
            record["drafter"],
            *("-" if record[name] is None else f"{record[name]:.1f}" for name in speeds),
            "" if plain or ratio is None else f"{ratio:.2f}x{'*' if differ else ''}",
            "" if plain or rate is None else f"{100 * rate:.0f} %",
            "" if plain or equal is None else "yes" if equal else f"no in {differ} of {record['prompts']}",
        )
    out.print("")
    out.print(table)
    if marked:
        out.print("* some of its texts are not its own plain texts: it did other work, so this is no speed-up")


def stages(records: SequenceOf[dict[str, Any]]) -> None:
    """Milliseconds of a decode step of every drafter by what they went into, from the run through stopwatches."""
    for task in dict.fromkeys(record["task"] for record in records):
        table = Table(box=None, pad_edge=False)
        table.add_column(f"{task}, ms per step", min_width=12)
        for head in STAGES:
            table.add_column(head, justify="right", no_wrap=True)
        for record in records:
            if record["task"] == task and record["peer"] is None:
                spent = record["ms_per_step"]
                table.add_row(record["drafter"], *(_milliseconds(spent[stage]) for stage in STAGES))
        out.print(table)


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _engine(peer: dict[str, Any]) -> str:
    """A peer with its package and options."""
    options = "".join(f", {name} {value}" for name, value in peer["options"].items())
    file = f", over {peer['peer_file']['name']}" if peer["peer_file"] else ""
    return f"{peer['drafter']} ({peer['peer']}{file}{options})"


def _figures_of(record: dict[str, Any]) -> list[str]:
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


def _summary(record: dict[str, Any]) -> str:
    """Counts, scores and the memory that all drafters share."""
    scores = ", ".join(f"{name} {value:.3f}" for name, value in (record["scores"] or {}).items())
    counts = f"{counted(record['prompts'], 'prompt')}, {counted(record['tokens'], 'token')}"
    shared = [f"{what} {record[f'{what}_bytes'] / 2**20:.0f} MiB" for what in ("weights", "cache")]
    return f"{counts}; {scores or 'no score: ' + record['unscored']}; {', '.join(shared)}"


def skip_set(record: dict[str, Any], name: str, path: Path) -> None:
    """A searched skip set: what it leaves out, what it is worth, how to use it."""
    blocks = [f"{kind} of blocks {', '.join(map(str, record[kind])) or '-'}" for kind in ("attention", "mlp")]
    out.print(f"left out: {'; '.join(blocks)}")
    line = f"agreement {record['agreement']:.3f} at c {record['c']:.3f}, predicted {record['predicted']:.2f}x"
    if "measured" in record:
        line += f", measured {record['measured']:.2f}x (c {record['c_measured']:.3f})"
    out.print(f"{line}; {counted(record['sets_tried'], 'set')} tried, {record['positions']} positions each")
    options: dict[str, Any] = {"method": "layer_skip", "skip_set": f"{path}#{name}"}
    options |= {key: record[key] for key in ("num_speculative_tokens", "confidence_threshold")}
    options["adaptive"] = False  # so it was predicted and confirmed
    out.print(f"use it: --speculative-config '{json.dumps(options)}'")


def predictions(rows: SequenceOf[dict[str, Any]]) -> None:
    """Predicted beside measured speed-ups."""
    heads = ("set", "draft tokens", "agreement", "c", "predicted", "measured", "error", "acceptance (predicted)")
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row["name"],
            str(row["num_speculative_tokens"]),
            f"{row['agreement']:.3f}",
            f"{row['c']:.3f}",
            f"{row['predicted']:.3f}x",
            f"{row['measured']:.3f}x",
            f"{100 * row['error']:+.1f} %",
            f"{row['measured_acceptance']:.3f} ({row['predicted_acceptance']:.3f})",
        )
    out.print(table)


def scaling(document: dict[str, Any], path: Path) -> None:
    """Lookahead's sizes and what they gave, the law through them, how to use the fastest."""
    table = Table("W", "N", "G", "tokens a pass", "rows a step", "tokens/s", box=None, pad_edge=False)
    for point in document["points"]:
        sizes = [str(point[name]) for name in ("window_size", "ngram_size", "guess_set_size")]
        rates = [
            f"{point['tokens_per_pass']:.3f}",
            f"{point['rows_per_step']:.1f}",
            f"{point['tokens_per_second']:.1f}",
        ]
        table.add_row(*sizes, *rates, "adaptive" if point["adaptive"] else "")
    out.print(table)
    line, law = document["law"]["log_rows"], document["law"]["paper"]
    out.print(
        f"tokens a pass = {line['intercept']:.2f} + {line['slope']:.3f} ln(rows), r = {line['correlation']:.2f}; "
        f"the paper's law: a = {law['acceptance']:.2f}, f = {law['period']:.1f}, off by {law['error']:.2f}"
    )
    options = json.dumps(document["speculative_config"])
    out.print(f"written to {path}; use it: --speculative-config '{options}'")


def replayed(record: dict[str, Any]) -> None:
    """What a replay counted."""
    out.print(
        f"{record['drafter']}, at most {counted(record['max_nodes'], 'node')}: "
        f"{record['tokens_per_forward']:.3f} tokens per forward, {record['rows_per_step']:.1f} rows a step "
        f"({counted(record['requests'], 'request')}, {counted(record['num_output_tokens'], 'token')}, "
        f"{counted(record['num_steps'], 'step')})"
    )
    shares = [f"{depth}: {100 * share:.1f}" for depth, share in enumerate(record["acceptance_by_depth"][:16], 1)]
    out.print(f"steps that accepted to depth, %: {', '.join(shares) or 'none'}")
    out.print(
        f"drafter's own time: {record['host_us_median']:.0f} us a step (median), "
        f"{record['host_us_draft']:.0f} drafting and {record['host_us_observe']:.0f} learning"
    )
    if record["predicted_by_actual"] is not None:
        out.print(f"predicted by actual acceptance: {record['predicted_by_actual']:.3f}")
    if "projected_speedup" in record:
        out.print(f"projected speed-up over plain decoding: {record['projected_speedup']:.2f}x")


def profile(found: Profile, short: int, long: int) -> None:
    """Milliseconds of a pass by its rows, behind few and many remembered tokens."""
    table = Table("rows", f"ms behind {short} tokens", f"behind {long:,}", "times one row", box=None, pad_edge=False)
    for rows in found.rows:
        near, far = found.at(rows, short), found.at(rows, long)
        table.add_row(str(rows), f"{1e3 * near:.2f}", f"{1e3 * far:.2f}", f"{near / found.at(1, short):.2f}")
    out.print(table)


def prose(text: str) -> None:
    """Text in lines as wide as the terminal."""
    out.print(Text(text))


def document(value: Any) -> None:
    """JSON on one line; where the output cannot take a character, its code, which means the same."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(out.file, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    write(text + "\n")


def complain(message: str) -> None:
    """An error, on one line of the error stream."""
    note(f"error: {message}")


def note(message: str) -> None:
    """One line on the error stream."""
    err.print(Text(" ".join(message.split())))


def ask() -> str | None:
    """A line of the user; None at its end."""
    try:
        said = out.input(Text("> ", style="bold"))
    except (EOFError, KeyboardInterrupt):
        out.print()
        return None
    return said.strip() or None


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    if not err.is_terminal:
        yield
        return
    with err.status(what):
        yield


@contextmanager
def share(what: str, *, quiet: bool = False) -> Iterator[Callable[[float], None]]:
    """A bar on the error stream that moves by itself until a share of the work is told."""
    columns = (TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done: bar.update(task, total=1.0, completed=done)


@contextmanager
def progress(total: int, *, quiet: bool, what: str = "verifying") -> Iterator[Callable[[], None]]:
    """A progress bar on the error stream."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


@contextmanager
def training(total: int, *, quiet: bool) -> Iterator[Callable[[Any], None]]:
    """A progress bar with loss and held-out acceptance per mask; a line for each measurement where there is no bar."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total, said="")

        def report(progress: Any) -> None:
            shares = " ".join(f"{share:.2f}" for share in progress.acceptance)
            if progress.acceptance:
                line = f"loss {progress.loss:.3f}, held-out acceptance per mask {shares}"
                bar.update(task, completed=progress.step, said=line)
                if not (quiet or err.is_terminal):
                    note(f"step {progress.step} of {total}: {line}")
            bar.update(task, completed=progress.step)

        yield report


def curve(found: Any, output: Any) -> None:
    """S3D's speed-up by skip width and number of masks, predicted and (after a sweep) measured."""
    measured = {(one["width"], one["masks"]): one["speed"] for one in found.get("sweep", ())}
    predicted = {(one["width"], one["masks"]): one["speed"] for one in found["settings"]}
    masks = sorted({count for _, count in predicted})
    title = "speed-up over plain decoding, predicted" + (" / measured" if measured else "")
    table = Table("blocks skipped", *(counted(count, "mask") for count in masks), title=title)
    for width in sorted({width for width, _ in predicted}):
        cells = []
        for count in masks:
            real = measured.get((width, count))
            cells.append(f"{predicted[width, count]:.2f}" + (f" / {real:.2f}" if real else ""))
        table.add_row(str(width), *cells)
    out.print(table)
    for one in found["widths"]:
        shares = " ".join(f"{share:.2f}" for share in one["acceptance"])
        out.print(f"{one['width']} blocks skipped: acceptance by place {shares}")
    best = found["best"]
    out.print(f"best: {json.dumps({'method': 's3d', **best})}, in {output}")
