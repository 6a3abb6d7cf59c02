"""The command line as a user meets it: outputs, schemas, exit codes, one line for every mistake."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import save_file

from selfdraft import LLM, SamplingParams, drafters
from selfdraft.cli import terminal
from selfdraft.core import verify as core_verify
from selfdraft.core.sequence import Sequence as Request
from selfdraft.core.tree import Draft
from selfdraft.llm import Piece
from selfdraft.models import load
from tests.terminal import command_of, one_line, typed
from tests.test_llm import TEXTS, model, tokenizer

PROMPT = TEXTS[0]
FIRST = ["generate", "chat", "serve", "pull", "results", "replay"]
VERBS = [*FIRST, "verify", "doctor", "perplexity", "train", "bench", "tune"]
MISSING = "/nowhere/at/all"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template."""
    path = tmp_path_factory.mktemp("tiny")
    model().save_pretrained(path)
    tokenizer(template=True).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a chat template."""
    path = tmp_path_factory.mktemp("plain")
    model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    records: list[dict[str, object]] = [{"prompt": TEXTS[0]}, {"turns": [TEXTS[1], "more"]}, {"question": TEXTS[2]}]
    path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n", "utf-8")
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `selfdraft` with arguments, errors and exit code included."""
    return partial(typed, monkeypatch, capsys)


def broken_folders(place: Path) -> dict[str, Path]:
    """Folders that cannot be loaded."""
    for name, config in {
        "empty": None,
        "hybrid": {"model_type": "jamba"},
        "weightless": {"model_type": "llama"},
    }.items():
        (place / name).mkdir()
        if config:
            (place / name / "config.json").write_text(json.dumps(config))
    save_file({}, place / "hybrid" / "model.safetensors")
    return {name: place / name for name in ("empty", "hybrid", "weightless")}


FOLDERS = {
    "empty": "no config.json",
    "hybrid": "whose state cannot be rewound to an earlier token",
    "weightless": "no *.safetensors file",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_be_loaded(run: Any, tmp_path: Path, name: str) -> None:
    done = run("generate", "hi", "--model", broken_folders(tmp_path)[name])
    one_line(done, FOLDERS[name])


def config(**options: object) -> list[str]:
    return ["--speculative-config", json.dumps(options)]


MISTAKES: dict[str, tuple[Sequence[str], str]] = {
    "missing folder": (["hi", "--model", MISSING], f"{MISSING}: there is no such folder"),
    "unknown drafter": (["hi", "--drafter", "lokup"], "there is no drafter 'lokup'; did you mean 'lookup'?"),
    "unknown method": (["hi", *config(method="medusa")], "there is no drafter 'medusa'"),
    "two methods": (["hi", "--drafter", "suffix", *config(method="lookup")], "disagree"),
    "no method": (["hi", *config(exit_layer=1)], 'gives exit_layer but no "method"'),
    "unknown option": (["hi", *config(method="lookup", depth=1)], "no option 'depth': no drafter has it"),
    "other's option": (["hi", *config(method="lookup", exit_layer=1)], "belongs to layer_skip"),
    "broken JSON": (["hi", "--speculative-config", "{method"], "--speculative-config is not JSON"),
    "no object": (["hi", "--speculative-config", "[1]"], "must be a JSON object, not '[1]'"),
    "empty prompt": ([""], "the prompt is empty"),
    "no prompt": ([], "no prompt is given: give one text, or a file with --prompts"),
    "penalty": (["hi", "--presence-penalty", "inf"], "presence_penalty=inf is out of range: it must be finite"),
    "prompts in a folder": (["--prompts", "."], "the prompts file '.' is a folder; give a jsonl file"),
    "temperature": (["hi", "--temperature", "-1"], "temperature=-1.0 is out of range"),
    "not a number": (["hi", "--temperature", "nan"], "temperature=nan is not a number"),
    "top_p": (["hi", "--top-p", "0"], "top_p=0.0 is out of range: it must be above 0.0, at most 1.0"),
    "min_tokens": (["hi", "--min-tokens", "200"], "min_tokens=200 is above max_tokens=128"),
    "empty stop": (["hi", "--stop", ""], "stop holds an empty string"),
    "dtype": (["hi", "--dtype", "int3"], "dtype 'int3' is unknown; there are auto, float32"),
    "max_new_tokens": (["hi", "--max-new-tokens", "0"], "'--max-new-tokens'"),
    "a word as number": (["hi", "--seed", "x"], "'--seed'"),
    "unknown flag": (["hi", "--frobnicate"], "No such option: --frobnicate; see selfdraft generate --help"),
    "exactness": (["hi", "--exactness", "very"], "'very' is not one of 'bitwise', 'token'"),
    "missing file": (["--prompts", MISSING], f"the prompts file '{MISSING}' is not there"),
    "both": (["hi", "--prompts", MISSING], "more than one prompt is given"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(run: Any, name: str) -> None:
    arguments, words = MISTAKES[name]
    one_line(run("generate", *arguments), words)


LOADED: dict[str, tuple[Sequence[str], str]] = {
    "range": (["hi", *config(method="lookup", num_speculative_tokens=0)], "num_speculative_tokens=0 is out of range"),
    "type": (["hi", *config(method="lookup", num_speculative_tokens="many")], "num_speculative_tokens='many'"),
    "too long": ([PROMPT * 40], "the context of 256 leaves room for 255 and an answer"),
}


@pytest.mark.parametrize("name", LOADED)
def test_a_mistake_that_needs_the_model(run: Any, folder: Path, name: str) -> None:
    arguments, words = LOADED[name]
    one_line(run("generate", *arguments, "--model", folder), words)


def test_chat_without_a_template(run: Any, plain_folder: Path) -> None:
    one_line(run("generate", "hi", "--chat", "--model", plain_folder), "no chat template")


FILES = {
    '{"prompt": "a"}\n{broken\n': ":2: broken JSON",
    '{"prompt": "a"}\n\n{"answer": 3}\n': ":3: no prompt; a record needs one of prompt, turns",
    '{"prompt": ""}': ":1: no prompt",
    "[1]": ":1: a record must be an object",
    "\n \n": " holds no prompt",
}


@pytest.mark.parametrize("verb", ["generate", "verify"])
@pytest.mark.parametrize("text", FILES)
def test_a_broken_file_names_its_line(run: Any, tmp_path: Path, verb: str, text: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    one_line(run(verb, "--prompts", path), f"{path}{FILES[text]}")


def test_a_file_that_is_no_text(run: Any, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'{"prompt": "\xff"}')
    one_line(run("generate", "--prompts", tmp_path / "a"), "is not UTF-8 text")


def test_a_prompt_of_a_file_is_named_and_nothing_is_run(run: Any, tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": PROMPT * 40}))
    for verb in ("generate", "verify"):
        one_line(run(verb, "--prompts", path, "--model", folder), "prompt 1: the prompt has")


def test_a_drafter_that_was_asked_for_is_not_left_out(run: Any, tmp_path: Path, folder: Path) -> None:
    """Else nothing would be compared, and no mismatch found."""
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "a"}))
    config = ("--speculative-config", '{"method": "s3d"}')
    one_line(
        run("verify", "--prompts", path, "--model", folder, *config), "s3d needs mask tokens trained for this model"
    )


VERIFY: dict[str, tuple[Sequence[str], str]] = {
    "hf sampled": (["--against", "hf", "--temperature", "1"], "--against hf is for greedy decoding"),
    "against": (["--against", "x"], "'x' is not one of 'plain', 'hf'"),
    "drafter": (["--drafters", "lookup,medusa"], "there is no drafter 'medusa'"),
    "nothing": (["--drafters", ","], "leaves nothing to compare"),
    "only plain": (["--drafters", "none"], "leaves nothing to compare"),
    "only plain by a config": (
        ["--speculative-config", '{"method": "none"}'],
        "--speculative-config leaves nothing to compare",
    ),
}


@pytest.mark.parametrize("name", VERIFY)
def test_a_mistake_in_verify(run: Any, prompts: Path, name: str) -> None:
    arguments, words = VERIFY[name]
    one_line(run("verify", "--prompts", prompts, "--model", MISSING, *arguments), words)


def test_usage(run: Any) -> None:
    one_line(run("genrate"), "No such command 'genrate'. Did you mean 'generate'; see selfdraft --help")
    one_line(run("verify"), "Missing option '--prompts'")
    bare = run()
    assert (bare.code, bare.out) == (2, "")
    assert bare.err.startswith("Usage: selfdraft")


SUB_COMMANDS = ["bench serve", "tune machine", "tune layer-skip", "tune s3d", "tune lookahead", "tune task"]


@pytest.mark.parametrize("command", [*VERBS[:-1], *SUB_COMMANDS])
def test_help_mentions_every_option(run: Any, command: str) -> None:
    words = command.split()
    done = run(*words, "--help")
    assert (done.code, done.err) == (0, "")
    options = [option for parameter in command_of(words).params for option in parameter.opts]
    assert len(options) > 1
    for option in options:
        assert re.search(rf"(^|\s){option}\b", done.out), option
    assert max(map(len, done.out.splitlines())) <= 80


def test_help_names_every_verb(run: Any) -> None:
    done = run("--help")
    assert done.code == 0
    assert re.findall(r"^  (\w+)  ", done.out, re.MULTILINE) == VERBS
    assert "..." not in done.out.partition("Commands:")[2]


def test_version(run: Any) -> None:
    done = run("--version")
    assert (done.code, done.out, done.err) == (0, f"selfdraft {version('selfdraft')}\n", "")


def answer(text: str, **options: Any) -> str:
    """What the door says to the same prompt."""
    llm = LLM(model(), tokenizer=tokenizer(template=True), drafter="none")
    return llm.generate(text, SamplingParams(**options))[0].outputs[0].text


def test_generate(run: Any, folder: Path) -> None:
    done = run("generate", PROMPT, "--model", folder, "--max-new-tokens", 20, "--dtype", "float64")
    assert done.code == 0
    assert done.out == answer(PROMPT, max_tokens=20) + "\n"
    assert re.fullmatch(
        r"20 tokens in \d+ steps \(\d\.\d\d a step\), first token after [\d.]+ s, then [\d.]+ tokens/s, auto.*\n",
        done.err,
    )


def test_an_answer_that_fills_the_context_says_so(run: Any, folder: Path) -> None:
    room = LLM(model(), tokenizer=tokenizer(), drafter="none").target.max_length
    options = ("--model", folder, "--ignore-eos", "--drafter", "none", "--max-new-tokens")
    full = f"the answer ended at the {room} tokens that the model takes, prompt and answer together"
    assert full in run("generate", PROMPT, *options, 10_000).err
    assert full not in run("generate", PROMPT, *options, 9).err


def test_text_is_written_as_it_is(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tabs, control characters and what looks like markup are the model's words."""
    words = "a\tb :smile: [bold]c[/bold]\r\x07 \x1b[0m 🐕"

    real = LLM.pieces

    def pieces(self: LLM, request: Request) -> Iterator[Piece]:
        yield replace(list(real(self, request))[-1], text=words)

    monkeypatch.setattr(LLM, "pieces", pieces)
    assert run("generate", "hi", "--model", folder).out == words + "\n"


def test_generate_json(run: Any, folder: Path) -> None:
    done = run("generate", PROMPT, "--model", folder, "--max-new-tokens", 30, "--json", "--compare", "--threads", 1)
    assert (done.code, done.err) == (0, "")
    said = done.said
    assert said.keys() == {"model", "dtype", "exactness", "runner", "machine", "drafter", "results"}
    assert (said["drafter"], said["machine"]["threads"]) == ("auto", 1)
    (result,) = said["results"]
    assert len(result["token_ids"]) == len(result["sources"]) == result["num_output_tokens"] == 30
    assert (result["prompt"], result["finish_reason"], result["stop_reason"]) == (PROMPT, "length", None)
    assert result["compare"].keys() == {
        "texts_equal",
        "plain_tokens_per_second",
        "drafted_tokens_per_second",
        "speedup_vs_plain",
        "mean_acceptance_length",
        "reason",
        "runs",
    }
    assert result["compare"]["texts_equal"] is True
    assert result["compare"]["speedup_vs_plain"] > 0


def test_compare_in_words(run: Any, folder: Path) -> None:
    done = run("generate", PROMPT, "--model", folder, "--max-new-tokens", 8, "--compare", "--temperature", 1)
    assert re.search(
        r"plain [\d.]+ tokens/s, auto [\d.]+ tokens/s: [\d.]+x; texts equal: yes \(whole answers", done.err
    )


def test_seeds(run: Any, folder: Path) -> None:
    options = ("--model", folder, "--max-new-tokens", 20, "--temperature", 1.5)
    texts = [run("generate", PROMPT, *options, "--seed", 3, "--drafter", name).out for name in ("none", "suffix")]
    assert texts[0] == texts[1]
    assert run("generate", PROMPT, *options).out != run("generate", PROMPT, *options).out


def test_generate_from_a_file(run: Any, folder: Path, prompts: Path) -> None:
    options = ("--prompts", prompts, "--model", folder, "--max-new-tokens", 6, "--dtype", "float64")
    said = run("generate", *options, "--json").said
    assert [result["prompt"] for result in said["results"]] == TEXTS
    assert [result["text"] for result in said["results"]] == [answer(text, max_tokens=6) for text in TEXTS]
    done = run("generate", *options, "--limit", 2)
    assert [line for line in done.out.splitlines() if line.startswith("> ")] == [f"> {text}" for text in TEXTS[:2]]


def test_generate_chat(run: Any, folder: Path) -> None:
    done = run("generate", "the dog", "--chat", "--model", folder, "--max-new-tokens", 9, "--dtype", "float64")
    wanted = answer("[user]the dog[bot]", max_tokens=9)
    assert wanted
    assert done.out == wanted + "\n"


def test_colours(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes of colour are all that a terminal sees more."""
    arguments = ("generate", PROMPT, "--model", folder, "--max-new-tokens", 60, "--drafter", "lookup")
    plain = run(*arguments).out
    monkeypatch.setattr(terminal, "out", Console(force_terminal=True, color_system="standard", highlight=False))
    done = run(*arguments)
    assert "\x1b[32m" in done.out
    assert re.sub(r"\x1b\[\d*m", "", done.out) == plain
    assert "\x1b" not in plain


def test_chat(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the dog\nthe hill\n\nnever asked\n"))
    done = run("chat", "--model", folder, "--max-new-tokens", 7, "--dtype", "float64")
    first = answer("[user]the dog[bot]", max_tokens=7)
    second = answer(f"[user]the dog[assistant]{first}[user]the hill[bot]", max_tokens=7)
    assert done.code == 0
    assert done.out == f"> {first}\n> {second}\n> "
    assert done.err.count(" tokens in ") == 2


def test_chat_goes_on_after_an_interrupt(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the dog\nthe hill\n"))
    interrupt_after(2, monkeypatch)
    done = run("chat", "--model", folder, "--max-new-tokens", 7)
    assert done.code == 0
    assert done.err == "stopped; the text so far stays in the conversation\n" * 2


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after so many pieces of every stream."""
    whole = LLM.pieces

    def pieces(self: LLM, *arguments: Any) -> Iterator[Piece]:
        pieces = whole(self, *arguments)
        for _ in range(count):
            yield next(pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "pieces", pieces)


def test_interrupt(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(4, monkeypatch)
    done = run("generate", PROMPT, "--model", folder, "--max-new-tokens", 20)
    assert done.code == 130
    assert re.fullmatch(r"\d+ tokens in 4 steps .*\ninterrupted\n", done.err)
    assert run("generate", PROMPT, "--model", folder, "--json").err == "interrupted\n"


def _heeds_interrupts() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that: undo it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def process(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "selfdraft", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **options}
    return subprocess.Popen(
        command, preexec_fn=_heeds_interrupts, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )


def test_a_real_interrupt() -> None:
    options = ("--max-new-tokens", 2000, "--ignore-eos", "--drafter", "none", "--threads", 1)
    with process("generate", "Once", *options) as running:
        assert running.stdout is not None
        first = running.stdout.read(1)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=600)
    assert running.returncode == 130
    assert first + out
    assert out.endswith(b"\n")
    assert re.fullmatch(rb"\d+ tokens? in \d+ steps? .*\ninterrupted\n", err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_an_output_that_is_full_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-m", "selfdraft", "--help"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == b"error: the output cannot be written: No space left on device\n"


def test_the_reader_has_gone_and_colour_is_forced(folder: Path) -> None:
    options = ("--model", folder, "--max-new-tokens", 200, "--threads", 1)
    with process("generate", PROMPT, *options, FORCE_COLOR="1") as running:
        assert running.stdout is not None
        assert running.stderr is not None
        first = running.stdout.read(1)
        running.stdout.close()
        err = running.stderr.read()
    assert first
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err


@pytest.mark.parametrize("against", ["plain", "hf"])
def test_verify(run: Any, folder: Path, prompts: Path, against: str) -> None:
    options = ("--prompts", prompts, "--model", folder, "--max-new-tokens", 20, "--limit", 2, "--against", against)
    done = run("verify", *options, "--json", "--dtype", "float64")
    said = done.said
    masked = ("s3d", "space")
    names = [name for name in drafters.table() if name not in masked and (against == "hf" or name != "none")]
    assert done.code == 0
    assert [line.split(" needs mask tokens")[0] for line in done.err.splitlines()] == [
        f"left out: {name}" for name in masked
    ]
    assert said["mismatches"] == []
    assert said["tokens_compared"] == len(names) * 2 * 20
    assert said["logit_rows_compared"] == (said["tokens_compared"] if against == "plain" else 0)
    assert (said["drafters"], said["prompts"], said["against"]) == (names, 2, against)
    words = run("verify", *options, "--drafters", "lookup, suffix,lookup").out
    assert words.startswith("80 tokens compared with ")
    assert ", 0 mismatches (2 prompts x lookup, suffix; " in words
    assert "95 % upper bound on mismatches per token: 3.7e-02" in words


def test_verify_sampled(run: Any, folder: Path, prompts: Path) -> None:
    options = ("--max-new-tokens", 12, "--temperature", 1, "--seed", 4, "--json")
    done = run("verify", "--prompts", prompts, "--model", folder, *options)
    assert (done.code, done.said["mismatches"], done.said["temperature"]) == (0, [], 1.0)


def test_verify_tells_on_a_liar(run: Any, folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = core_verify.walk

    def lie(draft: Draft, say: Any) -> tuple[list[int], list[int]]:
        path, tokens = honest(draft, say)
        return path, [*tokens[:-1], (tokens[-1] + 1) % 300] if draft.num_candidates else tokens

    monkeypatch.setattr(core_verify, "walk", lie)
    options = ("--prompts", prompts, "--model", folder, "--max-new-tokens", 20, "--limit", 1, "--drafters", "lookup")
    done = run("verify", *options, "--json")
    assert done.code == 1
    (mismatch,) = done.said["mismatches"]
    assert mismatch.keys() == {"prompt", "drafter", "position", "expected", "got", "gap"}
    assert (mismatch["prompt"], mismatch["drafter"]) == (0, "lookup")
    assert mismatch["got"] == (mismatch["expected"] + 1) % 300
    assert mismatch["gap"] > 0
    words = run("verify", *options)
    assert words.code == 1
    place, both = f"token {mismatch['position']} is {mismatch['got']}", f"expected {mismatch['expected']}"
    line = words.out.splitlines()[0]
    assert line.startswith(f"prompt 0, lookup: {place} '")
    assert both in line
    assert f"logit gap {mismatch['gap']:.6g}" in line
    assert "1 mismatches" not in words.out
    assert "upper bound" not in words.out
    assert run("verify", *options, "--against", "hf").code == 1


def test_doctor(run: Any, folder: Path) -> None:
    done = run("doctor", "--model", folder, "--max-new-tokens", 8, "--json", "--threads", 1)
    said = done.said
    assert (done.code, done.err) == (0, "")
    assert said.keys() == {"machine", "machine_state", "model", "trials"}
    plain = [trial for trial in said["trials"] if trial["runner"] != "fast"]
    assert [(trial["dtype"], trial["exactness"]) for trial in plain] == [
        (dtype, exactness) for dtype in ("float32", "bfloat16") for exactness in ("bitwise", "token")
    ]
    for trial in said["trials"]:
        assert trial["level"] in ("bitwise", "token", "none")
        assert trial["promised"] in ("bitwise", "token")
        assert trial["tokens"] == trial["rows"] == 24
        equal = (trial["rows_bitwise_equal"] == 24, trial["tokens_equal"] == 24)
        assert trial["level"] == ("bitwise" if equal[0] else "token" if equal[1] else "none")


def test_doctor_in_words(run: Any, folder: Path) -> None:
    done = run("doctor", "--model", folder, "--max-new-tokens", 4)
    assert done.code == 0
    assert len(re.findall(r"^(?:float32|bfloat16) +bitwise +rows x\d+", done.out, re.MULTILINE)) == 2
    assert len(re.findall(r"^(?:float32|bfloat16) +token +natural", done.out, re.MULTILINE)) == 2
    assert re.search(r"^float32: \w+ promised, \w+ found; ", done.out, re.MULTILINE)


def test_no_cache_and_prove_do_the_proof_again(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept proof spares the next start its proof; --no-cache and doctor --prove run it all the same."""
    monkeypatch.setenv("SELFDRAFT_CACHE", str(tmp_path / "cache"))
    real, proofs = vars(load)["prove"], list[int]()

    def counted(*given: Any, **options: Any) -> Any:
        proofs.append(1)
        return real(*given, **options)

    monkeypatch.setattr(load, "prove", counted)

    def ran(*words: object) -> int:
        """How many proofs a command makes."""
        proofs.clear()
        assert run(*words, "--model", folder).code == 0
        return len(proofs)

    generate = ("generate", "hi", "--max-new-tokens", 2, "--drafter", "none")
    assert ran(*generate) == 1
    kept = [*(tmp_path / "cache" / "proofs").iterdir()]
    assert kept
    before = [path.read_text() for path in kept]
    assert ran(*generate) == 0, "what was proved is kept"
    assert ran(*generate, "--no-cache") == 1
    assert [*(tmp_path / "cache" / "proofs").iterdir()] == kept
    assert [path.read_text() for path in kept] == before, "nothing is kept by --no-cache"
    doctor = ("doctor", "--max-new-tokens", 2)
    first = ran(*doctor)
    assert ran(*doctor) == 0, "all levels are kept"
    assert ran(*doctor, "--prove") == first > 0


@pytest.mark.parametrize("words", [("generate", "hi", "--max-new-tokens", 20), ("generate", "hi", "--json")])
def test_the_whole_answer_is_made_once(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...]
) -> None:
    """Not once for each piece: that would cost the square of its length."""
    real, made = vars(Piece)["output"].fget, list[int]()

    def counted(piece: Piece) -> Any:
        made.append(1)
        return real(piece)

    monkeypatch.setattr(Piece, "output", property(counted))
    assert run(*words, "--model", folder, "--drafter", "none").code == 0
    assert len(made) == 1
