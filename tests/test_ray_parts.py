"""What the adapter to Ray decides, without starting it: routes, conversations, scaling, metrics, options, manifests."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from selfdraft.cli.serve import ServeOptions
from selfdraft.errors import SelfdraftError
from selfdraft.integrations.ray import required
from selfdraft.integrations.ray.conversation import conversation_of, preferred
from selfdraft.integrations.ray.exported import merged
from selfdraft.integrations.ray.request_name import NamedByProxy
from selfdraft.serve.guard import Guard
from selfdraft.serve.metrics import Metrics
from selfdraft.serve.settings import Keys, Settings

ROOT = Path(__file__).parent.parent
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def named(path: str, body: object, key: str = "") -> str:
    return conversation_of(path, json.dumps(body).encode(), key)


def test_all_turns_have_the_name_of_their_conversation_and_no_other_has_it() -> None:
    first = [{"role": "system", "content": "be brief"}, user("hello")]
    later = [*first, {"role": "assistant", "content": "hi"}, user("and now?")]
    name = named(CHAT, {"messages": first})
    assert name
    assert named(CHAT, {"messages": later, "temperature": 1.0}) == name
    others = [
        named(CHAT, {"messages": [user("hello")]}),
        named(CHAT, {"messages": first}, "another key"),
        named(CHAT, {"messages": first, "prompt_cache_key": "a"}),
        named(TEXT, {"prompt": "hello"}),
    ]
    assert len({name, *others}) == 5
    assert named(CHAT, {"messages": first, "cache_salt": "a"}) == named(CHAT, {"messages": [], "cache_salt": "a"})
    long = "once upon a time " * 40
    assert named(TEXT, {"prompt": long}) == named(TEXT, {"prompt": [long + "there was"]})
    assert named(TEXT, {"prompt": [1] * 70}) == named(TEXT, {"prompt": [[1] * 64 + [2]]})


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b'{"messages": 3}', b'{"prompt": {}}', b"[" * 9999])
def test_what_is_no_request_has_no_conversation(body: bytes) -> None:
    assert conversation_of(CHAT, body) == conversation_of(TEXT, body) == ""


def test_a_conversation_stays_where_it_is_when_replicas_come_and_go() -> None:
    def first(key: str, names: str, **loads: int) -> str:
        return preferred(key, {name: loads.get(name, 0) for name in names}, 4)[0][0]

    keys = [f"conversation {number}" for number in range(400)]
    four = {key: first(key, "abcd") for key in keys}
    assert {name: sum(one == name for one in four.values()) >= 60 for name in "abcd"} == dict.fromkeys("abcd", True)
    moved = {key for key in keys if first(key, "abc") != four[key]}
    assert moved == {key for key in keys if four[key] == "d"}
    key = next(key for key in keys if four[key] == "a")
    assert first(key, "abcd", a=3) == "a"
    assert first(key, "abcd", a=4) == first(key, "bcd")
    full = preferred(key, dict.fromkeys("abcd", 4), 4)
    assert len(full) == 1
    assert {*full[0]} == {*"abcd"}
    assert preferred("", dict.fromkeys("ab", 4), 4) == [["a", "b"]]
    assert preferred(key, {}, 4) == []


def test_metrics_of_replicas_stay_apart() -> None:
    text = "# HELP selfdraft_steps_total Steps\n# TYPE selfdraft_steps_total counter\nselfdraft_steps_total %d\n"
    found = merged([("a", text % 3), ("b", text % 4)])
    assert found.count("# TYPE selfdraft_steps_total") == 1
    assert 'selfdraft_steps_total{replica="a"} 3.0' in found
    assert 'selfdraft_steps_total{replica="b"} 4.0' in found


def answered(headers: list[tuple[bytes, bytes]]) -> tuple[str, list[str]]:
    """The name of a request behind Ray's proxy, and the names in its answer before the proxy adds its own."""
    names: list[str] = []
    heads: list[Headers] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        names.append(scope["state"]["request_id"])
        await Response("text")(scope, receive, send)

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            heads.append(Headers(raw=message["headers"]))

    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    guarded = Guard(app, settings=Settings(no_auth=True), keys=Keys.of(()), metrics=Metrics())
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [(b"host", b"localhost"), *headers]}
    asyncio.run(NamedByProxy(guarded)(scope, nothing, send))
    assert heads[0]["x-content-type-options"] == "nosniff"
    return names[0], heads[0].getlist("x-request-id")


def test_a_request_has_the_name_of_the_proxy_which_writes_it_into_the_answer() -> None:
    assert answered([(b"x-request-id", b"7f-3.A_b")]) == ("7f-3.A_b", [])
    for given in ([], [(b"x-request-id", b'"}\n{"')], [(b"x-request-id", b"a" * 65)]):
        name, written = answered(given)
        assert re.fullmatch("[0-9a-f]{16}", name)
        assert written == []


def raising(error: Exception) -> Callable[[str], str]:
    def version(name: str) -> str:
        raise error

    return version


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (raising(PackageNotFoundError("ray")), "Ray is not installed: pip install 'selfdraft[ray]'"),
        (lambda name: "2.9.3", "Ray 2.9.3 is not supported, but 2.60 to below 3.0"),
        (lambda name: "3.0.0rc1", "Ray 3.0.0rc1 is not supported"),
    ],
)
def test_a_missing_or_unsupported_ray_is_one_line(
    version: Callable[[str], str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(required, "version", version)
    with pytest.raises(SelfdraftError, match=re.escape(words)) as said:
        required.check_ray(())
    assert "\n" not in str(said.value)


def test_a_missing_part_of_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(required, "version", lambda name: "2.60.0")
    with pytest.raises(SelfdraftError, match=r"without no_such_part: pip install 'selfdraft\[ray\]'"):
        required.check_ray(("json", "no_such_part"))


class TestWithRay:
    """What imports Ray, and does not start it."""

    pytestmark = pytest.mark.skipif(
        find_spec("ray") is None, reason="Ray is not installed: pip install 'selfdraft[ray]'"
    )

    def test_whichever_needs_more_replicas_decides(self) -> None:
        from selfdraft.integrations.ray.scaling import wanted

        assert wanted(8, 100, 4, 1000) == 2
        assert wanted(1, 3000, 4, 1000) == 3
        assert wanted(0, 0, 4, 1000) == 0

    def test_the_manifest_is_right_by_ray_s_own_schema_and_our_options(self) -> None:
        from ray.serve.schema import ServeDeploySchema

        from selfdraft.integrations.ray import app

        manifest = yaml.safe_load((ROOT / "deploy" / "rayservice.yaml").read_text())
        found = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
        (one,) = found.applications
        assert one.import_path == "selfdraft.integrations.ray:app"
        args = {**one.args, "api_key": "a-key-of-the-tests"}
        assert app(args)._bound_deployment.name == "gateway"

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            ({"modle": "pocket"}, "'modle' is not an option here; these are: adapter, allow_drafters"),
            ({"port": "1"}, "'port' is not an option here"),
            ({"max_batch": "many"}, "max_batch: "),
            ({"gateways": "0"}, "gateways='0' is not a whole number above 0"),
            ({"replicas": "2", "max_replicas": "1"}, "--max-replicas 1 is less than --replicas 2"),
            ({"target_tokens": "5"}, "give --max-replicas, too"),
            ({"host": "0.0.0.0"}, "no API key is set"),
        ],
    )
    def test_options_that_are_wrong_are_one_line(
        self, args: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from selfdraft.integrations.ray import app

        monkeypatch.delenv("SELFDRAFT_API_KEY", raising=False)
        with pytest.raises(SelfdraftError) as said:
            app(args)
        assert words in str(said.value)
        assert "\n" not in str(said.value)

    def test_the_command_serve_run_says_what_is_wrong_in_one_line(self) -> None:
        import click

        from selfdraft.integrations.ray import app

        wrong: dict[str, dict[str, object]]
        wrong = {"no such folder": {"model": "/nowhere/model"}, "not an option": {"modle": "pocket"}}
        for words, args in wrong.items():
            with click.Context(click.Command("run")), pytest.raises(click.ClickException, match=words) as said:
                app(args)
            assert "\n" not in said.value.message
        assert app({"model": "/nowhere/model"})  # elsewhere the replicas' machines have it

    def test_texts_become_options(self) -> None:
        from selfdraft.integrations.ray.application import options_from

        found = options_from({"model": "pocket", "max_batch": "4", "page": "false", "api_key": "aaaaaaaa, bbbbbbbb"})
        assert found == ServeOptions(model="pocket", max_batch=4, page=False, api_key=["aaaaaaaa", "bbbbbbbb"])

    @pytest.mark.parametrize("own", [None, "7"])
    def test_ray_waits_for_its_proxy_on_a_busy_machine(self, monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
        from selfdraft.integrations.ray import cluster

        (name,) = cluster.PATIENT
        seen: list[str | None] = []
        monkeypatch.setattr("ray.init", lambda *_, **__: seen.append(os.environ.get(name)))
        monkeypatch.setenv(name, "7")  # so that it is put back afterwards
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if own is None:
            monkeypatch.delenv(name)
        cluster.start_ray(1)
        assert seen == [own or "60"]

    def test_ray_that_does_not_start_in_time_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from selfdraft.integrations.ray import cluster

        def late(*_: object, **__: object) -> None:
            raise Exception("The current node timed out during startup.")  # it is of this very class

        monkeypatch.setattr("ray.init", late)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        with pytest.raises(SelfdraftError, match=r"^Ray cannot be started: The current node timed out during startup"):
            cluster.start_ray(1)

    def test_a_port_in_use_is_said_before_ray_is_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from selfdraft.integrations.ray import command

        monkeypatch.setattr(command, "start_ray", lambda cpus: pytest.fail("Ray was started"))
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(SelfdraftError, match=f"--port {port} cannot be used: Address already in use"):
                command.run_on_ray(ServeOptions(model="pocket", port=port))


def test_options_of_replicas_need_ray() -> None:
    from selfdraft.cli.serve import check_no_ray_options

    check_no_ray_options(ServeOptions())
    with pytest.raises(SelfdraftError, match="--max-replicas is for replicas on Ray Serve: give --ray, too"):
        check_no_ray_options(ServeOptions(max_replicas=2))
