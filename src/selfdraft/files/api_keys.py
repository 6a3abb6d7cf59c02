"""API keys, as the server and its clients read them: from a file with one key a line, or from the environment."""

from __future__ import annotations

import os
from pathlib import Path

from selfdraft.errors import OptionError
from selfdraft.types import comma_separated

KEY_VARIABLE = "SELFDRAFT_API_KEY"
"""Holds one key, or several with commas between."""


def keys_in(file: Path) -> list[str]:
    """The keys of a file, at least one. Errors: OptionError."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--api-key-file {file} cannot be read: {error}") from error
    if not (keys := [line.strip() for line in lines if line.strip()]):
        raise OptionError(f"--api-key-file {file} holds no key: write one key a line")
    return keys


def keys_of_environment() -> list[str]:
    """The keys of the environment; none where the variable is not set."""
    return comma_separated(os.environ.get(KEY_VARIABLE, ""))
