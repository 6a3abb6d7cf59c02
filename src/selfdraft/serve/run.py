"""Runs the server: uvicorn, signals, draining."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from types import FrameType

import uvicorn

from selfdraft.errors import OptionError
from selfdraft.serve.app import Server

_log = logging.getLogger("selfdraft.serve")
BACKLOG = 2048
HEADERS = 16 * 1024
"""Most bytes of the headers of a request."""
POLL = 0.1
"""Seconds between two looks whether all requests have ended."""


class DrainingServer(uvicorn.Server):
    """uvicorn's server: after a first SIGTERM or SIGINT requests may end before it closes; a second one ends it now."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self.server = server
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain is not None:
            self.should_exit = self.force_exit = True
            return
        self.server.worker.draining = True
        _log.info(
            "ending: %d requests have %.0f seconds", self.server.worker.busy, self.server.settings.shutdown_timeout
        )
        loop = asyncio.get_running_loop()
        self._drain = loop.create_task(self._end())

    async def _end(self) -> None:
        worker, left = self.server.worker, self.server.settings.shutdown_timeout
        while worker.busy and left > 0 and not self.should_exit:
            await asyncio.sleep(POLL)
            left -= POLL
        await asyncio.to_thread(worker.stop)
        await asyncio.sleep(POLL)  # the last events of those that were aborted
        self.should_exit = True  # and not uvicorn's own way, which raises the signal again: this is a clean end

    async def watch(self) -> None:
        """End the process when the engine was given up: nothing else would mend it."""
        while not self.should_exit:
            if self.server.worker.failed is not None and self._drain is None:
                self.handle_exit(signal.SIGTERM, None)
            await asyncio.sleep(POLL)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        watching = asyncio.create_task(self.watch())
        try:
            await super().serve(sockets)
        finally:
            watching.cancel()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Errors: OptionError when the address is taken, or none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # by its number: asyncio sends small events at once (TCP_NODELAY) only over a socket that says it is TCP
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host.strip("[]"), port))
    except OSError as error:
        found.close()
        raise OptionError(f"--host {host} --port {port} cannot be used: {error.strerror or error}") from error
    return found


def config_of(server: Server) -> uvicorn.Config:
    """How uvicorn serves: bounded headers, no headers of its own, no lifespan."""
    return uvicorn.Config(
        server.app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        backlog=BACKLOG,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=HEADERS,
        http="h11",
        loop="asyncio",  # and not uvloop where some other package brings it: what is tested is what runs
    )


def run(server: Server, sock: socket.socket) -> int:
    """Serve until a signal comes. Returns the exit status: 1 when the engine failed."""
    config = config_of(server)
    server.worker.start()
    try:
        DrainingServer(config, server).run(sockets=[sock])
    finally:
        server.worker.stop()
    return 1 if server.worker.failed is not None else 0
