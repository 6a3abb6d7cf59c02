"""What can be said of a checkpoint's folder before transformers reads it, and of a tokenizer that it could not make."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from selfdraft.errors import LoadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""Weight files that run code when they are read; never opened."""
POINTER = b"version https://git-lfs.github.com/spec"
"""How a file begins that Git LFS has put in the place of a large one."""
SHARD = re.compile(r"(?P<name>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.safetensors")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The names that transformers reads: the weights in one file, or the table that says which shard holds what."""


def check_folder(folder: Path, trust_remote_code: bool) -> None:
    """Errors: LoadError names the file that is missing, broken or not the file itself."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = folder / "config.json"
    if not file.is_file():
        raise LoadError(f"{folder}: no config.json and no .gguf file; give the folder that `save_pretrained` wrote")
    config = _parsed(file)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise LoadError(f"{file} names no model_type; give a checkpoint in the format of transformers")
    kind = config["model_type"]
    if kind not in CONFIG_MAPPING and not trust_remote_code:
        if "auto_map" in config:
            raise LoadError(
                f"{folder}: model type {kind!r} needs the checkpoint's code; read it, then pass trust_remote_code=True"
            )
        raise LoadError(f"{folder}: transformers does not know model type {kind!r}; check config.json or upgrade")
    check_pointer(folder / "generation_config.json")
    for part in weight_files(folder):
        check_pointer(part)


def check_pointer(file: Path) -> None:
    """Errors: LoadError when the file is a pointer of Git LFS."""
    if not file.is_file():
        return
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise LoadError(
                f"{file} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder, "
                "or download the file again"
            )


def read_json(file: Path) -> dict[str, object]:
    """The object in a JSON file. Errors: LoadError."""
    found = _parsed(file)
    if not isinstance(found, dict):
        raise LoadError(f"{file} holds no JSON object; download it again")
    return found


def _parsed(file: Path) -> object:
    """Errors: LoadError."""
    check_pointer(file)
    try:
        return json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{file} is not valid JSON ({error}); download it again") from error
    except OSError as error:
        raise LoadError(f"{file} cannot be read: {error.strerror or error}") from error


def has_weights(folder: Path) -> bool:
    """True when the folder has weights under a name that transformers reads."""
    return (folder / WHOLE).is_file() or (folder / INDEX).is_file()


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers will read the weights from. Errors: LoadError when one is missing."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if (folder / INDEX).is_file():
        return _indexed(folder)
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    shards = [name for name in found if SHARD.fullmatch(name)]
    if shards:
        raise LoadError(
            f"{folder}: {len(shards)} shards such as {shards[0]}, but no {INDEX}, which says what is in which; "
            "download it, too"
        )
    if found:
        raise LoadError(f"{folder}: {found[0]} is not the name of a model's weights; there is no {WHOLE}: rename it")
    pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLED)
    if pickled:
        for name in pickled:
            check_pointer(folder / name)
        raise LoadError(
            f"{folder}: {pickled[0]} is a pickle, which can run code and is never opened; convert it to safetensors"
        )
    raise LoadError(f"{folder}: no *.safetensors file; the weights are missing")


def _indexed(folder: Path) -> list[Path]:
    """The shards of an index. Errors: LoadError names the first that is missing."""
    table = read_json(folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise LoadError(f"{folder / INDEX} has no weight_map of keys to shards; download it again")
    names = sorted({*table.values()})
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise LoadError(
            f"{folder}: {len(absent)} of {len(names)} shards are missing, the first is {absent[0]}; download them all"
        )
    return [folder / name for name in names]


def check_tokenizer_files(folder: Path) -> None:
    """Errors: LoadError when there is no tokenizer file at all, or a pointer of Git LFS in the place of one."""
    # transformers makes an empty tokenizer for some families when there is no file at all
    if not has_tokenizer(folder):
        raise LoadError(f"{folder}: no tokenizer (tokenizer.json is missing); copy it there, or pass tokenizer=...")
    for pattern in ("*token*", "*vocab*", "merges*", "*.model", "chat_template*"):
        for file in sorted(folder.glob(pattern)):
            check_pointer(file)


def has_tokenizer(folder: Path) -> bool:
    """True when a folder holds a file of a tokenizer."""
    return any(folder.glob("*token*")) or any(folder.glob("vocab*"))


def check_vocabulary(where: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Errors: LoadError for the tokenizer without words that transformers makes when the file with them is missing."""
    added = {*tokenizer.added_tokens_decoder}
    if tokenizer.vocab_size <= len(added) and {*tokenizer.get_vocab().values()} <= added:
        raise LoadError(
            f"{where}: the tokenizer has no words, only {len(added)} special tokens: tokenizer.json is missing or "
            "empty; copy it there, or pass tokenizer=..."
        )


def tokenizer_fault(folder: Path) -> str | None:
    """Why transformers could make no tokenizer out of a folder, in words; None when its files look right."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text("utf-8"))
            except (ValueError, RecursionError) as error:
                return f"{name} is not valid JSON ({error}); download it again"
            if not isinstance(found, dict):
                return f"{name} holds no JSON object; download it again"
            if name == "tokenizer.json" and not isinstance(found.get("model"), dict):
                return "tokenizer.json has no entry 'model', so it is no tokenizer; download it again"
    if (folder / "tokenizer.json").is_file():
        return None
    others = sorted(file.name for pattern in ("*.model", "*.tiktoken") for file in folder.glob(pattern))
    if others:
        return (
            f"tokenizer.json is missing, and {others[0]} cannot be read in its place (it may need "
            "`pip install sentencepiece tiktoken`); copy tokenizer.json there, or pass tokenizer=..."
        )
    return "tokenizer.json is missing; copy it there, or pass tokenizer=..."
