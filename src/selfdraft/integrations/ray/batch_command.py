"""`selfdraft generate --ray FILE --output DIR`: starts Ray or joins it, has the rows answered, and ends it."""

from __future__ import annotations

from pathlib import Path

import ray
from ray.exceptions import RayError

from selfdraft.cli import terminal
from selfdraft.cli.generate import GenerateOptions
from selfdraft.cli.options import ensure_installed
from selfdraft.errors import LoadError, OptionError
from selfdraft.integrations.ray.batches import answer_rows, read_rows
from selfdraft.integrations.ray.cluster import last_line, start_ray


def answer_on_ray(given: GenerateOptions) -> None:
    """Answer the rows of the file. Errors: OptionError, RequestError, LoadError."""
    assert given.ray is not None
    folder = check_batch(given)
    rows = read_rows(given.ray, given.limit)
    ensure_installed(given.model)
    start_ray(given.workers * (given.threads or 1))
    try:
        answer_rows(given, rows, folder, terminal.note)
    except RayError as error:
        raise LoadError(f"a worker failed: {last_line(error)}") from error
    finally:
        ray.shutdown()


def check_batch(given: GenerateOptions) -> Path:
    """The folder for the answers. Errors: OptionError for options that have no meaning for a file on Ray."""
    if given.output is None:
        raise OptionError("--ray FILE needs --output DIR, the folder for the answers")
    others = {
        "prompt": given.prompt,
        "prompt_file": given.prompt_file,
        "prompts": given.prompts,
        "compare": given.compare,
    }
    others |= {"lookahead_parallel": given.lookahead_parallel}
    others |= {"prediction": given.prediction, "memory": given.memory, "log": given.log, "json": given.as_json}
    if given_too := next((name for name, value in others.items() if value), None):
        name = "a prompt" if given_too == "prompt" else f"--{given_too.replace('_', '-')}"
        raise OptionError(f"--ray answers the rows of its file, each by itself: leave {name} out")
    return given.output
