"""`selfdraft bench` as a user meets it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfdraft.bench import measure as measuring
from selfdraft.bench import run as running
from selfdraft.bench.tasks import QUICK
from selfdraft.core import verify as core_verify
from selfdraft.core.tree import Draft
from selfdraft.drafters import table
from tests.terminal import Done, one_line, typed
from tests.test_bench_tasks import write_data
from tests.test_llm import model, tokenizer

MISSING = "/nowhere/at/all"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template, and the data beside it."""
    path = tmp_path_factory.mktemp("tiny")
    model().save_pretrained(path)
    tokenizer(template=True).save_pretrained(path)
    write_data(path / "data")
    return path


@pytest.fixture
def bench(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `selfdraft bench` on the tiny model; later options win."""
    cheap = ("--model", folder, "--data-dir", folder / "data", "--max-new-tokens", 8, "--runs", 1, "--threads", 1)

    def call(*arguments: object, chat: str | None = "--no-chat") -> Done:
        form = [chat] if chat else []
        return typed(monkeypatch, capsys, "bench", *cheap, *form, "--drafters", "lookup", *arguments)

    return call


RECORD = {
    *("task", "drafter", "options", "prompts", "tokens", "seconds", "tokens_per_second", "plain_tokens_per_second"),
    *("speedup_vs_plain", "speedup_lowest", "speedup_highest", "decode_tokens_per_second", "decode_speedup_vs_plain"),
    *("first_token_seconds", "texts_equal", "prompts_different", "tokens_per_pass", "draft_acceptance_rate"),
    *("acceptance_by_position", "draft_tokens_per_pass", "draft_passes_per_token", "time_split"),
    *("ms_per_step", "host_ms_per_step"),
    *("weights_bytes", "cache_bytes", "working_bytes", "extra_bytes", "peak_bytes", "memory_vs_plain"),
    *("speed_memory_ratio", "scores", "unscored", "load_average_max", "conditions", "peer", "equal_tokens"),
    *("prompt_tokens_per_second", "peer_file", "texts_equal_own_plain", "prompts_different_own_plain"),
    *("decode_speedup_vs_own_plain", "cores", "machine_state", "resident_bytes"),
}


def test_json(bench: Callable[..., Done]) -> None:
    done = bench("--tasks", "gsm8k,mt-bench", "--drafters", "none,lookup,layer_skip", "--json")
    assert (done.code, done.err) == (0, "")
    assert [(record["task"], record["drafter"]) for record in done.said] == [
        (task, drafter) for task in ("gsm8k", "mt-bench") for drafter in ("none", "lookup", "layer_skip")
    ]
    for record in done.said:
        assert record.keys() == RECORD
        assert record["texts_equal"]
        assert record["speedup_vs_plain"] > 0
        assert record["tokens"] == 8
        assert sum(record["time_split"].values()) == pytest.approx(1, abs=1e-3)
        assert record["peak_bytes"] >= record["weights_bytes"] + record["cache_bytes"] > 0
    plain, lookup, skipping = done.said[:3]
    assert (plain["speedup_vs_plain"], plain["tokens_per_pass"], plain["extra_bytes"]) == (1.0, 1.0, 0)
    assert lookup["draft_passes_per_token"] == 0 < skipping["draft_passes_per_token"]
    assert plain["scores"].keys() == lookup["scores"].keys() == {"accuracy"}
    assert done.said[3]["unscored"] == "a judge model would be needed"
    facts = plain["conditions"]
    assert facts["machine"]["threads"] == 1
    assert (facts["max_new_tokens"], facts["temperature"], facts["exactness"]["level"]) == (8, 0.0, "bitwise")


def test_every_task_and_drafter_in_words(bench: Callable[..., Done]) -> None:
    done = bench("--tasks", "all", "--drafters", "all", "--max-new-tokens", 4, "--limit", 1)
    assert done.code == 0
    heads = re.findall(r"^([\w/-]+) \d+ prompts?, \d+ tokens?; ", done.out, re.MULTILINE)
    parts = ["mt-bench", "translation", "summarization", "qa", "math", "rag"]
    tasks = ["mt-bench", "gsm8k", "humaneval", "mbpp", "classeval", "cnn-dailymail", "xsum"]
    groups = [head for head in heads if head.startswith("quick")]
    assert groups
    assert heads == [*groups, "spec-bench", *(f"spec-bench/{part}" for part in parts), *tasks]
    for name in table():
        left_out = re.search(rf"left out: .*{name}", done.err) is not None
        assert len(re.findall(rf"^{name} .* yes$", done.out, re.MULTILINE)) == (0 if left_out else len(heads))
    assert "humaneval 1 prompt, 4 tokens; pass@1 0.000; weights" in done.out
    assert re.search(r"^xsum 1 prompt, 4 tokens; rouge1 \d\.\d{3}, rouge2", done.out, re.MULTILINE)
    assert max(map(len, (line for line in done.out.splitlines() if line.endswith(" yes")))) <= 80


def test_options_under_labels(bench: Callable[..., Done]) -> None:
    short = json.dumps({"method": "lookup", "name": "short", "num_speculative_tokens": 1})
    suffix = json.dumps({"method": "suffix"})
    done = bench("--tasks", "gsm8k", "--speculative-config", short, "--speculative-config", suffix, "--json")
    assert [record["drafter"] for record in done.said] == ["none", "lookup", "short", "suffix"]
    assert done.said[2]["options"] == {"num_speculative_tokens": 1}
    assert len(done.said[2]["acceptance_by_position"]) <= 1


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_goes_on_where_it_was(bench: Callable[..., Done], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    options = ("--tasks", "mbpp", "--output", path, "--json")
    first = bench(*options, "--limit", 1).said
    whole = path.read_bytes()
    assert [(row["key"], row["drafter"]) for row in rows_of(path)] == [("11", "none"), ("11", "lookup")]
    again = bench(*options, "--limit", 1).said  # nothing was timed, so there is no state of the machine beside it
    assert again == [record | {"machine_state": None} for record in first]
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-20])  # torn
    bench(*options)
    assert [(row["key"], row["drafter"]) for row in rows_of(path)] == [
        *(("11", "none"), ("11", "lookup"), ("12", "none"), ("12", "lookup"))
    ]
    before = path.read_bytes()
    bench(*options, "--drafters", "suffix")
    assert path.read_bytes().startswith(before)
    assert [(row["key"], row["drafter"]) for row in rows_of(path)[4:]] == [("11", "suffix"), ("12", "suffix")]
    for change in (["--max-new-tokens", 6], ["--seed", 5], ["--runs", 2], ["--exactness", "token"], ["--chat"]):
        count = len(rows_of(path))
        bench(*options, *change)
        assert len(rows_of(path)) == count + 4, change


def test_parts_share_rows_with_the_whole(bench: Callable[..., Done], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert bench("--tasks", "spec-bench", "--output", path).code == 0
    count = len(rows_of(path))
    done = bench("--tasks", "spec-bench/translation", "--output", path, "--json")
    assert [(record["task"], record["prompts"]) for record in done.said] == [("spec-bench/translation", 2)] * 2
    assert len(rows_of(path)) == count == 16


def test_seeds_by_prompt_and_sample(bench: Callable[..., Done], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    options = ("--tasks", "mbpp", "--temperature", 1.5, "--seed", 7, "--samples", 3, "--output", path)
    done = bench(*options, "--json")
    assert done.said[0]["scores"].keys() == {"pass@1", "pass@3"}
    plain = [row for row in rows_of(path) if row["drafter"] == "none"]
    assert [row["seed"] for row in plain] == [7, 8]
    assert all(len(row["texts"]) == len(row["scores"]["passed"]) == 3 for row in plain)
    assert len({text for row in plain for text in row["texts"]}) == 6
    assert all(row["texts_equal"] for row in rows_of(path))


def test_later_turns_follow_the_models_own_answers(
    bench: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    whole = running.Question.request

    def request(self: running.Question, sample: int = 0) -> Any:
        asked.append(list(self.history))
        return whole(self, sample)

    monkeypatch.setattr(running.Question, "request", request)
    path = tmp_path / "rows.jsonl"
    for chat in ([], ["--chat"]):
        asked.clear()
        done = bench("--tasks", "mt-bench", "--turns", "all", "--output", path, "--json", *chat)
        assert done.said[0]["prompts"] == 2
        rows = [row for row in rows_of(path) if row["drafter"] == "none"][-2:]
        assert [row["key"] for row in rows] == ["81", "81#2"]
        assert asked[0] == ["the dog"]
        assert asked[-1] == ["the dog", rows[0]["texts"][0], "and the hill"]


def test_a_file_of_prompts(bench: Callable[..., Done], tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "the dog"}\n{"prompt": "the hill"}\n')
    done = bench("--tasks", path, "--json")
    assert (done.said[0]["task"], done.said[0]["prompts"], done.said[0]["scores"]) == (str(path), 2, {})


def test_a_liar_is_told_on(bench: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = core_verify.walk

    def lie(draft: Draft, say: Any) -> tuple[list[int], list[int]]:
        path, tokens = honest(draft, say)
        return path, [*tokens[:-1], (tokens[-1] + 1) % 300] if draft.num_candidates else tokens

    monkeypatch.setattr(core_verify, "walk", lie)
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "the dog ran over the hill and the dog sat"}\n')
    options = ("--tasks", path, "--max-new-tokens", 30, "--output", tmp_path / "rows.jsonl")
    done = bench(*options, "--json")
    plain, lookup = done.said
    assert done.code == 1
    assert (plain["texts_equal"], plain["speedup_vs_plain"]) == (True, 1.0)
    assert (lookup["texts_equal"], lookup["speedup_vs_plain"], lookup["prompts_different"]) == (False, None, ["1"])
    assert rows_of(tmp_path / "rows.jsonl")[1]["first_difference"] >= 0
    words = bench(*options)
    assert words.code == 1
    assert re.search(r"^lookup .* - .* NO$", words.out, re.MULTILINE)
    assert "some texts DIFFER from plain decoding" in words.err


def test_pictures(bench: Callable[..., Done], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    place = tmp_path / "new" / "pictures"
    done = bench("--tasks", "gsm8k,spec-bench", "--pictures", place, "--drafters", "lookup,suffix")
    assert done.code == 0
    assert sorted(path.name for path in place.iterdir()) == ["acceptance.png", "speedup.png", "time.png"]
    for path in place.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"wrote {path}" in done.err


def test_prompts_that_do_not_fit_are_skipped(bench: Callable[..., Done], tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "the dog ran " * 200}) + '\n{"prompt": "the dog"}\n')
    done = bench("--tasks", path, "--json")
    assert (done.code, done.said[0]["prompts"]) == (0, 1)
    assert done.err.startswith(f"skipped: {path}, 1: the prompt has ")
    path.write_text(json.dumps({"prompt": "the dog ran " * 200}))
    done = bench("--tasks", path, "--json")
    assert (done.code, done.out) == (2, "")
    assert "error: nothing was measured: none of the prompts fits into the context of 256" in done.err


def interrupting(after: int) -> Callable[..., Any]:
    whole = measuring.measure
    calls: list[int] = []

    def measure(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    return measure


def test_an_interrupt_keeps_what_is_finished(
    bench: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(running, "measure", interrupting(1))
    done = bench("--tasks", "mbpp", "--output", path)
    assert (done.code, done.out) == (130, "")
    assert done.err == f"{path} keeps 2 rows; the same command goes on from there\ninterrupted\n"
    assert [row["key"] for row in rows_of(path)] == ["11", "11"]


def test_a_full_disk(bench: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    bench("--tasks", "mbpp", "--limit", 1, "--output", path)
    before = path.read_bytes()

    def fsync(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    one_line(bench("--tasks", "mbpp", "--output", path), "No space left on device; its 2 rows are whole")
    assert path.read_bytes() == before


def config(**options: object) -> list[str]:
    return ["--speculative-config", json.dumps(options)]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "task": (["--tasks", "gsm9k"], "there is no task and no file 'gsm9k'; did you mean 'gsm8k'?"),
    "no task": (["--tasks", ","], "names no task"),
    "drafter": (["--drafters", "lokup"], "there is no drafter 'lokup'; did you mean 'lookup'?"),
    "option": (config(method="lookup", depth=1), "no option 'depth'"),
    "no method": (config(name="x", num_speculative_tokens=1), 'has no "method"'),
    "label": (config(name=3, method="lookup"), '"name" is a label, not 3'),
    "same label": (config(method="lookup"), "two drafters are called 'lookup'; give each"),
    "plain's label": (config(method="suffix", name="none"), "two drafters are called 'none'"),
    "broken JSON": (["--speculative-config", "{"], "--speculative-config is not JSON"),
    "data": (
        ["--data-dir", MISSING],
        f"no data folder '{MISSING}'; expected in it: gsm8k/test.jsonl",
    ),
    "limit": (["--limit", "0"], "'--limit'"),
    "runs": (["--runs", "0"], "'--runs'"),
    "turns": (["--turns", "two"], "'two' is not one of 'first', 'all'"),
    "dtype": (["--dtype", "int3"], "dtype 'int3' is unknown"),
    "temperature": (["--temperature", "-1"], "temperature=-1.0 is out of range"),
    "greedy samples": (["--samples", "2", "--tasks", "mbpp"], "--samples 2 at temperature 0 are the same text"),
    "samples": (["--samples", "2", "--temperature", "1"], "--samples 2 is for coding tasks; of gsm8k none is one"),
    "output": (["--output", f"{MISSING}/rows.jsonl"], "cannot be written: No such file or directory"),
    "pictures": (["--pictures", "/dev/null/x"], "--pictures /dev/null/x cannot be written: Not a directory"),
    "model": (["--model", MISSING], "there is no such folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(bench: Callable[..., Done], name: str) -> None:
    arguments, words = MISTAKES[name]
    one_line(bench("--tasks", "gsm8k", "--model", MISSING, *arguments), words)


def test_chat_without_a_template(bench: Callable[..., Done], tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    one_line(bench("--tasks", "gsm8k", "--chat", "--model", tmp_path), "no chat template")


@pytest.mark.parametrize("package", ["rouge_score", "matplotlib"])
def test_a_missing_extra_is_named_first(
    bench: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    one_line(
        bench("--tasks", "xsum", "--pictures", tmp_path, "--model", MISSING), "missing: pip install 'selfdraft[bench]'"
    )


def test_quick_needs_no_file(bench: Callable[..., Done], tmp_path: Path) -> None:
    """The default task, group by group; the limit counts in each group."""
    done = bench("--data-dir", tmp_path, "--limit", 1, "--json", "--max-new-tokens", 2, "--drafters", "none")
    assert done.code == 0
    heads = [(record["task"], record["prompts"]) for record in done.said]
    assert heads[0][0] == "quick"
    assert {task for task, _ in heads[1:]} <= {f"quick/{group}" for group in QUICK}
    assert {prompts for _, prompts in heads[1:]} == {1}


def test_the_chat_template_is_taken_where_there_is_one(folder: Path, bench: Callable[..., Done]) -> None:
    for options, chat in (([], True), (["--no-chat"], False), (["--chat"], True)):
        done = bench("--tasks", "mt-bench", *options, "--json", chat=None)
        assert {record["conditions"]["chat"] for record in done.said} == {chat}
