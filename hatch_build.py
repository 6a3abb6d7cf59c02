"""The build's hook: kernels in the wheel where SELFDRAFT_BUILD_KERNELS=1 asks for them and a compiler is there."""

from __future__ import annotations

import importlib.util
import os
import platform
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

RUNNER = Path("src/selfdraft/models/runner")


def _levels(root: Path) -> ModuleType:
    """The module by its path: the package's dependencies are not there when it is built."""
    spec = importlib.util.spec_from_file_location("selfdraft_levels", root / RUNNER / "levels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class KernelsHook(BuildHookInterface):
    """Adds a library for each level and tags the wheel; a compiler that fails only leaves them out."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before the wheel is put together."""
        levels = _levels(Path(self.root))
        if not levels.wanted(self.target_name, version, os.environ, platform.system(), platform.machine()):
            return
        self.folder = tempfile.TemporaryDirectory()
        source = Path(self.root) / RUNNER / "kernels" / "run.cpp"
        made = levels.compiled(source, Path(self.folder.name), self.app.display_warning)
        for name, path in made.items():
            build_data["force_include"][str(path)] = f"selfdraft/models/runner/kernels/built/{name}"
        if made:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called by hatchling when the wheel is written."""
        if hasattr(self, "folder"):
            self.folder.cleanup()
