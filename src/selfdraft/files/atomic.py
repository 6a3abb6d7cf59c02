"""The user's cache folder, and writing into it whole or not at all."""

from __future__ import annotations

import atexit
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from selfdraft.types import JsonObject


def cache_folder(kind: str) -> Path:
    """The folder of the user's cache that holds files of this kind; it need not exist yet.

    Below SELFDRAFT_CACHE where that is set, else where the system keeps caches: on Linux ~/.cache/selfdraft, or below
    XDG_CACHE_HOME. Where that cannot be written (no home, a read-only one), a folder of this user below the system's
    temporary folder; later runs find it again.
    """
    if told := os.environ.get("SELFDRAFT_CACHE"):
        return Path(told).expanduser() / kind
    from platformdirs import user_cache_path

    try:
        root = Path(user_cache_path("selfdraft"))
        usable = root.is_absolute() and _writable(root)
    except (RuntimeError, KeyError, OSError):  # a user without a home
        usable = False
    return (root if usable else _private_folder()) / kind


def _writable(folder: Path) -> bool:
    """Whether it can be written, or made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@cache
def _private_folder() -> Path:
    """A folder that nobody else can write to: what is read from it is run."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"selfdraft-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o022:
            return folder
    except OSError:
        pass
    made = tempfile.mkdtemp(prefix="selfdraft-")  # somebody else has taken the name
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


@contextmanager
def whole_folder(wanted: Path) -> Iterator[Path]:
    """A new empty folder that becomes `wanted` when the block ends without an error; else nothing is left of it.

    A folder that stands there already is replaced. Errors: OSError.
    """
    wanted.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{wanted.name}-", suffix=".part", dir=wanted.parent))
    try:
        yield part
        part.chmod(0o755)
        if wanted.exists():
            shutil.rmtree(wanted)
        os.replace(part, wanted)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_record(place: Path, identity: object) -> JsonObject | None:
    """What was kept in a file for this identity; None when there is none, it is broken, or it is another's."""
    try:
        found = json.loads(place.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("identity") == identity else None


def write_record(place: Path, identity: object, **values: object) -> None:
    """Keep values, ready for JSON, for an identity; whole or not at all. Errors: OSError."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(place) as part:
        part.write_text(json.dumps({"identity": identity, **values}) + "\n", "utf-8")


@contextmanager
def whole_file(wanted: Path, part: Path | None = None) -> Iterator[Path]:
    """A path beside `wanted` that becomes `wanted` when the block ends without an error. Errors: OSError.

    The file is as readable as any other that is made here, or as the one that it replaces. `part`: that path, where
    only one process writes, so that the next run overwrites what a killed one has left; else no other has its name.
    """
    if part is None:
        part = wanted.with_name(f".{wanted.name[:100]}-{secrets.token_hex(6)}.part")
    try:
        yield part
        if wanted.exists():
            part.chmod(stat.S_IMODE(wanted.stat().st_mode))
        os.replace(part, wanted)
    finally:
        part.unlink(missing_ok=True)
