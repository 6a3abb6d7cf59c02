"""Engines that live elsewhere: a worker process in the Python that has them, asked in lines of JSON."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from typing import IO

from selfdraft.bench.peers import Answer, worker
from selfdraft.errors import OptionError, PeerError
from selfdraft.types import JsonObject

PROBING = 60.0
"""Seconds for looking up a version."""
CALM = 0.1
"""Seconds before and after an answer: worker threads go on spinning for a while, and would slow the other side down."""


def edition(engine: str, python: str, home: str | None = None) -> str | None:
    """Name and version of the package that brings an engine in a Python; None when it is not there.

    `home`: what --peer-python calls the engine, where the worker has another name for it.

    Errors: OptionError when that is no Python.
    """
    told = f"--peer-python {home or engine}={python}"
    try:
        done = subprocess.run(
            [python, worker.__file__, engine, "probe"],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env=_environment(python, None),
            timeout=PROBING,
        )
    except OSError as error:
        raise OptionError(f"{told} cannot be started: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise OptionError(f"{told} did not answer within {PROBING:g} s; is it a Python?") from error
    said = _parsed(done.stdout)
    if done.returncode or not {"edition", "missing"} & said.keys():
        raise OptionError(f"{told} is no Python that runs the worker: {_last_line(done.stderr) or 'it said nothing'}")
    return str(said["edition"]) if "edition" in said else None


class Foreign:
    """A worker process with one engine, loaded when this returns.

    `settings`: model (folder or file), dtype, threads, context, device, options, temperature (0: greedy), top_p.
    `seconds` is the most it may take to load, and to answer.

    Errors: PeerError names the peer, what happened to it, and its last words.
    """

    def __init__(self, label: str, engine: str, python: str, settings: JsonObject, seconds: float) -> None:
        self.label, self._seconds = label, seconds
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._heard = b""
        self._process = subprocess.Popen(
            [python, worker.__file__, engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=_environment(python, settings["threads"]),
            start_new_session=True,
        )
        try:
            said = self._ask(dict(settings))
            if said.get("ready") is not True:
                raise self._odd(said)
        except BaseException:
            self.close()
            raise

    def answer(self, prompt: SequenceOf[int], count: int, seed: int) -> Answer:
        time.sleep(CALM)
        said = self._ask({"prompt": list(prompt), "count": count, "seed": seed})
        time.sleep(CALM)
        try:
            tokens = tuple(map(int, said["tokens"]))
            drafts = said.get("drafts")
            counts = None if drafts is None else (int(drafts[0]), int(drafts[1]))
            return Answer(tokens, float(said["seconds"]), float(said["first_token_seconds"]), counts)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._odd(said) from error

    def close(self) -> None:
        """End the process and all that it started. A second time does nothing: the number may be another's by then."""
        if self._words.closed:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._words):
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    def _ask(self, message: Mapping[str, object]) -> JsonObject:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # reading tells why
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        said = _parsed(self._line(time.monotonic() + self._seconds))
        if "error" in said:
            raise PeerError(f"peer {self.label}: {_short(str(said['error']))}")
        return said

    def _line(self, deadline: float) -> bytes:
        """The next line it says."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._heard:
                if not selector.select(max(deadline - time.monotonic(), 0.0)):
                    raise PeerError(
                        f"peer {self.label}: no answer within {self._seconds:g} s; --peer-timeout gives it longer"
                    )
                more = os.read(self._process.stdout.fileno(), 2**16)
                if not more:
                    raise PeerError(f"peer {self.label}: its process {self._ending()}")
                self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        return line

    def _ending(self) -> str:
        """How the process ended, with its last words."""
        status = self._process.wait()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with code {status}"
        self._words.seek(max(self._words.seek(0, os.SEEK_END) - 2**16, 0))
        last = _last_line(self._words.read())
        return f"{how}: {last}" if last else how

    def _odd(self, said: object) -> PeerError:
        return PeerError(f"peer {self.label}: its worker said {_short(json.dumps(said))}, which is no answer")


def _environment(python: str, threads: int | None) -> dict[str, str]:
    """Ours, but another interpreter does not look for packages where this one does."""
    environment = dict(os.environ)
    if python != sys.executable:
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environment.pop(name, None)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment


def _parsed(line: bytes) -> JsonObject:
    try:
        said = json.loads(line)
    except ValueError:
        return {"said": line.decode("utf-8", "replace")}
    return said if isinstance(said, dict) else {"said": said}


def _last_line(words: bytes) -> str:
    lines = [line.strip() for line in words.decode("utf-8", "replace").splitlines()]
    return _short(next((line for line in reversed(lines) if line), ""))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."
