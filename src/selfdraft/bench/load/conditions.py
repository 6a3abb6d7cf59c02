"""What the figures of a load mean nothing without: servers, requests, and the machine that the load comes from."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from importlib.metadata import version

from selfdraft.bench.load.client import Server
from selfdraft.models.machine import cpu_name
from selfdraft.types import JsonObject


def client_machine() -> JsonObject:
    """The machine of the load generator; a server on loopback shares it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpu_name(),
        "cores": cores,
        "python": platform.python_version(),
        "selfdraft": version("selfdraft"),
        "httpx": version("httpx"),
    }


def server_facts(server: Server) -> JsonObject:
    """A server and how it is asked; never the key."""
    return {
        "name": server.name,
        "url": server.address.url,
        "model": server.model,
        "tells_usage": server.tells_usage,
        "options": dict(server.options),
        "about": dict(server.about),
    }


def conditions(servers: SequenceOf[Server], plan: Mapping[str, object], date: str) -> JsonObject:
    """All conditions, for the rows and the JSON document."""
    servers_facts = [server_facts(server) for server in servers]
    return {"date": date, "client": client_machine(), "servers": servers_facts, **plan}
