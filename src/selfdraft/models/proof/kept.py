"""What was proved at load, kept in the user's cache folder: the second start of the same model need not prove it again.

A record holds for the very same weights, dtype, options, machine and versions only; a model that was refused leaves
none. `models/proof/whole_model.py` says what a proof is.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from selfdraft.errors import RunnerUnavailable
from selfdraft.files.atomic import cache_folder, read_record, write_record
from selfdraft.models.adapters import MaskAdapter
from selfdraft.models.exactness import Shapes
from selfdraft.models.machine import cpu_name
from selfdraft.models.runner import kernel_build
from selfdraft.models.target import Exactness

FORMAT = 1
SAMPLES = 256
"""Numbers of a weight that are read to tell it from another: these, evenly spread, and its first and last."""


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
        return self.folder / f"{_hash(json.dumps(identity, sort_keys=True).encode())}.json"

    def read(self, identity: Mapping[str, object]) -> Record | None:
        """The record of this identity; None when there is none, or its file is broken."""
        found = read_record(self.place(identity), identity)
        try:
            given = (found or {})["proof"]
            return Record(given["level"], given["why"], tuple(given["shapes"]), given["runs"]).check()
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
    device = torch.cuda.get_device_name(weight.device) if weight.device.type == "cuda" else cpu_name()
    return {
        "format": FORMAT,
        "model": hash_of(model),
        "adapters": [_hash(*_tensors(_named(adapter))) for adapter in adapters],
        "dtype": str(weight.dtype).removeprefix("torch."),
        "options": dict(options),
        "device": f"{weight.device.type} {device} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "runner": "none" if options.get("runner") == "plain" else _runner(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "selfdraft": version("selfdraft"),
        "code": _code(),
    }


def hash_of(model: PreTrainedModel) -> str:
    """A name for this very model: its configuration, the code and tree of its modules, and samples of all weights."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    tree = [f"{name} {type(module).__module__}.{type(module).__qualname__}" for name, module in model.named_modules()]
    attention = str(getattr(model.config, "_attn_implementation", None))
    texts = [json.dumps(config, sort_keys=True, default=str), *tree, attention, _source(type(model))]
    weights = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return _hash(*(text.encode() for text in texts), *_tensors(weights))


def _named(adapter: MaskAdapter) -> list[tuple[str, Tensor]]:
    parts = [(adapter.method, adapter.embeddings)]
    for path, pair in adapter.layers.items():
        parts += [(path, part) for part in pair]
    return parts + [("link", part) for part in adapter.link or ()]


def _tensors(named: Iterable[tuple[str, Tensor]]) -> Iterable[bytes]:
    """For each tensor its name, type and shape, and some of its numbers."""
    for name, tensor in named:
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        try:
            flat = tensor.detach().reshape(-1)
            some = torch.cat([flat[:64], flat[:: max(1, flat.numel() // SAMPLES)], flat[-64:]])
            yield some.cpu().contiguous().view(torch.uint8).numpy().tobytes() if some.numel() else b""
        except (RuntimeError, TypeError, NotImplementedError):  # a tensor of another library's own kind
            yield type(tensor).__name__.encode()


def _source(kind: type) -> str:
    """A checkpoint's own code is no part of a version."""
    try:
        return inspect.getsource(inspect.getmodule(kind) or kind)
    except (OSError, TypeError):
        return ""


def _code() -> str:
    """Changes with the source of the room `models`: what proves and what is proved."""
    return _hash(*(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py"))))


def _runner() -> str:
    try:
        return kernel_build.fingerprint()
    except RunnerUnavailable as error:
        return str(error)


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
