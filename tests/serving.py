"""A server for the tests: real sockets, the pocket model, in this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from selfdraft import LLM
from selfdraft.serve.app import Server
from selfdraft.serve.run import bind, config_of
from selfdraft.serve.settings import Settings
from selfdraft.serve.tracing import Tracer
from tests.clocks import Ticking


def wait_until(holds: Callable[[], bool]) -> None:
    """Return when it holds; what never does fails after ten minutes, whatever the machine is busy with."""
    for _ in range(60_000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("waited for ten minutes")


@dataclass(frozen=True)
class Served:
    """A server that listens."""

    url: str
    server: Server

    @property
    def quiet(self) -> bool:
        """Whether nothing runs and nothing waits, and all slots are free."""
        worker, engine = self.server.worker, self.server.llm.engine
        free = len(engine.slots.free) == self.server.llm.target.slots
        return free and not worker.busy and not engine.running and not engine.waiting


@contextmanager
def serving(llm: LLM, settings: Settings | None = None, tracer: Tracer | None = None) -> Iterator[Served]:
    """A server in a thread of its own; at the end it must be quiet."""
    server = Server(llm, settings or Settings(model_name="pocket", details=True), tracer)
    sock = bind("127.0.0.1", 0)
    running = uvicorn.Server(config_of(server))
    thread = threading.Thread(target=lambda: asyncio.run(running.serve(sockets=[sock])), daemon=True)
    server.worker.start()
    thread.start()
    wait_until(lambda: running.started)
    served = Served(f"http://127.0.0.1:{sock.getsockname()[1]}", server)
    try:
        yield served
        wait_until(lambda: served.quiet)
    finally:
        running.should_exit = True
        thread.join()
        server.worker.stop()
        sock.close()


def pocket(drafter: str = "auto", **options: int) -> LLM:
    """The pocket model with small pieces of prefill, so that a few words take several steps."""
    sizes = {"max_num_seqs": 4, "prefill_chunk": 16, "max_num_batched_tokens": 16, **options}
    return LLM("pocket", drafter=drafter, dtype="float32", clock=Ticking(), **sizes)  # type: ignore[arg-type]
