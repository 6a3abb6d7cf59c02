"""Tables of two papers on a real model: what each part of lookahead and of SPACE brings, in tokens per pass.

    python recipes/paper_tables.py lookahead --data-dir DATA --record lookahead.jsonl --picture scaling-law.png
    python recipes/paper_tables.py space --data-dir DATA --record space.jsonl
    python recipes/paper_tables.py space --record space.jsonl --numbers       # the tables of what is there

Counts, no clock: they may be made beside other work. Every text is compared with that of plain decoding. Each line of
the record is one prompt decoded one way; what is there is not run again, so a run that was ended goes on, and records
of several processes can be put into one file. Tables are made of prompts that were decoded all ways; the pass that
reads a prompt, and says the first token, is counted.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from selfdraft import LLM, SamplingParams
from selfdraft.bench.charts import draw_scaling_law
from selfdraft.bench.tasks import load
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import EMPTY, Draft
from selfdraft.core.verify import Result
from selfdraft.drafters.space import Space
from selfdraft.engine.engine import Engine
from selfdraft.protocols import Target
from selfdraft.tune.lookahead import Point, Sizes, counted, fit_law, fit_log
from selfdraft.types import Budget

TASKS = ("mt-bench", "humaneval", "gsm8k")
TOKENS = 64
PLAIN = "plain"
FULL = (15, 5, 15)
LAW: tuple[Sizes, ...] = (
    (1, 3, 1), (5, 3, 5), (30, 3, 30), (7, 4, 7), (1, 5, 1), (3, 5, 3), (7, 5, 7), FULL, (5, 6, 5),
    (1, 7, 1), (3, 7, 3),
)  # fmt: skip
"""(W, N, G) of the scaling law: W from 1 to 30, N from 3, the smallest, to 7, and G = W as in the paper."""
Key = tuple[str, int, float, str]
"""Task, prompt, temperature, way."""
MASKS, BRANCHES = 5, 3
"""Masks of the adapter that comes with selfdraft, and branches by default."""


class Jacobi:
    """Jacobi decoding: a chain of guesses for the next tokens; each is answered, and the answers are guessed next."""

    def __init__(self, target: Target, *, num_speculative_tokens: int) -> None:
        self.most = num_speculative_tokens
        self.notes: WeakKeyDictionary[Sequence, list[int]] = WeakKeyDictionary()

    def draft(self, sequences: SequenceOf[Sequence], budgets: SequenceOf[Budget]) -> list[Draft]:
        return [self.one(sequence, budget) for sequence, budget in zip(sequences, budgets, strict=True)]

    def one(self, sequence: Sequence, budget: Budget) -> Draft:
        size = min(self.most, budget.max_depth, budget.max_nodes)
        chain = [*self.notes.get(sequence, []), *sequence.tokens[-self.most :]]
        return Draft.chain(chain[:size], "jacobi") if size > 0 else EMPTY

    def observe(self, sequences: SequenceOf[Sequence], results: SequenceOf[Result]) -> None:
        for sequence, result in zip(sequences, results, strict=True):
            self.notes[sequence] = [*result.argmax[len(result.tokens) :]]


class FewerMasks(Space):
    """SPACE with only the first masks of each group, where rows cost nothing."""

    def __init__(self, target: Target, *, masks: int, branches: int) -> None:
        super().__init__(target, branches=branches, min_probability=0.0)
        del self._held[masks:]


@dataclass(frozen=True)
class Way:
    """A row of a table: how its engine is made, and W, N and G where it is a point of the law."""

    engine: Callable[[LLM], Engine]
    sizes: Sizes | None = None
    greedy: bool = False
    """Whether it is run greedily alone, as in the paper."""


def fixed(sizes: Sizes, from_prompt: bool = True) -> Callable[[LLM], Engine]:
    options = Point(*sizes, 0, 0, 0, 0.0).options | {"pool_from_prompt": from_prompt}
    return lambda llm: llm.engine_for("lookahead", options)


def lookahead_ways() -> dict[str, Way]:
    """The rows of the ablation, then the other points of the law."""
    named = {
        PLAIN: Way(lambda llm: llm.engine_for("none")),
        "prompt lookup alone": Way(lambda llm: llm.engine_for("lookup")),
        "Jacobi, 15 guesses": Way(
            lambda llm: Engine(llm.target, Jacobi(llm.target, num_speculative_tokens=15)), greedy=True
        ),
        "1/5/15": Way(fixed((1, 5, 15)), greedy=True),
        "1/10/3": Way(fixed((1, 10, 3)), greedy=True),
        "30/5/1, prompt not in the pool": Way(fixed((30, 5, 1), False), greedy=True),
        "15/5/15, prompt not in the pool": Way(fixed(FULL, False)),
    }
    return named | {"/".join(map(str, sizes)): Way(fixed(sizes), sizes) for sizes in LAW}


def fewer(masks: int, branches: int) -> Callable[[LLM], Engine]:
    return lambda llm: Engine(llm.target, FewerMasks(llm.target, masks=masks, branches=branches))


def space_ways() -> dict[str, Way]:
    """One number of the two at a time, the other as it is by default."""
    pairs = [(masks, BRANCHES) for masks in range(1, MASKS + 1)] + [(MASKS, branches) for branches in (1, 2, 4)]
    ways = {f"masks {masks}, branches {branches}": Way(fewer(masks, branches)) for masks, branches in pairs}
    return {PLAIN: Way(lambda llm: llm.engine_for("none"))} | ways


WAYS = {"lookahead": lookahead_ways, "space": space_ways}


def ways_at(ways: Mapping[str, Way], temperature: float) -> dict[str, Way]:
    """Those that are run at a temperature."""
    return {name: way for name, way in ways.items() if temperature == 0 or not way.greedy}


def prompts_of(
    llm: LLM, folder: Path | None, count: int, numbers: SequenceOf[int]
) -> Iterator[tuple[str, int, list[int]]]:
    """(task, number, token ids) of the first turns of `numbers` out of `count` that are spread over each task."""
    items = {task: load(task, folder, chat=True, limit=None) for task in TASKS}
    for number in numbers:
        for task, found in items.items():
            item = found[number * (len(found) // count)]
            yield task, number, llm.render([{"role": "user", "content": item.turns[0]}])


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """Lines of a record by prompt, temperature and way; a last line that a kill has torn is cut off."""
    if not path.exists():
        return {}
    whole = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    rows = [json.loads(line) for line in whole.splitlines()]
    return {(row["task"], row["prompt"], row["temperature"], row["way"]): row for row in rows}


def run(given: argparse.Namespace, ways: Mapping[str, Way]) -> None:
    """Append to the record what it does not have. Errors: SystemExit where a text is not that of plain decoding."""
    known = read(given.record)
    if not given.numbers:
        return
    llm = LLM(given.model, drafter="none")
    for task, number, prompt in prompts_of(llm, given.data_dir, given.prompts, given.numbers):
        for temperature, (name, way) in product(given.temperatures, ways.items()):
            if name not in ways_at(ways, temperature):
                continue
            key = (task, number, temperature, name)
            if key in known:
                continue
            params = SamplingParams(max_tokens=TOKENS, temperature=temperature, seed=number)
            (request,) = llm.requests(prompt, params)
            tokens, steps, rows = counted(way.engine(llm), [request])
            row = dict(zip(("task", "prompt", "temperature", "way"), key, strict=True))
            row |= {"tokens": tokens, "steps": steps, "rows": rows}
            if name == PLAIN:
                row["text"] = request.output
            elif request.output != known[task, number, temperature, PLAIN]["text"]:
                raise SystemExit(f"{key}: the text differs from that of plain decoding")
            known[key] = row
            with given.record.open("a") as file:
                file.write(json.dumps(row) + "\n")


def complete(known: Mapping[Key, dict[str, Any]], ways: Mapping[str, Way]) -> dict[float, list[dict[str, Any]]]:
    """Rows by temperature, of the prompts that were decoded all ways."""
    found: dict[float, list[dict[str, Any]]] = {}
    for (*prompt, temperature, name), row in sorted(known.items(), key=lambda item: item[0]):
        wanted = ways_at(ways, temperature)
        if name in wanted and all((*prompt, temperature, one) in known for one in wanted):
            found.setdefault(temperature, []).append(row)
    return found


def point(lines: SequenceOf[dict[str, Any]], name: str, sizes: Sizes = (0, 0, 0)) -> Point:
    """All prompts of one way together."""
    found = [row for row in lines if row["way"] == name]
    tokens, steps, rows = (sum(row[what] for row in found) for what in ("tokens", "steps", "rows"))
    return Point(*sizes, tokens, steps, rows, 0.0)


def table(rows: SequenceOf[dict[str, Any]], ways: Mapping[str, Way]) -> Iterator[str]:
    """Lines of a table: tokens per pass / rows per pass, by way and task."""
    groups = {task: [row for row in rows if row["task"] == task] for task in TASKS} | {"all": list(rows)}
    heads = [f"{task}, {sum(row['way'] == PLAIN for row in found)} prompts" for task, found in groups.items()]
    yield f"| tokens per pass / rows | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    for name in ways:
        points = [point(found, name) for found in groups.values()]
        yield f"| {name} | {' | '.join(f'{one.tokens_per_pass:.2f} / {one.rows_per_step:.0f}' for one in points)} |"


def law(rows: SequenceOf[dict[str, Any]], ways: Mapping[str, Way]) -> tuple[list[Point], str]:
    """The points of the scaling law, and the line and the two numbers fitted to them."""
    points = [point(rows, name, way.sizes) for name, way in ways.items() if way.sizes is not None]
    line, fitted = fit_log(points), fit_law(points)
    return points, (
        f"tokens per pass = {line.intercept:.2f} + {line.slope:.3f} ln(rows), r = {line.correlation:.2f}; "
        f"the paper's law: a = {fitted.acceptance:.2f}, f = {fitted.period:.1f}, off by {fitted.error:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=WAYS)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--prompts", type=int, default=6, help="of each task")
    parser.add_argument("--numbers", type=int, nargs="*", help="these of them; none: what the record has")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--record", type=Path, required=True, help="jsonl; a run goes on where it ended")
    parser.add_argument("--picture", type=Path, help="of the scaling law")
    given = parser.parse_args()
    given.numbers = range(given.prompts) if given.numbers is None else given.numbers
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    ways = WAYS[given.table]()
    run(given, ways)
    show(given, ways)


def show(given: argparse.Namespace, ways: Mapping[str, Way]) -> None:
    """Print a table for each temperature, with the law where it is lookahead, and draw it."""
    laws: dict[str, list[Point]] = {}
    counts: list[str] = []
    for heat, rows in sorted(complete(read(given.record), ways).items()):
        print(f"\ntemperature {heat:g}\n")
        print("\n".join(table(rows, ways_at(ways, heat))))
        if given.table == "lookahead":
            laws["greedy" if heat == 0 else f"temperature {heat:g}"], said = law(rows, ways)
            counts.append(str(sum(row["way"] == PLAIN for row in rows)))
            print(f"\n{said}")
    if given.picture is not None and laws:
        foot = f"{given.model}, {' and '.join(counts)} prompts of {', '.join(TASKS)}, at most {TOKENS} tokens each"
        draw_scaling_law(laws, given.picture, f"{foot}; texts equal to plain decoding")


if __name__ == "__main__":
    main()
