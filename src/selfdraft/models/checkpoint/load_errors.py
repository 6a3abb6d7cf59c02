"""Whatever transformers raises while it reads a checkpoint, as one line that names the checkpoint and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selfdraft.errors import LoadError
from selfdraft.models.kinds import first_line

CLEARER = {
    "automatic conversion of the weights": (
        "weights that belong together, mostly those of experts, are missing in part or have different sizes; "
        "download it again"
    ),
}
"""Our words where transformers only points at a report that it printed."""


@contextmanager
def blaming(where: str | Path, what: str = "model") -> Iterator[None]:
    """Turn whatever transformers raises into one line about `where`."""
    try:
        yield
    except ImportError as error:
        extra = "; pip install selfdraft[quantised]" if "quant" in str(error).lower() or "bits" in str(error) else ""
        raise LoadError(f"{where}: a package for this {what} is missing: {first_line(error)}{extra}") from error
    except Exception as error:
        said = next((text for mark, text in CLEARER.items() if mark in str(error)), first_line(error))
        hint = _hint(str(error))
        raise LoadError(f"{where}: cannot load the {what}: {said.rstrip('.') if hint else said}{hint}") from error


def _hint(text: str) -> str:
    hints: dict[str, Callable[[str], bool]] = {
        "; read its code, then pass trust_remote_code=True": lambda t: "trust_remote_code" in t,
        "; the file is cut off or damaged: download it again": lambda t: "deserializing header" in t,
        "; it is no decoder-only language model": lambda t: "Unrecognized configuration class" in t,
        "; there is no folder of this name here: check it, or give smollm2 or a GGUF file": lambda t: (
            "huggingface.co" in t and ("connect" in t or "valid model identifier" in t)
        ),
        "; only safetensors are read: convert the weights": lambda t: "model.safetensors" in t,
    }
    return next((hint for hint, fits in hints.items() if fits(text)), "")
