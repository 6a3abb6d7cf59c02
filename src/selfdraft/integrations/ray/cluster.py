"""Starting Ray on this machine, or joining a cluster of it."""

from __future__ import annotations

import logging
import math
import os

import ray

from selfdraft.cli import terminal
from selfdraft.errors import OptionError

PATIENT = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
"""Environment variables of Ray's processes, where the operator has not set them. By itself Ray kills its proxy when it
has not started within 5 seconds, and on a busy machine it may take longer."""


def cluster_address() -> str | None:
    """The cluster that Ray's own variable RAY_ADDRESS names; None where Ray is to be started here."""
    return os.environ.get("RAY_ADDRESS")


def start_ray(cpus: float) -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine, as if it had at least so many processors.

    Here the operator says how many processes run; Ray's count is no more than its own, and must not hold them up.
    Errors: OptionError.
    """
    address = cluster_address()
    sizes: dict[str, object] = {}
    if address is None:
        for name, value in PATIENT.items():
            os.environ.setdefault(name, value)  # Ray's processes inherit them
        sizes = {"num_cpus": max(os.cpu_count() or 1, math.ceil(cpus) + 1), "include_dashboard": False}
    logging.getLogger("ray").setLevel(logging.ERROR)
    with terminal.waiting("starting Ray"):
        try:
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **sizes)
        except Exception as error:  # Ray raises Exception itself where its processes do not start within 30 seconds
            how = f"joined at {address}" if address else "started"
            raise OptionError(f"Ray cannot be {how}: {last_line(error)}") from error
    for name in ("ray.serve", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


def last_line(error: object) -> str:
    """The last line of a text that says something, without the name of the class of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    name, _, words = last.partition(": ")
    return words if words and " " not in name else last
