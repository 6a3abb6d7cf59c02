"""Where tests that need a real model find SmolLM2."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest


def smollm2_or_skip() -> Path:
    """The checkpoint folder that SELFDRAFT_SMOLLM2 names, or the one that was pulled; else the test is skipped."""
    if named := os.environ.get("SELFDRAFT_SMOLLM2"):
        return Path(named)
    try:
        found = importlib.import_module("selfdraft.models.embedded").installed("smollm2")
    except ImportError:
        found = None
    if found is None:
        pytest.skip("SmolLM2 is not on this machine: set SELFDRAFT_SMOLLM2 to its folder")
    return Path(found)
