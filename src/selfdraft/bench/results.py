"""A page of results out of kept rows: one section for each set of conditions, one table for each temperature."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path

from selfdraft.bench import beside_bf16, papers
from selfdraft.bench.report import cores_of, scores_of
from selfdraft.bench.rows import HEAD, Row, key_of, row_of
from selfdraft.bench.sheets import Sheet, ratio, speedup, tokens_per_pass
from selfdraft.errors import RequestError
from selfdraft.types import JsonObject

VARIED = ("temperature", "top_p")
"""Conditions that part tables, not sections."""
SCORED = "Scores of the plain texts, in brackets how many of them were cut at the limit of tokens"


def read_rows(paths: SequenceOf[Path]) -> list[Row]:
    """The rows of files that `bench --output` wrote, also gzipped; a torn last line is left out.

    Errors: RequestError for a file that cannot be read or holds something else.
    """
    rows: dict[tuple[str, str, str, str], Row] = {}
    for path in paths:
        try:
            with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
                lines = file.read().splitlines(keepends=True)
        except (OSError, EOFError) as error:
            raise RequestError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            if not line.startswith(HEAD.encode()):
                raise RequestError(f"{path}:{number}: not written by this version of selfdraft bench --output")
            try:
                row = row_of(line)
            except ValueError as error:
                raise RequestError(f"{path}:{number}: broken row: {error}; take the line out") from error
            rows[key_of(row)] = row
    if not rows:
        raise RequestError(f"no rows in {', '.join(map(str, paths))}")
    return [*rows.values()]


def sheets_of(rows: SequenceOf[Row]) -> list[list[Sheet]]:
    """Sections of sheets: rows whose conditions agree but for the temperature share a section.

    Errors: RequestError when a prompt was measured twice with a drafter under the same conditions but with other
    options, seed or number of runs: the table could only show one of them.
    """
    sections: dict[str, dict[str, list[Row]]] = {}
    seen: dict[tuple[str, ...], str] = {}
    for row in rows:
        facts = row["conditions"]
        common = json.dumps({name: value for name, value in facts.items() if name not in VARIED}, sort_keys=True)
        own = json.dumps([facts[name] for name in VARIED])
        task, key, label, fingerprint = key_of(row)
        if seen.setdefault((common, own, task, key, label), fingerprint) != fingerprint:
            raise RequestError(
                f"{task}, {key}, {label}: measured twice under the same conditions, with other options, seed or "
                "number of runs; give such rows to calls of their own"
            )
        sections.setdefault(common, {}).setdefault(own, []).append(row)
    return [[Sheet(part[0]["conditions"], part) for part in parts.values()] for parts in sections.values()]


def page(sections: SequenceOf[SequenceOf[Sheet]], pictures: Mapping[int, str]) -> str:
    """The page as markdown; `pictures` are links by number of the sheet, counted through all sections."""
    lines = ["# Results", "", "Made by `selfdraft results` from kept rows; docs/bench.md says what is measured.", ""]
    lines += beside_bf16.table([_greedy(sheets) for sheets in sections])
    number = 0
    for sheets in sections:
        facts = sheets[0].conditions
        lines += [f"## {Path(str(facts['model'])).name}, {facts['dtype']}, weights {str(facts['weights'])[:8]}", ""]
        lines += [_conditions(facts), ""]
        for sheet in sheets:
            lines += [*_table(sheet), ""]
            if number in pictures:
                lines += [f"![Speed-up by drafter and task]({pictures[number]})", ""]
            number += 1
        lines += papers.table(_greedy(sheets))
    return "\n".join(lines)


def _greedy(sheets: SequenceOf[Sheet]) -> Sheet:
    """The greedy sheet of a section, or its first one."""
    return next((sheet for sheet in sheets if sheet.conditions["temperature"] == 0), sheets[0])


def _conditions(facts: JsonObject) -> str:
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts["machine"].items() if value)
    chat = "chat template" if facts["chat"] else "prompts continued"
    return (
        f"Exactness {facts['exactness']['level']}, runner {facts['runner']}, {chat}, at most {facts['max_new_tokens']} "
        f"new tokens, batch {facts['batch']}, selfdraft {facts['selfdraft']}; {machine}."
    )


def _table(sheet: Sheet) -> list[str]:
    temperature = sheet.conditions["temperature"]
    heading = "Greedy" if temperature == 0 else f"Temperature {temperature:g}, top-p {sheet.conditions['top_p']:g}"
    plain, *others = sheet.labels
    columns = [*sheet.columns, None]
    load = max(row["load_average"] for row in sheet.rows)
    cores = cores_of(sheet.rows)
    lines = [
        f"### {heading}",
        "",
        f"Tokens per second against plain decoding in the same process, in brackets tokens "
        f"per pass. Load average up to {load:.1f}{'; cores ' + ', '.join(cores) if cores else ''}.",
        "",
    ]
    lines.append("| | " + " | ".join(column or "all" for column in columns) + " | texts equal |")
    lines.append("|---|" + "---:|" * len(columns) + "---|")
    counts = [str(len(sheet.of(plain, column))) for column in columns]
    lines.append(f"| prompts | {' | '.join(counts)} | |")
    speeds = [f"{ratio(rows, 'tokens'):.1f}" if (rows := sheet.of(plain, column)) else "" for column in columns]
    lines.append(f"| plain, tokens/s | {' | '.join(speeds)} | |")
    for label in others:
        cells = [_cell(sheet.of(label, column), len(sheet.of(plain, column))) for column in columns]
        lines.append(f"| {label} | {' | '.join(cells)} | {_equal(sheet.of(label))} |")
    lines += _engines(sheet)
    said = [told for column in sheet.columns if (told := _scored(column, sheet.of(plain, column)))]
    return [*lines, *(["", f"{SCORED}: {'; '.join(said)}."] if said else [])]


def _scored(column: str, rows: SequenceOf[JsonObject]) -> str:
    """The scores of a column's answers, and how many of them were cut; nothing where there are none."""
    found = scores_of(rows)
    cut = sum(row["finish_reason"] == "length" for row in rows)
    figures = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    limit = f" ({cut} of {len(rows)})" if cut else ""
    return f"{column} {figures}{limit}" if found else ""


def _engines(sheet: Sheet) -> list[str]:
    """One line that says which packages the other engines are, and over which file of their own they ran."""
    names: dict[str, list[str]] = {}
    for row in sheet.rows:
        if row.get("peer"):
            file = f", over {row['peer_file']['name']}" if row.get("peer_file") else ""
            names.setdefault(f"{row['peer']}{file}", []).append(row["drafter"])
    said = [f"{what} ({', '.join(dict.fromkeys(labels))})" for what, labels in names.items()]
    return ["", "Other engines: " + "; ".join(said) + "."] if said else []


def _cell(rows: SequenceOf[Row], prompts: int) -> str:
    if not rows:
        return "-"
    faster = speedup(rows)
    said = "texts differ" if faster is None else f"{faster:.2f}x"
    if rows[0].get("peer") is None and (passes := tokens_per_pass(rows)) is not None:
        said += f" ({passes:.2f})"
    return said + (f", {len(rows)} of {prompts}" if len(rows) < prompts else "")


def _equal(rows: SequenceOf[Row]) -> str:
    uncompared = any(row["texts_equal"] is None for row in rows)
    if uncompared and rows[0]["conditions"]["temperature"] > 0:
        return f"other {'weights and ' if rows[0]['peer_file'] else ''}random numbers"
    if uncompared:  # over a file of its own, with other weights
        own = [row["texts_equal_own_plain"] for row in rows if "texts_equal_own_plain" in row]
        return "other weights" + (f"; as its own plain text: {sum(own)} of {len(own)}" if own else "")
    equal = sum(bool(row["texts_equal"]) for row in rows)
    if rows and rows[0].get("peer") and equal < len(rows):  # another engine rounds otherwise
        said = sum(row["tokens"] if (first := row["first_difference"]) is None else first for row in rows)
        return f"{equal} of {len(rows)}; {100 * said / sum(row['tokens'] for row in rows):.0f} % of the tokens"
    return f"yes, {equal}" if equal == len(rows) else f"NO: {equal} of {len(rows)}"
