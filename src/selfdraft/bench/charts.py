"""Pictures of a bench: speed-up, acceptance by position, where the time goes, why drafts were rejected, other engines.

And one of a replay: predicted against actual acceptance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

from selfdraft.errors import OptionError, RequestError
from selfdraft.files.atomic import whole_file
from selfdraft.types import JsonObject

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from selfdraft.replay.reliability import Reliability
    from selfdraft.tune.lookahead import Point

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31", "#6A4C93")
"""Okabe and Ito's colours, told apart by the colour-blind too, and two more."""
PARTS = {"prefill": "#B8C4CE", "target": "#0072B2", "drafting": "#E69F00", "rest": "#7F7F7F"}
MEANINGS = {
    "prefill": "prompt (prefill)",
    "target": "forward passes of the target",
    "drafting": "drafting",
    "rest": "host (rows, walk, text)",
}
OTHERS = "#B8C4CE"
INK, FAINT = "#222222", "#6B6B6B"
WIDE = 3
"""Panels beside one another."""


def need_matplotlib(option: str = "--pictures") -> None:
    """Errors: OptionError when matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError(f"{option} needs matplotlib, which is missing: pip install 'selfdraft[bench]'") from error


def draw(records: SequenceOf[JsonObject], folder: Path) -> list[Path]:
    """Write speedup.png, acceptance.png and time.png, and return their paths.

    With peers also peers.png, and rejections.png where rejections were explained. Errors: RequestError.
    """
    own = [record for record in records if record.get("peer") is None]
    made = {"speedup.png": speedup(own), "acceptance.png": acceptance(own), "time.png": time_split(own)}
    if len(own) < len(records):
        made["peers.png"] = peers(records)
    if any(record.get("rejections") for record in own):
        made["rejections.png"] = rejections(own)
    return [_save(figure, folder / name) for name, figure in made.items()]


def speedup(records: SequenceOf[JsonObject]) -> Figure:
    """Bars of tokens per second against plain decoding, by task and drafter; the whiskers are single prompts."""
    tasks, labels = _names(records, "task"), _drafters(records)
    rows = len(tasks) * (len(labels) + 1)
    figure, (axes,) = _canvas(1, 9.0, 1.9 + 0.27 * rows, "Speed-up over plain decoding, texts equal")
    best = 1.0
    for number, label in enumerate(labels):
        for place, task in enumerate(tasks):
            record = _one(records, task, label)
            if record is None:
                continue
            y = place * (len(labels) + 1) + number
            ratio = record["speedup_vs_plain"]
            if ratio is None:
                axes.text(0.02, y, "texts differ", va="center", color="#B00020", fontsize=8)
                continue
            low, high = record["speedup_lowest"], record["speedup_highest"]
            axes.barh(y, ratio, 0.84, color=_colour(labels, label), label=label if place == 0 else None)
            axes.plot([low, high], [y, y], color=INK, linewidth=0.9, solid_capstyle="butt")
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # the line at 1 must not cross the figure
            axes.text(max(ratio, high) + 0.03, y, f"{ratio:.2f}x", va="center", color=INK, fontsize=8, bbox=box)
            best = max(best, ratio, high)
    axes.axvline(1.0, color=INK, linewidth=1.0)
    axes.set_yticks([place * (len(labels) + 1) + (len(labels) - 1) / 2 for place in range(len(tasks))], tasks)
    axes.set_ylim(rows - 1.2, -0.8)
    axes.set_xlim(0, best * 1.12)
    axes.set_xlabel(
        "tokens per second, plain decoding = 1   (bar: all prompts; line: slowest to fastest single prompt)"
    )
    axes.grid(axis="x", color="#E3E3E3", linewidth=0.7)
    _legend(figure, [axes])
    _foot(figure, records)
    return figure


def acceptance(records: SequenceOf[JsonObject]) -> Figure:
    """Share of drafted steps in which a path was accepted down to a position; one panel for each task."""
    from matplotlib.ticker import MaxNLocator

    tasks, labels = _names(records, "task"), _drafters(records)
    rows = -(-len(tasks) // WIDE)
    title = "Acceptance by position in the draft"
    figure, panels = _canvas(len(tasks), 10.0, 1.9 + 2.3 * rows, title)
    deepest = max((len(record["acceptance_by_position"]) for record in records), default=1)
    for axes, task in zip(panels, tasks, strict=False):
        for number, label in enumerate(labels):
            record = _one(records, task, label)
            shares = record["acceptance_by_position"] if record is not None else []
            marker = "osD^vPX*"[number % 8]
            places = range(1, len(shares) + 1)
            style: JsonObject = {
                "color": _colour(labels, label),
                "marker": marker,
                "markersize": 3.5,
                "linewidth": 1.4,
            }
            axes.plot(places, shares, label=label, clip_on=False, **style)
        if not any(record["acceptance_by_position"] for record in records if record["task"] == task):
            axes.text(
                0.5, 0.5, "no draft token accepted", transform=axes.transAxes, ha="center", color=FAINT, fontsize=9
            )
        axes.set_title(task, fontsize=10, color=INK)
        axes.set_ylim(0, 1)
        axes.set_xlim(0.6, max(deepest, 2) + 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#E3E3E3", linewidth=0.7)
    for number, axes in enumerate(panels):
        if number % WIDE == 0:
            axes.set_ylabel("share of drafted steps")
        if number + WIDE >= len(panels):
            axes.set_xlabel("position in the draft")
    _legend(figure, panels)
    _foot(figure, records)
    return figure


def time_split(records: SequenceOf[JsonObject]) -> Figure:
    """Bars of the time of an answer by what it went into, by task and drafter, plain decoding too."""
    tasks, labels = _names(records, "task"), _names(records, "drafter")
    rows = len(tasks) * (len(labels) + 1.6)
    figure, (axes,) = _canvas(1, 9.0, 1.9 + 0.24 * rows, "Where the time of an answer goes")
    ticks: dict[float, str] = {}
    for place, task in enumerate(tasks):
        top = place * (len(labels) + 1.6)
        axes.text(0, top - 0.9, task, color=INK, fontsize=9, fontweight="bold", va="center")
        for number, label in enumerate(labels):
            record = _one(records, task, label)
            if record is None:
                continue
            y, left = top + number, 0.0
            ticks[y] = label
            for part, colour in PARTS.items():
                share = 100 * record["time_split"][part]
                axes.barh(y, share, 0.82, left=left, color=colour, label=MEANINGS[part] if not place + number else None)
                if share >= 6:
                    ink = INK if part in ("prefill", "drafting") else "white"
                    axes.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=7.5)
                left += share
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(max(ticks) + 0.8, -1.4)
    axes.set_xlim(0, 100)
    axes.set_xlabel("per cent of the time of all answers")
    _legend(figure, [axes])
    _foot(figure, records)
    return figure


def rejections(records: SequenceOf[JsonObject]) -> Figure:
    """Bars of all tokens by what became of them: accepted, rejected by kind, not drafted; by task and drafter."""
    told = [record for record in records if record.get("rejections")]
    tasks = _names(told, "task")
    rows = len(told) + 1.6 * len(tasks)
    figure, (axes,) = _canvas(1, 10.0, 1.9 + 0.3 * rows, "What became of the tokens, and why drafts were rejected")
    ticks: dict[float, str] = {}
    top = 0.0
    for task in tasks:
        found = [record for record in told if record["task"] == task]
        axes.text(0, top - 0.9, task, color=INK, fontsize=9, fontweight="bold", va="center")
        for y, record in enumerate(found, int(top)):
            _fates(axes, y, record["rejections"])
            ticks[y] = record["drafter"]
        top += len(found) + 2
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(max(ticks) + 0.8, -1.4)
    axes.set_xlim(0, 100)
    axes.set_xlabel("per cent of all tokens   (not drafted: the place had no candidate)")
    _legend(figure, [axes])
    _foot(figure, records)
    return figure


def _fates(axes: Axes, y: float, found: JsonObject) -> None:
    """One bar: accepted, the kinds of rejections, not drafted. The first bar of an axes names the colours."""
    kinds = {kind: one["count"] for kind, one in found["kinds"].items()}
    counts = {"accepted": found["accepted"]["count"], **kinds, "not drafted": sum(found["undrafted"].values())}
    colours = [PALETTE[0], *PALETTE[1 : 1 + len(kinds)], OTHERS]
    first, left = not axes.patches, 0.0
    for (what, count), colour in zip(counts.items(), colours, strict=True):
        share = 100 * count / max(found["tokens"], 1)
        axes.barh(y, share, 0.82, left=left, color=colour, label=what if first else None)
        if share >= 4:
            ink = "white" if what == "accepted" else INK
            axes.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=7.5)
        left += share


def peers(records: SequenceOf[JsonObject]) -> Figure:
    """Bars of tokens per second by task: plain decoding, our drafters, and other engines."""
    tasks, labels = _names(records, "task"), _names(records, "drafter")
    plain, *drafters = _names([record for record in records if record.get("peer") is None], "drafter")
    rows = len(records) + 2 * len(tasks)
    figure, (axes,) = _canvas(1, 9.0, 1.9 + 0.24 * rows, "Tokens per second, other engines beside ours")
    ticks: dict[float, str] = {}
    top = 0
    best = max(record["tokens_per_second"] for record in records)
    for task in tasks:
        found = [record for label in labels if (record := _one(records, task, label)) is not None]
        axes.text(0, top - 0.9, task, color=INK, fontsize=9, fontweight="bold", va="center")
        for y, record in enumerate(found, top):
            speed, label, ratio = record["tokens_per_second"], record["drafter"], record["speedup_vs_plain"]
            colour, kind = OTHERS, "other engines"
            if label == plain:
                colour, kind = INK, "selfdraft, plain"
            elif label in drafters:
                colour, kind = PALETTE[0], "selfdraft, drafted"
            axes.barh(y, speed, 0.82, color=colour, label=kind)
            said = f"{speed:.0f}" + ("" if label == plain else f"   {ratio:.2f}x" if ratio else "   texts differ")
            said += f"   {record['peer']}" if record.get("peer") else ""
            axes.text(speed + best * 0.01, y, said, va="center", color=INK, fontsize=7.5)
            ticks[y] = label
        top += len(found) + 2
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(max(ticks) + 0.8, -1.4)
    axes.set_xlim(0, best * 1.4)  # the figures stand right of the bars
    axes.set_xlabel("tokens per second   (x: against our plain decoding; the same number of tokens everywhere)")
    axes.grid(axis="x", color="#E3E3E3", linewidth=0.7)
    _legend(figure, [axes])
    _foot(figure, records)
    return figure


def draw_reliability(found: Reliability, path: Path, conditions: str) -> None:
    """Predicted chance of a node against the share of such nodes that were accepted. Errors: RequestError."""
    _save(reliability(found, conditions), path)


def reliability(found: Reliability, conditions: str) -> Figure:
    """One dot for each class of predicted chances: all of them, and the small ones on logarithmic axes."""
    figure, panels = _canvas(2, 9.0, 5.2, "Predicted against actual acceptance")
    figure.subplots_adjust(wspace=0.24)
    said = [one for one in found.bins if one.nodes]
    points = [(one.predicted / one.nodes, one.accepted / one.nodes, one.nodes) for one in said]
    for axes, scale in zip(panels, ("linear", "log"), strict=True):
        shown = [point for point in points if scale == "linear" or point[1] > 0]
        low = 0.0 if scale == "linear" else 0.8 * min((min(x, y) for x, y, _ in shown), default=0.001)
        axes.plot([low, 1], [low, 1], color=OTHERS, linewidth=1.2, label="predicted = actual")
        style: JsonObject = {"color": PALETTE[0], "fmt": "o", "markersize": 4.5, "elinewidth": 1.0}
        spread = [1.96 * (y * (1 - y) / nodes) ** 0.5 for _, y, nodes in shown]
        down = [min(width, y - low) for width, (_, y, _) in zip(spread, shown, strict=True)]
        across, up = [x for x, _, _ in shown], [y for _, y, _ in shown]
        axes.errorbar(across, up, yerr=[down, spread], label="nodes of about this chance; bar: 95 %", **style)
        axes.set_xscale(scale)
        axes.set_yscale(scale)
        axes.set_xlim(low, 1)
        axes.set_ylim(low, 1)
        axes.set_xlabel("predicted chance of the path to a node")
        axes.grid(color="#E3E3E3", linewidth=0.7)
    panels[0].set_ylabel("share that was accepted")
    _legend(figure, panels)
    height = figure.get_size_inches()[1]
    ratio = f"{found.predicted:,.0f} accepted tokens predicted, {found.accepted:,} actual"
    ratio += f" ({100 * (found.ratio - 1):+.1f} %)" if found.ratio is not None else ""
    ratio += f"; {found.nodes:,} nodes behind the first {found.behind:,} of {found.tokens:,} tokens"
    for line, place in ((conditions, 0.34), (ratio, 0.16)):
        figure.text(0.02, place / height, line, fontsize=7.5, color=FAINT, va="center")
    return figure


def _canvas(panels: int, width: float, height: float, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, WIDE in a row, without matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    rows, columns = -(-panels // WIDE), min(panels, WIDE)
    made = [figure.add_subplot(rows, columns, number + 1) for number in range(panels)]
    for axes in made:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=8.5, length=2.5)
        axes.set_axisbelow(True)
    # inches kept for title and legend above, and for axis title and conditions below
    figure.subplots_adjust(
        left=0.22 if panels == 1 else 0.07,
        right=0.97,
        top=1 - (0.95 if panels == 1 else 1.15) / height,
        bottom=1.0 / height,
        hspace=0.42,
        wspace=0.18,
    )
    figure.text(0.02, 1 - 0.3 / height, title, fontsize=13, fontweight="bold", color=INK, va="center")
    return figure, made


def _legend(figure: Figure, panels: SequenceOf[Axes]) -> None:
    """What the colours mean, in one line under the title."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(str(label), handle)
    height = figure.get_size_inches()[1]
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="center left",
            bbox_to_anchor=(0.012, 1 - 0.62 / height),
            ncols=len(handles),
            frameon=False,
            fontsize=9,
            handlelength=1.4,
            columnspacing=1.5,
        )


def _foot(figure: Figure, records: SequenceOf[JsonObject]) -> None:
    """The conditions, in two faint lines at the bottom."""
    facts = records[0]["conditions"]
    machine = facts["machine"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    device = machine["gpu"] or f"{machine['processor']} {machine['cpu_capability']}, {threads}"
    decoding = "greedy" if facts["temperature"] == 0 else f"temperature {facts['temperature']:g}"
    first = f"{Path(facts['model']).name}, {facts['dtype']}, {facts['exactness']['level']} exactness, {decoding}, "
    first += f"at most {facts['max_new_tokens']} new tokens, batch {facts['batch']}; "
    first += f"{max(record['prompts'] for record in records)} prompts at most in a task"
    second = f"{device}, torch {machine['torch']}, transformers {machine['transformers']}, "
    second += f"selfdraft {facts['selfdraft']}, load average up to {max(r['load_average_max'] for r in records):.1f}"
    height = figure.get_size_inches()[1]
    for line, place in ((first, 0.34), (second, 0.16)):
        figure.text(0.02, place / height, line, fontsize=7.5, color=FAINT, va="center")


def _save(figure: Figure, path: Path) -> Path:
    try:
        with whole_file(path) as part:
            figure.savefig(part, format="png")
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _names(records: SequenceOf[JsonObject], field: str) -> list[str]:
    return list(dict.fromkeys(record[field] for record in records))


def _drafters(records: SequenceOf[JsonObject]) -> list[str]:
    """Labels of the drafters; plain decoding comes first in the records, and is the yardstick."""
    return [label for label in _names(records, "drafter") if label != records[0]["drafter"]]


def _one(records: SequenceOf[JsonObject], task: str, drafter: str) -> JsonObject | None:
    return next((r for r in records if (r["task"], r["drafter"]) == (task, drafter)), None)


def _colour(labels: SequenceOf[str], label: str) -> str:
    return PALETTE[labels.index(label) % len(PALETTE)]


def draw_load(records: SequenceOf[JsonObject], path: Path, foot: SequenceOf[str]) -> None:
    """Tokens per second, and the times to the first and for each further token, by load. Errors: RequestError."""
    _save(load(records, foot), path)


LOAD: dict[str, Callable[[JsonObject], tuple[float | None, float | None]]] = {
    "tokens per second": lambda record: (record["tokens_per_second"], None),
    "time to first token, ms": lambda record: (record["ttft_ms"]["p50"], record["ttft_ms"]["p95"]),
    "time per output token, ms": lambda record: (record["tpot_ms"]["p50"], record["tpot_ms"]["p95"]),
}
"""Panels of the picture of a load: (the line, the faint line above it)."""


def load(records: SequenceOf[JsonObject], foot: SequenceOf[str]) -> Figure:
    """Three panels over the load, one line for each server; the faint lines are the 95th percentiles."""
    by = "rate" if records[0]["rate"] is not None else "concurrency"
    figure, panels = _canvas(len(LOAD), 10.0, 4.4, "Under load (times: line median, dotted 95th percentile)")
    labels = _names(records, "server")
    for axes, (title, figures_of) in zip(panels, LOAD.items(), strict=True):
        for number, label in enumerate(labels):
            found = sorted((one for one in records if one["server"] == label), key=lambda one: float(one[by]))
            style: JsonObject = {"color": _colour(labels, label), "marker": "osD^vPX*"[number % 8], "markersize": 4}
            places = [float(one[by]) for one in found]
            middle, upper = zip(*(figures_of(one) for one in found), strict=True)
            axes.plot(places, [_height(one) for one in middle], label=label, linewidth=1.5, **style)
            if any(one is not None for one in upper):
                axes.plot(places, [_height(one) for one in upper], linewidth=0.9, linestyle=":", alpha=0.7, **style)
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests per second" if by == "rate" else "requests at a time")
        axes.set_xticks(sorted({float(one[by]) for one in records}))
        axes.grid(color="#E3E3E3", linewidth=0.7)
    _legend(figure, panels)
    height = figure.get_size_inches()[1]
    for line, place in zip(foot, (0.34, 0.16), strict=False):
        figure.text(0.02, place / height, line, fontsize=7.5, color=FAINT, va="center")
    return figure


def steps_by_rows(records: SequenceOf[JsonObject], path: Path) -> None:
    """Tokens per step by the width of the window and by the rows of the busiest rank. Errors: RequestError.

    `records` are those of `recipes/ranks.py steps`: ranks, window, tokens_per_step, rows_of_a_rank, model, prompts.
    """
    figure, panels = _canvas(2, 10.0, 4.4, "Lookahead parallelism: tokens a step")
    labels = [str(ranks) for ranks in sorted({record["ranks"] for record in records})]
    for number, label in enumerate(labels):
        found = sorted((one for one in records if str(one["ranks"]) == label), key=lambda one: int(one["window"]))
        style: JsonObject = {"color": _colour(labels, label), "marker": "osD^vPX*"[number % 8], "markersize": 5}
        style |= {"label": f"{label} rank{'s' if label != '1' else ''}", "linewidth": 1.5, "alpha": 0.85}
        speeds = [one["tokens_per_step"] for one in found]
        panels[0].plot([one["window"] for one in found], speeds, **style)
        panels[1].plot([max(one["rows_of_a_rank"]) for one in found], speeds, **style)
    for axes, words in zip(panels, ("columns W of the whole window", "rows of the busiest rank"), strict=True):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"{words} (logarithmic)")
        axes.grid(color="#E3E3E3", linewidth=0.7)
    panels[0].set_ylabel("tokens a step")
    _legend(figure, panels)
    first = records[0]
    foot = (
        f"{first['model']}, greedy, N = {first['ngram']}, G = W, {first['prompts']} prompts, {first['tokens']} tokens"
    )
    figure.text(0.02, 0.16 / figure.get_size_inches()[1], foot, fontsize=7.5, color=FAINT, va="center")
    _save(figure, path)


def _height(value: float | None) -> float:
    """A figure on an axis; a gap where there is none."""
    return float("nan") if value is None else value


ROWS_SHOWN = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200)
"""Numbers of rows that stand below a logarithmic axis, where they are in its range."""


def draw_scaling_law(laws: Mapping[str, SequenceOf[Point]], path: Path, foot: str) -> None:
    """Tokens per pass of lookahead over the rows of a pass, one panel for each key. Errors: RequestError."""
    _save(scaling_law(laws, foot), path)


def scaling_law(laws: Mapping[str, SequenceOf[Point]], foot: str) -> Figure:
    """Dots of fixed sizes, one colour for each N, with the line fitted to ln(rows) of all."""
    from selfdraft.tune.lookahead import fit_log

    figure, panels = _canvas(max(len(laws), 2), 10.0, 4.8, "Lookahead: tokens a pass by the rows of a pass")
    labels = sorted({f"N = {point.ngram_size}" for points in laws.values() for point in points})
    for axes, (title, points) in zip(panels, laws.items(), strict=False):
        for number, label in enumerate(labels):
            found = [point for point in points if f"N = {point.ngram_size}" == label]
            style: JsonObject = {"color": _colour(labels, label), "marker": "osD^vPX*"[number % 8], "markersize": 5}
            rows, heights = [one.rows_per_step for one in found], [one.tokens_per_pass for one in found]
            axes.plot(rows, heights, linestyle="", label=label, **style)
            for one in found:
                place = (one.rows_per_step, one.tokens_per_pass)
                axes.annotate(f"W {one.window_size}", place, (4, -9), textcoords="offset points", fontsize=6.5)
        line = fit_log(points)
        ends = [min(one.rows_per_step for one in points), max(one.rows_per_step for one in points)]
        said = f"{line.intercept:.2f} + {line.slope:.3f} ln(rows), r = {line.correlation:.2f}"
        axes.plot(ends, [line.intercept + line.slope * log(rows) for rows in ends], color=FAINT, linewidth=1.2)
        axes.set_title(f"{title}: {said}", fontsize=10, color=INK)
        axes.set_xscale("log")
        shown = [rows for rows in ROWS_SHOWN if ends[0] <= rows <= ends[1]]
        axes.set_xticks(shown, [str(rows) for rows in shown])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("rows of a pass")
        axes.grid(color="#E3E3E3", linewidth=0.7)
    panels[0].set_ylabel("tokens a pass")
    _legend(figure, panels)
    figure.text(0.02, 0.16 / figure.get_size_inches()[1], foot, fontsize=7.5, color=FAINT, va="center")
    return figure
