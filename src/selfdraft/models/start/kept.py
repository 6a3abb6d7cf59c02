"""What is kept of a start for the next one, in the user's cache folder: one file for each checkpoint and its options.

It holds for the very same files of the checkpoint's folder (each by its size, its number in the file system and the
times of its last changes), options, machine and versions; whatever else is found is passed over and written anew.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from selfdraft.files.arrays import Numbers, read_arrays, write_arrays
from selfdraft.files.atomic import cache_folder
from selfdraft.models.adapters import Frame
from selfdraft.models.checkpoint.folder import INDEX, WHOLE
from selfdraft.models.facts import Facts
from selfdraft.models.proof.kept import Record, surroundings
from selfdraft.models.start.tape_file import TapeFile
from selfdraft.models.start.weights import Place, place_of
from selfdraft.types import JsonObject

FORMAT = 3
MASKED = "masked."
"""What the names of the arrays of a pass with masks begin with."""
ADAPTER = "adapter_config.json"
"""In the folder of a model it makes the folder one that needs more than its files' weights."""


@dataclass(frozen=True, slots=True)
class KeptStart:
    """What a start without the stock model needs."""

    facts: Facts
    frame: Frame
    proof: Record
    adapters: tuple[str, ...]
    """Hashes of the adapters that took part in the proof."""
    tokenizer: tuple[str, str] | None
    """Module and name of the class that makes the tokenizer out of the folder alone; None when none does."""
    tape: TapeFile
    masked: Masked | None
    """For a model with adapters whose masks stand in passes of the whole model."""


@dataclass(frozen=True, slots=True)
class Masked:
    """What passes with masks need beside the whole pass."""

    tape: TapeFile
    table: Place
    """The weights that make states of tokens."""
    head: Place
    """The weights that make logits of states."""


class StartFile:
    """The file of one checkpoint folder, one set of options and one number of threads."""

    def __init__(self, folder: Path, options: Mapping[str, str | int | None], root: Path | None = None) -> None:
        self.name = str(folder)
        """The folder as it was given, by which a tokenizer is called."""
        self.folder, self.options = folder.resolve(), dict(options)
        key = json.dumps([FORMAT, str(self.folder), self.options, torch.get_num_threads()], sort_keys=True)
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        self.place = (root or cache_folder("starts")) / f"{name}.start"

    def identity(self) -> JsonObject:
        """Everything that a kept start depends on. Errors: OSError."""
        around = surroundings(None, torch.device("cpu"), self.options)
        return {"format": FORMAT, "folder": str(self.folder), "files": files_of(self.folder), **around}

    def read(self, identity: JsonObject) -> KeptStart | None:
        """What was kept for this identity; None when there is nothing.

        Errors: OSError, TypeError, ValueError, LookupError or AttributeError where a sealed file holds something else.
        """
        found = read_arrays(self.place)
        if found is None or found[0].get("identity") != identity:
            return None
        told, arrays = found
        frame = told["frame"]
        layers = {path: (wide, out) for path, (wide, out) in frame["layers"].items()}
        return KeptStart(
            Facts.of_dict(told["facts"]),
            Frame(frame["base"], frame["hidden"], layers),
            Record.of_dict(told["proof"]),
            tuple(told["adapters"]),
            tuple(told["tokenizer"]) if told["tokenizer"] else None,
            TapeFile(told["tape"], {name: held for name, held in arrays.items() if not name.startswith(MASKED)}),
            self._masked(told["masked"], arrays),
        )

    def _masked(self, told: JsonObject | None, arrays: Mapping[str, Numbers]) -> Masked | None:
        """Errors: TypeError or LookupError where `write` did not make it."""
        if told is None:
            return None
        own = {name.removeprefix(MASKED): held for name, held in arrays.items() if name.startswith(MASKED)}
        return Masked(TapeFile(told["tape"], own), place_of(told["table"]), place_of(told["head"]))

    def write(self, identity: JsonObject, start: KeptStart) -> None:
        """Keep a start for this identity.

        Errors: OSError; TypeError and ValueError for facts that JSON does not hold.
        """
        facts: dict[str, object] = {
            "identity": identity,
            "facts": start.facts.as_dict(),
            "frame": asdict(start.frame),
            "proof": asdict(start.proof),
            "adapters": start.adapters,
            "tokenizer": start.tokenizer,
            "tape": start.tape.facts,
            "masked": None,
        }
        arrays = dict(start.tape.arrays)
        if (masked := start.masked) is not None:
            facts["masked"] = {"tape": masked.tape.facts, "table": asdict(masked.table), "head": asdict(masked.head)}
            arrays |= {MASKED + name: held for name, held in masked.tape.arrays.items()}
        write_arrays(self.place, facts, arrays)


def keepable(folder: Path) -> bool:
    """Whether a folder is a checkpoint whose weights can be mapped: safetensors and a configuration, no adapter."""
    whole = (folder / WHOLE).is_file() or (folder / INDEX).is_file()
    return whole and (folder / "config.json").is_file() and not (folder / ADAPTER).exists()


def files_of(folder: Path) -> dict[str, list[int]]:
    """The files of a folder, and by what a changed one is told from itself. Errors: OSError."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.iterdir()):
        about = path.stat()
        if stat.S_ISREG(about.st_mode):
            found[path.name] = [about.st_size, about.st_ino, about.st_mtime_ns, about.st_ctime_ns]
    return found
