"""Levels of processors that kernels are built into a wheel for; no imports of the package, so that a build can use it.

A machine with a compiler builds kernels for its own processor instead (`kernel_build.py`).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    *("-O3", "-fopenmp", "-std=c++17", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
)
PATIENCE = 300
"""Seconds that the compiler may take."""
SWITCH = "SELFDRAFT_BUILD_KERNELS"
"""Environment variable: 1 builds kernels into the wheel; without it one wheel is for every machine."""


class Level(NamedTuple):
    """What a built-in library may use: its name, the compiler's flags, and what Linux calls it in /proc/cpuinfo."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm"})
LEVELS = (
    Level(
        "avx512",
        ("-march=x86-64-v4", "-mavx512vnni"),
        V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"},
    ),
    Level("avx2", ("-march=x86-64-v3",), V3),
)
"""The best one first."""


def best_level(cpu: Iterable[str], asked: str = "native") -> Level | None:
    """The best level of a processor with these flags. `asked`: as SELFDRAFT_INSTRUCTIONS says."""
    has = set(cpu)
    allowed = {"native": LEVELS, "avx2": LEVELS[1:]}.get(asked, ())
    return next((level for level in allowed if level.needs <= has), None)


def wanted(target: str, version: str, env: Mapping[str, str], system: str, machine: str) -> bool:
    """Whether a build has kernels: a wheel that is not editable, asked for, for Linux on x86-64."""
    asked = env.get(SWITCH, "") == "1"
    return asked and target == "wheel" and version != "editable" and (system, machine) == ("Linux", "x86_64")


def find_compiler(names: Iterable[str]) -> str | None:
    """The first of these C++ compilers that is on the machine."""
    return next((found for name in names if (found := shutil.which(name))), None)


def compiled(source: Path, folder: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """Libraries of the levels, by file name, built in `folder`; none of them where one cannot be built, and why."""
    compiler = find_compiler(COMPILERS)
    if compiler is None:
        say(f"no kernels in this wheel: there is no C++ compiler ({', '.join(COMPILERS)})")
        return {}
    made = {f"{level.name}.so": folder / f"{level.name}.so" for level in LEVELS}
    for level, path in zip(LEVELS, made.values(), strict=True):
        command = [compiler, *FLAGS, *level.flags, str(source), "-o", str(path)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
        except (OSError, subprocess.SubprocessError) as error:
            say(f"no kernels in this wheel: {level.name} cannot be built: {error}")
            return {}
    return made
