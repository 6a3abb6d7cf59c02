"""`selfdraft tune` as a user meets it: a set is found, written, used; mistakes end with one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfdraft import LLM
from selfdraft.drafters.layer_skip import LayerSkip
from selfdraft.errors import OptionError
from selfdraft.files.skip_sets import read_skip
from tests.terminal import Done, typed
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
        small = ["--method", "layer_skip", "--prompts", "prompts.jsonl", "--model", folder, "--dtype", "float32"]
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
    assert {"lookahead", "space", "s3d", "layer_skip"} < {verdict["drafter"] for verdict in said["verdicts"]}


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
        (["--method", "guessing"], "'guessing' is not one of 'auto', 'layer_skip', 's3d', 'lookahead'"),
        (["--sweep"], "--sweep belongs to --method s3d, not to layer_skip"),
        (["--adapter", "."], "--adapter belongs to --method s3d"),
        (["--method", "s3d", "--trials", 1000], "--trials belongs to --method layer_skip, not to s3d"),
        (["--method", "auto", "--trials", 5], "--prompts belongs to --method layer_skip"),
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
