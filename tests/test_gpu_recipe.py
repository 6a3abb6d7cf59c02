"""The three runs of `recipes/gpu.py` without a GPU: whole, over the fake capture of `tests/graphs.py`, small models."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from selfdraft.core.tree import Draft
from selfdraft.drafters import NAMES
from selfdraft.files.token_log import Logged
from selfdraft.models.graph.graph_runner import GraphSettings
from selfdraft.models.graph.plain_glue import plain_glue
from tests.clocks import Ticking
from tests.graphs import settings

ROOT = Path(__file__).parent.parent
ALL = os.environ.get("SELFDRAFT_TEST_GRAPHS") == "all"
SOME = ("none", "space", "layer_skip")
"""Drafters of the default run: with masks, and with short passes."""
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 97, "tie_word_embeddings": False}  # fmt: skip
MOTIF = [17, 4, 33, 8, 51, 22, 9]


@pytest.fixture(autouse=True)
def recipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of the folder `recipes` can be imported; they go with the test."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    yield
    for name in [name for name in sys.modules if name == "gpu" or name.startswith("gpu_runs")]:
        del sys.modules[name]


def part_of(name: str) -> Any:
    """A module of the recipe, which is no package of ours: mypy does not look there."""
    __import__(f"gpu_runs.{name}")
    return sys.modules[f"gpu_runs.{name}"]


def bench(**changes: object) -> Any:
    """This machine, on a clock that goes on when it is read."""
    made, clock = part_of("bench"), Ticking(1e-4)

    def graphs(classes: tuple[int, ...]) -> GraphSettings:
        return settings(classes=classes, piece=32, shortest=128)

    given = {"shapes": {"1b": SMALL, "8b": SMALL}, "lengths": (8, 24, 40), "context": 1024, "tokens": 3, "text": 6,
             "copied": 2**12, "warm": 1, "times": 2, "prompt": 12, "tried": (16, 32), "slots": (1, 2),
             "drafters": tuple(NAMES) if ALL else SOME, "glue": plain_glue, **changes}  # fmt: skip
    suite = (sys.executable, "-c", "print('FAILED one\\n1 failed, 2 passed in 0.1s'); raise SystemExit(1)")
    return made.Bench(
        torch.device("cpu"), torch.float32, graphs, clock, lambda: made.ClockMark(clock()), lambda: None, suite, **given
    )


def run_of(verb: str, folder: Path, **changes: object) -> Any:
    return part_of("parts").Run(verb, bench(**changes), folder, say=lambda line: None)


def parts(folder: Path, verb: str) -> dict[str, dict[str, Any]]:
    whole = json.loads((folder / f"{verb}.json").read_text("utf-8"))
    assert whole["verb"] == verb
    return {part["part"]: part for part in whole["parts"]}


def test_check_runs_whole(tmp_path: Path) -> None:
    """All parts say something; of the tests, which fail here on purpose, it says which."""
    assert part_of("check").check(run_of("check", tmp_path), ["1b"]) == 1
    found = parts(tmp_path, "check")
    assert found.pop("tests on the device")["failed"] == "1 tests failed, exit code 1"
    assert [name for name, part in found.items() if "failed" in part] == []
    texts = found["every drafter says the plain text, pocket"]["figures"]
    assert texts[0]["value"] == "bitwise"
    assert {figure["value"] for figure in texts[1:]} == {"4 of 4 texts are the plain ones"}
    rows = {figure["rows"]: figure["value"] for figure in found["bits of passes, 1b"]["figures"]}
    assert rows[32] == "150 of 150"
    ways = [figure["figure"] for figure in found["plain decoding, 1b"]["figures"]]
    assert ways[:4] == ["bound", "transformers", "ours, call by call", "ours, graphs"]
    assert ways[4:] == ["ours, graphs, fused glue", "ours, graphs of one row", "ours, graphs of one row, fused glue"]


def test_time_runs_whole_on_a_clock_that_is_handed_in(tmp_path: Path) -> None:
    assert part_of("times").time(run_of("time", tmp_path), ["1b"]) == 1
    found = parts(tmp_path, "time")
    failed = {name: part["failed"] for name, part in found.items() if "failed" in part}
    assert failed == {
        "kernels of a pass, 1b": "the profiler saw no kernels",
        "small operations compiled, 1b": "torch compiles no graphs for cpu here",
    }
    rows = found["rows and contexts, 1b"]["figures"][1:]
    assert [(figure["tokens"], figure["rows"]) for figure in rows[:3]] == [(8, 1), (8, 2), (8, 4)]
    assert {round(figure["value"], 6) for figure in rows} == {0.1}  # the clock is read once in a pass
    assert [figure["rows"] for figure in found["graphs in memory, 1b"]["figures"]] == [128, 64, 32, 16, 8, 4, 2, 1]


def logs() -> dict[str, list[Logged]]:
    """Two answers that repeat themselves, and one of another file."""

    def one(prompt: list[int], answer: list[int]) -> Logged:
        return Logged(tuple(prompt), tuple(answer), len(prompt) + len(answer))

    return {
        "chat": [one(MOTIF * 3, MOTIF * 2), one([1, 2, 3, 300], [1, 2, 3, 300, 1, 2, 3])],
        "code": [one([5], MOTIF)],
    }


def test_speed_runs_whole(tmp_path: Path) -> None:
    made = part_of("speed")
    assert (
        made.speed(
            run_of("speed", tmp_path, drafters=("none", "lookup") if ALL else ()),
            ["1b"],
            made.Settings(logs(), None, 24),
        )
        == 0
    )
    found = parts(tmp_path, "speed")
    answers = found["recorded answers, 1b"]["figures"]
    assert len(answers) == 2 * (4 + 2)
    assert all(figure["texts_equal"] and figure["accepted_as_replay"] for figure in answers)
    accepted = {
        (figure["log"], figure["drafter"]): figure["accepted"] for figure in answers if not figure["temperature"]
    }
    assert accepted["chat", "none"] == 0 < accepted["chat", "lookup"]
    assert found["tokens compared"]["figures"][0]["value"] == 0
    assert [figure["slots"] for figure in found["batches, 1b"]["figures"]] == [1, 1, 2, 2]
    table = part_of("page").tables([tmp_path / "speed.json"])
    assert "| accepted tokens as `selfdraft replay` counts | not measured | not measured |" in table
    assert "| exactness | bitwise | not measured |" in table


def test_a_draft_is_forced_along_the_recorded_answer_only() -> None:
    """Rows whose path is a beginning of the answer say its next token, and nothing is said behind its end."""
    from selfdraft.core.rows import tree_rows
    from selfdraft.core.sequence import Sequence
    from selfdraft.types import SamplingParams
    from tests.models import tiny_target

    forced = part_of("forced").Forced(tiny_target(), lambda: 0.0, None)
    sequence = Sequence([1, 2, 3, 10], 3, SamplingParams(), slot=0, num_cached=3)
    forced.answers[sequence] = (10, 11, 12, 13)
    tree = Draft((11, 12, 13, 9, 12), (-1, 0, 1, -1, 3), ("",) * 5, 5)
    assert forced.next_tokens(tree_rows([(0, 3, 10, tree)])) == ([0, 1, 2], [11, 12, 13])


def test_counts_that_are_not_those_of_replay_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = part_of("speed")
    run = run_of("speed", tmp_path)
    monkeypatch.setattr(made, "replayed_counts", lambda *_: [99])
    run.do("recorded answers", partial(made.answers, run.bench, "1b", {"chat": logs()["code"]}))
    assert run.parts[0]["failed"].startswith("other texts, or other counts than those of replay: chat none")


def test_a_part_that_fails_does_not_end_the_run_and_time_does(tmp_path: Path) -> None:
    run = run_of("check", tmp_path)

    def broken() -> Iterator[dict[str, object]]:
        yield {"figure": "one", "value": 1}
        raise RuntimeError("an illegal access\nand more")

    run.do("broken", broken)
    run.do("whole", lambda: iter([{"figure": "two", "value": 2}]))
    run.minutes = 0
    run.do("late", broken)
    assert run.end() == 1
    found = parts(tmp_path, "check")
    assert (found["broken"]["failed"], found["broken"]["figures"]) == (
        "RuntimeError: an illegal access",
        [{"figure": "one", "value": 1}],
    )
    assert "failed" not in found["whole"]
    assert found["late"]["failed"] == "not begun: the 0 minutes were over"


def hanging() -> Iterator[dict[str, object]]:
    yield {"figure": "one", "value": 1}
    threading.Event().wait()


def dying() -> Iterator[dict[str, object]]:
    yield {"figure": "one", "value": 1}
    os._exit(7)


def breaking() -> Iterator[dict[str, object]]:
    yield {"figure": "one", "value": 1}
    raise RuntimeError("an illegal access\nand more")


def test_a_part_in_a_process_of_its_own_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has found before stays."""
    run = run_of("check", tmp_path)
    run.forks = True

    def whole() -> Iterator[dict[str, object]]:
        run.bench.known["shape"] = (3, 4)
        yield {"figure": "two", "value": os.getpid()}

    run.do("dying", dying)
    run.do("breaking", breaking)
    run.do("whole", whole)
    found = parts(tmp_path, "check")
    for name, why in (("dying", "its process ended with code 7"), ("breaking", "RuntimeError: an illegal access")):
        assert (found[name]["failed"], found[name]["figures"]) == (why, [{"figure": "one", "value": 1}])
    assert "raise RuntimeError" in found["breaking"]["trace"]
    assert found["whole"]["figures"][0]["value"] != os.getpid()
    assert run.bench.known == {"shape": (3, 4)}


def test_a_part_that_hangs_is_ended() -> None:
    made = part_of("parts")
    with pytest.raises(made.CheckFailed, match="it did not end in 0 s"):
        list(made.apart(hanging, 0))
    assert multiprocessing.active_children() == []


def test_figures_are_written_before_their_part_has_ended(tmp_path: Path) -> None:
    run = run_of("check", tmp_path)
    seen = []

    def part() -> Iterator[dict[str, object]]:
        yield {"figure": "one", "value": 1}
        seen.extend(parts(tmp_path, "check")["some"]["figures"])

    run.do("some", part)
    assert seen == [{"figure": "one", "value": 1}]


# --- the command and the page -----------------------------------------------------------------------------------


def command() -> ModuleType:
    __import__("gpu")
    return sys.modules["gpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", ["check", "time", "speed"])
def test_without_a_gpu_a_run_ends_with_one_line(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command().main([verb, "--out", str(tmp_path / "gpu")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"recipes/gpu.py {verb}: device='cuda': ")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "gpu").exists()
    assert command().main([verb, "--shape", "3b"]) == 2
    assert capsys.readouterr().err == f"recipes/gpu.py {verb}: --shape '3b' is unknown; there are 1b, 8b\n"


def test_the_page_has_the_tables_of_the_recorded_runs() -> None:
    """Those of docs/figures/gpu, and 'not measured' in every cell where there is no figure."""
    page = part_of("page")
    text = (ROOT / "docs" / "gpu.md").read_text("utf-8")
    recorded = sorted((ROOT / "docs" / "figures" / "gpu").glob("*.json"))
    assert text.split(page.BEGIN)[1].split(page.END)[0].strip() == page.tables(recorded).strip()
    if not recorded:
        assert "x |" not in page.tables([])


def test_the_tables_are_put_between_their_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, file, result = part_of("page"), tmp_path / "page.md", tmp_path / "speed.json"
    file.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n", "utf-8")
    figures = [{"figure": "bound", "shape": "8b", "value": 5.04}, {"figure": "plain", "shape": "8b", "value": 6.5}]
    told = {"verb": "speed", "conditions": {"gpu": "NVIDIA X"}, "parts": [{"figures": figures}]}
    result.write_text(json.dumps(told), "utf-8")
    assert command().main(["page", str(result), "--into", str(file)]) == 0
    text = file.read_text("utf-8")
    assert text.startswith(f"before\n{page.BEGIN}\nNVIDIA X; ")
    assert text.endswith(f"{page.END}\nafter\n")
    assert "| bound of memory, ms a token | not measured | 5.04 |" in text
    file.write_text("no marks", "utf-8")
    assert command().main(["page", str(result), "--into", str(file)]) == 2
    result.write_text("[]", "utf-8")
    assert command().main(["page", str(result)]) == 2
    assert "not what a run of recipes/gpu.py writes (TypeError)" in capsys.readouterr().err


def test_what_is_packed() -> None:
    packing = part_of("packing")
    said = packing.command(Path(".whl"), "3.12")
    assert said[said.index("--python-version") + 1] == "3.12"
    assert "--no-deps" in said
    needed = {"typer", "platformdirs", "filelock", "gguf", "accelerate", "safetensors", "pytest", "pluggy", "peft"}
    assert needed <= set(packing.WHEELS)


def test_a_made_up_shape_is_another_model() -> None:
    """Sizes are taken from the bench: nothing of 8 billion weights is made in a test."""
    made = part_of("bench")
    model = made.random_model(replace(bench(), shapes={"1b": {**SMALL, "tie_word_embeddings": True}}), "1b")
    tied = made.read_bytes(model)
    free = made.read_bytes(made.random_model(bench(), "1b"))
    assert tied == free  # a table of its own is not read, one that is the output layer is
