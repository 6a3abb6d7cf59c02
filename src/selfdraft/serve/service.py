"""From a body to a call of the engine worker: prompts, sampling options, grammar, drafter, and whose it is."""

from __future__ import annotations

import copy
import json
import secrets
import threading
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from selfdraft.core.sequence import Sequence
from selfdraft.drafters import build
from selfdraft.errors import OptionError, RequestError, shown
from selfdraft.llm import LLM
from selfdraft.methods import ALIASES
from selfdraft.prompts import check_text, once, render_messages, text_of
from selfdraft.protocols import Drafter, needs_of
from selfdraft.serve import tools as calling
from selfdraft.serve.errors import ApiError
from selfdraft.serve.grammar import ANY_OBJECT, GrammarDrafter, Grammars
from selfdraft.serve.requests import ChatRequest, CompletionRequest, Message, SamplingFields, Tool
from selfdraft.serve.settings import Settings
from selfdraft.serve.worker import Call
from selfdraft.types import JsonObject

SAME_NAMED = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens"),
    *("seed", "logit_bias", "bad_words", "allowed_token_ids"),
)
"""Options of a body that are options of SamplingParams under the same name."""
COMPLETION_TOKENS = 16
"""max_tokens of a text completion when none is given, as with OpenAI."""


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: the call, and what its answer must look like."""

    call: Call
    model: str
    n: int
    stream: bool
    include_usage: bool
    logprobs: bool
    details: bool
    trees: bool
    echo: tuple[str, ...] = ()
    """Prompts to write before their answers."""
    names: frozenset[str] = field(default_factory=frozenset)
    """Functions that may be called."""
    form: str = ""
    forced_call: bool = False
    """The answer is a call and nothing else."""


class Asked(NamedTuple):
    """What a request asks of a drafter."""

    method: str
    num_speculative_tokens: int | None = None
    task_profile: str | None = None
    """The operator's name of a kind of text."""


class Service:
    """Makes calls. `settings` are the operator's. Safe from several threads; it never waits for the engine."""

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self.llm, self.settings = llm, settings
        # its own tokenizer: the engine decodes with the other one, and must not wait for a long prompt of somebody
        self._tokenizer = copy.deepcopy(llm.tokenizer)
        self._lock = threading.Lock()
        self._grammars: Grammars | None = None
        self._drafters: dict[Asked, Drafter] = {}
        allowed = [ALIASES.get(name, name) for name in settings.drafters]
        self.own = ALIASES.get(llm.drafter_name, llm.drafter_name)
        """The drafter of requests that name none."""
        self.methods = tuple(dict.fromkeys([self.own, "none", *allowed]))
        for name in self.methods[1:]:
            self._drafters[Asked(name)] = self._built(Asked(name))
        own = llm.engine.drafter
        self._drafters[Asked(self.own)] = own if self.own == "none" else GrammarDrafter(own)

    @property
    def drafter(self) -> Drafter:
        """The drafter of requests that ask for none."""
        return self._drafters[Asked(self.own)]

    def chat(self, body: ChatRequest, caller: str) -> Job:
        """The job of a chat completion. Errors: ApiError, RequestError, OptionError."""
        self._check_model(body.model)
        if body.tool_choice not in (None, "none", "auto") and not body.tools:
            raise ApiError(400, "tool_choice asks for a function, and there are no tools: give tools", "tool_choice")
        wants_tools = bool(body.tools) and body.tool_choice != "none"
        ids = self._render(body, wants_tools)
        asked = None
        if body.logprobs:
            asked = body.top_logprobs or 0
        elif body.top_logprobs is not None:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        limit = body.max_completion_tokens or body.max_tokens
        forced = wants_tools and body.tool_choice not in (None, "auto")
        grammar = self._grammar_of(body, forced)
        sequences = self._open([ids], body, limit, asked, grammar)
        names = frozenset(tool.function.name for tool in body.tools or ()) if wants_tools else frozenset()
        form = calling.form_of(self._template) if wants_tools else ""
        job = self._job(body, sequences, caller, asked is not None)
        return replace(job, names=names, form=form, forced_call=forced)

    def completion(self, body: CompletionRequest, caller: str) -> Job:
        """The job of a text completion. Errors: ApiError, RequestError, OptionError."""
        self._check_model(body.model)
        encoded = [self.encode(one) if isinstance(one, str) else one for one in _prompts_of(body)]
        if len(encoded) * (body.n or 1) > 64:
            raise ApiError(
                400, f"{len(encoded)} prompts with n={body.n} are more than 64 answers: send fewer", "prompt"
            )
        grammar = self._grammar_of(body, False)
        sequences = self._open(encoded, body, body.max_tokens or COMPLETION_TOKENS, body.logprobs, grammar)
        echo = tuple(self.decode(ids) for ids in encoded) if body.echo else ()
        return replace(self._job(body, sequences, caller, body.logprobs is not None), echo=echo)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Errors: RequestError."""
        check_text(text, "the prompt")
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer here: give token ids")
        with self._lock:
            ids = list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        return once(ids, text, self._tokenizer)

    def decode(self, ids: SequenceOf[int]) -> str:
        """Text of token ids, special tokens included. Errors: RequestError for an id that there is not."""
        if any(not 0 <= token < self.llm.target.vocab for token in ids):
            raise RequestError(f"a token id is outside the vocabulary of {self.llm.target.vocab}")
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer here")
        with self._lock:
            return str(self._tokenizer.decode([*ids], clean_up_tokenization_spaces=False))

    def render(
        self,
        messages: SequenceOf[Message],
        *,
        tools: SequenceOf[Tool] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Token ids of a conversation. Errors: RequestError, ApiError."""
        given = dict(variables or {})
        if "chat_template" in given:
            raise ApiError(400, "a client cannot give a chat template: it is a program", "chat_template_kwargs")
        plain = [_plain(message) for message in messages]
        if "developer" not in self._template:  # the name that newer models of OpenAI give to what the operator says
            plain = [one | {"role": "system"} if one["role"] == "developer" else one for one in plain]
        if tools and "tools" in self._template:
            given["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
        elif tools:
            plain = [{"role": "system", "content": calling.told_in_words(tools)}, *plain]
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer here, and no chat template: use /v1/completions with ids")
        with self._lock:
            return render_messages(
                self._tokenizer,
                plain,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=given,
            )

    @property
    def _template(self) -> str:
        return str(getattr(self._tokenizer, "chat_template", None) or "")

    def _render(self, body: ChatRequest, wants_tools: bool) -> list[int]:
        goes_on, begins = bool(body.continue_final_message), body.add_generation_prompt
        return self.render(
            body.messages,
            tools=body.tools or () if wants_tools else (),
            add_generation_prompt=not goes_on if begins is None else begins,
            continue_final_message=goes_on,
            variables=body.chat_template_kwargs,
        )

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.model_name:
            raise ApiError(
                404, f"this server has the model {self.settings.model_name!r} only", "model", code="model_not_found"
            )

    def _grammar_of(self, body: SamplingFields, forced: bool) -> str | None:
        """The grammar that an answer must obey; None: any text."""
        schema: Mapping[str, object] | bool
        if forced:
            assert isinstance(body, ChatRequest)
            assert body.tools is not None
            choice = body.tool_choice
            if not isinstance(choice, str) and choice is not None:
                known = [tool.function.name for tool in body.tools]
                if choice.function.name not in known:
                    raise ApiError(400, "tool_choice names a function that is not among the tools", "tool_choice")
            schema = calling.forced_schema(body.tools, choice if choice is not None else "required")
        elif body.response_format is None or body.response_format.type == "text":
            return None
        elif body.response_format.type == "json_object":
            schema = ANY_OBJECT
        elif body.response_format.json_schema is None:
            raise ApiError(400, "response_format json_schema needs a json_schema", "response_format")
        else:
            schema = body.response_format.json_schema.schema_
        if self._tokenizer is None:
            raise RequestError("structured output needs a tokenizer")
        with self._lock:
            if self._grammars is None:
                self._grammars = Grammars(self._tokenizer, self.llm.eos, self.llm.target.vocab)
        return self._grammars.json(schema)

    def _open(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        body: SamplingFields,
        limit: int | None,
        logprobs: int | None,
        grammar: str | None,
    ) -> list[Sequence]:
        """The sequences of all prompts, n each. Errors: RequestError, OptionError, ApiError."""
        most = self.settings.max_output_tokens
        if limit is not None and limit > most:
            raise ApiError(400, f"max_tokens={limit} is more than the {most} that this server allows", "max_tokens")
        given = {name: value for name in SAME_NAMED if (value := getattr(body, name)) is not None}
        drafter = self._drafter_of(body)
        if body.prediction is not None and needs_of(drafter).prediction:
            given["prediction"] = text_of(body.prediction.model_dump(exclude_none=True)["content"], "the prediction")
        seed = secrets.randbits(62) if body.seed is None else body.seed
        base = replace(self.llm.default_sampling_params(), max_tokens=limit or most, logprobs=logprobs, **given)
        found: list[Sequence] = []
        for ids in prompts:
            for number in range(body.n or 1):
                one = replace(base, seed=seed + number)
                if grammar is not None and self._grammars is not None:
                    processor = self._grammars.processor(grammar, len(ids))
                    one = replace(one, logits_processors=(*one.logits_processors, processor))
                found += self.llm.requests(ids, one, drafter=drafter)
        return found

    def _job(self, body: SamplingFields, sequences: list[Sequence], caller: str, logprobs: bool) -> Job:
        details, trees = bool(body.draft_details), bool(body.draft_tree)
        if (details or trees) and not self.settings.details:
            raise ApiError(403, "this server does not tell who drafted what: its operator can start it with --details")
        salt = body.cache_salt or body.prompt_cache_key or ""
        call = Call(
            sequences,
            caller=caller,
            owner=json.dumps([caller, salt]) if self.settings.reuses else None,
            drafter=self._drafter_of(body),
            wants_trees=trees,
            queue_timeout=self.settings.queue_timeout,
            timeout=self.settings.request_timeout,
        )
        usage = bool(body.stream_options and body.stream_options.include_usage)
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options is for streams: add stream: true", "stream_options")
        return Job(call, self.settings.model_name, body.n or 1, bool(body.stream), usage, logprobs, details, trees)

    def _drafter_of(self, body: SamplingFields) -> Drafter:
        """The drafter that a request asks for. Errors: ApiError for one that the operator does not allow."""
        config = body.speculative_config
        if config is None:
            return self.drafter
        method = self.own if config.method is None else config.method
        asked = Asked(ALIASES.get(method, method), config.num_speculative_tokens, config.task_profile)
        if asked.method not in self.methods:
            allowed = ", ".join(self.methods)
            what = f"drafter {shown(method)} is not offered here; there are {allowed} (the operator's --allow-drafters)"
            raise ApiError(400, what, "speculative_config")
        if asked.task_profile not in (None, *self.settings.task_profiles):
            known = ", ".join(self.settings.task_profiles) or "none"
            what = f"there is no task profile {shown(asked.task_profile)} here; there are: {known} (--task-profile)"
            raise ApiError(400, what, "speculative_config")
        with self._lock:
            if asked not in self._drafters:
                try:
                    self._drafters[asked] = self._built(asked)
                except OptionError as error:
                    raise ApiError(400, str(error), "speculative_config") from error
                for old in [one for one in self._drafters if one.num_speculative_tokens is not None][:-8]:
                    del self._drafters[old]
            return self._drafters[asked]

    def _built(self, asked: Asked) -> Drafter:
        """A drafter that obeys grammars; `none` is plain decoding and drafts nothing, not even what is forced.

        The server's own keeps the operator's options. Errors: OptionError for options that it does not have.
        """
        options = dict(self.llm.drafter_options if asked.method == self.own else {})
        if asked.num_speculative_tokens is not None:
            options["num_speculative_tokens"] = asked.num_speculative_tokens
        if asked.task_profile is not None:
            options["task_profile"] = self.settings.task_profiles[asked.task_profile]
        found = build(asked.method, self.llm.target, options)
        return found if asked.method == "none" else GrammarDrafter(found)


def _prompts_of(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a body: one or several, texts or token ids."""
    if isinstance(body.prompt, str):
        return [body.prompt]
    ids = [one for one in body.prompt if isinstance(one, int)]
    return [ids] if ids else [one for one in body.prompt if not isinstance(one, int)]


def _plain(message: Message) -> JsonObject:
    """A message as templates read it: the arguments of calls are objects."""
    found = message.model_dump(include={"role", "content", "name", "tool_call_id", "tool_calls"}, exclude_none=True)
    for call in found.get("tool_calls", ()):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return found


def _arguments(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
