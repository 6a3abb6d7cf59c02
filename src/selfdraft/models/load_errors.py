"""Whatever transformers raises while it reads a checkpoint, as one line that names the checkpoint and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selfdraft.errors import LoadError
from selfdraft.models.kinds import first_line


@contextmanager
def blaming(where: str | Path, what: str = "model") -> Iterator[None]:
    """Turn whatever transformers raises into one line about `where`."""
    try:
        yield
    except ImportError as error:
        extra = "; pip install selfdraft[quantised]" if "quant" in str(error).lower() or "bits" in str(error) else ""
        raise LoadError(f"{where}: a package for this {what} is missing: {first_line(error)}{extra}") from error
    except Exception as error:
        hint = _hint(str(error))
        raise LoadError(f"{where}: cannot load the {what}: {first_line(error)}{hint}") from error


def _hint(text: str) -> str:
    hints: dict[str, Callable[[str], bool]] = {
        "; read its code, then pass trust_remote_code=True": lambda t: "trust_remote_code" in t,
        "; it is no decoder-only language model": lambda t: "Unrecognized configuration class" in t,
        "; only safetensors are read: convert the weights": lambda t: "model.safetensors" in t,
    }
    return next((hint for hint, fits in hints.items() if fits(text)), "")
