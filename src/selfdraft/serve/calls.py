"""A call of the engine worker, awaited: the only place where the worker's thread and the event loop meet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from starlette.requests import Request

from selfdraft.serve.worker import Call, EngineWorker, Update


class AwaitedCall:
    """One call on its way. Leaving it early, however, aborts it before the next step."""

    def __init__(self, worker: EngineWorker, call: Call) -> None:
        self.worker, self.call = worker, call
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        call.notify = self._notify

    def submit(self) -> None:
        """Hand the call to the worker. Errors: those of `EngineWorker.submit`."""
        self.worker.submit(self.call)

    async def updates(self, pace: float = 0.0) -> AsyncGenerator[list[Update], None]:
        """What has come since the last time, until the end. `pace`: at least so many seconds apart, news or not.

        Errors: the call's own.
        """
        try:
            while True:
                if pace:
                    await asyncio.sleep(pace)
                else:
                    await self._news.wait()
                self._news.clear()
                done = self.call.done  # before reading: what comes between is read next time
                found = []
                while self.call.updates:
                    found.append(self.call.updates.popleft())
                if found or pace:
                    yield found
                if done and not self.call.updates:
                    if self.call.error is not None:
                        raise self.call.error
                    return
        finally:
            self.worker.cancel(self.call)

    async def end(self, request: Request) -> bool:
        """Wait for the end; False when the client has gone before, and the call was aborted. Errors: the call's own."""
        gone = asyncio.create_task(_disconnected(request))
        try:
            while not self.call.done:
                news = asyncio.create_task(self._news.wait())
                await asyncio.wait({news, gone}, return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
                self._news.clear()
                if gone.done() and not self.call.done:
                    return False
            if self.call.error is not None:
                raise self.call.error
            return True
        finally:
            gone.cancel()
            self.worker.cancel(self.call)

    def _notify(self) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self._loop.call_soon_threadsafe(self._news.set)


async def _disconnected(request: Request) -> None:
    """Return when the client has gone. The body must have been read: nothing else is told behind it."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
