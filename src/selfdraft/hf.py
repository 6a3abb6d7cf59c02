"""Plug into transformers: `model.generate(**inputs, custom_generate=selfdraft.generate, drafter="lookup")`.

transformers prepares inputs, processors and stopping criteria as for its own decoding; the tokens then come from our
step. Greedy text is the text of transformers' greedy decoding; sampled text follows the same distribution, with noise
keyed by position instead of torch's global stream (`torch.manual_seed` still decides it). A row that has ended is
padded; transformers lets rows run on until all have ended when there is no end-of-sequence id.

transformers hands neither `streamer` nor `tokenizer` to a custom function: stream with `token_streamer=`, and give
stop strings as `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria, logits_process
from transformers.generation.streamers import BaseStreamer

from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.drafters import build
from selfdraft.engine.engine import Engine
from selfdraft.errors import EngineError, OptionError, RequestError
from selfdraft.methods import drafter_of
from selfdraft.models import load
from selfdraft.models.adapters import MaskAdapter, load_adapters
from selfdraft.models.target import HFTarget
from selfdraft.types import LogitsProcessor, SamplingParams, StoppingCriterion

UNSUPPORTED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "penalty_alpha")
STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")
"""Processors that count on being called once per token, in order."""
SLOTS = 16
"""Most rows that are decoded at once; the others wait."""
KEPT = 2
"""Prepared targets that are kept with a model."""
_LEFT: WeakKeyDictionary[PreTrainedModel, list[tuple[tuple[object, ...], HFTarget]]] = WeakKeyDictionary()
_LEFT_LOCK = threading.Lock()
OURS = (MaxLengthCriteria, EosTokenCriteria)
"""Stopping criteria that `commit` does itself."""


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    drafter: str | None = None,
    speculative_config: Mapping[str, object] | None = None,
    adapters: SequenceOf[str | Path | MaskAdapter] = (),
    exactness: Literal["bitwise", "token"] = "token",
    token_streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Called by `model.generate`; give `drafter`, `speculative_config`, `adapters`, `token_streamer` to that call.

    `input_ids` [batch, length], left-padded rows marked by `attention_mask`; returns [batch, longest], padded on the
    right. Errors: OptionError for what this decoding cannot honour, RequestError, UnsupportedModel.
    """
    config = generation_config or model.generation_config
    processors, criteria = list(logits_processor or ()), list(stopping_criteria or ())
    _check(model, config, input_ids, model_kwargs, token_streamer)
    _check_processors(processors)
    name, options = drafter_of(drafter, speculative_config)
    with prepared(model, min(len(input_ids), SLOTS), exactness, adapters) as target:
        engine = Engine(target, build(name, target, options), slots=target.slots)
        mask = model_kwargs.get("attention_mask")
        sequences = []
        for i, row in enumerate(input_ids):
            prompt = row[mask[i].bool()] if mask is not None else row
            sampling = _sampling(config, processors, criteria, input_ids, i, len(prompt))
            sequences.append(_open(prompt.tolist(), input_ids.shape[1], sampling, criteria, config, target.max_length))
        _run(engine, sequences, input_ids, token_streamer)
    ids = _padded(input_ids, sequences, config)
    return GenerateDecoderOnlyOutput(sequences=ids) if config.return_dict_in_generate else ids


@contextmanager
def prepared(
    model: PreTrainedModel,
    slots: int,
    exactness: Literal["bitwise", "token"],
    adapters: SequenceOf[str | Path | MaskAdapter],
) -> Iterator[HFTarget]:
    """A proven target of this model, for one caller at a time: one that an earlier call left, or a new one.

    It is kept as long as the model lives, and the model is what it was: same modules, parameters, dtype and device.
    A second caller at the same moment gets a target of its own.
    """
    state = (exactness, *map(_trace_of, adapters), *_state_of(model))
    target = None
    with _LEFT_LOCK:
        left = _LEFT.setdefault(model, [])
        place = next((i for i, (kept, one) in enumerate(left) if kept == state and one.slots >= slots), None)
        if place is not None:
            target = left.pop(place)[1]
    if target is None:
        target = load.open_target(
            model,
            slots=slots,
            exactness=exactness,
            adapters=load_adapters(adapters, model),
            runner="plain",  # the roundings of transformers' own kernels, so that ties fall as in its own decoding
        )
    try:
        yield target
    finally:
        with _LEFT_LOCK:
            left.insert(0, (state, target))
            del left[KEPT:]


def _state_of(model: PreTrainedModel) -> Iterator[object]:
    """What makes a prepared target wrong when it changes."""
    yield model.config._attn_implementation
    for module in model.modules():
        yield id(module)
        for one in (*module._parameters.values(), *module._buffers.values()):
            if one is not None:
                yield id(one), one.data_ptr(), one.dtype, one.device


def _trace_of(adapter: str | Path | MaskAdapter) -> object:
    """An adapter's name: the object, or the folder and when it was last written."""
    if isinstance(adapter, MaskAdapter):
        return id(adapter)
    folder = Path(adapter).expanduser()
    return str(folder), *sorted((file.name, file.stat().st_mtime_ns) for file in folder.glob("*"))


def _run(engine: Engine, sequences: list[Sequence], input_ids: Tensor, streamer: BaseStreamer | None) -> None:
    """Decode all; a streamer is told the prompt and then every token. It ends even when a step fails."""
    sent = 0
    try:
        if streamer is not None:
            streamer.put(input_ids.cpu())
        for _ in engine.generate(sequences):
            if streamer is not None:
                for token in sequences[0].output[sent:]:
                    streamer.put(torch.tensor([token]))
                sent = sequences[0].num_output_tokens
    except EngineError as error:
        raise error.__cause__ or error from error  # what a processor raised, as transformers lets it through
    finally:
        if streamer is not None:
            streamer.end()


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


def _check_processors(processors: SequenceOf[object]) -> None:
    for processor in processors:
        if type(processor).__name__ in STATEFUL:
            raise OptionError(
                f"{type(processor).__name__} keeps state from call to call, which rejected drafts would spoil: "
                "leave out guidance_scale and SynthID watermarks"
            )


def _sampling(
    config: GenerationConfig,
    processors: SequenceOf[Callable[..., Tensor]],
    criteria: SequenceOf[Callable[..., object]],
    input_ids: Tensor,
    index: int,
    prompt_length: int,
) -> SamplingParams:
    """transformers' own processors and warpers, in its order; temperature 1 because a warper has applied it.

    They see row `index` as transformers shows it, with its padding, and at its place in the batch.
    """
    row, count, device = input_ids[index].tolist(), len(input_ids), input_ids.device

    def shown(path: SequenceOf[int]) -> Tensor:
        return torch.tensor([[*row, *path[prompt_length:]]], device=device)

    def wrapped(processor: Callable[..., Tensor]) -> LogitsProcessor:
        kind = type(processor)
        # the costly ones look at the scores of a row only; others may know their row by its place
        alone = kind.__module__ == logits_process.__name__ and kind.__name__.endswith("LogitsWarper")
        rows, place = (1, 0) if alone else (count, index)
        return lambda path, scores: processor(shown(path).repeat(rows, 1), scores.float().repeat(rows, 1))[place]

    def stops(criterion: Callable[..., object]) -> StoppingCriterion:
        def stop(path: SequenceOf[int]) -> bool:
            answers = torch.as_tensor(criterion(shown(path).repeat(count, 1), None)).reshape(-1)
            return bool(answers[index if len(answers) > 1 else 0])

        return stop

    return SamplingParams(
        temperature=1.0 if config.do_sample else 0.0,
        max_tokens=2**30,
        logits_processors=tuple(wrapped(p) for p in processors),
        stopping_criteria=tuple(stops(c) for c in criteria if not isinstance(c, OURS)),
    )


def _open(
    prompt: list[int],
    padded: int,
    sampling: SamplingParams,
    criteria: SequenceOf[object],
    config: GenerationConfig,
    context: int,
) -> Sequence:
    """A sequence that ends where transformers' criteria would end its padded row."""
    eos = {int(token) for c in criteria if isinstance(c, EosTokenCriteria) for token in c.eos_token_id.reshape(-1)}
    longest = min([c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)], default=config.max_length)
    seed = int(torch.randint(2**62, (1,))) if config.do_sample else 0
    if len(prompt) >= context:
        raise RequestError(f"a prompt of {len(prompt)} tokens leaves no room in the context of {context}")
    sequence = open_sequence(prompt, sampling, seed=seed, eos=frozenset(eos), context=context)
    sequence.max_length = min(context, len(prompt) + longest - padded)
    return sequence


def _padded(input_ids: Tensor, sequences: list[Sequence], config: GenerationConfig) -> Tensor:
    """Prompts and outputs [batch, longest]; short rows end in padding."""
    longest = max(sequence.num_output_tokens for sequence in sequences)
    ends = config.eos_token_id
    fill = config.pad_token_id
    if fill is None:
        fill = (ends if isinstance(ends, int) else ends[0]) if ends else 0
    rows = [sequence.output + [fill] * (longest - sequence.num_output_tokens) for sequence in sequences]
    new = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
    return torch.cat([input_ids, new], dim=1)
