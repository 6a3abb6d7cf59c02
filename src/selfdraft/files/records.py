"""Prompts out of jsonl files in the formats of the field's benchmarks."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from selfdraft.errors import RequestError
from selfdraft.types import JsonObject

FIELDS = ("prompt", "turns", "question", "instruction", "text")
"""Where a record keeps its prompt; of `turns` the first one counts."""
MOST_ID = 2**31
"""A token id is below it."""


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """Prompts of a jsonl file, at most `limit`. Errors: RequestError names the file, the line and what is wrong."""
    if not path.is_file():
        what = "is a folder; give a jsonl file" if path.is_dir() else "is not there"
        raise RequestError(f"the prompts file {str(path)!r} {what}")
    prompts = [turns_of(record, place)[0] for place, record in islice(read_records(path), limit)]
    if not prompts:
        raise RequestError(f"{path} holds no prompt")
    return prompts


def read_records(path: Path) -> Iterator[tuple[str, JsonObject]]:
    """(place, record) of a file, one by one: jsonl, also gzipped, or (`.json`) one list of objects.

    `place` is the file with the line, or the number of the record. Errors: RequestError names it and what is wrong.
    """
    try:
        if path.suffix == ".json":
            yield from _listed(path)
            return
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    yield f"{path}:{number}", _object(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RequestError(f"{path} is a broken gzip file: {error}") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error


def turns_of(record: JsonObject, place: str) -> list[str]:
    """What the user says in a record, turn by turn. Errors: RequestError."""
    for name in FIELDS:
        value = record.get(name)
        turns = [turn for turn in (value if isinstance(value, list) else [value]) if isinstance(turn, str) and turn]
        if turns:
            return turns
    raise RequestError(f"{place}: no prompt; a record needs one of {', '.join(FIELDS)} as a non-empty text")


def token_ids(record: JsonObject, name: str, place: str, vocab: int | None = None) -> list[int]:
    """Token ids of a field; none where it is not there or empty. Errors: RequestError names the place and the value."""
    tokens = record.get(name) or []
    if not isinstance(tokens, list):
        raise RequestError(f"{place}: {name} is not a list of token ids")
    wrong = next((token for token in tokens if type(token) is not int or not 0 <= token < (vocab or MOST_ID)), None)
    if wrong is not None:
        raise RequestError(f"{place}: {wrong!r} in {name} is no token id below {vocab or 'the vocabulary'}")
    return tokens


def _listed(path: Path) -> Iterator[tuple[str, JsonObject]]:
    try:
        records = json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise RequestError(f"{path}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: {_unreadable(error)}") from error
    if not isinstance(records, list):
        raise RequestError(f"{path}: a .json file must hold a list of records; one record a line is .jsonl")
    for number, record in enumerate(records, 1):
        yield f"{path}, record {number}", _record(record, f"{path}, record {number}")


def _object(line: str, place: str) -> JsonObject:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"{place}: broken JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place}: {_unreadable(error)}") from error
    return _record(value, place)


def _unreadable(error: Exception) -> str:
    """What Python's JSON reader gives up on though it is JSON."""
    return "JSON nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"


def _record(value: object, place: str) -> JsonObject:
    if not isinstance(value, dict):
        raise RequestError(f"{place}: a record must be an object with one of {', '.join(FIELDS)}")
    return value
