"""The floors of the house and its manners, read from the source: lower rooms never import higher ones."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import selfdraft
from selfdraft.methods import OPTIONS as METHODS

SOURCE = Path(selfdraft.__file__).parent
FLOORS = {
    "types": 0,
    "errors": 0,
    "methods": 0,
    "core": 1,
    "drafting": 2,
    "protocols": 3,
    "files": 4,
    "remote": 4,
    "drafters": 5,
    "models": 5,
    "engine": 6,
    "prove": 7,
    "replay": 7,
    "parallel": 7,
    "bench": 8,
    "tune": 8,
    "train": 8,
}
"""Rooms that are not named stand on the top floor: llm, hf, cli, serve, __init__ and what belongs to them."""
TOP = 9
LONGEST = 50
CORE = 1260
"""Most lines of `core/`: a reader holds the rules of exactness in mind at once."""
STEP = 72
UNTYPED = 32
"""Most uses of `Any`, imports counted: hooks of torch and transformers, JSON, bodies of requests, untyped libraries."""
QUIET = ("core", "drafting", "drafters", "engine", "models")
"""Rooms without environment, globals and printing."""
PURE = ("core", "drafting")
"""Rooms that read no clock, keep no result and open no file."""


def paths() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in paths()}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text("utf-8"))


def package_of(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def imports(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything a module imports, wherever in it; relative names are made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                whole = [part for part in ("selfdraft." + package_of(module)).split(".") if part]
                base = ".".join([*whole[: len(whole) - node.level + 1], *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def room(module: str) -> str:
    return module.partition(".")[0]


def inner(name: str) -> str | None:
    """The module of ours that an imported name is in; None for other people's."""
    if name != "selfdraft" and not name.startswith("selfdraft."):
        return None
    short = name.removeprefix("selfdraft").removeprefix(".")
    while short and short not in MODULES:
        short = short.rpartition(".")[0]
    return short


def complaint(module: str, wanted: str) -> str | None:
    """Why `module` must not import our module `wanted`, or None."""
    mine, other = room(module), room(wanted)
    if mine == other and (mine != "drafters" or module.split(".")[:2] == wanted.split(".")[:2]):
        return None
    here, there = FLOORS.get(mine, TOP), FLOORS.get(other, TOP)
    if mine == other == "drafters":
        alone = "." in module and "." in wanted and module != wanted
        return "drafters do not know one another" if alone else None
    if there > here:
        return f"{other} is above {mine}"
    if here == there == FLOORS["models"]:
        return "drafters and models do not know one another"
    if mine == "engine" and there == FLOORS["models"]:
        return "the engine knows no drafter and no model by name"
    if here == there == 0 and other != "errors":
        return f"{mine} and {other} do not know one another"
    return None


def outside(module: str, name: str) -> str | None:
    """Why `module` must not import other people's `name`, or None."""
    top = name.partition(".")[0]
    if top == "transformers" and room(module) not in ("models", "hf"):
        return "only models and hf know transformers"
    if top in ("typer", "rich", "click") and room(module) != "cli":
        return "only the command line knows typer and rich"
    return None


@pytest.mark.parametrize("module", MODULES)
def test_floors(module: str) -> None:
    found = []
    for line, name in imports(module, tree_of(module)):
        wanted = inner(name)
        why = outside(module, name) if wanted is None else complaint(module, wanted)
        if why:
            found.append(f"{MODULES[module]}:{line} imports {name}: {why}")
    assert not found, "\n".join(found)


def noises(tree: ast.Module) -> Iterator[str]:
    """Environment, globals and printing."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Global):
            yield f"{line}: global"
        elif isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
            yield f"{line}: {node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (f"{line}: {alias.name}" for alias in node.names if alias.name in ("environ", "getenv"))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{line}: print"


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in QUIET])
def test_quiet_rooms(module: str) -> None:
    assert not list(noises(tree_of(module))), MODULES[module]


CACHED = ("drafting.cost_model",)
"""Modules that may keep a result: the prices of a profile, which follow from its own numbers alone."""


def kept_time(tree: ast.Module) -> Iterator[str]:
    """Clocks and results that outlive a call: the time is handed in, and objects hold what they know."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        for name in names:
            cached = re.fullmatch(r"functools\.(cache|lru_cache|cached_property)", name)
            if cached or name.partition(".")[0] in ("time", "datetime"):
                yield f"{node.lineno}: {name}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in PURE])
def test_pure_rooms_read_no_clock_and_cache_nothing(module: str) -> None:
    assert bool(list(kept_time(tree_of(module)))) == (module in CACHED), MODULES[module]


@pytest.mark.parametrize(
    "line",
    [
        "import time",
        "from time import perf_counter",
        "import datetime",
        "from functools import lru_cache",
        "import functools\n@functools.cache\ndef f(): pass",
    ],
)
def test_the_clock_test_can_tell(line: str) -> None:
    assert list(kept_time(ast.parse(line)))
    assert not list(kept_time(ast.parse("from functools import partial\nself.time.observe(1)\nclock()")))


def test_core_stays_small() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (SOURCE / "core").glob("*.py"))
    assert lines <= CORE


UNCALLED = {
    "attend_plainly": "the plain twin that the Triton kernel is compared with",
    "run_floats": "one layer through the kernels, for comparison",
    "initialize_state": "Ray Serve calls it",
    "choose_replicas": "Ray Serve calls it",
    "record_autoscaling_stats": "Ray Serve calls it",
}
"""What neither the house nor recipes and docs call, and why it is there."""


def test_nothing_is_there_for_its_tests_alone() -> None:
    home = Path(__file__).parents[1]
    others = [*home.glob("*.md"), *home.glob("docs/*.md"), *home.glob("recipes/**/*.py"), *home.glob("examples/*.py")]
    words = Counter(word for path in [*paths(), *others] for word in re.findall(r"\w+", path.read_text()))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    alone = {
        node.name
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if isinstance(node, kinds) and words[node.name] == 1 and not node.decorator_list
    }
    assert {name for name in alone if not name.startswith("__")} == UNCALLED.keys()


FILES = {"open", "Path", "read_text", "write_text", "read_bytes", "write_bytes", "fdopen"}


def files_used(tree: ast.Module) -> Iterator[str]:
    """Files that are opened, and modules that open them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in FILES and not (name == "open" and isinstance(node.func, ast.Attribute)):
                yield f"{node.lineno}: {name}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if {"os", "io", "pathlib", "shutil", "tempfile", "json", "pickle"} & {*names}:
                yield f"{node.lineno}: {names}"


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in PURE])
def test_pure_rooms_open_no_file(module: str) -> None:
    assert not list(files_used(tree_of(module))), MODULES[module]


@pytest.mark.parametrize("line", ["open('x')", "Path('x').read_text()", "import json", "from pathlib import Path"])
def test_the_file_test_can_tell(line: str) -> None:
    assert list(files_used(ast.parse(line)))
    assert not list(files_used(ast.parse("from math import inf\nself.opened.append(1)")))


METHODS_BY_NAME = {
    "drafting.source_tree": {"recycling"},
    "models.adapters": {"s3d", "space"},
}
"""Modules that still name a drafter in a string, and which."""


WORDS = {"none", "auto", "context", "prediction"}
"""Names of drafters that are also ordinary words."""


def methods_named(tree: ast.Module) -> set[str]:
    """Names of drafters that stand in the code as strings."""
    found = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return found & ({*METHODS} - WORDS)


@pytest.mark.parametrize(
    "module", [module for module in MODULES if room(module) in ("core", "drafting", "models", "engine")]
)
def test_nobody_below_knows_a_method_by_name(module: str) -> None:
    assert methods_named(tree_of(module)) == METHODS_BY_NAME.get(module, set()), MODULES[module]


def too_long(tree: ast.Module, most: int = LONGEST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > most:
                yield f"{node.name} has {size} lines"


@pytest.mark.parametrize("module", MODULES)
def test_functions_fit_on_a_screen(module: str) -> None:
    assert not list(too_long(tree_of(module))), MODULES[module]


def test_the_step_fits_on_a_screen() -> None:
    assert len(MODULES["engine.step"].read_text("utf-8").splitlines()) <= STEP


def untyped(tree: ast.Module) -> int:
    """How often a module says `Any`, in its imports, too."""
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    return names.count("Any")


def test_what_is_not_typed_stands_at_the_edge_of_a_library() -> None:
    found = {module: count for module in MODULES if (count := untyped(tree_of(module)))}
    assert sum(found.values()) <= UNTYPED, found


def test_the_test_of_types_can_tell() -> None:
    assert untyped(ast.parse("from typing import Any\ndef f(x: dict[str, Any]) -> 'Any': ...")) == 2
    assert not untyped(ast.parse("def f(x: object) -> None:\n    'Any number of threads.'"))


def test_no_room_for_odds_and_ends() -> None:
    names = [part for module in MODULES for part in module.split(".")]
    assert not [name for name in names if re.fullmatch(r"_*(utils?|helpers?|misc|common)", name)]


def test_every_room_has_a_floor_and_every_floor_a_room() -> None:
    """What is new stands on the top floor only if it is named here; a floor whose room has gone is taken down."""
    rooms = {room(module) for module in MODULES if module}
    assert {*FLOORS} <= rooms
    assert rooms - {*FLOORS} == {
        "__main__",
        "async_llm",
        "cli",
        "hf",
        "integrations",
        "llm",
        "outputs",
        "prompts",
        "sampling",
        "serve",
        "testing",
    }
    assert {*QUIET, *PURE} <= {*FLOORS}


@pytest.mark.parametrize(
    ("module", "line", "fine"),
    [
        ("core.tree", "from selfdraft.types import Budget", True),
        ("core.tree", "from selfdraft.protocols import Target", False),
        ("core.tree", "from ..engine import step", False),
        ("core.tree", "import transformers.models", False),
        ("types", "from selfdraft.core.tree import Draft", False),
        ("types", "from selfdraft.errors import OptionError", True),
        ("errors", "from selfdraft.types import Budget", False),
        ("drafters.none", "from selfdraft.drafters.lookup import Lookup", False),
        ("drafters.none", "from selfdraft.drafters import lookup", False),
        ("drafters.none", "from . import lookup", False),
        ("drafters", "from selfdraft.drafters.lookup import Lookup", True),
        ("drafters.none", "from selfdraft.models.target import HFTarget", False),
        ("models.target", "from selfdraft.drafters.none import NoDrafter", False),
        ("models.target", "from transformers import PreTrainedModel", True),
        ("engine.engine", "from selfdraft.drafters import build", False),
        ("engine.engine", "def f():\n    from selfdraft.models.target import HFTarget", False),
        ("engine.engine", "import selfdraft.protocols", True),
        ("engine.engine", "import rich", False),
        ("", "from selfdraft.engine.engine import Engine", True),
        ("", "from transformers import AutoModel", False),
        ("engine.engine", "import selfdraft", False),
    ],
)
def test_the_floor_test_can_tell(module: str, line: str, fine: bool) -> None:
    names = [name for _, name in imports(module, ast.parse(line))]
    inside = [(name, inner(name)) for name in names]
    reasons = [outside(module, name) if ours is None else complaint(module, ours) for name, ours in inside]
    assert (not any(reasons)) == fine


@pytest.mark.parametrize(
    "line", ["global x", "os.environ['A']", "os.getenv('A')", "from os import environ", "print(1)"]
)
def test_the_noise_test_can_tell(line: str) -> None:
    assert list(noises(ast.parse(f"def f():\n    {line}")))
    assert not list(noises(ast.parse("def f(printer, table):\n    printer.print(table)")))
    assert list(too_long(ast.parse("def f():\n" + "    x = 1\n" * LONGEST)))
    assert not list(too_long(ast.parse("def f():\n" + "    x = 1\n" * (LONGEST - 1))))
