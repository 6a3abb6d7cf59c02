"""Whether a model will fit into the machine's memory, asked before anything is allocated for it."""

from __future__ import annotations

from pathlib import Path

from selfdraft.errors import LoadError

TOLD = Path("/proc/meminfo")
SPARE = 1 << 26
"""Bytes that everything else takes while a model is loaded."""


def available() -> int | None:
    """Bytes of memory that programs can still take; None where the system does not tell."""
    try:
        lines = TOLD.read_text("ascii").splitlines()
    except OSError:
        return None
    told = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    return int(told[1]) << 10 if told is not None and len(told) > 1 and told[1].isdigit() else None


def check_memory(where: str | Path, needed: int) -> None:
    """Errors: LoadError when a model that takes `needed` bytes does not fit into memory."""
    there = available()
    if there is not None and needed + SPARE > there:
        raise LoadError(
            f"{where}: the model takes {_mib(needed)} of memory and {_mib(there)} are free; close other programs, or "
            "take a file of fewer bits or a smaller model"
        )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
