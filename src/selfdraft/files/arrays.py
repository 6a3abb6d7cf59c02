"""Arrays of numbers with facts beside them, in one file that is written whole or not at all and read without pickle."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

from selfdraft.files.atomic import whole_file
from selfdraft.types import JsonObject

FACTS = "facts"
"""The name of the array that holds the facts, as bytes of JSON."""
SEAL = 16
"""Bytes of the hash that the file begins with."""

Numbers: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def write_arrays(place: Path, facts: Mapping[str, object], arrays: Mapping[str, Numbers]) -> None:
    """Keep arrays, and facts that are ready for JSON. Errors: OSError; TypeError and ValueError for other facts."""
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **{FACTS: text, **arrays})
    body = packed.getvalue()
    place.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(place) as part:
        part.write_bytes(_seal(body) + body)


def read_arrays(place: Path) -> tuple[JsonObject, dict[str, Numbers]] | None:
    """(facts, arrays) as they were written; None when there is no such file, or a byte of it has changed."""
    try:
        held = place.read_bytes()
        if _seal(held[SEAL:]) != held[:SEAL]:
            return None
        with np.load(io.BytesIO(held[SEAL:]), allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        facts = json.loads(arrays.pop(FACTS).tobytes())
    except (OSError, ValueError, LookupError, RecursionError, zipfile.BadZipFile):
        return None
    return (facts, arrays) if isinstance(facts, dict) else None


def sealing() -> hashlib.blake2b:
    """The hash that files begin with, of nothing yet."""
    return hashlib.blake2b(digest_size=SEAL)


def _seal(body: bytes) -> bytes:
    seal = sealing()
    seal.update(body)
    return seal.digest()
