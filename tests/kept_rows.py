"""Rows as `bench --output` keeps them, and files of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from selfdraft.bench.rows import HEAD


def row(drafter: str = "none", key: str = "1", temperature: float = 0.0, **other: Any) -> dict[str, Any]:
    """A row of plain decoding, or of a drafter that is twice as fast; `other` are further fields or other values."""
    machine: dict[str, Any] = {"processor": "x", "threads": 2} | other.pop("machine", {})
    facts: dict[str, Any] = {
        "model": "/m/tiny",
        "dtype": "bfloat16",
        "weights": "abc",
        "temperature": temperature,
        "top_p": 1.0,
    }
    facts |= {"exactness": {"level": "bitwise"}, "runner": "fast", "chat": True, "max_new_tokens": 8, "batch": 1}
    facts |= {"selfdraft": "0", "machine": machine}
    made: dict[str, Any] = {
        "task": "quick",
        "group": "qa",
        "key": key,
        "drafter": drafter,
        "peer": None,
        "fingerprint": f"{drafter} {temperature} {machine}",
    }
    made |= {
        "tokens": 8,
        "prompt_tokens": 5,
        "seconds": 1.0 if drafter == "none" else 0.5,
        "plain_seconds": 1.0,
        "texts_equal": True,
    }
    made |= {"finish_reason": "stop", "first_difference": None, "load_average": 1.0, "scores": {}, "conditions": facts}
    made |= {"stats": {"num_steps": 4, "mean_acceptance_length": 2.0}}
    return made | other


def write(path: Path, *rows: dict[str, Any]) -> Path:
    """Writes a file of rows, gzipped if its name says so."""
    data = "".join(HEAD + json.dumps(one)[1:] + "\n" for one in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
