"""What a model wrote is run, judged, and kept from doing harm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from selfdraft.bench.sandbox import inside
from selfdraft.bench.sandbox.outside import Limits, run_program

TIGHT = Limits(cpu_seconds=30, wall_seconds=600.0, memory_bytes=2**28, file_bytes=2**20)
ROOMY = Limits(wall_seconds=600.0)
"""However busy the machine is."""


def test_what_holds_passes() -> None:
    verdict = run_program("def f(x):\n    return x + 1\n\nassert f(1) == 2\n", ROOMY)
    assert (verdict.passed, verdict.why) == (True, "passed")
    assert verdict.protection in ("network namespace", "audit hook")


FAILURES = {
    "assert": ("assert 1 == 2, 'they differ'", "AssertionError: they differ"),
    "syntax": ("def f(:", "SyntaxError"),
    "null": ("x = 1\n\0", "null bytes"),
    "loop": ("while True: pass", "more than 1 s of processor time"),
    "memory": ("hoard = []\nwhile True: hoard.append(bytearray(2**24))", "MemoryError"),
    "fork": ("import os\nwhile True: os.fork()", "refuses os.fork"),
    "process": ("import subprocess, sys\nsubprocess.run([sys.executable, '--version'])", "refuses subprocess.Popen"),
    "multiprocessing": ("import multiprocessing as m\nm.Process(target=print).start()", "refuses os.fork"),
    "shell": ("import os\nos.system('true')", "refuses os.system"),
    "signal": ("import os\nos.kill(os.getppid(), 0)", "refuses os.kill"),
    "big file": ("open('x', 'wb').write(bytes(2**22))", "File too large"),
    "input": ("input()", "EOFError"),
    "exit": ("import sys\nsys.exit(0)\nassert False", "it called exit"),
    "hard exit": ("import os\nos._exit(0)\nassert False", "it ended before its tests did"),
    "crash": ("import ctypes\nctypes.string_at(0)", "ended by SIGSEGV"),
    "odd message": ("raise ValueError('\\ud800')", "ValueError: ?"),
    "a forged proof": (
        "import os\nfor file in range(3, 64):\n"
        "    try: os.write(file, b'\\nforged')\n    except OSError: pass\nos._exit(0)",
        "it ended before",
    ),
    "a lie": ("import os\nos.write(1, b'passed')\nos.write(2, b'passed')\nos._exit(0)", "it ended before"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_says_why(name: str) -> None:
    code, why = FAILURES[name]
    verdict = run_program(code, replace(TIGHT, cpu_seconds=1) if name == "loop" else TIGHT)
    assert not verdict.passed
    assert why in verdict.why
    assert verdict.protection in ("network namespace", "audit hook")


def test_sleeping_ends_too() -> None:
    verdict = run_program("import time\ntime.sleep(600)", Limits(wall_seconds=0.5))
    assert (verdict.passed, verdict.why) == (False, "no end within 0.5 s")


def test_a_thread_does_not_hold_it_up() -> None:
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=(6000,)).start()"
    assert run_program(code, ROOMY).passed


def test_children_that_are_left_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A jail that leaves a child behind, as one would that got around the hook: the whole group is killed."""
    leaky = tmp_path / "leaky.py"
    left = tmp_path / "left"
    child = "import time; time.sleep(6000)"
    leaky.write_text(
        "import subprocess, sys\nsys.stdin.read()\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"open({str(left)!r}, 'w').write(str(child.pid))\n"
    )
    monkeypatch.setattr(inside, "__file__", str(leaky))
    assert run_program("", ROOMY).why == "it ended before its tests did"
    pid = int(left.read_text())
    for _ in range(60_000):  # its new parent reaps it in its own time
        if not alive(pid):
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child lives on")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


CONNECTING = """
import socket
with socket.socket(socket.{family}) as s:
    s.settimeout(600)
    s.connect({address!r})
"""


@pytest.mark.parametrize("namespace", [True, False])
def test_no_network(namespace: bool, tmp_path: Path) -> None:
    """Neither a port of this machine nor a socket in its file system can be reached."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "s"))
        local.listen()
        for family, address in (("AF_INET", server.getsockname()), ("AF_UNIX", str(tmp_path / "s"))):
            code = CONNECTING.format(family=family, address=address)
            verdict = run_program(code, replace(ROOMY, namespace=namespace))
            assert not verdict.passed
            assert verdict.why.startswith("PermissionError: the sandbox refuses socket.")
    assert namespace or verdict.protection == "audit hook"


def test_the_namespace_alone_has_no_network() -> None:
    """Without the hook: a process that went through `leave_network` reaches nobody."""
    code = "import os, socket, sys; sys.path.insert(0, sys.argv[1]); import inside\nprint(inside.leave_network())\n"
    code += "try: socket.create_connection(('127.0.0.1', int(sys.argv[2])), 600); print('reached')\n"
    code += "except OSError: print('alone')\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments = [str(Path(inside.__file__).parent), str(server.getsockname()[1])]
        said = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600)
    moved, reached = said.stdout.split()
    if moved != "True":
        pytest.skip("this kernel refuses network namespaces to this user")
    assert reached == "alone"


WRITES = {
    "write": "open({path!r}, 'w')",
    "append": "open({path!r}, 'a')",
    "low": "import os\nos.open({path!r}, os.O_WRONLY)",
    "remove": "import os\nos.remove({path!r})",
    "rename": "import os\nos.rename({path!r}, 'mine')",
    "rename onto": "import os\nopen('mine', 'w').close()\nos.rename('mine', {path!r})",
    "mkdir": "import os\nos.mkdir({path!r} + '-d')",
    "link": "import os\nos.symlink({path!r}, 'mine')",
    "dots": "import os\nopen(os.path.join('..', os.path.relpath({path!r}, '..')), 'w')",
}


@pytest.mark.parametrize("name", WRITES)
def test_only_its_folder_can_be_changed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("kept")
    verdict = run_program(WRITES[name].format(path=str(path)), ROOMY)
    assert not verdict.passed
    assert "the sandbox refuses" in verdict.why
    assert path.read_text() == "kept"
    assert [entry.name for entry in tmp_path.iterdir()] == ["precious"]


ALLOWED = {
    "files": "import os, shutil\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('1')\nos.rename('a/b/c', 'd')\n"
    "assert open('d').read() == '1'\nshutil.rmtree('a')",
    "temporary": "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'1')",
    "database": "import sqlite3\nsqlite3.connect(':memory:').execute('create table t (a)')\nsqlite3.connect('t.db')",
    "output": "print('x' * 10**6)",
    "recursion": "def f(n): return n and f(n - 1)\nassert f(500) == 0",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(3).x == 3",
    "main": "assert __name__ == '__main__'",
    "folder": "import os\nassert os.listdir() == []",
    "environment": f"import os\nassert os.environ.keys() <= {set(inside.ENVIRONMENT)!r}, dict(os.environ)",
    "arguments": "import sys\nassert sys.argv == ['answer.py']",
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_programs_may_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    verdict = run_program(ALLOWED[name], ROOMY)
    assert verdict.passed, verdict.why
