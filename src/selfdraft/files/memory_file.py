"""A drafter's memory of earlier outputs as a file of the caller's own: token ids, and whose tokens they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from selfdraft.drafting.output_memory import Memory
from selfdraft.errors import OptionError, RequestError
from selfdraft.files.atomic import whole_file

FORMAT = 1


def fingerprint(tokenizer: object, vocab: int) -> str:
    """What tells one tokenizer from another: a hash of its vocabulary; without one the number of ids."""
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return f"vocab:{vocab}"
    words = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]))
    return "sha256:" + hashlib.sha256(words.encode()).hexdigest()[:32]


def check_memory(path: Path) -> None:
    """Errors: RequestError when a memory could not be written there; asked before anything runs."""
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise RequestError(f"memory {path} cannot be written: {'a folder' if path.is_dir() else 'no regular file'}")
    if not path.parent.is_dir():
        raise RequestError(f"memory {path} cannot be written: no folder {path.parent}")


def load_memory(path: Path, memory: Memory, tokenizer: str | None) -> str | None:
    """Read a file into a memory. `tokenizer` is the fingerprint that it must have; None takes any. Returns the file's.

    Errors: RequestError for a file that cannot be read or is broken, OptionError for one of another tokenizer or with
    more tokens than the memory takes. The memory is then as it was.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RequestError(f"memory {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is no memory file: it holds bytes that are no text") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"memory {path} is broken: {error}") from error
    if not isinstance(value, dict) or value.get("selfdraft_memory") != FORMAT:
        raise RequestError(f"{path} is no memory file of format {FORMAT}")
    outputs, known = value.get("outputs"), value.get("tokenizer")
    if not isinstance(outputs, list) or not all(_is_output(output) for output in outputs):
        raise RequestError(f"memory {path} is broken: outputs must be lists of token ids")
    if tokenizer is not None and known != tokenizer:
        raise OptionError(
            f"memory {path} is of another tokenizer ({known or 'unknown'}, not {tokenizer}): take another file"
        )
    size = sum(map(len, outputs))
    if size > memory.most:
        raise OptionError(f"memory {path} holds {size} tokens; memory={memory.most} takes fewer: raise it")
    for output in outputs:
        memory.add(output)
    return known if isinstance(known, str) else None


def _is_output(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int and 0 <= token < 2**31 for token in value)


def save_memory(path: Path, memory: Memory, tokenizer: str | None) -> None:
    """Write a memory, whole or not at all. Errors: RequestError."""
    value = {"selfdraft_memory": FORMAT, "tokenizer": tokenizer, "outputs": [list(one) for one in memory.outputs]}
    try:
        with whole_file(path) as part:
            part.write_text(json.dumps(value), "utf-8")
    except OSError as error:
        raise RequestError(f"memory {path} cannot be written: {error.strerror}") from error
