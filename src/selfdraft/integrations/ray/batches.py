"""A file of prompts, answered on Ray Data: blocks of rows over workers, each block written once and whole.

Rows are cut into blocks of a fixed size, in the order of the file. Workers answer blocks; this process alone writes
them, each into a file of its own that appears when it is whole. A run that was killed goes on with the blocks that have
no file. So each row is in exactly one file, however often the run was begun, and the texts are those of one process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray
import ray.data
from filelock import FileLock, Timeout

from selfdraft.cli.generate import GenerateOptions, llm_of, sampling_of
from selfdraft.cli.options import EngineSizes, opening_of
from selfdraft.errors import RequestError
from selfdraft.files.atomic import read_record, whole_file, write_record
from selfdraft.files.records import read_records, turns_of
from selfdraft.types import JsonObject

if TYPE_CHECKING:
    from selfdraft.outputs import RequestOutput

FORMAT = 1
RECORD, LOCK = "run.json", ".lock"
"""In the folder of the output: what was asked for, and the lock of the process that writes."""
LEFT_OUT = ("output", "workers", "ray", "threads", "no_cache")
"""Options that change no text: a run may go on with others."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the file."""

    id: str | int
    """Its field `id`, or its number in the file."""
    prompt: str


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """The rows of a jsonl or parquet file. Errors: RequestError names the row and what is wrong."""
    if not path.is_file():
        raise RequestError(f"--ray {path}: there is no such file")
    found: list[Row] = []
    seen: set[str] = set()
    for number, (place, record) in enumerate(_records(path)):
        if number == limit:
            break
        name = record.get("id", number)
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise RequestError(f"{place}: the id must be a text or a whole number")
        if str(name) in seen:
            raise RequestError(f"{place}: the id {name!r} was there before: each row needs one of its own")
        seen.add(str(name))
        found.append(Row(name, turns_of(record, place)[0]))
    if not found:
        raise RequestError(f"--ray {path} holds no prompt")
    return found


def _records(path: Path) -> Iterator[tuple[str, JsonObject]]:
    """(place, record) of a file. Errors: RequestError."""
    if path.suffix != ".parquet":
        yield from read_records(path)
        return
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        for batch in ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except (ArrowException, OSError) as error:
        raise RequestError(f"{path} is no parquet file that can be read: {error}") from error


class Answerer:
    """One worker: a model, and the answers to a block of rows at a time. `given`: the options of `generate`."""

    def __init__(self, given: GenerateOptions) -> None:
        # without a seed, one that a run which goes on has, too
        self.given, self.sampling = given, replace(sampling_of(given), seed=given.seed or 0)
        self.llm = llm_of(given, EngineSizes(given.block_rows, batched_tokens=1024))

    def __call__(self, batch: Mapping[str, SequenceOf[object]]) -> dict[str, list[object]]:
        """The blocks of a batch, each as the lines of its file."""
        return {"block": [*batch["block"]], "lines": [self._lines(str(rows)) for rows in batch["rows"]]}

    def _lines(self, rows: str) -> str:
        read = [Row(**row) for row in json.loads(rows)]
        opening, prompts = opening_of(self.given.system), []
        for row in read:
            messages = [*opening, {"role": "user", "content": row.prompt}]
            chat = self.given.chat_template or bool(opening)
            prompts.append(self.llm.render(messages) if chat else row.prompt)
        answers = self.llm.generate(prompts, self.sampling, return_errors=True)
        return "".join(line_of(row, answer) for row, answer in zip(read, answers, strict=True))


def line_of(row: Row, answer: RequestOutput) -> str:
    """A row's line in the output: what depends on the row, the model and the options, and on nothing else."""
    if answer.error is not None:
        why = str(answer.error).removeprefix("prompt ").lstrip("0123456789").removeprefix(": ")
        return json.dumps({"id": row.id, "prompt": row.prompt, "error": why}, ensure_ascii=False) + "\n"
    said = answer.outputs[0]
    told = {"text": said.text, "token_ids": list(said.token_ids)}
    ending = {"finish_reason": said.finish_reason, "stop_reason": said.stop_reason}
    return json.dumps({"id": row.id, "prompt": row.prompt, **told, **ending}, ensure_ascii=False) + "\n"


def answer_rows(given: GenerateOptions, rows: SequenceOf[Row], folder: Path, note: Callable[[str], None]) -> None:
    """Answer what is not answered yet in `folder`. `note` is told how far it is. Errors: RequestError."""
    size = given.block_rows
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=0):
            claim(folder, identity(given, rows))
            missing = [number for number in range(len(blocks)) if not place_of(folder, number).exists()]
            done = sum(map(len, blocks)) - sum(len(blocks[number]) for number in missing)
            note(f"{len(rows)} rows in {len(blocks)} blocks; {done} rows are answered already")
            for number, lines in _answered(given, {number: blocks[number] for number in missing}):
                _write(place_of(folder, number), lines)
                done += len(blocks[number])
                note(f"{done} of {len(rows)} rows")
    except Timeout as error:
        raise RequestError(f"--output {folder}: another run writes there now") from error
    except OSError as error:
        raise RequestError(f"--output {folder} cannot be written: {error}") from error


def place_of(folder: Path, number: int) -> Path:
    """The file of a block."""
    return folder / f"part-{number:06d}.jsonl"


def _write(place: Path, lines: str) -> None:
    """A block's file, on the disk before it has its name. Errors: OSError."""
    with whole_file(place) as part, part.open("w", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def _answered(given: GenerateOptions, blocks: Mapping[int, SequenceOf[Row]]) -> Iterator[tuple[int, str]]:
    """(block, lines) of every block, in the order in which they are done."""
    if not blocks:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    items = [
        {"block": number, "rows": json.dumps([{"id": row.id, "prompt": row.prompt} for row in block])}
        for number, block in blocks.items()
    ]
    data = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Answerer,
        fn_constructor_args=(given,),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(given.workers, len(items)), max_tasks_in_flight_per_actor=2),
        num_cpus=given.threads or 1,
    )
    for row in data.iter_rows():
        yield int(row["block"]), str(row["lines"])


def claim(folder: Path, wanted: JsonObject) -> None:
    """Say in the folder what it is for. Errors: RequestError where it holds the answers of another run."""
    place = folder / RECORD
    if not place.exists():
        if any(folder.glob("part-*")):
            raise RequestError(f"--output {folder} holds parts and no {RECORD}: give another folder")
        write_record(place, wanted)
    elif read_record(place, wanted) is None:
        raise RequestError(f"--output {folder} holds answers to other rows or with other options: give another folder")


def _digest(rows: SequenceOf[Row]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([row.id, row.prompt]).encode())
    return found.hexdigest()


def identity(given: GenerateOptions, rows: SequenceOf[Row]) -> JsonObject:
    """What the answers in a folder are answers to: the rows, and the options that may change a text."""
    named = {field.name: getattr(given, field.name) for field in fields(given) if field.name not in LEFT_OUT}
    kept: JsonObject = json.loads(json.dumps(named, default=str))
    return {"format": FORMAT, "rows": _digest(rows), **kept}
