"""Replicas on Ray Serve: the texts are those of one process, whatever becomes of the replicas. Real processes."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'selfdraft[ray]'")

from tests.replicas import KEY, ROOT, Replicas, mixed, plain
from tests.serving import wait_until

CHAT = "/v1/chat/completions"
AUTHORIZED = f"Authorization: Bearer {KEY}\r\n"


DEADLINES = {
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "60",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "60",
}
"""A replica that does not say within 0.1 s how long its queue is, as on a busy machine, is passed over by Ray: then a
turn of a conversation goes to the other one, which has not prefilled it."""


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    """Two replicas, started once for all tests; the last one ends them."""
    with Replicas(log=tmp_path_factory.mktemp("ray") / "log", env=DEADLINES) as found:
        yield found


def test_mixed_requests_have_the_texts_of_one_process(replicas: Replicas) -> None:
    asked = mixed(40)
    wanted = plain(asked)
    found = replicas.ask_all(asked)
    assert [(one.status, one.whole, one.text) for one in found] == [(200, True, wanted[one.number]) for one in asked]
    answered = [
        line.split('replica="')[1].split('"')[0]
        for line in replicas.client.get("/metrics").text.splitlines()
        if line.startswith("selfdraft_requests_total{") and 'outcome="ok"' in line
    ]
    assert {*answered} == replicas.names()
    assert len(answered) == 2


def test_turns_of_a_conversation_find_what_was_prefilled(replicas: Replicas) -> None:
    for word in ("one", "two", "three", "four"):
        messages = [{"role": "user", "content": f"{word}: say a long thing about dogs and cats and the sea."}]
        for turn in range(3):
            body = {"messages": messages, "max_tokens": 4}
            answer = replicas.client.post(CHAT, json=body).json()
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert bool(cached) == bool(turn)
            content = answer["choices"][0]["message"]["content"]
            messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "and then?"}]


def test_keys_and_limits_of_the_server_hold(replicas: Replicas) -> None:
    url = str(replicas.client.base_url)
    assert httpx.post(url + CHAT, json={}).json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(url + "/metrics").status_code == 401
    assert httpx.get(url + "/health").status_code == 200
    post, message = replicas.client.post, [{"role": "user", "content": "hi"}]
    assert post(CHAT, json={"messages": message, "max_tokens": 5000}).json()["error"]["param"] == "max_tokens"
    assert post(CHAT, content=b"x" * (2 * 2**20 + 1)).status_code == 413
    assert post(CHAT, json={"messages": message, "model": "another"}).status_code == 404
    assert post(CHAT, content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert replicas.client.get("/nowhere").status_code == 404


def test_an_answer_has_one_name(replicas: Replicas) -> None:
    for headers in ({}, {"x-request-id": "mine-1"}):
        response = replicas.client.get("/v1/models", headers=headers)
        (name,) = response.headers.get_list("x-request-id")
        assert name == headers.get("x-request-id", name)


def test_a_replica_that_is_killed_loses_no_request(replicas: Replicas) -> None:
    asked = mixed(24, seed=1, most=96)
    wanted, before = plain(asked), replicas.names()
    killed: list[int] = []

    def kill_one_and_wait() -> bool:
        if not killed:
            killed.append(replicas.pids()[0])
            os.kill(killed[0], signal.SIGKILL)
        now = replicas.names()
        return len(now) == 2 and now != before

    found = replicas.asking(asked, kill_one_and_wait)
    for one, outcome in found:
        assert outcome.whole
        assert len(outcome.ids) <= 1
        if outcome.error:
            assert (one.stream, outcome.error) == (True, "replica_lost")
            assert wanted[one.number].startswith(outcome.text)
        else:
            assert (outcome.status, outcome.text) == (200, wanted[one.number])


def test_a_rolling_restart_under_load_is_seen_by_no_client(replicas: Replicas) -> None:
    asked = mixed(24, seed=2)
    wanted, before = plain(asked), replicas.names()
    replicas.process.send_signal(signal.SIGHUP)
    found = replicas.asking(asked, lambda: replicas.says("all replicas are new"))
    assert not before & replicas.names()
    assert [(one.status, one.text) for _, one in found] == [(200, wanted[asked.number]) for asked, _ in found]


def test_a_client_that_goes_frees_its_slot(replicas: Replicas) -> None:
    body = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True}
    with replicas.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        next(response.iter_lines())
    wait_until(lambda: running(replicas) == 0)
    request = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{AUTHORIZED}Content-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", replicas.port), timeout=600) as sock:
        sock.sendall(f"{head}Content-Length: {len(request)}\r\n\r\n".encode() + request)
        wait_until(lambda: running(replicas) == 1 or bool(select.select([sock], [], [], 0)[0]))
    wait_until(lambda: running(replicas) == 0)


def running(replicas: Replicas) -> float:
    """Answers that are being generated, in all replicas."""
    lines = replicas.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("selfdraft_requests_running{"))


def test_serve_run_refuses_a_model_that_is_not_there_before_anything_is_started(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("serve")), "run", "selfdraft.integrations.ray:app"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT)))}
    found = subprocess.run([*command, f"model={tmp_path / 'model'}"], capture_output=True, text=True, env=env)
    assert found.returncode == 1
    told = f"Error: {tmp_path / 'model'}: there is no such folder; check the path, or give a hub name such as org/model"
    assert found.stderr.splitlines()[-1] == told
    assert "Traceback" not in found.stderr


def test_the_end_is_a_clean_one(replicas: Replicas) -> None:
    assert replicas.end() == 0
