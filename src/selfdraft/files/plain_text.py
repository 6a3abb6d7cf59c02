"""A text to measure a model on, out of a file: plain text, or the records of a jsonl file."""

from __future__ import annotations

from pathlib import Path

from selfdraft.errors import RequestError
from selfdraft.files.records import read_records

FIELDS = ("text", "prompt")
"""Where a record keeps its text."""
RECORDS = (".jsonl", ".json")
"""Endings of files of records, also with .gz behind them."""
BETWEEN = "\n\n"
"""What stands between two records."""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; of a .jsonl, .jsonl.gz or .json file the texts of its records, one after the other.

    Errors: RequestError names the file and what is wrong: missing, unreadable, binary, empty, a record without text.
    """
    if not path.exists():
        raise RequestError(f"there is no text file {str(path)!r}")
    if path.is_dir():
        raise RequestError(f"{path} is a folder: give a text file or a .jsonl file")
    name = path.name.removesuffix(".gz")
    if name.endswith(RECORDS):
        text = BETWEEN.join(_text(record, place) for place, record in read_records(path))
    else:
        text = _plain(path)
    if not text.strip():
        raise RequestError(f"{path} holds no text")
    return text


def _plain(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error
    if b"\0" in raw:
        raise RequestError(f"{path} is no text: byte {raw.index(0)} is zero; give a UTF-8 text or a .jsonl file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _text(record: dict[str, object], place: str) -> str:
    for name in FIELDS:
        value = record.get(name)
        if isinstance(value, str) and value:
            return value
    raise RequestError(f"{place}: no text; a record needs one of {', '.join(FIELDS)} as a non-empty text")
