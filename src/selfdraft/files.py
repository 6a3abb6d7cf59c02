"""The user's cache folder, and writing into it whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder of the user's cache that holds files of this kind; it need not exist yet.

    On Linux ~/.cache/selfdraft/KIND, or below XDG_CACHE_HOME where that is set.
    """
    from platformdirs import user_cache_path

    return Path(user_cache_path("selfdraft")) / kind


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


@contextmanager
def whole_file(wanted: Path) -> Iterator[Path]:
    """A path beside `wanted` that becomes `wanted` when the block ends without an error. Errors: OSError."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{wanted.name}-", suffix=".part", dir=wanted.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        os.replace(part, wanted)
    finally:
        part.unlink(missing_ok=True)
