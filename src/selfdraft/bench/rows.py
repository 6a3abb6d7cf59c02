"""Results on disk: one JSON object a line, written whole or not at all, so that a run can be killed and go on."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, TracebackType

from selfdraft.errors import RequestError, shown
from selfdraft.types import JsonObject

Row = JsonObject
Key = tuple[str, str, str, str]
"""(task, key of the item, drafter's label, fingerprint of everything that can change the result)."""
FORMAT = 1
HEAD = f'{{"selfdraft_bench": {FORMAT}, '
"""How every line begins; a file with other lines is somebody else's and is left alone."""
NUMBER = (int, float)
FIELDS: Mapping[str, object] = {
    **dict.fromkeys(("task", "key", "drafter", "fingerprint"), (str,)),
    **dict.fromkeys(("group", "finish_reason", "peer"), (str, NoneType)),
    **dict.fromkeys(("tokens", "prompt_tokens"), (int,)),
    **dict.fromkeys(("seconds", "plain_seconds", "load_average"), NUMBER),
    "texts_equal": (bool, NoneType),
    "first_difference": (int, NoneType),
    "conditions": {
        **dict.fromkeys(("model", "dtype", "weights", "runner", "selfdraft"), (str,)),
        **dict.fromkeys(("temperature", "top_p"), NUMBER),
        **dict.fromkeys(("max_new_tokens", "batch"), (int,)),
        "chat": (bool,),
        "exactness": {"level": (str,)},
        "machine": {"threads": (int,)},
    },
}
"""What tables read of every row: types, or the fields of an object."""
OWN_FIELDS: Mapping[str, object] = {"stats": {"num_steps": (int,), "mean_acceptance_length": NUMBER}}
"""What they read of rows of our own engine beside that."""
OBJECTS = ("memory", "split", "scores", "options", "peer_file")
"""Fields that are an object, or nothing, where they are there."""


class Ledger:
    """Rows by key; with a path, also those that stand in the file, and new ones are appended to it at once.

    A torn last line, left by a run that was killed while writing, is dropped. A file that was made here and got no row
    is removed. One ledger a file: it is locked.
    Errors: RequestError when the file cannot be read or written, is in use, or holds something else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: dict[Key, Row] = {}
        self._file: int | None = None
        self._made = path is not None and not path.exists()
        if path is not None:
            self._file = self._open(path)
            try:
                self._read(self._file)
            except BaseException:
                self.close()
                raise

    def _open(self, path: Path) -> int:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RequestError(f"--output {path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            raise RequestError(f"--output {path} is in use by another bench: {error.strerror}") from error
        return file

    def _read(self, file: int) -> None:
        assert self.path is not None
        with os.fdopen(os.dup(file), "rb") as reading:
            whole = reading.read()
        end = whole.rfind(b"\n") + 1
        for number, line in enumerate(whole[:end].splitlines(), 1):
            row = self._row(line, f"{self.path}:{number}")
            self.rows[key_of(row)] = row
        torn, head = whole[end:], HEAD.encode()
        if torn and not (torn.startswith(head) or head.startswith(torn)):
            raise self._foreign(f"{self.path}, last line")
        if torn:
            os.ftruncate(file, end)

    def _row(self, line: bytes, place: str) -> Row:
        if not line.startswith(HEAD.encode()):
            raise self._foreign(place)
        try:
            return row_of(line)
        except ValueError as error:
            raise RequestError(f"{place}: broken row: {error}; take the line out, or give another --output") from error

    @staticmethod
    def _foreign(place: str) -> RequestError:
        return RequestError(f"{place}: not written by this version of selfdraft bench; give another --output")

    def append(self, row: Row) -> None:
        """Book a row, in the file first. Errors: RequestError; then the file holds the earlier rows, all whole."""
        if self._file is not None:
            line = (HEAD + json.dumps(row, ensure_ascii=False)[1:] + "\n").encode("utf-8", "replace")
            size = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, line)
                if written < len(line):  # a disk that fills up takes a part, and says so at the next write
                    os.write(self._file, line[written:])
                os.fsync(self._file)
            except OSError as error:
                os.ftruncate(self._file, size)
                raise RequestError(
                    f"--output {self.path}: {error.strerror}; its {len(self.rows)} rows are whole: "
                    "make room and run the same command again"
                ) from error
        self.rows[key_of(row)] = row

    def close(self) -> None:
        if self._file is None:
            return
        if self._made and self.path is not None and os.fstat(self._file).st_size == 0:
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def key_of(row: Row) -> Key:
    """What a row is found by."""
    return str(row["task"]), str(row["key"]), str(row["drafter"]), str(row["fingerprint"])


def row_of(line: bytes) -> Row:
    """The row in a line of a file. Errors: ValueError that names a field which no bench has written so."""
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise ValueError("too many brackets") from error
    _check(row, FIELDS)
    if row["peer"] is None:
        _check(row, OWN_FIELDS)
    _check(row, {name: (dict, NoneType) for name in OBJECTS if name in row})
    for name in ("seconds", "plain_seconds"):
        if not (math.isfinite(row[name]) and row[name] > 0):
            raise ValueError(f"{name} is {row[name]}, not above 0")
    return dict(row)


def _check(found: JsonObject, fields: Mapping[str, object], inside: str = "") -> None:
    """Errors: ValueError."""
    for name, kinds in fields.items():
        if name not in found:
            raise ValueError(f"{inside}{name} is not there")
        value = found[name]
        if isinstance(kinds, Mapping):
            if not isinstance(value, dict):
                raise ValueError(f"{inside}{name} is {shown(value)}, not an object")
            _check(value, kinds, f"{inside}{name}.")
        elif type(value) not in kinds:  # type: ignore[operator]
            raise ValueError(f"{inside}{name} is {shown(value)}")
