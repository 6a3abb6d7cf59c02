"""Our worker for vLLM: the platform's own, which hands its model runner to our proposer. Nothing is patched."""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf
from functools import cache
from typing import TYPE_CHECKING

from selfdraft.errors import LoadError
from selfdraft.integrations.vllm.requests import Facts

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

ARGUMENT = "selfdraft_prediction"
"""In `SamplingParams(extra_args=...)`, or `vllm_xargs` of an HTTP request: the expected answer, a text or token ids."""
log = logging.getLogger("vllm.selfdraft")


class RunnerRequests:
    """The requests of a model runner, by name."""

    def __init__(self, runner: GPUModelRunner) -> None:
        self.runner = runner

    def names(self) -> SequenceOf[str]:
        """Names of the batch rows, in order."""
        found: SequenceOf[str] = self.runner.input_batch.req_ids
        return found

    def lives(self, name: str) -> bool:
        """Whether the request has not ended."""
        return name in self.runner.requests

    def facts(self, name: str) -> Facts:
        state = self.runner.requests[name]
        sampling = state.sampling_params
        most = sampling.max_tokens if sampling is not None else None
        limit = self.runner.max_model_len if most is None else state.num_prompt_tokens + most
        extra = (sampling.extra_args if sampling is not None else None) or {}
        return Facts(state.num_prompt_tokens, limit, self._prediction(extra.get(ARGUMENT)))

    def _prediction(self, given: object) -> tuple[int, ...]:
        """Token ids of a prediction. One that cannot be read is left out: it must not end the other requests."""
        if given is None:
            return ()
        if isinstance(given, str) and not self.runner.model_config.skip_tokenizer_init:
            from vllm.tokenizers import cached_tokenizer_from_config

            tokenizer = cached_tokenizer_from_config(self.runner.model_config)
            return tuple(tokenizer.encode(given, add_special_tokens=False))
        if isinstance(given, list | tuple) and all(type(token) is int and token >= 0 for token in given):
            return tuple(given)
        log.warning("%s of a request cannot be read as a text or a list of token ids: it is left out", ARGUMENT)
        return ()


@cache
def worker_class() -> type:
    """The worker class of this platform with our hook. Errors: LoadError on a platform without one."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Base
    elif current_platform.is_cuda_alike():
        from vllm.v1.worker.gpu_worker import Worker as Base
    else:
        raise LoadError(f"our worker for vLLM runs on cpu and cuda, not on {current_platform.device_type}")

    class Worker(Base):  # type: ignore[misc]
        """The platform's worker; a proposer of ours gets the model runner before the model is loaded."""

        def init_device(self) -> None:
            super().init_device()
            attach = getattr(getattr(self.model_runner, "drafter", None), "attach", None)
            if attach is not None:
                attach(self.model_runner)

    return Worker
