"""`selfdraft tune` as a user meets it: a set is found, written, used; mistakes end with one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from selfdraft import LLM
from selfdraft.cli.tune import forwarded
from selfdraft.drafters.layer_skip import LayerSkip
from selfdraft.errors import OptionError
from selfdraft.files.skip_sets import read_skip
from tests.terminal import Done, one_line, typed
from tests.test_llm import TEXTS, model, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> Any:
    """Runs `selfdraft tune` in an empty folder on a tiny checkpoint with small settings."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": text}) for text in TEXTS[:2]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    def call(*arguments: object) -> Done:
        small = ["layer-skip", "--prompts", "prompts.jsonl", "--model", folder, "--dtype", "float32"]
        small += ["--trials", 8, "--max-new-tokens", 12, "--num-speculative-tokens", 3, "--confirm", 0, "--runs", 1]
        return typed(monkeypatch, capsys, "tune", *small, *arguments)

    return call


def test_a_set_is_found_and_used(tune: Any, folder: Path, tmp_path: Path) -> None:
    done = tune("--confirm", 1, "--evidence", "evidence.json", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    output = tmp_path / f"skip-{folder.name}.json"
    assert said["output"] == output.name
    layers = model().config.num_hidden_layers
    skip = read_skip(f"{output}#{folder.name}", layers)
    assert sorted(skip.attention) == said["attention"]
    assert said["measured"] > 0
    assert said["conditions"]["machine"]["threads"] >= 1
    evidence = json.loads((tmp_path / "evidence.json").read_text())
    assert len(evidence["single"]) == 2 * layers
    assert len(evidence["pairs"]) == layers * (2 * layers - 1)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"prompts.jsonl", output.name, f"skip-{folder.name}.db", "evidence.json"}

    again = tune("--confirm", 1, "--json")
    assert json.loads(again.out) == said, "nothing was measured or tried anew"
    words = tune("--confirm", 1)
    assert "left out: attention of blocks" in words.out
    assert f'"skip_set": "{output.name}#{folder.name}"' in words.out

    checked = tune("--check", output.name, "--draft-lengths", "1,2", "--json")
    rows = json.loads(checked.out)["checks"]
    assert [row["num_speculative_tokens"] for row in rows] == [1, 2]
    assert "predicted" in tune("--check", output.name, "--draft-lengths", "1").out


def test_measured_costs_can_be_given(tune: Any, folder: Path) -> None:
    first = json.loads(tune("--json").out)
    second = json.loads(tune("--output", "b.json", "--costs", f"skip-{folder.name}.json", "--json").out)
    assert {**second, "output": ""} == {**first, "output": ""}


def test_the_machine_is_measured_and_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("selfdraft.tune.machine.MOST", 1)
    monkeypatch.setattr("selfdraft.tune.machine.STEADY", 1e9)
    done = typed(monkeypatch, capsys, "tune", "--model", "pocket", "--dtype", "float32")
    assert done.code == 0, done.err
    assert "A plain step takes" in done.out
    assert "lookahead off: its 57 rows take" in done.out
    (kept,) = (tmp_path / "selfdraft" / "profiles").iterdir()
    assert str(kept) in done.out
    said = json.loads(typed(monkeypatch, capsys, "tune", "--model", "pocket", "--dtype", "float32", "--json").out)
    assert said["profile"]["rows"][0] == 1
    assert {"lookahead", "space", "s3d", "layer_skip", "rounded copy"} < {
        verdict["drafter"] for verdict in said["verdicts"]
    }


def test_a_profile_of_a_busy_machine_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("selfdraft.tune.machine.MOST", 1)
    monkeypatch.setattr("selfdraft.tune.machine.STEADY", 0.5)
    done = typed(monkeypatch, capsys, "tune", "--model", "pocket", "--dtype", "float32")
    assert done.code == 0
    assert "the machine is busy" in done.err
    assert not (tmp_path / "selfdraft" / "profiles").exists()


def test_a_set_in_the_checkpoints_folder_is_taken(folder: Path) -> None:
    place = folder / "selfdraft_skip.json"
    try:
        place.write_text(json.dumps({"any": {"attention": [1], "mlp": [0]}}))
        drafter = LLM(str(folder), drafter="layer_skip", dtype="float32").engine.drafter
        assert isinstance(drafter, LayerSkip)
        assert drafter.skip.attention == {1}
        assert drafter.skip.mlp == {0}
        place.write_text(json.dumps({"any": {"attention": [99], "mlp": [0]}}))
        with pytest.raises(OptionError, match=r"selfdraft_skip\.json holds 99: the model has blocks 0 to"):
            LLM(str(folder), drafter="layer_skip", dtype="float32")
    finally:
        place.unlink()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trials", 0], "trials=0"),
        (["--sweep"], "No such option: --sweep"),
        (["--adapter", "."], "No such option: --adapter"),
        (["--sampler", "dice"], "'dice' is unknown"),
        (["--prompts", "empty.jsonl"], "holds no prompt"),
        (["--output", "nowhere/out.json"], "there is no folder 'nowhere'"),
        (["--output", "."], "is a folder"),
        (["--evidence", "nowhere/e.json"], "there is no folder 'nowhere'"),
        (["--costs", "empty.jsonl"], "--costs empty.jsonl cannot be read"),
        (["--costs", "other.json"], "holds no measured costs"),
        (["--check", "other.json"], "other.json: 'a' is no skip set"),
        (["--check", "long.json"], "holds 70: the model has blocks"),
        (["--draft-lengths", "two"], "--draft-lengths 'two'"),
        (["--study", "empty.jsonl"], "is no study"),
    ],
)
def test_mistakes_end_with_one_line(tune: Any, tmp_path: Path, arguments: list[object], said: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "long.json").write_text('{"a": {"attention": [70], "mlp": []}}')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = tune(*arguments)
    assert done.code == 2
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1
    after = {path: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".db"}
    assert after == before


OWN = {
    "machine": set[str](),
    "layer-skip": {
        *("--study", "--trials", "--sampler", "--num-speculative-tokens", "--max-cost", "--confirm"),
        *("--evidence", "--costs", "--check", "--draft-lengths", "--runs"),
    },
    "s3d": {"--adapter", "--sweep", "--runs"},
    "lookahead": set[str](),
    "task": set[str](),
}
"""Options of a sub-command that not all of them have, those about prompts left out."""
OF_PROMPTS = {"--prompts", "--limit", "--chat", "--max-new-tokens", "--temperature", "--seed", "--output"}
OF_ALL = {"--model", "--lora", "--quantization", "--dtype", "--device", "--exactness", "--threads", "--json", "--help"}


@pytest.mark.parametrize("name", OWN)
def test_help_shows_only_the_own_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    done = typed(monkeypatch, capsys, "tune", name, "--help")
    assert done.code == 0
    shown = set(re.findall(r"^  (--[a-z0-9-]+)", done.out, re.MULTILINE))
    assert shown == OWN[name] | OF_ALL | (OF_PROMPTS if name != "machine" else set())


def test_help_names_the_sub_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done = typed(monkeypatch, capsys, "tune", "--help")
    assert done.code == 0
    assert re.findall(r"^  ([a-z]\S+)  ", done.out, re.MULTILINE) == list(OWN)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "machine"),
        ("--json --model pocket", "machine --json --model pocket"),
        ("--method auto --model pocket", "machine --model pocket"),
        ("--model pocket --method layer_skip --trials 5", "layer-skip --model pocket --trials 5"),
        ("--method=s3d --sweep", "s3d --sweep"),
        ("--method s3d --method lookahead", "lookahead"),
        ("--method s3d --help", "s3d --help"),
        ("--help", "--help"),
        ("s3d --sweep", "s3d --sweep"),
    ],
)
def test_the_older_spelling_is_forwarded(old: str, new: str) -> None:
    assert forwarded(old.split()) == new.split()


def test_the_older_spelling_finds_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tune: Any, folder: Path
) -> None:
    """A finished search is taken up by either spelling."""
    new = tune("--json")
    small = ["--trials", 8, "--max-new-tokens", 12, "--num-speculative-tokens", 3, "--confirm", 0, "--runs", 1]
    given = ["--prompts", "prompts.jsonl", "--model", folder, "--dtype", "float32", *small, "--json"]
    old = typed(monkeypatch, capsys, "tune", "--method", "layer_skip", *given)
    assert old == new
    assert old.code == 0


def test_lookahead_is_tuned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    """Every size of the grid and the adaptive one are measured; both spellings write the same kind of document."""
    monkeypatch.chdir(tmp_path)
    small = ["--model", folder, "--dtype", "float32", "--limit", 1, "--max-new-tokens", 12]
    done = typed(monkeypatch, capsys, "tune", "lookahead", *small)
    assert done.code == 0, done.err
    assert "use it: --speculative-config" in done.out
    document = json.loads((tmp_path / f"lookahead-{folder.name}.json").read_text())
    assert [point["adaptive"] for point in document["points"]] == [False] * 6 + [True]
    old = typed(monkeypatch, capsys, "tune", "--method", "lookahead", *small, "--json").said
    assert old.keys() == {"output", *document}
    assert old["points"][0].keys() == document["points"][0].keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "No such command 'nope'; see selfdraft tune --help"),
        (["machin"], "No such command 'machin'. Did you mean 'machine'; see selfdraft tune --help"),
        (
            ["--method", "guessing"],
            "'guessing' is not one of 'auto', 'layer_skip', 's3d', 'lookahead'; see selfdraft tune",
        ),
        (["--method"], "'' is not one of 'auto', 'layer_skip'"),
        (
            ["--trials", "5"],
            "No such option: --trials (Possible options: --threads); see selfdraft tune machine --help",
        ),
        (["--method", "s3d", "--trials", "5"], "see selfdraft tune s3d --help"),
        (["machine", "--prompts", "x"], "No such option: --prompts"),
        (["lookahead", "--runs", "2"], "No such option: --runs"),
        (["s3d", "--runs", "0"], "runs=0 is out of range: it must be at least 1, at most 100"),
        (["lookahead", "--seed", "-1"], "seed=-1 is out of range: it must be at least 0"),
        (["s3d", "--max-new-tokens", "3"], "max_new_tokens=3 is out of range: it must be at least 4"),
        (["s3d", "--temperature", "-1"], "temperature=-1.0 is out of range"),
    ],
)
def test_mistakes_of_sub_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    one_line(typed(monkeypatch, capsys, "tune", *arguments), said)
