"""The head of a GGUF file as transformers reads it, kept in the user's cache folder: configuration and tokenizer.

The list of tokens in it takes seconds to read each time, and does not change. What is kept holds for the very same
file (its path, size and time of its last change) and the same versions; whatever else is found is written anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase, TokenizersBackend

from selfdraft.files.atomic import cache_folder, read_record, whole_folder, write_record
from selfdraft.types import JsonObject

_log = logging.getLogger("selfdraft")
CONFIG = "gguf_config.json"


def fields_of(file: Path, read: Callable[[], JsonObject]) -> JsonObject:
    """The fields of the configuration: those that were kept, else what `read` says, which is kept."""
    identity, folder = _identity(file)
    place = folder / CONFIG
    kept = (read_record(place, identity) or {}).get("fields")
    if isinstance(kept, dict):
        return kept
    fields = read()
    with suppress(OSError, TypeError, ValueError):  # what is no JSON is read anew each time
        if json.loads(json.dumps(fields)) == fields:
            write_record(place, identity, fields=fields)
    return fields


def tokenizer_of(file: Path, read: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """The tokenizer: the one that was kept, else what `read` makes, which is kept if it is the same when it is read."""
    identity, folder = _identity(file)
    place = folder / "tokenizer"
    name = str(file.parent)
    if read_record(place / "made.json", identity) is not None:
        with suppress(OSError, ValueError):
            return _kept(place, name)
    made = read()
    if type(made) is TokenizersBackend:
        try:
            with whole_folder(place) as part:
                made.save_pretrained(part)
                if _traits(_kept(part, name)) != _traits(made):
                    raise ValueError("it is another one when it is read again")
                write_record(part / "made.json", identity)
        except (OSError, ValueError) as error:
            _log.info("the tokenizer of %s is not kept: %s", file, error)
    return made


def _kept(place: Path, name: str) -> PreTrainedTokenizerBase:
    made: PreTrainedTokenizerBase = TokenizersBackend.from_pretrained(place, local_files_only=True)
    made.name_or_path = name
    return made


def _traits(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """Everything by which a tokenizer treats text."""
    ids = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")]
    sides = tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length
    also = tokenizer.all_special_ids, tokenizer.chat_template, tokenizer.clean_up_tokenization_spaces
    return [tokenizer.backend_tokenizer.to_str(), ids, sides, also, len(tokenizer)]


def _identity(file: Path) -> tuple[JsonObject, Path]:
    """What the head depends on, and the folder in which it is kept."""
    state, where = file.stat(), str(file.resolve())
    told: JsonObject = {
        "file": [where, state.st_size, state.st_mtime_ns, state.st_ino],
        "versions": [version(name) for name in ("transformers", "tokenizers", "gguf", "selfdraft")],
    }
    key = hashlib.blake2b(where.encode(), digest_size=12).hexdigest()
    return told, cache_folder("gguf") / f"head-{key}"
