"""The server as OpenAI's own client sees it: every answer equals the engine's plain decoding with that seed."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from selfdraft import LLM, SamplingParams
from selfdraft.drafting.mixing import Credit
from selfdraft.drafting.source_tree import SourceTree
from selfdraft.files.task_profiles import read_task_profile, write_task_profile
from selfdraft.serve.requests import ChatRequest
from selfdraft.serve.run import bind
from selfdraft.serve.settings import Settings
from tests.clocks import Ticking
from tests.serving import Served, pocket, serving
from tests.terminal import one_line, typed

STORY = [{"role": "user", "content": "Tell a story about a dog."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "add_person", "parameters": PERSON}}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    settings = Settings(model_name="pocket", details=True, drafters=("lookup", "merged"))
    with serving(pocket(max_num_seqs=4), settings) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


@cache
def plain() -> LLM:
    return pocket("none")


def said(messages: list[dict[str, str]], **options: Any) -> str:
    """What plain decoding answers."""
    return plain().chat(messages, SamplingParams(**options)).outputs[0].text


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_chat_whole_and_streamed(client: Any, temperature: float) -> None:
    wanted = said(STORY, max_tokens=40, temperature=temperature, seed=7)
    given = {"model": "pocket", "messages": STORY, "max_tokens": 40, "temperature": temperature, "seed": 7}
    answer = client.chat.completions.create(**given)
    assert answer.choices[0].message.content == wanted
    assert answer.usage.completion_tokens == 40
    assert answer.choices[0].finish_reason == "length"
    parts, reasons, usage = "", [], None
    for chunk in client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (parts, reasons) == (wanted, ["length"])
    assert usage is not None
    assert usage.total_tokens == answer.usage.total_tokens


def test_n_answers_have_the_seeds_that_follow_one_another(client: Any) -> None:
    answer = client.chat.completions.create(model="pocket", messages=STORY, max_tokens=20, temperature=0.9, seed=3, n=3)
    assert [one.message.content for one in answer.choices] == [
        said(STORY, max_tokens=20, temperature=0.9, seed=3 + i) for i in range(3)
    ]
    assert answer.usage.completion_tokens == 60
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="pocket", messages=STORY, max_tokens=20, temperature=0.9, seed=3, n=3, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [one.message.content for one in answer.choices]


def test_logprobs_are_those_of_plain_decoding(client: Any) -> None:
    (wanted,) = plain().chat(STORY, SamplingParams(max_tokens=12, logprobs=3)).outputs
    answer = client.chat.completions.create(
        model="pocket", messages=STORY, max_tokens=12, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs.content
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in wanted.logprobs], abs=1e-5)
    assert all(len(one.top_logprobs) == 3 for one in found)
    assert "".join(one.token for one in found) == wanted.text
    text = client.completions.create(model="pocket", prompt="Once upon", max_tokens=12, logprobs=2)
    logs = text.choices[0].logprobs
    assert len(logs.tokens) == len(logs.token_logprobs) == len(logs.top_logprobs) == 12
    assert logs.text_offset == [len("".join(logs.tokens[:i])) for i in range(12)]


def test_stop_strings_end_the_text_and_are_named(client: Any) -> None:
    whole = said(STORY, max_tokens=60)
    stop = whole.split()[5]
    answer = client.chat.completions.create(model="pocket", messages=STORY, max_tokens=60, stop=[stop])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].stop_reason == stop


def test_text_completions_of_several_prompts(client: Any) -> None:
    prompts = ["Once upon a time", "The little dog"]
    answer = client.completions.create(model="pocket", prompt=prompts, max_tokens=10, echo=True)
    wanted = [one.outputs[0].text for one in plain().generate(prompts, SamplingParams(max_tokens=10))]
    assert [one.text for one in answer.choices] == [a + b for a, b in zip(prompts, wanted, strict=True)]
    ids = plain().encode(prompts[0])
    answer = client.completions.create(model="pocket", prompt=ids, max_tokens=10)
    assert answer.choices[0].text == wanted[0]
    assert answer.usage.prompt_tokens == len(ids)


def test_a_json_schema_is_obeyed_and_equals_constrained_plain_decoding(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    given = {
        "model": "pocket",
        "messages": STORY,
        "max_tokens": 60,
        "response_format": form,
        "temperature": 0.7,
        "seed": 1,
    }
    answer = client.chat.completions.create(**given)
    jsonschema.validate(json.loads(answer.choices[0].message.content), PERSON)
    alone = client.chat.completions.create(**given, extra_body={"speculative_config": {"method": "none"}})
    assert alone.choices[0].message.content == answer.choices[0].message.content
    detailed = client.chat.completions.create(**given, extra_body={"draft_details": True})
    assert "grammar" in {token["source"] for token in detailed.choices[0].draft["tokens"]}


def test_a_json_object(client: Any) -> None:
    answer = client.chat.completions.create(
        model="pocket", messages=STORY, max_tokens=200, response_format={"type": "json_object"}, temperature=1.0, seed=5
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    assert answer.choices[0].message.content.startswith("{")


def test_a_function_that_must_be_called(client: Any) -> None:
    choice = {"type": "function", "function": {"name": "add_person"}}
    given = {"model": "pocket", "messages": STORY, "max_tokens": 80, "tools": [TOOL], "tool_choice": choice}
    answer = client.chat.completions.create(**given)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "add_person"
    jsonschema.validate(json.loads(call.function.arguments), PERSON)
    calls: list[Any] = []
    content = ""
    for chunk in client.chat.completions.create(**given, stream=True):
        for one in chunk.choices:
            calls += one.delta.tool_calls or []
            content += one.delta.content or ""
    assert [one.function.arguments for one in calls] == [call.function.arguments]
    assert not content
    answered = [
        *STORY,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": dict(call.function)}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "added"},
    ]
    answer = client.chat.completions.create(model="pocket", messages=answered, max_tokens=8, tools=[TOOL])
    assert answer.choices[0].message.content is not None


def test_a_prediction_is_drafted_and_counted(client: Any) -> None:
    wanted = said(STORY, max_tokens=60)
    merged = {"speculative_config": {"method": "merged"}}
    given = {"model": "pocket", "messages": STORY, "max_tokens": 60, "extra_body": merged}
    answer = client.chat.completions.create(**given, prediction={"type": "content", "content": wanted})
    details = answer.usage.completion_tokens_details
    assert answer.choices[0].message.content == wanted
    assert details.accepted_prediction_tokens > 30
    copied = [{"role": "user", "content": f"Repeat: {wanted}"}]
    both = client.chat.completions.create(
        **{**given, "messages": copied}, prediction={"type": "content", "content": wanted + wanted}
    )
    details = both.usage.completion_tokens_details
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens > 0, "beside other sources, too"
    wrong = client.chat.completions.create(**given, prediction={"type": "content", "content": "1 2 3 4 5 6 7"})
    assert wrong.choices[0].message.content == wanted
    assert wrong.usage.completion_tokens_details.accepted_prediction_tokens == 0


def test_a_prediction_is_read_by_the_drafter_of_the_request() -> None:
    """Also where the server's own drafter reads none: that one is not asked."""
    parts = [{"type": "text", "text": "there was"}]
    body = {"messages": STORY, "max_tokens": 24, "prediction": {"type": "content", "content": parts}}
    with serving(pocket("lookup", max_num_seqs=1), Settings(model_name="pocket", drafters=("merged",))) as own:
        for config in ({"method": "merged"}, {"method": "lookup"}):
            given = {**body, "speculative_config": config}
            answer = httpx.post(f"{own.url}/v1/chat/completions", json=given, timeout=600)
            assert answer.json()["choices"][0]["message"]["content"] == said(STORY, max_tokens=24)


def test_a_drafter_of_its_own(client: Any) -> None:
    wanted = said(STORY, max_tokens=24)
    for method in ("none", "lookup", "merged", "auto", "ngram"):
        answer = client.chat.completions.create(
            model="pocket", messages=STORY, max_tokens=24, extra_body={"speculative_config": {"method": method}}
        )
        assert answer.choices[0].message.content == wanted
    with pytest.raises(
        openai.BadRequestError, match="'space' is not offered here; there are auto, none, lookup, merged"
    ):
        client.chat.completions.create(
            model="pocket", messages=STORY, extra_body={"speculative_config": {"method": "space"}}
        )


def test_a_kind_of_text_by_its_name(tmp_path: Path) -> None:
    """A request names a task profile of the operator's; the server's drafter takes it, with the operator's options."""
    learning = pocket("merged")
    learning.generate("Once upon a time", SamplingParams(max_tokens=24))
    learning.save_task_profile(tmp_path / "stories.json", "stories")
    options = {"method": "auto", "num_speculative_tokens": 5}
    own = LLM("pocket", speculative_config=options, dtype="float32", clock=Ticking())
    profiles = {"stories": tmp_path / "stories.json"}
    settings = Settings(model_name="pocket", details=True, drafters=("lookup",), task_profiles=profiles)
    with serving(own, settings) as found:
        assert httpx.get(f"{found.url}/v1/info").json()["task_profiles"] == ["stories"]

        def ask(**config: object) -> httpx.Response:
            body = {"messages": STORY, "max_tokens": 24, "speculative_config": config}
            return httpx.post(f"{found.url}/v1/chat/completions", json=body, timeout=600)

        for config in ({"task_profile": "stories"}, {"method": "auto", "task_profile": "stories"}, {}):
            answer = ask(**config)
            assert answer.json()["choices"][0]["message"]["content"] == said(STORY, max_tokens=24)

        def tree(**config: object) -> SourceTree:
            body = ChatRequest.model_validate({"messages": STORY, "speculative_config": config})
            drafter: Any = found.server.service.chat(body, "somebody").call.drafter
            return drafter.inner.tree  # type: ignore[no-any-return]

        assert [tree(**one).most for one in ({}, {"task_profile": "stories"}, {"num_speculative_tokens": 3})] == [
            5,
            5,
            3,
        ]
        known = read_task_profile(tmp_path / "stories.json")
        fresh = tree(task_profile="stories", num_speculative_tokens=4).credit.learned()
        assert known is not None
        assert fresh.together == known.together != []
        assert tree(num_speculative_tokens=4).credit.learned().together == []
        for config, words in (
            ({"task_profile": "code"}, "there is no task profile 'code' here; there are: stories (--task-profile)"),
            ({"task_profile": "../stories.json"}, "there is no task profile '../stories.json' here"),
            ({"method": ""}, "drafter '' is not offered here; there are auto, none, lookup"),
            ({"method": "lookup", "task_profile": "stories"}, "task_profile"),
        ):
            refused = ask(**config)
            assert refused.status_code == 400
            assert words in refused.json()["error"]["message"]


def test_a_drafter_by_its_other_name() -> None:
    """The server was started with the name that other engines use; requests may use either."""
    with serving(pocket("ngram", max_num_seqs=1), Settings(model_name="pocket")) as found:
        for config in (
            {},
            {"num_speculative_tokens": 3},
            {"method": "ngram"},
            {"method": "lookup"},
            {"method": "plain"},
        ):
            body = {"messages": STORY, "max_tokens": 16, "speculative_config": config}
            answer = httpx.post(f"{found.url}/v1/chat/completions", json=body, timeout=600)
            assert answer.json()["choices"][0]["message"]["content"] == said(STORY, max_tokens=16)


def test_a_kind_of_text_where_another_drafter_than_the_server_s_own_reads_it(tmp_path: Path) -> None:
    write_task_profile(tmp_path / "stories.json", Credit().learned())
    profiles = {"stories": tmp_path / "stories.json"}
    settings = Settings(model_name="pocket", drafters=("merged",), task_profiles=profiles)
    with serving(pocket("lookup", max_num_seqs=1), settings) as found:
        for method, status in (("merged", 200), ("lookup", 400), (None, 400)):
            config = {"method": method, "task_profile": "stories"}
            body = {"messages": STORY, "max_tokens": 8, "speculative_config": config}
            answer = httpx.post(f"{found.url}/v1/chat/completions", json=body, timeout=600)
            assert answer.status_code == status
            if status == 400:
                assert "drafter 'lookup' has no option 'task_profile'" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["code"], "--task-profile code is not NAME=FILE"),
        (["a b=x.json"], "--task-profile a b=x.json: 'a b' is no name of a kind of text: give 1 to 64 of A-Z a-z 0-9"),
        (
            ["code={0}", "--drafter=lookup", "--allow-drafters=ngram"],
            "is read by the drafters merged, auto, casc",
        ),
        (["code=/nowhere.json"], "task_profile '/nowhere.json' cannot be read: No such file or directory"),
        (["code={0}", "code={0}"], "two --task-profile are called 'code'"),
    ],
)
def test_a_wrong_task_profile_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    given: list[str],
    words: str,
) -> None:
    write_task_profile(tmp_path / "task.json", Credit().learned())
    told = [one.format(tmp_path / "task.json") for one in given]
    options = [one if one.startswith("--") else f"--task-profile={one}" for one in told]
    one_line(typed(monkeypatch, capsys, "serve", "--model", "pocket", *options), words)


def test_details_say_who_drafted_each_token(served: Served) -> None:
    body = {"messages": STORY, "max_tokens": 40, "stream": True, "draft_details": True, "draft_tree": True}
    body["speculative_config"] = {"method": "merged"}
    text, told, trees = "", "", []
    with httpx.stream("POST", served.url + "/v1/chat/completions", json=body, timeout=600) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            for choice in chunk["choices"]:
                text += choice["delta"].get("content", "")
            told += "".join(token["text"] for token in chunk.get("draft", {}).get("tokens", ()))
            trees += [chunk["draft_tree"]] if "draft_tree" in chunk else []
    assert text == told == said(STORY, max_tokens=40)
    assert all(len(tree["tokens"]) == len(tree["parents"]) == len(tree["sources"]) for tree in trees)
    assert sum(len(tree["accepted"]) + 1 for tree in trees) >= 40
    assert any(tree["accepted"] for tree in trees)


def test_tokens_and_back(served: Served) -> None:
    text = "Once upon a time, été 🐕"
    found = httpx.post(served.url + "/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["tokens"] == plain().encode(text)
    back = httpx.post(served.url + "/detokenize", json={"tokens": found["tokens"]}).json()
    assert back["prompt"] == text
    chat = httpx.post(served.url + "/tokenize", json={"messages": STORY}).json()
    assert chat["tokens"] == plain().render(STORY)


def test_a_developers_message_is_the_systems_where_the_template_knows_no_other(served: Served) -> None:
    def ids(role: str) -> object:
        messages = [{"role": role, "content": "Be brief."}, *STORY]
        return httpx.post(served.url + "/tokenize", json={"messages": messages}).json()["tokens"]

    assert ids("developer") == ids("system") != ids("user")


def test_about_the_server(served: Served, client: Any) -> None:
    assert [one.id for one in client.models.list()] == ["pocket"]
    assert client.models.retrieve("pocket").max_model_len == plain().target.max_length
    for route in ("/health", "/ready", "/v1/info", "/openapi.json"):
        assert httpx.get(served.url + route).status_code == 200
    text = httpx.get(served.url + "/metrics").text
    assert "selfdraft_spec_decode_num_accepted_tokens_total" in text
    assert 'selfdraft_requests_total{outcome="ok"}' in text
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=STORY)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../../etc/passwd")


def test_the_document_of_the_interface_is_whole(served: Served) -> None:
    document = httpx.get(served.url + "/openapi.json").json()
    text = json.dumps(document)
    for name in re.findall(r"#/components/schemas/(\w+)", text):
        assert name in document["components"]["schemas"], name
    assert "temperature" in document["components"]["schemas"]["ChatRequest"]["properties"]
    schema = {**document["components"]["schemas"]["ChatRequest"], "components": document["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate({"messages": [{"role": "user", "content": "x"}], "temperature": 0.5})
    assert not validator.is_valid({"messages": [], "temperature": 9})


def test_the_next_turn_prefills_what_is_new_alone(client: Any) -> None:
    messages = [{"role": "user", "content": "Tell a long story about a dog, a cat and a bird. " * 8}]
    first = client.chat.completions.create(model="pocket", messages=messages, max_tokens=20)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Go on."},
    ]
    second = client.chat.completions.create(model="pocket", messages=messages, max_tokens=20)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached > 0.8 * first.usage.prompt_tokens
    assert second.choices[0].message.content == said(messages, max_tokens=20)
    salted = client.chat.completions.create(
        model="pocket", messages=messages, max_tokens=20, extra_body={"cache_salt": "other"}
    )
    assert salted.usage.prompt_tokens_details.cached_tokens == 0
    assert salted.choices[0].message.content == second.choices[0].message.content


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 10**6}, "more than the 4096"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "add stream: true"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "not among the tools"),
        ({"response_format": {"type": "json_schema"}}, "needs a json_schema"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, "it is a program"),
        ({"extra_body": {"best_of": 3}}, "best_of' is not an option"),
        ({"logit_bias": {"99999": 1}}, "99999"),
    ],
)
def test_a_contradiction_is_a_400_that_says_what(client: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(model="pocket", messages=STORY, **options)


def test_a_prompt_longer_than_the_context(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="pocket", messages=[{"role": "user", "content": "word " * 9000}])
    assert caught.value.code == "context_length_exceeded"


def test_small_events_are_not_held_back() -> None:
    """Without TCP_NODELAY a stream over a connection that is used again begins 40 ms late, all in one piece."""

    async def nodelay() -> int:
        seen: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            taken = writer.get_extra_info("socket")
            seen.set_result(taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = await asyncio.start_server(handle, sock=bind("127.0.0.1", 0))
        async with listening:
            _, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
            found = await seen
            writer.close()
        return found

    assert asyncio.run(nodelay())
