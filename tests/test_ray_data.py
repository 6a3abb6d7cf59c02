"""Files of prompts on Ray Data: each row once, with the text of one process, however often the run was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'selfdraft[ray]'")

from selfdraft import SamplingParams
from selfdraft.cli.generate import GenerateOptions
from selfdraft.errors import RequestError, SelfdraftError
from selfdraft.integrations.ray import batch_command, batches
from tests.serving import pocket

ROOT = Path(__file__).parent.parent
OPTIONS = ("--model", "pocket", "--dtype", "float32", "--max-new-tokens", "8", "--temperature", "0.8", "--seed", "3")


def write_rows(path: Path, count: int) -> list[str]:
    """A file with so many rows, every third with an id of its own; the prompts."""
    prompts = [f"The dog number {number} went to the" for number in range(count)]
    rows = [{"prompt": prompt, **({"id": f"row-{i}"} if i % 3 == 0 else {})} for i, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prompts


def start(rows: Path, folder: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "selfdraft", "generate", "--ray", str(rows), "--output", str(folder)]
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([*command, *OPTIONS, *options], stdout=log, stderr=log, env=env)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the driver; what it had started sees that and ends."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(600)
    _, left = psutil.wait_procs(children, timeout=600)
    assert not left


def answers(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for part in sorted(folder.glob("part-*")) for line in part.read_text().splitlines()]


def test_a_run_goes_on_where_an_earlier_one_was_killed_with_the_tokens_of_one_process(tmp_path: Path) -> None:
    """What an earlier run has left: its record and two blocks. `recipes/ray_batches.py` kills real ones at random."""
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "answers"
    prompts = write_rows(rows, 24)
    given = GenerateOptions(
        model="pocket",
        dtype="float32",
        max_new_tokens=8,
        temperature=0.8,
        seed=3,
        ray=rows,
        output=folder,
        block_rows=2,
    )
    read = batches.read_rows(rows)
    folder.mkdir()
    batches.claim(folder, batches.identity(given, read))
    answerer = batches.Answerer(given)
    for number in (0, 5):
        block = [{"id": row.id, "prompt": row.prompt} for row in read[2 * number : 2 * number + 2]]
        (lines,) = answerer({"block": [number], "rows": [json.dumps(block)]})["lines"]
        # marked: a block that is there is never answered again
        left = str(lines).replace('"finish_reason"', '"kept": true, "finish_reason"')
        batches.place_of(folder, number).write_text(left)
    assert start(rows, folder, "--block-rows", "2").wait(600) == 0, folder.with_suffix(".log").read_text()
    found = answers(folder)
    plain = pocket("none").generate(prompts, SamplingParams(max_tokens=8, temperature=0.8, seed=3))
    assert [row["id"] for row in found] == [f"row-{i}" if i % 3 == 0 else i for i in range(24)]
    assert [row["token_ids"] for row in found] == [[*one.outputs[0].token_ids] for one in plain]
    assert [row["text"] for row in found] == [one.outputs[0].text for one in plain]
    assert [number for number, row in enumerate(found) if "kept" in row] == [0, 1, 10, 11]
    assert "4 rows are answered already" in folder.with_suffix(".log").read_text()


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (['{"prompt": "a"}'], ("--compare",), "leave --compare out"),
        (['{"id": 1, "prompt": "a"}', '{"id": "1", "prompt": "b"}'], (), "was there before"),
        (['{"prompt": "a"}', '{"answer": "b"}'], (), "rows.jsonl:2: no prompt"),
        (['{"id": 1.5, "prompt": "a"}'], (), "the id must be"),
        ([], (), "holds no prompt"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    tmp_path: Path, lines: list[str], options: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_command, "start_ray", lambda cpus: pytest.fail("Ray was started"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(lines))
    given = GenerateOptions(model="pocket", ray=rows, output=tmp_path / "out", compare="--compare" in options)
    with pytest.raises(SelfdraftError, match=words):
        batch_command.answer_on_ray(given)


def test_answers_of_other_options_are_never_mixed(tmp_path: Path) -> None:
    batches.claim(tmp_path, {"seed": 1})
    batches.claim(tmp_path, {"seed": 1})
    with pytest.raises(RequestError, match="give another folder"):
        batches.claim(tmp_path, {"seed": 2})
