"""Ray Serve LLM with our proposers, in the Python that has vLLM and Ray: its check of arguments, and real texts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from selfdraft.bench.tasks import QUICK, load
from selfdraft.integrations.vllm.settings import PROPOSERS, WORKER
from selfdraft.types import JsonObject
from tests.smollm2 import smollm2_or_skip
from tests.test_vllm_engine import REPOSITORY, ask, environment

COUNT = 32
CHECKED = """
import json
from ray.serve.llm import LLMConfig
from selfdraft.integrations.vllm import engine_args

def read(**arguments):
    loading = {"model_id": "small", "model_source": "/nowhere"}
    config = LLMConfig(model_loading_config=loading, accelerator_config={"kind": "cpu"}, engine_kwargs=arguments)
    return config.get_engine_config().get_initialization_kwargs()

said = {name: read(**engine_args(name)) for name in NAMES}
said["options"] = read(**engine_args("suffix", num_speculative_tokens=4, factor=2.0))
try:
    read(speculativ_config={})
except ValueError as error:
    said["wrong"] = str(error)
print("\\n" + json.dumps(said))
"""
"""Ray sorts the arguments by the fields of vLLM's own classes, and refuses those that there are not."""


@pytest.fixture(scope="module")
def python() -> str:
    """The Python with vLLM and Ray."""
    python = os.environ.get("SELFDRAFT_VLLM_PYTHON")
    if not python:
        pytest.skip("SELFDRAFT_VLLM_PYTHON names no Python with vLLM: 'make test-vllm' makes one")
    code = "import importlib.util as u, sys; sys.exit(not (u.find_spec('ray') and u.find_spec('pyarrow')))"
    if subprocess.run([python, "-c", code]).returncode:
        pytest.skip("the Python with vLLM has no Ray: docs/vllm.md says how to add it")
    return python


def test_ray_takes_our_arguments(python: str) -> None:
    code = CHECKED.replace("NAMES", repr(sorted(PROPOSERS.values())))
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment(), timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    said = json.loads(run.stdout.splitlines()[-1])
    for name, drafter in PROPOSERS.items():
        assert said[drafter]["worker_cls"] == WORKER
        wanted = {"model": f"selfdraft.integrations.vllm.{name}", "num_speculative_tokens": 8}
        assert said[drafter]["speculative_config"] == wanted
    assert said["options"]["additional_config"] == {"selfdraft": {"factor": 2.0}}
    assert said["wrong"] == "Unknown engine argument: speculativ_config"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def served(python: str, folder: Path, *arguments: str) -> Iterator[str]:
    """The address of the recipe's server; ended with all that it started."""
    port = free_port()
    engine = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": True}
    engine["enable_prefix_caching"] = False
    command = [python, str(REPOSITORY / "recipes/ray_llm.py"), str(smollm2_or_skip()), "--name", "small"]
    command += ["--engine", json.dumps(engine), "--port", str(port), *arguments]
    own = {**environment(), "HF_HUB_OFFLINE": "1"}
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(command, env=own, stdout=said, stderr=said)
        try:
            for _ in range(900):
                if b"Ctrl-C ends" in (folder / "said").read_bytes():
                    break
                assert process.poll() is None, (folder / "said").read_text()[-3000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(120)


def post(url: str, body: JsonObject) -> JsonObject:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            said: JsonObject = json.load(answer)
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error
    return said


def accepted(port: int, wanted: float) -> float:
    """Accepted draft tokens, as vLLM counts them; Ray tells them every few seconds, so it is asked again."""
    found = 0.0
    for _ in range(60):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
            lines = page.read().decode().splitlines()
        counts = [line for line in lines if line.startswith("ray_vllm_spec_decode_num_accepted_tokens_total{")]
        found = float(counts[0].split()[-1]) if counts else 0.0
        if found >= wanted:
            break
        time.sleep(1)
    return found


def test_the_texts_are_those_of_vllm_itself(python: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_or_skip())
    prompts = []
    for group in QUICK:
        (item,) = load(f"quick/{group}", None, chat=True, limit=1)
        chat = [{"role": "user", "content": item.turns[0]}]
        prompts.append(list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]))
    plain = ask({}, alone=prompts, count=COUNT)["tokens"]
    greedy = {"model": "small", "max_tokens": COUNT, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    port = free_port()
    drafting = ["--drafter", "merged", "--options", '{"min_probability": 0.05}']
    with served(python, tmp_path, *drafting, "--metrics-port", str(port)) as url:
        for prompt, wanted in zip(prompts, plain, strict=True):
            body = {**greedy, "prompt": prompt, "vllm_xargs": {"selfdraft_prediction": wanted}}
            said = post(f"{url}/completions", body)["choices"][0]
            assert said["token_ids"] == wanted
        assert accepted(port, 100) >= 100  # the predictions were read: 8 answers of 32 tokens
