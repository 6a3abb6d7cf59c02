"""Where a training begins: fresh, or with the masks and the adapter of an earlier one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from selfdraft.errors import OptionError
from selfdraft.models.adapters import EMBEDDINGS, WEIGHTS, MaskAdapter, load_adapter, load_adapters
from selfdraft.models.reference import Model
from selfdraft.train.settings import Recipe
from selfdraft.train.student import Student

BUNDLED = "bundled"
"""Names an adapter that comes with selfdraft for the model."""


def digest_of(given: str) -> str:
    """What a card and a checkpoint say of the adapter that a training begins with: a hash, no path of this machine.

    Errors: OptionError when there is no such folder.
    """
    if given == BUNDLED:
        return given
    files = [Path(given).expanduser() / name for name in (EMBEDDINGS, WEIGHTS)]
    if not files[0].is_file():
        raise OptionError(f"start_from={given!r} is no folder that 'selfdraft train' has written, nor {BUNDLED!r}")
    parts = [path.read_bytes() for path in files if path.exists()]
    return hashlib.blake2b(b"".join(parts), digest_size=12).hexdigest()


def read_start(given: str, model: Model, recipe: Recipe) -> MaskAdapter:
    """The adapter itself; of those that come with selfdraft that of the same recipe, else the other one.

    Errors: OptionError when none comes with selfdraft; LoadError when it is of another model.
    """
    if given != BUNDLED:
        return load_adapter(given, model)
    found = load_adapters([], model)
    if not found:
        raise OptionError(f"start_from={given!r}: no adapter for this model comes with selfdraft; give a folder")
    return min(found, key=lambda adapter: adapter.method != recipe)


@torch.no_grad()
def begin_with(student: Student, adapter: MaskAdapter) -> None:
    """Give a fresh student the masks, the link and the layers of a trained adapter, as far as both have them.

    A mask guesses the same place in `space` and in `s3d`, so either recipe may begin with the other's. Errors:
    OptionError where ranks differ or no layer is in both.
    """
    _same_rank("link", student.link_down.shape[1], adapter.link[0].shape[1] if adapter.link is not None else 0)
    both = min(len(student.masks), len(adapter.embeddings))
    student.masks[:both] = adapter.embeddings[:both].to(student.masks)
    if adapter.link is not None:
        for own, given in zip((student.link_down, student.link_up), adapter.link, strict=True):
            own.copy_(given)
    peft = getattr(student.model, "peft_config", None)
    _same_rank("rank", peft["default"].r if peft else 0, _rank(adapter))
    if peft:
        _copy_layers(student, adapter)


def _rank(adapter: MaskAdapter) -> int:
    return next((down.shape[1] for down, _ in adapter.layers.values()), 0)


def _same_rank(name: str, own: int, given: int) -> None:
    if own != given:
        raise OptionError(f"{name}={own}, but the adapter to start from has {given}: give --{name} {given}")


def _copy_layers(student: Student, adapter: MaskAdapter) -> None:
    """The student's scale is 1, and the adapter's is in its second matrix."""
    stock = student.model.get_base_model()
    modules = {path: module for path, module in stock.named_modules() if hasattr(module, "lora_A")}
    shared = [path for path in modules if path in adapter.layers]
    if not shared:
        raise OptionError("the adapter to start from is on other layers: give the --modules that it was trained with")
    for path in shared:
        down, up = adapter.layers[path]
        modules[path].lora_A["default"].weight.copy_(down.T)
        modules[path].lora_B["default"].weight.copy_(up.T)
