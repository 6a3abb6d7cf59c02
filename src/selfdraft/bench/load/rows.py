"""Requests on disk: one JSON object a line, appended as soon as a request has ended."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TextIO

from selfdraft.bench.load.client import Answer
from selfdraft.bench.load.figures import Round
from selfdraft.errors import RequestError
from selfdraft.types import JsonObject

FORMAT = 1


class Rows:
    """A file of rows; without a path nothing is kept. `run` names the run in every row.

    Errors: RequestError when the file cannot be written.
    """

    def __init__(self, path: Path | None, run: str) -> None:
        self.path, self.run, self.count = path, run, 0
        self._file: TextIO | None = None
        if path is not None:
            try:
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise RequestError(f"--save {path} cannot be written: {error.strerror}") from error

    def begin(self, conditions: JsonObject) -> None:
        """The row that says under which conditions those behind it were measured."""
        self._write({"kind": "run", "conditions": conditions})

    def append(self, found: Round, answer: Answer) -> None:
        """The row of a request."""
        self._write(row_of(found, answer))
        self.count += 1

    def _write(self, row: JsonObject) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"selfdraft_load": FORMAT, "run": self.run, **row}, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise RequestError(f"--save {self.path} cannot be written: {error.strerror}") from error

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def row_of(found: Round, answer: Answer) -> JsonObject:
    """A request as a row. Times in seconds from the beginning of its round; `chunks` from its sending."""
    ask = answer.ask
    return {
        "kind": "request",
        "server": found.server,
        "concurrency": found.point.concurrency,
        "rate": found.point.rate,
        "round": found.number,
        "number": ask.number,
        "key": ask.key,
        "due": None if ask.at is None else round(ask.at, 6),
        "sent": round(answer.sent - found.began, 6),
        "end": round(answer.end - found.began, 6),
        "ttft": None if answer.first is None else round(answer.first, 6),
        "tpot": None if answer.per_token is None else round(answer.per_token, 6),
        "chunks": [round(at - answer.sent, 6) for at in answer.chunks],
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "finish_reason": answer.reason,
        "text_hash": answer.digest,
        "asked_again": answer.tries,
        "error": answer.error,
        "words": answer.words,
        "counts": answer.counts,
    }
