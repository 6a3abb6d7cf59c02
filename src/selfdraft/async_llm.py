"""The front door for web handlers: the same answers, awaited. Nothing here blocks the event loop.

from selfdraft import AsyncLLM
llm = AsyncLLM("smollm2")
async for piece in llm.stream("Tell me about rain."):
    print(piece.text, end="")
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, Unpack

from selfdraft.llm import LLM, Message, Piece, Prompt, RequestOutput
from selfdraft.models.reference import Model
from selfdraft.prompts import ChatOptions
from selfdraft.types import SamplingParams

T = TypeVar("T")
THREADS = 64
"""Calls that wait for answers at the same time; further ones wait for one of these."""


class AsyncLLM:
    """An `LLM` whose calls are awaited. Requests of all calls share the engine's steps.

    `model`: an LLM, or what `LLM` takes, with its options. A call that is cancelled (a client that has gone) aborts
    its requests before the next step. `llm` is the LLM itself; it may be used beside, from any thread.
    Errors: those of `LLM`.
    """

    def __init__(self, model: LLM | str | Path | Model, **options: object) -> None:
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)  # type: ignore[arg-type]
        self._threads = ThreadPoolExecutor(THREADS, "selfdraft")

    async def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        return_errors: bool = False,
    ) -> list[RequestOutput]:
        """As `LLM.generate`."""
        job = await self._run(lambda: self.llm.job(prompts, sampling_params, return_errors=return_errors))
        try:
            return await self._run(lambda: self.llm.finish(job))
        finally:
            self.llm.shared.abort(job.sequences)

    async def chat(
        self,
        messages: SequenceOf[Message],
        sampling_params: SamplingParams | None = None,
        **template: Unpack[ChatOptions],
    ) -> RequestOutput:
        """As `LLM.chat`."""
        ids = await self._run(lambda: self.llm.render(messages, **template))
        return (await self.generate([ids], sampling_params))[0]

    async def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> AsyncIterator[Piece]:
        """As `LLM.stream`. Leaving the loop early, or cancelling the task, aborts the request."""
        sequence = await self._run(lambda: self.llm.stream_request(prompt, sampling_params))
        pieces = self.llm.pieces(sequence)
        try:
            while (piece := await self._run(lambda: next(pieces, None))) is not None:
                yield piece
        finally:
            # the thread that waits for the next piece ends by this; closing its generator meanwhile would be an error
            self.llm.shared.abort([sequence])

    def close(self) -> None:
        """End the threads when their calls have ended. No call may follow."""
        self._threads.shutdown(wait=False)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
