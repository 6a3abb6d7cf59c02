"""Files that are not part of the repository, for tests that want them: CONTRIBUTING.md says which and where from."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "SELFDRAFT_TEST_DATA"
WANTED = f"wants the folder that the environment variable {VARIABLE} names; see CONTRIBUTING.md"


def outside(name: str) -> Path:
    """The path of a file or folder below that folder; without the variable one that does not exist."""
    return Path(os.environ.get(VARIABLE, "/nonexistent")) / name
