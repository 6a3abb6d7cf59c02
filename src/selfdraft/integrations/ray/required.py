"""Whether Ray is installed, with the parts and in a version that are used here."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from selfdraft.errors import OptionError

INSTALL = "pip install 'selfdraft[ray]'"
OLDEST, BELOW = (2, 60), (3, 0)
"""Versions that have all that is used: `DeploymentHandle.broadcast`, request routers and scaling rules as classes."""
SERVE_PARTS, DATA_PARTS = ("starlette", "aiohttp", "grpc"), ("pyarrow", "pandas")
"""What `ray[serve]` and `ray[data]` bring beside Ray itself."""


def check_ray(parts: tuple[str, ...] = SERVE_PARTS) -> None:
    """Errors: OptionError where Ray or one of `parts` is missing, or Ray's version is not supported."""
    try:
        found = version("ray")
    except PackageNotFoundError as error:
        raise OptionError(f"Ray is not installed: {INSTALL}") from error
    if missing := [name for name in parts if find_spec(name) is None]:
        raise OptionError(f"Ray is installed without {', '.join(missing)}: {INSTALL}")
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if not OLDEST <= numbers < BELOW:
        oldest, below = ".".join(map(str, OLDEST)), ".".join(map(str, BELOW))
        raise OptionError(f"Ray {found} is not supported, but {oldest} to below {below}: {INSTALL}")
