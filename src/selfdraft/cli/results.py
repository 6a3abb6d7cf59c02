"""The verb `results`: a page of tables out of the rows of benches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from selfdraft.cli import terminal
from selfdraft.errors import RequestError


def results(
    rows: Annotated[list[Path], typer.Argument(help="Files that 'bench --output' wrote; .gz works too.")],
    output: Annotated[Path, typer.Option(help="The markdown page to write.")] = Path("results.md"),
    pictures: Annotated[Path | None, typer.Option(help="A folder for one picture (PNG) of each table.")] = None,
) -> None:
    """Write a page of tables from the rows of one or more benches.

    Rows under different conditions (model, dtype, machine, versions) come into different tables; nothing is measured.
    """
    from selfdraft.bench import heatmap
    from selfdraft.bench.charts import need_matplotlib
    from selfdraft.bench.results import page, read_rows, sheets_of

    if pictures is not None:
        need_matplotlib()
    sections = sheets_of(read_rows(rows))
    links: dict[int, str] = {}
    try:
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            for number, sheet in enumerate(sheet for sheets in sections for sheet in sheets):
                path = heatmap.draw(sheet, pictures / f"{output.stem}-{number + 1}.png")
                links[number] = os.path.relpath(path, output.parent)
                terminal.note(f"wrote {path}")
        output.write_text(page(sections, links) + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{error.filename or output} cannot be written: {error.strerror}") from error
    terminal.note(f"wrote {output}")
