"""Classes that vLLM loads as proposers, each with one of our drafters behind it.

They keep the interface of vLLM's `custom_class`: `propose` after every step, `load_model` once. A draft is never
longer than `num_speculative_tokens`; vLLM verifies it, so it can cost time, never the text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from selfdraft.core.rows import Rows
from selfdraft.drafters import build
from selfdraft.errors import OptionError
from selfdraft.integrations.chains import Chains
from selfdraft.integrations.vllm.requests import Requests, Tokens
from selfdraft.integrations.vllm.settings import HOOKED, WORKER, Settings, check_version
from selfdraft.integrations.vllm.worker import RunnerRequests
from selfdraft.protocols import DraftExtras
from selfdraft.types import PassVariant

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class NoPasses:
    """What a drafter of tokens sees of vLLM's model: its sizes. A pass is refused."""

    num_mask_ids = 0

    def __init__(self, vocab: int, context: int) -> None:
        self.vocab, self.max_length = vocab, context
        self.extras = DraftExtras(time.perf_counter)

    def forward(self, rows: Rows, short: PassVariant | None = None) -> Tensor:
        raise OptionError("this drafter runs the model; in vLLM only LayerSkip does")

    def keep(self, slot: int, base: int, order: SequenceOf[int]) -> None:
        """vLLM itself keeps what it verified."""

    def reuse(self, slot: int, source: int, count: int) -> None:
        """vLLM itself reuses what it has."""

    def next_boundary(self, position: int) -> int:
        return self.max_length


class Proposer:
    """A proposer with one of our drafters. `config` is vLLM's whole configuration.

    Options of the drafter stand in `additional_config["selfdraft"]`.
    Errors: LoadError for a version of vLLM that is not supported; OptionError, UnsupportedModel.
    """

    method: ClassVar[str]

    def __init__(self, config: VllmConfig) -> None:
        check_version()
        self.config = config
        self.settings = Settings.of(self.method, config)
        self.runner: GPUModelRunner | None = None
        model = config.model_config
        self.requests = self._requests(NoPasses(model.get_vocab_size(), model.max_model_len))

    def _requests(self, target: NoPasses) -> Requests:
        """The drafter, and the requests that it drafts for."""
        most, options = self.settings.num_speculative_tokens, dict(self.settings.options)
        if self.method == "merged":
            options.setdefault("recycling", False)
        drafter = build(self.method, target, {"num_speculative_tokens": most, **options})
        return Requests(Chains(drafter, most, target.vocab), most, target.max_length)

    def attach(self, runner: GPUModelRunner) -> None:
        """Called by our worker: the runner knows the names of requests, and what they carry."""
        self.runner = runner
        self.requests.known = RunnerRequests(runner)

    def load_model(self, *args: object, **kwargs: object) -> None:
        """The model is there. Errors: OptionError when our worker is needed and was not given."""
        if self.method in HOOKED and self.runner is None:
            raise OptionError(f"{type(self).__name__} needs our worker: give worker_cls={WORKER!r} (--worker-cls) too")

    def propose(
        self,
        sampled_token_ids: SequenceOf[SequenceOf[int]],
        num_tokens_no_spec: SequenceOf[int],
        token_ids_cpu: Tokens,
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """A draft for every row of the batch; vLLM calls this after every step.

        `sampled_token_ids`: what the step brought, by row; `num_tokens_no_spec`: tokens of each row;
        `token_ids_cpu` [rows, max_model_len]: their ids.
        """
        return self.requests.propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)


class Lookup(Proposer):
    """The longest match in the request's own text (`drafters/lookup.py`)."""

    method: ClassVar[str] = "lookup"


class Suffix(Proposer):
    """What followed the longest end of the text (`drafters/suffix.py`)."""

    method: ClassVar[str] = "suffix"


class Context(Proposer):
    """The likeliest path out of the request's own text (`drafters/context.py`)."""

    method: ClassVar[str] = "context"


class Prediction(Proposer):
    """The text that the request brought as `selfdraft_prediction` (`drafters/prediction.py`)."""

    method: ClassVar[str] = "prediction"


class Merged(Proposer):
    """The likeliest path over all sources that need no logits (`drafters/merged.py`)."""

    method: ClassVar[str] = "merged"


class LayerSkip(Proposer):
    """Passes of vLLM's own model with some sublayers left out (`drafters/layer_skip.py`)."""

    method: ClassVar[str] = "layer_skip"

    def _requests(self, target: NoPasses) -> Requests:
        from selfdraft.integrations.vllm.passes import ShortPasses

        model, most = self.config.model_config, self.settings.num_speculative_tokens
        layers = model.get_num_layers(self.config.parallel_config)
        self.passes = ShortPasses(target.vocab, target.max_length, layers)
        drafter = build(self.method, self.passes, {"num_speculative_tokens": most, **self.settings.options})
        return Requests(Chains(drafter, most, target.vocab), most, target.max_length, room=self.passes.room)

    def attach(self, runner: GPUModelRunner) -> None:
        super().attach(runner)
        self.passes.runner = runner

    def load_model(self, *args: object, **kwargs: object) -> None:
        super().load_model(*args, **kwargs)
        self.passes.check_model()
