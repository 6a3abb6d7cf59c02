"""Running what a model wrote: a process of its own, limited in time, memory and files, without network.

It keeps accidents from doing harm: endless loops, memory, forks, big files, stray writes, connections. It is no wall
against code that is written to break out (it runs in Python, as the user who runs the bench): docs/bench.md.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

from selfdraft.bench.sandbox import inside


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use."""

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    """Longer than the processor time, so that a busy machine does not change a verdict."""
    memory_bytes: int = 2**30
    """Address space."""
    file_bytes: int = 2**24
    """Largest file."""
    processes: int = 64
    """Processes and threads; the kernel does not hold the superuser to it."""
    namespace: bool = True
    """Try a network namespace before the audit hook."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a program ran to its end, its tests included."""

    passed: bool
    why: str
    """'passed', or what ended it."""
    protection: str
    """How the network was taken away: 'network namespace', or 'audit hook' where the kernel refuses that."""


def run_program(code: str, limits: Limits | None = None) -> Verdict:
    """Run Python source to its end in a fresh process and say whether it got there.

    It has an empty folder of its own, no environment, no input, and nobody reads its output. The proof of success is
    a secret token that is written after the last line: an early exit, whatever its code, has no proof.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="selfdraft-", ignore_cleanup_errors=True) as folder:
        job = json.dumps({"code": code, "token": token, "limits": asdict(limits)}).encode()
        said, status = _run(job, folder, limits.wall_seconds)
    protection, why, proof = [*said.split("\n"), "", "", ""][:3]
    if proof == token:
        return Verdict(True, "passed", protection)
    return Verdict(False, why or _ending(status, limits), protection or "it did not start")


def _ending(status: int | None, limits: Limits) -> str:
    """Why a program that said nothing ended; `status` as Popen's returncode, None when it was stopped."""
    if status is None:
        return f"no end within {limits.wall_seconds:g} s"
    if status == -signal.SIGXCPU:
        return f"more than {limits.cpu_seconds} s of processor time"
    return f"ended by {signal.Signals(-status).name}" if status < 0 else "it ended before its tests did"


def _run(job: bytes, folder: str, seconds: float) -> tuple[str, int | None]:
    """Let the jail run a job; returns what it said and its return code, None when it had to be stopped."""
    jailed = subprocess.Popen(
        [sys.executable, "-I", "-B", inside.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=dict(inside.ENVIRONMENT),
        start_new_session=True,
    )
    assert jailed.stdin is not None
    assert jailed.stdout is not None
    try:
        with suppress(BrokenPipeError), jailed.stdin:
            jailed.stdin.write(job)
        ended = _ends(jailed.pid, time.monotonic() + seconds)
    finally:
        # before it is reaped, so that its group is still its own; children that are left go with it
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(jailed.pid, signal.SIGKILL)
        status = jailed.wait()
    with jailed.stdout:
        # a process that broke away may hold the other end
        os.set_blocking(jailed.stdout.fileno(), False)
        return (jailed.stdout.read() or b"").decode("utf-8", "replace"), status if ended else None


def _ends(pid: int, deadline: float) -> bool:
    """Wait for the end of a child without reaping it; False at the deadline."""
    pause = 0.001
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return True
