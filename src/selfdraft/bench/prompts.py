"""Prompts out of jsonl files in the formats of the field's benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

from selfdraft.errors import RequestError

FIELDS = ("prompt", "turns", "question", "text")
"""Where a record keeps its prompt; of `turns` the first one counts."""


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """Prompts of a jsonl file, at most `limit`. Errors: RequestError names the file, the line and what is wrong."""
    if not path.is_file():
        raise RequestError(f"there is no prompts file {str(path)!r}")
    prompts: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and (limit is None or len(prompts) < limit):
                    prompts.append(_prompt(line, f"{path}:{number}"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not prompts:
        raise RequestError(f"{path} holds no prompt")
    return prompts


def _prompt(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"{place}: broken JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise RequestError(f"{place}: a record must be an object with one of {', '.join(FIELDS)}")
    for name in FIELDS:
        value = record.get(name)
        if name == "turns" and isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value:
            return value
    raise RequestError(f"{place}: no prompt; a record needs one of {', '.join(FIELDS)} as a non-empty text")
