"""The verb that needs no model: replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from selfdraft import show
from selfdraft.cli.options import AsJson, Config, Memory, parse_config
from selfdraft.errors import OptionError


def replay(
    traces: Annotated[
        list[Path], typer.Argument(help="jsonl files with prompt_token_ids and generated_token_ids in each line.")
    ],
    drafter: Annotated[
        str | None, typer.Option(help="Who guesses: one that reads only tokens. Default: lookup.")
    ] = None,
    speculative_config: Config = None,
    max_nodes: Annotated[int, typer.Option(help="Most draft tokens of a step.", min=1)] = 64,
    limit: Annotated[int | None, typer.Option(help="Only the first so many requests of each file.", min=1)] = None,
    step_times: Annotated[
        str | None,
        typer.Option(help="Seconds of a pass by rows, as JSON: '[0.036, 0.037]' or '{\"1\": 0.036, \"8\": 0.051}'."),
    ] = None,
    memory: Memory = None,
    as_json: AsJson = False,
) -> None:
    """Run a drafter over recorded answers, no model needed.

    Every step is the one that live decoding would make.
    """
    from selfdraft.bench.log import read_logs
    from selfdraft.bench.replay import open_drafter
    from selfdraft.bench.replay import replay as run
    from selfdraft.llm import drafter_of
    from selfdraft.memory import load_memory, memory_of, save_memory, with_memory

    name, options = drafter_of(drafter, parse_config(speculative_config))
    times = parse_times(step_times)
    guesser = open_drafter(name, with_memory(name, options) if memory is not None else options)
    requests = read_logs(traces, limit)
    (tokenizer, *others) = {request.tokenizer for request in requests} - {None} or {None}
    if others:
        raise OptionError("the logs are of different tokenizers: replay them one by one")
    if memory is not None and memory.exists():
        tokenizer = load_memory(memory, memory_of(guesser), tokenizer)
    with show.progress(len(requests), quiet=as_json, what="replaying") as done:
        found = run(requests, guesser, max_nodes, times=times, done=done)
    if memory is not None:
        save_memory(memory, memory_of(guesser), tokenizer)
    record = {"drafter": name, "options": options, "max_nodes": max_nodes, **found.as_dict()}
    if times is not None:
        record["projected_speedup"] = round(found.speedup(times), 4)
    if as_json:
        show.document({"traces": [str(path) for path in traces], **record})
    else:
        show.replayed(record)


def parse_times(text: str | None) -> dict[int, float] | None:
    """Rows -> seconds out of a JSON list (of 1, 2, ... rows) or object. Errors: OptionError."""
    from selfdraft.bench.replay import check_times

    if text is None:
        return None
    try:
        value = json.loads(text)
        pairs = value.items() if isinstance(value, dict) else enumerate(value, 1)
        times = {int(rows): float(seconds) for rows, seconds in pairs}
    except (TypeError, ValueError) as error:
        raise OptionError(f"--step-times must be a JSON list or object of seconds by rows, not {text!r}") from error
    check_times(times)
    return times
