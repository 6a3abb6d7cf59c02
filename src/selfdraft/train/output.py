"""The folder that training leaves: all of it or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError

from selfdraft.errors import OptionError
from selfdraft.models.adapters import CARD, CHECKPOINT
from selfdraft.models.identity import base_hash
from selfdraft.models.reference import Model, Tokenizer
from selfdraft.train.settings import Settings
from selfdraft.train.student import Student

MODEL = "model"
"""Folder of the tuned model inside the output."""
PART = "unfinished"
"""Folder in which results are written before they are moved to their places."""


def finished(folder: Path) -> dict[str, object] | None:
    """The card of a finished run in `folder`, or None. Errors: OptionError when it cannot be read."""
    path = folder / CARD
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.exists() else None
    except (OSError, ValueError, TypeError) as error:
        raise OptionError(f"{path} cannot be read: {error}; choose another --output") from error


def check_output(folder: Path) -> None:
    """Said before hours of training, and before anything is made: can results be written there? Errors: OptionError."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(there):
        raise OptionError(f"the output {folder} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OptionError(f"the output {folder} cannot be made: {there} is not writable")


def make_output(folder: Path) -> None:
    """The folder itself. Errors: OptionError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"the output {folder} cannot be made: {error.strerror}") from error


def tidy(folder: Path) -> None:
    """Remove what only an unfinished training needs."""
    shutil.rmtree(folder / PART, ignore_errors=True)
    (folder / CHECKPOINT).unlink(missing_ok=True)


def _readable(folder: Path) -> None:
    """Files as readable as any others that are made here: safetensors writes for its owner alone."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def write_model(folder: Path, model: Model, tokenizer: Tokenizer | None) -> None:
    """The tuned model into `folder`/MODEL, whole or not at all. Errors: OptionError."""
    part = folder / PART
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        _readable(part)
        shutil.rmtree(folder / MODEL, ignore_errors=True)
        os.replace(part, folder / MODEL)
    except (OSError, SafetensorError) as error:
        raise OptionError(f"the model cannot be written into {folder}: {error}; the checkpoint stays") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_adapter(
    folder: Path, student: Student, model: Model, settings: Settings, facts: Mapping[str, object]
) -> None:
    """Adapter, mask embeddings and card into `folder`; the card goes last, so without it a folder is unfinished.

    Errors: OptionError when they cannot be written; then nothing half-written is left.
    """
    part = folder / PART
    shutil.rmtree(part, ignore_errors=True)
    card = {"method": settings.recipe, "model": base_hash(model), "settings": settings.as_dict(), **facts}
    try:
        part.mkdir(parents=True)
        student.save(part)
        _readable(part)
        (part / CARD).write_text(json.dumps(card, indent=1) + "\n", "utf-8")
        for path in sorted(part.iterdir(), key=lambda path: path.name == CARD):
            os.replace(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        raise OptionError(f"the adapter cannot be written into {folder}: {error}; the checkpoint stays") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
