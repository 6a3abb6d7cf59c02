"""The stock model's own words: transformers' greedy decoding and plain full forwards, for comparison only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Model: TypeAlias = "PreTrainedModel"
Tokenizer: TypeAlias = "PreTrainedTokenizerBase"
"""For annotations only: importing this module brings no modelling code of transformers."""


def quiet() -> None:
    """No progress bars and notices of the libraries, for programs whose output is the text."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


@torch.inference_mode()
def greedy(model: Model, prompt: SequenceOf[int], most: int, ends: frozenset[int]) -> list[int]:
    """What `model.generate` says greedily to token ids: at most `most` new tokens, until an id of `ends`."""
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], device=device)
    with _own_settings(model) as settings:
        settings.update(max_new_tokens=most, eos_token_id=sorted(ends) or None)
        text = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    new: list[int] = text[0, len(prompt) :].tolist()
    return new


@contextmanager
def _own_settings(model: Model) -> Iterator[GenerationConfig]:
    """Fresh settings of greedy decoding. The checkpoint's, a repetition penalty or beams, are put away meanwhile."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()  # what stands here counts where a call says None
    try:
        yield GenerationConfig(do_sample=False, num_beams=1, pad_token_id=0)
    finally:
        model.generation_config = own


class _Noticing:
    """Takes what `generate` streams: the prompt first, then what each step added."""

    def __init__(self, notice: Callable[[], None]) -> None:
        self._notice, self._prompt = notice, True

    def put(self, tokens: Tensor) -> None:
        if not self._prompt:
            self._notice()
        self._prompt = False

    def end(self) -> None:
        pass


@torch.inference_mode()
def decode(
    model: Model,
    prompt: SequenceOf[int],
    count: int,
    options: Mapping[str, int],
    notice: Callable[[], None],
    sampled: Mapping[str, float] | None = None,
) -> list[int]:
    """`count` tokens of `model.generate`, whatever ends a text; `notice` is called when a step is done.

    `options` are generate's own: those of prompt lookup. `sampled`: its temperature and top_p, where it is not greedy.
    """
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    with _own_settings(model) as settings:
        settings.update(max_new_tokens=count, **options)
        if sampled:
            settings.update(do_sample=True, top_k=0, **sampled)  # its own default keeps 50 tokens
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=_Noticing(notice)
        )
    new: list[int] = text[0, len(prompt) :].tolist()
    return new


def folder_of(name: str | Path) -> Path:
    """The folder of a checkpoint that was loaded by this name: itself, or the hub's copy on this machine."""
    from transformers.utils import cached_file

    folder = Path(name).expanduser()
    return folder if folder.is_dir() else Path(str(cached_file(str(name), "config.json"))).parent


@torch.inference_mode()
def logit_gap(model: Model, prefix: SequenceOf[int], one: int, other: int) -> float:
    """Logit of `one` minus logit of `other` after `prefix`, by one full forward."""
    device = next(model.parameters()).device
    logits = model(torch.tensor([list(prefix)], device=device), use_cache=False).logits[0, -1].double()
    return float(logits[one] - logits[other])
