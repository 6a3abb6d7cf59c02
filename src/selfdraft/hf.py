"""Plug into transformers: `model.generate(**inputs, custom_generate=selfdraft.generate, drafter="lookup")`.

transformers prepares inputs, processors and stopping criteria as for its own decoding; the tokens then come from our
step. Greedy text is the text of transformers' greedy decoding; sampled text follows the same distribution, with noise
keyed by position instead of torch's global stream (`torch.manual_seed` still decides it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.drafters import build
from selfdraft.engine.loop import Engine
from selfdraft.errors import OptionError, RequestError
from selfdraft.llm import drafter_of
from selfdraft.models import load
from selfdraft.types import SamplingParams

UNSUPPORTED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "penalty_alpha")


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    drafter: str | None = None,
    speculative_config: Mapping[str, object] | None = None,
    exactness: Literal["bitwise", "token"] = "token",
    token_streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Called by `model.generate`; give `drafter`, `speculative_config`, `token_streamer` to that call.

    `input_ids` [batch, length], left-padded rows marked by `attention_mask`; returns [batch, longest], padded on the
    right. `token_streamer` is what transformers calls `streamer`: under that name a custom function never gets it.
    Errors: OptionError for what this decoding cannot honour, RequestError, UnsupportedModel.
    """
    config = generation_config or model.generation_config
    _check(model, config, input_ids, model_kwargs, token_streamer)
    name, options = drafter_of(drafter, speculative_config)
    target = load.open_target(model, slots=min(len(input_ids), 16), exactness=exactness)
    engine = Engine(target, build(name, target, options), slots=target.slots)
    sampling = _sampling(config, logits_processor, stopping_criteria, input_ids.device)
    mask = model_kwargs.get("attention_mask")
    prompts = [row[mask[i].bool()] if mask is not None else row for i, row in enumerate(input_ids)]
    sequences = [_open(p.tolist(), input_ids.shape[1], sampling, config, target.context) for p in prompts]
    if token_streamer is not None:
        token_streamer.put(input_ids.cpu())
    sent = 0
    for _ in engine.generate(sequences):
        if token_streamer is not None and sequences[0].written > sent:
            for token in sequences[0].output[sent:]:
                token_streamer.put(torch.tensor([token]))
            sent = sequences[0].written
    if token_streamer is not None:
        token_streamer.end()
    ids = _padded(input_ids, sequences, config)
    return GenerateDecoderOnlyOutput(sequences=ids) if config.return_dict_in_generate else ids


def _check(
    model: PreTrainedModel,
    config: GenerationConfig,
    input_ids: Tensor,
    model_kwargs: Mapping[str, Any],
    streamer: BaseStreamer | None,
) -> None:
    for name in UNSUPPORTED:
        if getattr(config, name, None):
            raise OptionError(
                f"{name}={getattr(config, name)!r} cannot be honoured by selfdraft.generate: leave it out"
            )
    if (config.num_beams or 1) > 1:
        raise OptionError(f"num_beams={config.num_beams}: selfdraft decodes one text per row; use num_beams=1")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise OptionError("past_key_values already holds tokens; selfdraft keeps its own cache: pass the whole prompt")
    if "inputs_embeds" in model_kwargs or input_ids.shape[1] == 0:
        raise RequestError("selfdraft.generate needs input_ids with at least one token in each row")
    if model.training:
        raise RequestError("the model is in training mode; call model.eval() first")
    if streamer is not None and len(input_ids) > 1:
        raise OptionError(f"a streamer carries one text, not {len(input_ids)}: leave out token_streamer or the batch")


def _sampling(
    config: GenerationConfig,
    processors: LogitsProcessorList | None,
    criteria: StoppingCriteriaList | None,
    device: torch.device,
) -> SamplingParams:
    """transformers' own processors and warpers, in its order; temperature 1 because a warper has applied it."""

    def wrapped(processor: Callable[[Tensor, Tensor], Tensor]) -> Callable[[SequenceOf[int], Tensor], Tensor]:
        return lambda path, scores: processor(torch.tensor([list(path)], device=device), scores[None])[0]

    def stops(criterion: Callable[..., Tensor]) -> Callable[[SequenceOf[int]], bool]:
        return lambda path: bool(torch.as_tensor(criterion(torch.tensor([list(path)], device=device), None)).all())

    ours = (MaxLengthCriteria, EosTokenCriteria)  # commit does these
    return SamplingParams(
        temperature=1.0 if config.do_sample else 0.0,
        max_tokens=2**30,
        logits_processors=tuple(wrapped(p) for p in processors or ()),
        stopping_criteria=tuple(stops(c) for c in criteria or () if not isinstance(c, ours)),
    )


def _open(prompt: list[int], padded: int, sampling: SamplingParams, config: GenerationConfig, context: int) -> Sequence:
    """A sequence that may write as many tokens as transformers would allow its padded row."""
    ends = config.eos_token_id
    eos = frozenset([ends] if isinstance(ends, int) else ends or [])
    seed = int(torch.randint(2**62, (1,))) if config.do_sample else 0
    if len(prompt) >= context:
        raise RequestError(f"a prompt of {len(prompt)} tokens leaves no room in the context of {context}")
    sequence = open_sequence(prompt, sampling, seed=seed, eos=eos, context=context)
    sequence.limit = min(context, len(prompt) + config.max_length - padded)
    return sequence


def _padded(input_ids: Tensor, sequences: list[Sequence], config: GenerationConfig) -> Tensor:
    """Prompts and outputs [batch, longest]; short rows end in padding."""
    longest = max(sequence.written for sequence in sequences)
    ends = config.eos_token_id
    fill = config.pad_token_id
    if fill is None:
        fill = (ends if isinstance(ends, int) else ends[0]) if ends else 0
    rows = [sequence.output + [fill] * (longest - sequence.written) for sequence in sequences]
    new = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
    return torch.cat([input_ids, new], dim=1)
