"""Where tests that need a real model find SmolLM2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from selfdraft.models.checkpoint.embedded import installed


def smollm2_or_skip() -> Path:
    """The checkpoint folder that SELFDRAFT_SMOLLM2 names, or the one that was pulled; else the test is skipped."""
    named = os.environ.get("SELFDRAFT_SMOLLM2")
    found = Path(named) if named else installed("smollm2")
    if found is None:
        pytest.skip("SmolLM2 is not on this machine: run 'selfdraft pull smollm2', or set SELFDRAFT_SMOLLM2")
    return found
