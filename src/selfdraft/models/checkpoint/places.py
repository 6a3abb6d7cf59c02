"""What the name of a checkpoint stands for: a folder, a GGUF file, or a name on the hub. Nothing heavy is imported."""

from __future__ import annotations

import re
from pathlib import Path

from selfdraft.errors import LoadError

PART = re.compile(r"(?P<name>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")
"""The name of one part of a split file, as llama.cpp's gguf-split writes it."""


def find_gguf(path: str | Path) -> Path | None:
    """The GGUF file that a path stands for, of a split one the first part; None when it stands for none.

    A path stands for itself when it ends in .gguf, and a folder without a config.json for the file that it holds.
    Errors: LoadError when there is no such file, or when a folder holds several.
    """
    where = Path(path).expanduser()
    if where.suffix.lower() == ".gguf" and not where.is_dir():
        if not where.is_file():
            raise LoadError(f"{path}: there is no such file; check the path")
        return _first_part(where)
    if not where.is_dir() or (where / "config.json").exists():
        return None
    found = sorted({_first_part(file) for file in where.iterdir() if file.suffix.lower() == ".gguf"})
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:5])
        raise LoadError(f"{path} holds {len(found)} GGUF files; name one of them: {names}")
    return found[0] if found else None


def _first_part(file: Path) -> Path:
    """The first of the files that `file` belongs to."""
    match = PART.fullmatch(file.name)
    return file.with_name(f"{match['name']}-00001-of-{match['count']}.gguf") if match else file


def place(path: str | Path) -> str:
    """What to hand to transformers. A path that does not exist is an error here, and never asked of the hub."""
    text = str(path)
    home = Path(text).expanduser()
    if home.is_dir():
        return str(home)
    if home.is_file():
        raise LoadError(
            f"{text} is a file; give a .gguf file, or the folder that holds config.json and the safetensors"
        )
    parts = text.replace("\\", "/").split("/")
    marked = isinstance(path, Path) or text[:1] in ("/", ".", "~", "\\") or text[1:2] == ":"
    if marked or len(parts) > 2 or "" in parts or (len(parts) == 2 and Path(parts[0]).is_dir()):
        raise LoadError(f"{text}: there is no such folder; check the path, or give a hub name such as org/model")
    return text
