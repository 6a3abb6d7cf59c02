"""What was proved at load, kept in the user's cache folder: the second start of the same model need not prove it again.

A record holds for the very same weights, dtype, options, machine and versions only; a model that was refused leaves
none. `models/proof/whole_model.py` says what a proof is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selfdraft.errors import RunnerUnavailable
from selfdraft.files.atomic import cache_folder, read_record, write_record
from selfdraft.models.adapters import MaskAdapter
from selfdraft.models.exactness import Shapes
from selfdraft.models.identity import hash_of, samples_of, whole_hash
from selfdraft.models.machine import machine_of
from selfdraft.models.runner import kernel_build
from selfdraft.models.target import Exactness
from selfdraft.types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Record:
    """What `open_target` has to know of a proof: the level reached, the shapes, and which runner, with reasons."""

    level: str
    why: str
    shapes: tuple[int, int, int]
    runs: str

    @property
    def fast(self) -> bool:
        return self.runs == "fast"

    @property
    def exactness(self) -> Exactness:
        return Exactness("bitwise" if self.level == "bitwise" else "token", self.why)

    @classmethod
    def of(cls, exactness: Exactness, shapes: Shapes, runs: str) -> Record:
        return cls(exactness.level, exactness.why, (shapes.rows, shapes.bucket, shapes.width), runs)

    @classmethod
    def of_dict(cls, given: JsonObject) -> Record:
        """Errors: ValueError, TypeError or LookupError when these are not the values of a record."""
        return cls(given["level"], given["why"], tuple(given["shapes"]), given["runs"]).check()

    def check(self) -> Record:
        """Errors: ValueError when these are not the values of a record."""
        texts = (self.level, self.why, self.runs)
        whole = len(self.shapes) == 3 and all(type(part) is int and 0 <= part <= 1024 for part in self.shapes)
        if not whole or not all(isinstance(text, str) for text in texts) or self.level not in ("bitwise", "token"):
            raise ValueError("no record of a proof")
        return self


class ProofStore:
    """Records in a folder, one file each; the user's cache folder unless another is given."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder("proofs")

    def place(self, identity: Mapping[str, object]) -> Path:
        """The file of an identity."""
        return self.folder / f"{hash_of(json.dumps(identity, sort_keys=True).encode())}.json"

    def read(self, identity: Mapping[str, object]) -> Record | None:
        """The record of this identity; None when there is none, or its file is broken."""
        found = read_record(self.place(identity), identity)
        try:
            return Record.of_dict((found or {})["proof"])
        except (ValueError, TypeError, LookupError):
            return None

    def keep(self, identity: Mapping[str, object], record: Record) -> bool:
        """Write a record, whole or not at all. Returns whether it could be written; if not, it is proved again."""
        try:
            write_record(self.place(identity), identity, proof=asdict(record))
        except OSError:
            return False
        return True


def identity_of(
    model: PreTrainedModel, adapters: SequenceOf[MaskAdapter], options: Mapping[str, str | int | None]
) -> dict[str, object]:
    """Everything that a proof depends on, ready for JSON: weights, code, options, machine, versions."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    return {
        "format": FORMAT,
        "model": whole_hash(model),
        "adapters": hashes_of(adapters),
        **surroundings(weight.dtype, weight.device, options),
    }


def surroundings(
    dtype: torch.dtype | None, device: torch.device, options: Mapping[str, str | int | None]
) -> dict[str, object]:
    """The part of an identity that needs no model: options, machine, versions."""
    return {
        "options": dict(options),
        "runner": "none" if options.get("runner") == "plain" else _runner(),
        "transformers": version("transformers"),
        **machine_of(dtype, device),
        "code": _code(),
    }


def hashes_of(adapters: SequenceOf[MaskAdapter]) -> list[str]:
    """A name for every adapter."""
    return [hash_of(*samples_of(_named(adapter))) for adapter in adapters]


def _named(adapter: MaskAdapter) -> list[tuple[str, Tensor]]:
    parts = [(adapter.method, adapter.embeddings)]
    for path, pair in adapter.layers.items():
        parts += [(path, part) for part in pair]
    return parts + [("link", part) for part in adapter.link or ()]


def _code() -> str:
    """Changes with the source of the room `models`: what proves and what is proved."""
    return hash_of(*(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py"))))


def _runner() -> str:
    try:
        return kernel_build.fingerprint()
    except RunnerUnavailable as error:
        return str(error)
