"""Skip sets and evidence as files. A file is written beside its place, then moved there: it is whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfdraft.core.skipset import Record, parse_sets
from selfdraft.errors import OptionError


def load_sets(path: Path) -> dict[str, Record]:
    """The named sets of a file in the published format. Errors: OptionError."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise OptionError(f"{path} cannot be read: {why}") from error
    return parse_sets(text, str(path))


def save_set(path: Path, name: str, record: Mapping[str, Any]) -> None:
    """Put a set into a file under its name; the other sets of the file stay. Errors: OptionError."""
    sets = load_sets(path) if path.is_file() else {}
    write_json(path, {**sets, name: dict(record)})


def write_json(path: Path, value: Any) -> None:
    """Write a document, lists of numbers on one line each. Errors: OptionError; then the old file is as it was."""
    check_writable(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(_pretty(value) + "\n", "utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror}; give another place") from error
    finally:
        beside.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Errors: OptionError when nothing can be written there; asked before hours of work, not after."""
    folder = path.parent
    if not folder.is_dir():
        raise OptionError(f"{path} cannot be written: there is no folder {str(folder)!r}; give the path of a file")
    if path.exists() and not path.is_file():  # moving a file onto a device would take its place
        raise OptionError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; give the path of a file")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OptionError(f"{path} cannot be written: permission denied; give another place")


def _pretty(value: Any, indent: str = "") -> str:
    inner = indent + "  "
    if isinstance(value, dict) and value and any(isinstance(each, dict | list) for each in value.values()):
        items = [f"{inner}{json.dumps(str(key))}: {_pretty(each, inner)}" for key, each in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return "[\n" + ",\n".join(inner + _pretty(each, inner) for each in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)
