"""The front door: puts target, drafter and engine together.

from selfdraft import LLM, SamplingParams
llm = LLM("path/to/checkpoint")
print(llm.generate("def add(a, b):", SamplingParams(max_tokens=64))[0].outputs[0].text)
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, Unpack

import torch

from selfdraft.core.detokenizer import TextStream
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.drafters import build, find, learned_by, memory_of, table
from selfdraft.drafters.lookahead import Lookahead
from selfdraft.engine.engine import Engine
from selfdraft.engine.shared import SharedEngine
from selfdraft.engine.slots import Reuse
from selfdraft.errors import EngineError, OptionError, PromptTooLong, RequestError, SelfdraftError, shown
from selfdraft.files.memory_file import fingerprint, load_memory, save_memory
from selfdraft.files.skip_sets import read_skip
from selfdraft.files.task_profiles import write_task_profile
from selfdraft.files.token_log import entry
from selfdraft.methods import drafter_of, splittable
from selfdraft.models.adapters import MaskAdapter
from selfdraft.models.checkpoint.end_ids import ends_of
from selfdraft.models.checkpoint.places import find_gguf
from selfdraft.models.device import chunk_on, dtype_on, file_bytes, pick_device
from selfdraft.models.kv_cache import KVCacheDtype
from selfdraft.models.reference import Model, Tokenizer
from selfdraft.models.start.opening import Wanted, open_model
from selfdraft.outputs import CompletionOutput as CompletionOutput
from selfdraft.outputs import Job, Piece, PieceReader, RequestOutput, completion
from selfdraft.parallel.lookahead import LookaheadRanks
from selfdraft.parallel.ranks import Ranks
from selfdraft.parallel.same import facts_of
from selfdraft.prompts import (
    ChatOptions,
    Message,
    ParsedPrompt,
    Prompt,
    check_text,
    naming,
    once,
    parse_prompt,
    render_messages,
    split_prompts,
)
from selfdraft.protocols import Drafter, needs_of
from selfdraft.sampling import bad_word_ids, generation_defaults, read_generation_config, spread, stop_tokens
from selfdraft.tune.machine import profile_of
from selfdraft.types import Clock, Quantization, SamplingParams, Stats, check_quantization, within

__all__ = ["LLM", "CompletionOutput", "Job", "Message", "Piece", "Prompt", "RequestOutput", "naming"]
_log = logging.getLogger("selfdraft")
SKIP_FILE = "selfdraft_skip.json"
"""The searched skip set of a checkpoint, in its folder: what `layer_skip` leaves out when it is told nothing else."""


def _sizes(slots: int, chunk: int, rows: int) -> dict[str, int]:
    """The sizes of an engine, by its own names. Errors: OptionError for one that is none."""
    for name, size in (("max_num_seqs", slots), ("prefill_chunk", chunk), ("max_num_batched_tokens", rows)):
        within(name, size, 1, 2**20)
    return {"slots": slots, "chunk": chunk, "rows": rows}


class LLM:
    """A model, a drafter and an engine.

    `model`: 'smollm2' (SmolLM2-135M-Instruct, downloaded on its first use), a local folder, a GGUF file, a hub name,
    'pocket' (a toy inside this package, for tests), or a loaded transformers model.
    `drafter`: a name of `selfdraft.drafters.table()`, auto by default; `speculative_config` adds its options, and may
    name it by `method`, as in vLLM. `exactness`: 'bitwise' computes in canonical shapes, so that drafted and plain
    decoding have the same bits where the machine allows it (`llm.exactness` says what was reached); 'token' takes
    natural shapes.
    `device`: where a checkpoint is loaded to: 'cpu', 'cuda', 'cuda:1', or 'auto': the first GPU with bfloat16 units
    that has room for it, else the CPU. Weights in blocks (GGUF, int8, int4) have kernels for CPUs alone: 'auto'
    keeps them there. A loaded model stays where it is. On a GPU the memory of `max_num_seqs` x `max_model_len` tokens
    is taken at the start (docs/gpu.md).
    `runner`: 'auto' runs passes on the fast runner where it works for this model and machine, 'plain' never, 'fast'
    or not at all; `llm.target.runs` says what was taken, and why.
    `quantization`: 'auto' runs a GGUF file's own blocks where the fast runner can, and anything else as it is; 'none'
    makes floats of all weights; 'int8' and 'int4' round the weights of any checkpoint when they are loaded. The model
    that is run is the one that drafts are exact to. Block weights round the rows they multiply to 8 bits.
    `kv_cache_dtype`: 'auto' stores keys and values of tokens as the model computes them; 'int8' as codes of 8 bits with
    one scale for each token and head, in about half the memory of bfloat16: the model that is decoded, plain and
    drafted alike, is then the one whose keys and values are so rounded.
    `adapters`: folders that `selfdraft train` wrote, or what `load_adapters` made of them, for the drafters s3d and
    space; those in the checkpoint's own folder (selfdraft_*) are found without being named.
    `lora`: the folder of a LoRA adapter of peft, merged into the weights when they are loaded.
    `max_num_seqs`: requests that run at the same time; `prefill_chunk`: tokens of one piece of a prompt, by default
    256 on a CPU and 2,048 on a GPU;
    `max_num_batched_tokens`: about how many rows one pass may have.
    `enable_prefix_caching`: a prompt that begins as an earlier request did (the next turn of a chat) prefills only what
    is new. The text stays the same. Slots that were used keep their memory.
    `cache`: what was proved and traced of a model at load is kept in the user's cache folder, and the next start is
    quick; False does it again and keeps nothing. A loaded transformers model is proved each time.
    `generation_config`: what a request without SamplingParams means. 'none' is greedy, as this library promises; 'auto'
    takes temperature, top_k, top_p, min_p and repetition_penalty of the checkpoint, as vLLM does; a folder, those of
    its generation_config.json. `default_sampling_params()` says them.
    `clock`: seconds that drafters and measurements read; one that is handed in makes a run repeatable.
    `ranks`: processes that decode together (`selfdraft.parallel.join`): each has the whole model and runs its share of
    the rows of `lookahead`, the default drafter then. All make the same calls in the same order (docs/scaling.md).
    Errors: LoadError, OptionError, RunnerUnavailable; RankError when ranks differ in model or options.
    """

    def __init__(
        self,
        model: str | Path | Model,
        *,
        drafter: str | None = None,
        speculative_config: Mapping[str, object] | None = None,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        tokenizer: Tokenizer | None = None,
        adapters: SequenceOf[str | Path | MaskAdapter] = (),
        lora: str | Path | None = None,
        exactness: Literal["bitwise", "token"] = "bitwise",
        runner: Literal["auto", "plain", "fast"] = "auto",
        quantization: Quantization = "auto",
        kv_cache_dtype: KVCacheDtype = "auto",
        max_num_seqs: int = 16,
        max_model_len: int | None = None,
        prefill_chunk: int | None = None,
        max_num_batched_tokens: int = 1024,
        enable_prefix_caching: bool = False,
        trust_remote_code: bool = False,
        cache: bool = True,
        generation_config: str | Path = "none",
        clock: Clock = time.perf_counter,
        ranks: Ranks | None = None,
    ) -> None:
        settings = read_generation_config(generation_config)
        self.ranks, self._owner = ranks, "llm" if enable_prefix_caching else None
        name, options = self._drafter(drafter, speculative_config)
        place = where_of(model, device, check_quantization(quantization))
        chunk = chunk_on(place) if prefill_chunk is None else prefill_chunk
        self._sizes = _sizes(max_num_seqs, chunk, max_num_batched_tokens)
        opening = Wanted(
            dtype=dtype_on(dtype, place, runner),
            tokenizer=tokenizer,
            adapters=adapters,
            lora=lora,
            exactness=exactness,
            runner=runner,
            quantization=quantization,
            slots=max_num_seqs,
            context=max_model_len,
            trust_remote_code=trust_remote_code,
            clock=clock,
            kv_cache_dtype=kv_cache_dtype,
            device=place if isinstance(model, str | Path) else None,
        )
        self._stock, self.tokenizer, self.target, folder = open_model(model, opening, cache=cache)
        self._take_facts(folder, settings)
        self._start(name, options)

    def _start(self, name: str, options: Mapping[str, object]) -> None:
        """Take the first drafter; all ranks have the same model and options. Errors: RankError."""
        self._take(name, options)
        if self.ranks is not None:
            told = facts_of(self.target, self.fingerprint, self._sizes, self._owner, self.drafter_name, options)
            self.ranks.agree(told)

    def _drafter(self, drafter: str | None, config: Mapping[str, object] | None) -> tuple[str, dict[str, object]]:
        """Name and options of a drafter; with ranks it is one whose rows they can share. Errors: OptionError."""
        name, options = drafter_of(drafter, config) if self.ranks is None else splittable(drafter, config)
        find(name, options)
        return name, options

    def _take_facts(self, folder: Path | None, settings: Mapping[str, object] | None) -> None:
        """What the checkpoint says of ends and sampling, and the skip set beside it, which `layer_skip` leaves out.

        Errors: OptionError.
        """
        self.stats = Stats()  # over all requests so far
        # guards `stats`, and the tokenizer: one of the Rust library raises when two threads use it at once
        self._lock = threading.RLock()
        self.exactness, facts = self.target.exactness, self.target.facts
        self.eos = ends_of(facts.ends, facts.vocab, self.tokenizer)
        self._defaults = generation_defaults(facts.generation if settings is None else settings)
        if folder is not None and (searched := folder / SKIP_FILE).is_file():
            self.target.tuned["layer_skip"] = {"skip_set": read_skip(searched, self.target.layers)}

    def _take(self, drafter: str, options: Mapping[str, object]) -> None:
        """From now on requests run with this drafter."""
        self.engine, self.drafter_name, self.drafter_options = self._engine(drafter, options), drafter, dict(options)
        self.shared = SharedEngine(self.engine, self._owner)

    @property
    def model(self) -> Model:
        """The stock model; after a second start it is loaded when it is first asked for."""
        return self._stock.model

    def _engine(self, drafter: str, options: Mapping[str, object]) -> Engine:
        if needs_of(find(drafter, options)).pass_cost and self.target.profile is None:
            self._measure()
        reuse: Reuse = "all" if self.target.rows_independent else "chunks"
        made = build(drafter, self.target, options)
        if self.ranks is None or not isinstance(made, Lookahead):
            return Engine(self.target, made, **self._sizes, reuse=reuse)
        window = made.sizes
        shared = LookaheadRanks(self.target, self.target.cache, self.ranks, width=window.width, size=window.size)
        engine = Engine(shared, made, **self._sizes, reuse=reuse)
        engine.choose = shared.choose
        return engine

    def _measure(self) -> None:
        """What passes cost: what `selfdraft tune` kept in the user's cache folder, or a coarse measurement now."""
        try:
            self.target.profile = profile_of(self.target, note=_log.warning)
        except OptionError as error:  # too short a context: rows are priced while decoding
            _log.info("%s", error)

    def engine_for(self, drafter: str | None, speculative_config: Mapping[str, object] | None = None) -> Engine:
        """Another engine over the same target, for comparisons in one thread; do not run two at the same moment.

        Errors: EngineError while requests run: two engines would write into the same slots.
        """
        with self.shared.idle("another engine cannot be made"):
            return self._engine(*self._drafter(drafter, speculative_config))

    def use(self, drafter: str | None = None, speculative_config: Mapping[str, object] | None = None) -> None:
        """Change the drafter; model, cache and exactness stay. Errors: EngineError while requests run."""
        name, options = self._drafter(drafter, speculative_config)
        with self.shared.idle("the drafter cannot be changed"):
            self._take(name, options)

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        return_errors: bool = False,
    ) -> list[RequestOutput]:
        """Answer all prompts, batched; one params for all, or one for each.

        A prompt is text, token ids (also an array), vLLM's dicts, or what a tokenizer of transformers gives.

        Any number of threads may call this, and have streams, at once: their requests share the engine's steps, and
        each has the text that it has alone.
        Errors: RequestError names the prompt by number; then none of them was run. EngineError names the prompt whose
        own step failed (NaN, every token banned, a processor that raises); the others are answered first, and are in
        `error.outputs`. With `return_errors` neither is raised: such a prompt has no outputs, and its `error`.
        """
        job = self.job(prompts, sampling_params, return_errors=return_errors)
        return self.finish(job)

    def job(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        return_errors: bool = False,
    ) -> Job:
        """The checked requests of a call to `generate`; `finish` runs them. Errors: RequestError."""
        batch = split_prompts(prompts)
        params = spread(sampling_params, len(batch), self._defaults)
        parsed: list[ParsedPrompt] = []
        found: list[list[Sequence] | SelfdraftError] = []
        for i, (prompt, one) in enumerate(zip(batch, params, strict=True)):
            given = ParsedPrompt()
            try:
                with naming(i):
                    given = parse_prompt(prompt)
                    found.append(self._open(given, one))
            except RequestError as error:
                if not return_errors:
                    raise
                found.append(error)
            parsed.append(given)
        return Job(parsed, found, return_errors)

    def finish(self, job: Job) -> list[RequestOutput]:
        """The answers of a job, when all have ended. Errors: as `generate`."""
        owners = {} if self._owner is not None else job.owners()
        self.shared.submit(job.sequences, owners)
        try:
            self.shared.run(job.sequences)
        finally:
            self._count(job.sequences)
        outputs = [self._output(i, *pair) for i, pair in enumerate(zip(job.prompts, job.requests, strict=True))]
        failed = next((one.error for one in outputs if one.error is not None), None)
        if isinstance(failed, EngineError) and not job.return_errors:
            failed.outputs = tuple(outputs)
            raise failed
        return outputs

    def _output(self, number: int, prompt: ParsedPrompt, request: list[Sequence] | SelfdraftError) -> RequestOutput:
        """The answers to one prompt, or what went wrong with it."""
        text, ids = prompt.text, prompt.ids or ()
        if isinstance(request, SelfdraftError):
            return RequestOutput(text, ids, (), request)
        ids = tuple(request[0].tokens[: request[0].prompt_length])
        for sequence in request:
            if (error := self.shared.errors.get(sequence)) is not None:
                named = EngineError(f"prompt {number}: {error}", sequence)
                named.__cause__ = error.__cause__ or error
                return RequestOutput(text, ids, (), named)
        return RequestOutput(text, ids, tuple(completion(i, sequence) for i, sequence in enumerate(request)))

    def _count(self, sequences: SequenceOf[Sequence]) -> None:
        with self._lock:
            for sequence in sequences:
                self.stats.add(sequence.stats)

    def chat(
        self,
        messages: SequenceOf[Message],
        sampling_params: SamplingParams | None = None,
        **template: Unpack[ChatOptions],
    ) -> RequestOutput:
        """Answer a conversation ({'role', 'content'} each) through the checkpoint's chat template.

        `template`: the options of `render`. Errors: RequestError; EngineError.
        """
        return self.generate([self.render(messages, **template)], sampling_params)[0]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[Piece]:
        """Answer one prompt piece by piece. Closing the iterator aborts the request.

        A piece holds what has come since the last one was read: one step, or more when other calls ran meanwhile. The
        last one has the finish reason.
        Errors: RequestError, before the first piece is asked for; EngineError when its own step fails.
        """
        return self.pieces(self.stream_request(prompt, sampling_params))

    def stream_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Sequence:
        """The one request of a stream, checked; `pieces` runs it. Errors: RequestError."""
        (sampling,) = spread(sampling_params, 1, self._defaults)
        if sampling.n != 1:
            raise RequestError(f"n={sampling.n}: a stream carries one answer; use generate for more")
        (sequence,) = self.requests(prompt, sampling)
        return sequence

    def pieces(self, sequence: Sequence) -> Iterator[Piece]:
        """The answer of one request piece by piece; see `stream`."""
        reader = PieceReader(sequence)
        self.shared.submit([sequence])
        try:
            while True:
                piece = self.shared.until(lambda: reader.moved, reader.read)
                if (error := self.shared.errors.get(sequence)) is not None:
                    raise EngineError(str(error), sequence) from error
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self.shared.abort([sequence])
            self._count([sequence])

    def render(
        self,
        messages: SequenceOf[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn; the options are vLLM's.

        `continue_final_message`: the answer goes on with the last message (with `add_generation_prompt=False`).
        `chat_template_kwargs`: variables of the template. Errors: RequestError, with the template's words.
        """
        with self._lock:
            return render_messages(
                self._needs_tokenizer("chat messages"),
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
            )

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; ids are checked and passed on. Errors: RequestError."""
        return self._encode(parse_prompt(prompt))

    def _encode(self, prompt: ParsedPrompt) -> list[int]:
        if prompt.ids is not None:
            ids = list(prompt.ids)
        else:
            text = prompt.text or ""
            ids = once(self._ids(text, "a text prompt"), text, self._needs_tokenizer("a text prompt"))
        outside = next((token for token in ids if not self._known(token)), None)
        if outside is not None:
            raise RequestError(f"token id {shown(outside)} is outside the vocabulary of {self.target.vocab}")
        return ids

    def decode(self, tokens: SequenceOf[int], *, skip_special_tokens: bool = True) -> str:
        """Text of tokens; special tokens are left out unless they are asked for."""
        if self.tokenizer is None:
            return ""
        with self._lock:
            said = self.tokenizer.decode(
                list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        return str(said)

    def _ids(self, text: str, what: str, **options: bool) -> list[int]:
        """Token ids of a text; `what` it is, for the error. Errors: RequestError without a tokenizer."""
        tokenizer = self._needs_tokenizer(what)
        check_text(text, what)
        with self._lock:
            return list(tokenizer(text, **options)["input_ids"])

    def requests(self, prompt: Prompt, sampling: SamplingParams, *, drafter: Drafter | None = None) -> list[Sequence]:
        """The n sequences of one prompt, checked and ready for an engine. Errors: RequestError.

        `drafter`: the one that will run them, if it is not the engine's.
        """
        return self._open(parse_prompt(prompt), sampling, drafter)

    def _open(self, prompt: ParsedPrompt, sampling: SamplingParams, drafter: Drafter | None = None) -> list[Sequence]:
        tokens = self._encode(prompt)
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token")
        if len(tokens) >= self.target.max_length:
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens; the context of {self.target.max_length} leaves room for "
                f"{self.target.max_length - 1} and an answer: shorten the prompt"
            )
        sampling, stops = self._readied(sampling, drafter or self.engine.drafter)
        decode = partial(self.decode, skip_special_tokens=sampling.skip_special_tokens)
        fresh = secrets.randbits(62) if self.ranks is None else self.ranks.seed()
        seed = fresh if sampling.seed is None else sampling.seed
        return [
            open_sequence(
                tokens,
                replace(sampling, n=1),
                seed=seed + i,
                eos=self.eos,
                context=self.target.max_length,
                stream=TextStream(decode) if self.tokenizer is not None else None,
                stop_tokens=stops,
            )
            for i in range(sampling.n)
        ]

    def _readied(self, sampling: SamplingParams, drafter: Drafter) -> tuple[SamplingParams, dict[int, str]]:
        """The options in token ids of this model, and stop strings that are special tokens. Errors: RequestError."""
        stops: dict[int, str] = {}
        if self.ranks is not None and sampling.logprobs is not None:
            raise RequestError("logprobs are not known to all ranks of lookahead parallelism: leave logprobs out")
        if sampling.stop:
            if self.tokenizer is None:
                raise RequestError("stop strings need a tokenizer; use stop_token_ids")
            with self._lock:
                stops = stop_tokens(sampling.stop, self.tokenizer, self._known)
        named = chain(
            sampling.logit_bias, sampling.allowed_token_ids or (), sampling.stop_token_ids, *sampling.bad_words_ids
        )
        outside = next((token for token in named if not self._known(token)), None)
        if outside is not None:
            raise RequestError(
                f"token id {shown(outside)} in the sampling options is outside {self.target.vocab} tokens"
            )
        if sampling.prediction:
            sampling = replace(sampling, prediction=self._prediction(sampling, drafter))
        if sampling.bad_words:
            words = bad_word_ids(
                sampling.bad_words, lambda word: self._ids(word, "bad_words", add_special_tokens=False)
            )
            sampling = replace(sampling, bad_words=(), bad_words_ids=(*sampling.bad_words_ids, *words))
        return sampling, stops

    def default_sampling_params(self) -> SamplingParams:
        """What a request without SamplingParams means: see `generation_config`."""
        return self._defaults

    def logged(self, prompt: SequenceOf[int], output: SequenceOf[int], sampling: SamplingParams) -> dict[str, object]:
        """A line of a token log, as `selfdraft replay` reads it."""
        (sequence,) = self.requests(prompt, replace(sampling, n=1))
        return entry(
            prompt,
            output,
            self.target,
            limit=sequence.max_length,
            ends=sequence.stop_ids,
            chunk=self.engine.chunk,
            tokenizer=self.fingerprint,
        )

    def load_memory(self, path: str | Path) -> None:
        """Read earlier outputs into the drafter's memory. Errors: RequestError, OptionError."""
        load_memory(Path(path), memory_of(self.engine.drafter), self.fingerprint)

    def save_memory(self, path: str | Path) -> None:
        """Write the drafter's memory of earlier outputs. Errors: RequestError, OptionError."""
        save_memory(Path(path), memory_of(self.engine.drafter), self.fingerprint)

    def save_task_profile(self, path: str | Path, name: str = "") -> None:
        """Write what the drafter learned about the text so far: counts, and no token of it.

        Later runs take it as the option `task_profile` of the drafters auto, merged and cascade. Errors: OptionError.
        """
        if not (isinstance(path, str | Path) and str(path) and isinstance(name, str)):
            raise OptionError(f"save_task_profile({path!r}, {name!r}): give a path to write to, and a name as a text")
        learned, tokens = learned_by(self.engine.drafter), self.stats.num_output_tokens
        write_task_profile(Path(path), learned, name=name, tokens=tokens, tokenizer=self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """Whose token ids these are: what files of token ids are checked by."""
        return fingerprint(self.tokenizer, self.target.vocab)

    def _prediction(self, sampling: SamplingParams, drafter: Drafter) -> tuple[int, ...]:
        """Token ids of a prediction. Errors: RequestError, also when the drafter reads none."""
        if not needs_of(drafter).prediction:
            able = ", ".join(name for name, factory in table().items() if needs_of(factory).prediction)
            raise RequestError(f"drafter {self.drafter_name!r} reads no prediction; these do: {able}")
        if isinstance(sampling.prediction, str):
            return tuple(self._ids(sampling.prediction, "a prediction as text", add_special_tokens=False))
        outside = next((token for token in sampling.prediction if not self._known(token)), None)
        if outside is not None:
            raise RequestError(f"token id {outside} in the prediction is outside {self.target.vocab} tokens")
        return sampling.prediction

    def _known(self, token: int) -> bool:
        return 0 <= token < self.target.vocab

    def _needs_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{what} needs a tokenizer: pass LLM(..., tokenizer=...) or give token ids")
        return self.tokenizer


def where_of(model: str | Path | Model, device: str, quantization: str) -> torch.device:
    """Where the model of these options runs. Errors: OptionError for a device that is not there."""
    if not isinstance(model, str | Path):
        weights = getattr(model, "parameters", None)
        if weights is None:
            return torch.device("cpu")  # no model at all: opening it says what it is
        here: torch.device = next(weights()).device
        if device != "auto" and here != pick_device(device):
            raise OptionError(f"device={device!r}: the model is loaded already, on {here}; move it with model.to()")
        return here
    if not str(model).strip():
        raise OptionError("model='' names none: give a folder, a GGUF file, a hub name, 'smollm2' or 'pocket'")
    blocks = quantization in ("int8", "int4") or (quantization == "auto" and find_gguf(model) is not None)
    if device == "auto" and blocks:
        return torch.device("cpu")
    return pick_device(device, file_bytes(Path(model).expanduser()))
