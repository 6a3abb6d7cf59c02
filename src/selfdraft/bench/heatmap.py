"""The picture of a table of results: speed-up by drafter and task."""

from __future__ import annotations

import math
from pathlib import Path

from selfdraft.bench.sheets import Sheet, speedup
from selfdraft.types import JsonObject


def draw(sheet: Sheet, path: Path) -> Path:
    """Write the picture: blue is faster than plain decoding, red slower. Errors: OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels, columns = sheet.labels[1:], [*sheet.columns, None]
    ratios = [[speedup(sheet.of(label, column)) for column in columns] for label in labels]
    wide, high = 2.4 + 0.85 * len(columns), 2.2 + 0.34 * len(labels)
    figure = Figure(figsize=(wide, high), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shades = [[math.log2(ratio) if ratio else 0.0 for ratio in line] for line in ratios]
    axes.imshow(shades, cmap="RdBu", vmin=-1.6, vmax=1.6, aspect="auto")
    for y, line in enumerate(ratios):
        for x, ratio in enumerate(line):
            dark = ratio is not None and abs(math.log2(ratio)) > 1.1
            said = f"{ratio:.2f}" if ratio else "-"
            axes.text(x, y, said, ha="center", va="center", fontsize=8, color="white" if dark else "#222222")
    names = [(column or "all").replace("/", "/\n") for column in columns]
    axes.set_xticks(range(len(columns)), names, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(title_of(sheet.conditions), fontsize=9)
    figure.savefig(path, format="png")
    return path


def title_of(facts: JsonObject) -> str:
    """What was measured, and under it where: pictures of one page differ in little else."""
    kind = "greedy" if facts["temperature"] == 0 else f"temperature {facts['temperature']:g}"
    machine = facts["machine"]
    unit = machine.get("kernels") or machine.get("cpu_capability") or machine.get("processor")
    where = machine.get("gpu") or f"{machine['threads']} threads, {unit}"
    return (
        f"{Path(str(facts['model'])).name}, {facts['dtype']}, {kind}, at most {facts['max_new_tokens']} tokens\n"
        f"tokens/s, plain = 1 ({where})"
    )
