"""What the environment asks for."""

from __future__ import annotations

import os


def instructions() -> str:
    """SELFDRAFT_INSTRUCTIONS: what kernels may use (`models/runner/kernel_build.py`); 'native' when it is not set."""
    return os.environ.get("SELFDRAFT_INSTRUCTIONS") or "native"
