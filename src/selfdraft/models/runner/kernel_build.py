"""The compiled half of a tape: `kernels/`, built by the machine's own C++ compiler once and kept for the user.

Nothing is built when the package is installed. Without a compiler a library of the wheel's runs, if it was built with
some (`levels.py`); else the plain path does, and says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

from selfdraft.errors import RunnerUnavailable
from selfdraft.files import environment
from selfdraft.files.atomic import cache_folder, whole_file
from selfdraft.models.machine import cpu_flags, cpu_vendor
from selfdraft.models.runner.levels import COMPILERS, FLAGS, PATIENCE, best_level, find_compiler

SOURCE = Path(__file__).with_name("kernels") / "run.cpp"
"""What is compiled; it includes the headers beside it."""
MACHINE = SOURCE.with_name("machine.cpp")
"""Measures the machine, not the model: a library of its own, so that a change there proves no model anew."""
BUILT = SOURCE.with_name("built")
"""Where a wheel has libraries for levels of processors, if it was built with them (`levels.py`)."""
INSTRUCTIONS = {"native": "-march=native", "avx2": "-march=x86-64-v3", "generic": "-mtune=generic"}
"""What kernels may use, by the value of the environment variable SELFDRAFT_INSTRUCTIONS: all that the processor has
(the default), AVX2 at most, or what every processor of its kind has. Bits differ from one to another."""


class Pass(ctypes.Structure):
    """The layout of `Pass` in kernels/tape.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "answers", "threads", "layers")),
        *((name, ctypes.c_void_p) for name in ("arena", "scratch")),
        ("scratch_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("slots", "slot", "place", "seen", "extra", "position", "extras")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "strides")),
        ("stage", ctypes.c_void_p),
        ("stage_bytes", ctypes.c_int64),
        ("coded", ctypes.c_int64),
    ]


@cache
def library() -> ctypes.CDLL:
    """The kernels, built on first use. Errors: RunnerUnavailable says what is missing."""
    from selfdraft.models.runner.tape import (  # brings torch, which measuring the machine does without
        INSTR,
        LARGEST,
        STAGED,
        STEP,
        UNIT,
    )

    built_in = _built_in()
    if built_in is None:
        compiler = _compiler()
        opened = _opened(compiler, SOURCE, f"kernels-{_fingerprint(compiler)}")
    else:
        opened = _loaded(built_in)
    word, place = ctypes.c_int64, ctypes.c_void_p
    opened.selfdraft_keep.argtypes = [place, place, word, word, word, place, word]
    opened.selfdraft_run.argtypes = [place, word, place, place]
    opened.selfdraft_pack.argtypes = [word, place, word, word, word, word, place, word]
    opened.selfdraft_forget.argtypes = [place, word]
    opened.selfdraft_packed_bytes.argtypes = [word, word, word, word]
    opened.selfdraft_packed_bytes.restype = word
    opened.selfdraft_pin.argtypes = [word]
    opened.selfdraft_contenders.argtypes = [place, word, ctypes.c_uint64, ctypes.c_float, place, word]
    opened.selfdraft_contenders.restype = word
    opened.selfdraft_link_state.argtypes = [word, place, word, word, place, place, word, ctypes.c_float, place]
    opened.selfdraft_picked.argtypes = [word, place, word, place, word, place, place]
    opened.selfdraft_likeliest.argtypes = [word, place, word, word, word, word, place, place]
    opened.selfdraft_four.argtypes = [place, word, word, place, place, place]
    opened.selfdraft_four.restype = None
    opened.selfdraft_instructions.restype = ctypes.c_char_p
    *sizes, rows = (opened.selfdraft_sizes(which) for which in range(6))
    known = [INSTR.itemsize, STEP.itemsize, ctypes.sizeof(Pass), UNIT, STAGED]
    assert sizes == known, "kernels/ and tape.py disagree"
    assert rows <= LARGEST, "kernels/ and tape.py disagree"
    return opened


def instructions() -> str:
    """The instructions that products use here, such as 'AVX-512 VNNI'. Errors: RunnerUnavailable."""
    told: bytes = library().selfdraft_instructions()
    return told.decode()


def vectors() -> bool:
    """Whether there are kernels here for more than what every processor has."""
    try:
        return instructions() != "generic"
    except RunnerUnavailable:
        return False


def pin_threads(on: bool) -> None:
    """Keep the threads of passes on cores of their own, or let the system place them (the default); for the process.

    Passes that run at the same time as another are not pinned, nor those with more threads than physical cores. It
    helps beside one busy process, and harms where two processes do it on the same cores (docs/log.md, "Pinning").
    Errors: RunnerUnavailable.
    """
    library().selfdraft_pin(int(on))


@cache
def machine_library() -> ctypes.CDLL:
    """What measures the machine, built on first use. Errors: RunnerUnavailable says what is missing."""
    compiler = _compiler()
    opened = _opened(compiler, MACHINE, f"machine-{_fingerprint(compiler, MACHINE)}")
    whole, word, place, real = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
    opened.selfdraft_ping.argtypes = [whole, whole, word, real]
    opened.selfdraft_fill.argtypes = [place, word, place, whole]
    opened.selfdraft_read.argtypes = [place, word, place, whole, real]
    opened.selfdraft_ping.restype = opened.selfdraft_read.restype = real
    opened.selfdraft_fill.restype = None
    return opened


def _opened(compiler: str, source: Path, name: str) -> ctypes.CDLL:
    """A source as a library, built unless one of this name is kept. Errors: RunnerUnavailable."""
    built = cache_folder("kernels") / f"{name}.so"
    if not built.is_file():
        _build(compiler, built, source)
    return _loaded(built)


def _loaded(built: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise RunnerUnavailable(f"{built} cannot be loaded: {error}") from error


def fingerprint() -> str:
    """A name for the kernels as they are built here. Errors: RunnerUnavailable."""
    built_in = _built_in()
    return _fingerprint(_compiler()) if built_in is None else _named_built(built_in)


def _built_in() -> Path | None:
    """The wheel's library for this processor where there is no compiler; else, or without one, None."""
    if _found() is not None:
        return None
    level = best_level(cpu_flags(), _asked())
    path = None if level is None else BUILT / f"{level.name}.so"
    return path if path is not None and path.is_file() else None


@cache
def _named_built(path: Path) -> str:
    """Unlike the name of any library built here, whose flags and compiler are in it."""
    return f"built-in-{path.stem}-{hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()}"


def _found() -> str | None:
    return find_compiler(COMPILERS)


def _compiler() -> str:
    compiler = _found()
    if compiler is None:
        raise RunnerUnavailable(f"there is no C++ compiler ({', '.join(COMPILERS)}) on this machine")
    return compiler


def _asked() -> str:
    """The instructions that the environment asks for. Errors: RunnerUnavailable where they are unknown."""
    asked = environment.instructions()
    if asked not in INSTRUCTIONS:
        known = ", ".join(INSTRUCTIONS)
        raise RunnerUnavailable(f"SELFDRAFT_INSTRUCTIONS={asked!r} is unknown; there are {known}")
    return asked


def _flags() -> tuple[str, ...]:
    """How kernels are compiled for this processor. Errors: RunnerUnavailable."""
    asked = _asked()
    # one instruction for two numbers of bfloat16 is as quick as one for a float on AMD, and much slower on Intel
    paired = asked == "native" and "AMD" in cpu_vendor()
    return (*FLAGS, INSTRUCTIONS[asked], *(["-DBF16_PAIRS"] if paired else []))


def _fingerprint(compiler: str, source: Path | None = None) -> str:
    """Changes with the source and all headers, the flags, the compiler, and the processor that it builds for."""
    return _named(compiler, source or SOURCE, _flags())


@cache
def _named(compiler: str, chosen: Path, flags: tuple[str, ...]) -> str:
    told = _call([compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    read = [chosen, *sorted(path for path in chosen.parent.iterdir() if path.suffix == ".h")]
    sources = b"".join(path.read_bytes() for path in read)
    return hashlib.blake2b(sources + " ".join(flags).encode() + told, digest_size=12).hexdigest()


def _build(compiler: str, wanted: Path, source: Path | None = None) -> None:
    """Build `wanted` out of a source, whole or not at all. Errors: RunnerUnavailable."""
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(wanted) as part:
            _call([compiler, *_flags(), str(source or SOURCE), "-o", str(part)])
            part.chmod(0o755)
    except OSError as error:
        raise RunnerUnavailable(
            f"{wanted} cannot be written ({error.strerror}): set SELFDRAFT_CACHE to a folder that can"
        ) from error


def _call(command: list[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunnerUnavailable(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise RunnerUnavailable(f"{command[0]} failed: {next((line for line in said if 'error' in line), 'no reason')}")
    return done.stdout
