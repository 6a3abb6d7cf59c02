"""Token logs: what a request was given and what it answered, one JSON object a line; the input of a replay.

`prompt_token_ids` and `generated_token_ids` are all that a line needs. `limit`, `ends`, `edge`, `context` and `chunk`
say how a live run was bounded; with them a replay makes the very same steps. Without them the answer's own length is
its limit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from selfdraft.errors import RequestError
from selfdraft.files.records import read_records, token_ids
from selfdraft.protocols import Target
from selfdraft.types import JsonObject

FAR = 2**31
"""More tokens than any text has."""


@dataclass(frozen=True, slots=True)
class Logged:
    """One request of a log."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    limit: int
    """Most tokens, prompt and output together."""
    ends: frozenset[int] = frozenset()
    """Token ids that ended the output."""
    edge: int = FAR
    """Drafts ended before multiples of this position."""
    context: int = FAR
    chunk: int = FAR
    """Tokens of one piece of the prefill."""
    tokenizer: str | None = None
    """Fingerprint of the tokenizer, if known."""


def read_logs(paths: Iterable[Path], limit: int | None = None) -> list[Logged]:
    """The requests of all files, at most `limit` of each. Errors: RequestError names the file and the line."""
    found = []
    for path in paths:
        if not path.is_file():
            raise RequestError(f"there is no log file {str(path)!r}")
        lines = [_logged(record, place) for place, record in islice(read_records(path), limit)]
        if not lines:
            raise RequestError(f"{path} holds no request")
        found += lines
    return found


def _logged(record: JsonObject, place: str) -> Logged:
    prompt = _tokens(record, "prompt_token_ids", place)
    output = _tokens(record, "generated_token_ids", place)
    whole = len(prompt) + len(output)
    bounds = {name: _positive(record, name, place) for name in ("limit", "edge", "context", "chunk")}
    if (bounds["limit"] or whole) < whole:
        raise RequestError(f"{place}: limit {bounds['limit']} is below the {whole} tokens of prompt and answer")
    ends = _tokens(record, "ends", place) if record.get("ends") else ()
    far = {name: bounds[name] or FAR for name in ("edge", "context", "chunk")}
    tokenizer = record.get("tokenizer")
    if tokenizer is not None and not isinstance(tokenizer, str):
        raise RequestError(f"{place}: tokenizer is {tokenizer!r}; it must be a fingerprint or left out")
    return Logged(prompt, output, bounds["limit"] or whole, frozenset(ends), **far, tokenizer=tokenizer)


def _tokens(record: JsonObject, name: str, place: str) -> tuple[int, ...]:
    if not (found := token_ids(record, name, place)):
        raise RequestError(f"{place}: {name} is not there or empty: give a list of token ids")
    return tuple(found)


def _positive(record: JsonObject, name: str, place: str) -> int | None:
    value = record.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise RequestError(f"{place}: {name} is {value!r}; it must be a whole number of at least 1")
    return value


def entry(
    prompt: SequenceOf[int],
    output: SequenceOf[int],
    target: Target,
    *,
    limit: int,
    ends: Iterable[int],
    chunk: int,
    tokenizer: str | None = None,
) -> dict[str, object]:
    """A line of a log: tokens, and what bounded the live run on `target`."""
    return {
        "prompt_token_ids": list(prompt),
        "generated_token_ids": list(output),
        "limit": limit,
        "ends": sorted(ends),
        "edge": target.next_boundary(0),
        "context": target.max_length,
        "chunk": chunk,
        "tokenizer": tokenizer,
    }


def check_log(path: Path | None) -> None:
    """Errors: RequestError when the log could not be written; asked before anything runs. Leaves nothing behind."""
    if path is None:
        return
    folder = path.parent
    if not folder.is_dir() or path.is_dir():
        raise RequestError(f"--log {path} cannot be written: {'a folder' if path.is_dir() else f'no folder {folder}'}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise RequestError(f"--log {path} cannot be written: permission denied")


def append(path: Path, record: Mapping[str, object]) -> None:
    """Add one line, in one write. Errors: RequestError."""
    try:
        with path.open("ab", buffering=0) as file:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise RequestError(f"--log {path} cannot be written: {error.strerror}") from error
