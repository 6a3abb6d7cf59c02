"""The inside of the sandbox: a program that takes a job from its input, locks itself in, and runs it.

Started by path in an isolated Python, so it imports the standard library only. It answers in lines: how the network was
taken away, what went wrong (empty when nothing did), and the token that proves that the end was reached.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import types
from collections.abc import Callable

ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
"""All that a program sees: without the first two, numpy alone would fill the address space with threads' stacks."""
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000

STARTING = ("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile", "pty.spawn")
REFUSED = (*STARTING, "subprocess.Popen", "os.kill", "os.killpg", "socket.connect", "socket.sendto", "socket.sendmsg")
"""Beginnings of the audit events that are always refused: processes, signals, connections."""
CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod")
PATHS = (*CHANGING, "os.chown", "os.utime", "shutil.", "sqlite3.connect")
"""Beginnings of the audit events that are refused outside the folder."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    job = json.load(sys.stdin)
    answers = os.dup(1)
    for stream, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        os.dup2(os.open(os.devnull, flags), stream)
    folder = os.getcwd()
    alone = job["limits"]["namespace"] and leave_network()
    say = answering(answers, "network namespace" if alone else "audit hook")
    limit(job["limits"])
    sys.addaudithook(guard(folder, alone))
    program = types.ModuleType("__main__")
    sys.modules["__main__"] = program
    program.__file__ = os.path.join(folder, "answer.py")
    sys.argv = ["answer.py"]
    try:
        exec(compile(job["code"], "answer.py", "exec"), program.__dict__)
    except SystemExit:
        say("it called exit")
    except BaseException as error:
        say(f"{type(error).__name__}: {error}")
    else:
        say("", job["token"])


def answering(file: int, first: str) -> Callable[..., None]:
    """Writes `first` now, and returns what writes the last lines and ends the process, threads and all."""
    write, leave = os.write, os._exit  # the program may replace what stands in `os`
    write(file, f"{first}\n".encode())

    def say(why: str, token: str = "") -> None:
        line = " ".join(why.split())[:200]
        write(file, f"{line}\n{token}".encode("utf-8", "replace"))
        leave(0)

    return say


def leave_network() -> bool:
    """Move into a network of its own without any interface that is up; False where the kernel refuses."""
    try:
        unshare = ctypes.CDLL(None, use_errno=True).unshare
    except (OSError, AttributeError):
        return False
    return bool(unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) == 0)


def limit(limits: dict[str, int]) -> None:
    """Set the limits of the kernel; one that the system does not know, or holds lower already, is left."""
    seconds = limits["cpu_seconds"]
    wanted = {
        "RLIMIT_AS": (limits["memory_bytes"],) * 2,
        "RLIMIT_CPU": (seconds, seconds + 1),  # the lower one ends it by a signal that names the cause
        "RLIMIT_FSIZE": (limits["file_bytes"],) * 2,
        "RLIMIT_NPROC": (limits["processes"],) * 2,
        "RLIMIT_CORE": (0, 0),
    }
    for name, pair in wanted.items():
        try:
            resource.setrlimit(getattr(resource, name), pair)
        except (AttributeError, ValueError, OSError):
            continue


def guard(folder: str, alone: bool) -> Callable[[str, tuple[object, ...]], None]:
    """An audit hook that refuses processes, connections, and writing outside `folder`; it cannot be taken out again.

    `alone`: sockets may be made, for they lead nowhere.
    """
    inside = os.path.join(os.path.realpath(folder), "")
    refused = REFUSED if alone else (*REFUSED, "socket.")
    realpath, fsdecode = os.path.realpath, os.fsdecode

    def within(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return isinstance(path, int)  # a file that was opened before
        name = fsdecode(path)
        return name in (":memory:", os.devnull) or f"{realpath(name)}{os.sep}".startswith(inside)

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "open":
            flags = args[2] if len(args) > 2 and isinstance(args[2], int) else 0
            if flags & WRITING and not within(args[0]):
                raise PermissionError(f"the sandbox refuses to write {args[0]!r}")
        elif event.startswith(refused):
            raise PermissionError(f"the sandbox refuses {event}")
        elif event.startswith(PATHS) and not all(within(path) for path in args[:2] if isinstance(path, str | bytes)):
            raise PermissionError(f"the sandbox refuses {event} outside its folder")

    return hook


if __name__ == "__main__":
    main()
