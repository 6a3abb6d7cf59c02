"""The verb `replay`: a drafter over recorded answers, with no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfdraft.cli import terminal
from selfdraft.cli.options import AsJson, Config, Memory, parse_config
from selfdraft.errors import OptionError

if TYPE_CHECKING:
    from selfdraft.files.token_log import Logged
    from selfdraft.replay.reliability import Reliability
    from selfdraft.replay.replay import Replayed


def replay(
    traces: Annotated[
        list[Path], typer.Argument(help="jsonl files with prompt_token_ids and generated_token_ids in each line.")
    ],
    drafter: Annotated[str | None, typer.Option(help="Who guesses: one that reads only tokens. Default: auto.")] = None,
    speculative_config: Config = None,
    max_nodes: Annotated[int, typer.Option(help="Most draft tokens of a step.", min=1)] = 64,
    limit: Annotated[int | None, typer.Option(help="Take at most this many requests of each file.", min=1)] = None,
    step_times: Annotated[
        str | None,
        typer.Option(help="Seconds of a pass by rows, as JSON: '[0.036, 0.037]' or '{\"1\": 0.036, \"8\": 0.051}'."),
    ] = None,
    memory: Memory = None,
    reliability: Annotated[
        Path | None, typer.Option(help="Draw predicted against actual acceptance into this PNG.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a drafter over recorded answers, no model needed.

    Every step is the one that live decoding would make.
    """
    from selfdraft.drafters import memory_of, with_memory
    from selfdraft.files.memory_file import check_memory, load_memory, save_memory
    from selfdraft.methods import drafter_of
    from selfdraft.replay.replay import LogTarget, open_drafter
    from selfdraft.replay.replay import replay as run

    name, options = drafter_of(drafter, parse_config(speculative_config))
    times = parse_times(step_times)
    picture = drawing_to(reliability)
    target = LogTarget(times)
    guesser = open_drafter(name, with_memory(name, options) if memory is not None else options, target)
    if memory is not None:
        check_memory(memory)
    requests, tokenizer = read_requests(traces, limit)
    if memory is not None and memory.exists():
        tokenizer = load_memory(memory, memory_of(guesser), tokenizer)
    with terminal.progress(len(requests), quiet=as_json, what="replaying") as done:
        found = run(requests, guesser, max_nodes, target=target, done=done)
    if memory is not None:
        save_memory(memory, memory_of(guesser), tokenizer)
    picture(found.reliability, f"{', '.join(path.stem for path in traces)}: {name} {json.dumps(options)}")
    if as_json:
        facts = {"drafter": name, "options": options, "max_nodes": max_nodes, **found.as_dict()}
        projected = {} if times is None else {"projected_speedup": round(found.speedup(times), 4)}
        terminal.print_json({"traces": [str(path) for path in traces], **facts, **projected})
    else:
        show_counts(found, f"{name}, at most {terminal.counted(max_nodes, 'node')}", times)


def read_requests(traces: list[Path], limit: int | None) -> tuple[list[Logged], str | None]:
    """The recorded answers, and the tokenizer they were made with where the logs say it. Errors: OptionError."""
    from selfdraft.files.token_log import read_logs

    requests = read_logs(traces, limit)
    tokenizers = {request.tokenizer for request in requests} - {None}
    if len(tokenizers) > 1:
        raise OptionError("the logs are of different tokenizers: replay them one by one")
    return requests, next(iter(tokenizers), None)


def show_counts(found: Replayed, drafter: str, times: Mapping[int, float] | None) -> None:
    """What a replay counted: tokens per forward, acceptance by depth, the drafter's own time, projected speed-up."""
    counts, stats, counted = found.as_dict(), found.stats, terminal.counted
    terminal.out.print(
        f"{drafter}: {found.tokens_per_forward:.3f} tokens per forward, {counts['rows_per_step']:.1f} rows a step "
        f"({counted(found.requests, 'request')}, {counted(stats.num_output_tokens, 'token')}, "
        f"{counted(stats.num_steps, 'step')})"
    )
    shares = [f"{depth}: {100 * share:.1f}" for depth, share in enumerate(found.by_depth[:16], 1)]
    terminal.out.print(f"steps that accepted to depth, %: {', '.join(shares) or 'none'}")
    terminal.out.print(
        f"drafter's own time: {counts['host_us_median']:.0f} us a step (median), "
        f"{counts['host_us_draft']:.0f} drafting and {counts['host_us_observe']:.0f} learning"
    )
    if found.reliability.ratio is not None:
        terminal.out.print(f"predicted by actual acceptance: {found.reliability.ratio:.3f}")
    if times is not None:
        terminal.out.print(f"projected speed-up over plain decoding: {found.speedup(times):.2f}x")


def drawing_to(path: Path | None) -> Callable[[Reliability, str], None]:
    """What draws into the file, whole or not at all. Errors: OptionError, before anything runs, when it could not."""
    from selfdraft.bench import charts

    if path is None:
        return lambda found, conditions: None
    charts.need_matplotlib("--reliability")
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        why = f"no folder {path.parent}" if not path.parent.is_dir() else "a folder, or no regular file"
        raise OptionError(f"--reliability {path} cannot be written: {why}")

    def draw(found: Reliability, conditions: str) -> None:
        if not found.nodes:
            why = "the drafter gives no chances" if found.tokens > found.behind else "none is behind them"
            raise OptionError(
                f"--reliability counts nodes behind the first {found.behind} tokens; of {found.tokens} replayed, {why}"
            )
        charts.draw_reliability(found, path, conditions)

    return draw


def parse_times(text: str | None) -> dict[int, float] | None:
    """Rows -> seconds out of a JSON list (of 1, 2, ... rows) or object. Errors: OptionError."""
    from selfdraft.replay.replay import check_times

    if text is None:
        return None
    try:
        value = json.loads(text)
        pairs = value.items() if isinstance(value, dict) else enumerate(value, 1)
        times = {int(rows): float(seconds) for rows, seconds in pairs}
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"--step-times must be a JSON list or object of seconds by rows, not {text!r}") from error
    check_times(times)
    return times
