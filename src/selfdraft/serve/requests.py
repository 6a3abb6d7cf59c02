"""The bodies that clients send, with the names of OpenAI and, where it has none, of vLLM; and their limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

TOP_LOGPROBS = 20
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Name = Annotated[str, StringConstraints(max_length=256)]
Text = Annotated[str, StringConstraints(max_length=2**24)]
TokenId = Annotated[int, Field(ge=0, le=2**31)]
IGNORED = ("user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "verbosity")
"""Options of OpenAI that change nothing here; they are taken so that clients which send them work."""


class Strict(BaseModel):
    """A model without fields that it does not know, and without numbers that are texts."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class SpeculativeConfig(Strict):
    """Which drafter answers this request, out of those that the operator allows; unset: the server's own."""

    method: Name | None = None
    task_profile: Name | None = None
    """The operator's name of a kind of text."""
    num_speculative_tokens: Annotated[int, Field(ge=1, le=256)] | None = None


class JsonSchema(Strict):
    name: Name = "answer"
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | bool, Field(alias="schema")] = True
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Part(Strict):
    type: Name
    text: Text | None = None
    image_url: Any = None
    file: Any = None
    input_audio: Any = None


class FunctionCall(Strict):
    name: Name
    arguments: Text = "{}"


class ToolCall(Strict):
    id: Name | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Strict):
    role: Annotated[str, StringConstraints(min_length=1, max_length=32, pattern=r"^[A-Za-z0-9_-]+$")]
    content: Text | list[Part] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Name | None = None
    refusal: Text | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None


class Function(Strict):
    name: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class Prediction(Strict):
    """Predicted outputs: what the answer will mostly be, such as the file that is to be edited."""

    type: Literal["content"]
    content: Text | list[Part]


class SamplingFields(Strict):
    """What both kinds of completions take."""

    model: Name | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**20)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024),
        ]
        | None
    ) = None
    bad_words: Annotated[list[Stop], Field(max_length=64)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=2**17)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    prediction: Prediction | None = None
    speculative_config: SpeculativeConfig | None = None
    draft_details: bool | None = None
    """Say who drafted each token, and the counts of this request; where the operator allows it."""
    draft_tree: bool | None = None
    """In a stream, the token tree of each step, too; where the operator allows it."""
    cache_salt: Name | None = None
    """Prompts with another salt share no prefilled prefix."""
    prompt_cache_key: Name | None = None
    """OpenAI's name of a cache salt."""
    user: Name | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Name | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: Name | None = None
    verbosity: Name | None = None
    request_id: Name | None = None


class ChatRequest(SamplingFields):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
        | Annotated[list[TokenId], Field(min_length=1, max_length=2**20)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=64)]
    )
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: None = None
    best_of: Literal[1] | None = None


class TokenizeRequest(Strict):
    """The body of POST /tokenize: a prompt, or messages."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """The body of POST /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**20)]
