"""The benchmarks' files as items: formats, judges, stops, parts, and what is said about broken ones."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfdraft.bench import tasks
from selfdraft.bench.tasks import TASKS, Item, load, names_of
from selfdraft.errors import OptionError, RequestError
from tests.outside import WANTED, outside

DATA = outside("data")
HUMANEVAL = {
    "task_id": "HumanEval/7",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
}
MBPP = {"task_id": 11, "text": "Write a function that adds.", "test_list": ["assert add(1, 2) == 3"]}
CLASSEVAL = {
    "task_id": "ClassEval_1",
    "skeleton": "class Box:\n    def size(self):\n        pass\n",
    "class_name": "Box",
    "import_statement": ["import math"],
    "test": "import unittest\nclass TestBox(unittest.TestCase):\n"
    "    def test(self):\n        self.assertEqual(Box().size(), 3)\n",
    "test_classes": ["TestBox"],
}
RECORDS: dict[str, list[dict[str, Any]]] = {
    "spec-bench/question.jsonl": [
        {"question_id": i, "category": category, "turns": [f"{category} one", "two"]}
        for i, category in enumerate(
            ["writing", "coding", "translation", "translation", "summarization", "qa", "math_reasoning", "rag"]
        )
    ],
    "mt-bench/question.jsonl": [{"question_id": 81, "category": "writing", "turns": ["the dog", "and the hill"]}],
    "gsm8k/test.jsonl": [{"question": "How many dogs?", "answer": "2 + 1 = 3\n#### 3"}],
    "humaneval/HumanEval.jsonl.gz": [HUMANEVAL],
    "mbpp/mbpp.jsonl": [{**MBPP, "task_id": 10}, MBPP, {**MBPP, "task_id": 12}, {**MBPP, "task_id": 511}],
    "classeval/ClassEval_data.json": [CLASSEVAL],
    "cnn-dailymail/eagle_sum_question.jsonl": [
        {"question_id": 1, "category": "summarization", "turns": ["Summarize: the dog ran"], "reference": ["dog ran"]}
    ],
    "xsum/xsum_summarize_DOC.jsonl": [{"prompt": "Summarize: the dog", "completion": "The dog.<|endoftext|>"}],
}


def write_data(folder: Path) -> Path:
    """A small file of every task, in its authors' format."""
    for name, records in RECORDS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(json.dumps(record) for record in records) + "\n"
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(lines.encode()))
        else:
            path.write_text(json.dumps(records) if name.endswith(".json") else lines)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def one(name: str, data: Path, *, chat: bool = False) -> Item:
    (item,) = load(name, data, chat=chat, limit=1)
    return item


def judged(item: Item, *texts: str) -> Any:
    assert item.judge is not None
    return item.judge(texts)


def test_every_task_can_be_read(data: Path) -> None:
    for name in TASKS:
        for chat in (False, True):
            items = load(name, data, chat=chat, limit=None)
            assert items
            assert all(turn for item in items for turn in item.turns)


def test_parts(data: Path) -> None:
    whole = load("spec-bench", data, chat=False, limit=None)
    assert [item.group for item in whole] == [
        *("mt-bench", "mt-bench", "translation", "translation", "summarization", "qa", "math", "rag")
    ]
    assert [item.key for item in load("spec-bench", data, chat=False, limit=1)] == ["0", "2", "4", "5", "6", "7"]
    assert [item.key for item in load("spec-bench/translation", data, chat=False, limit=None)] == ["2", "3"]
    assert whole[0].turns == ("writing one", "two")


def test_gsm8k(data: Path) -> None:
    item = one("gsm8k", data)
    assert item.turns == ("Question: How many dogs?\nAnswer:",)
    assert item.stop == ("Question:",)
    assert one("gsm8k", data, chat=True).turns == ("How many dogs?",)
    assert one("gsm8k", data, chat=True).stop == ()
    assert judged(item, "2 and 1 make 3.") == {"accuracy": 1.0}
    assert judged(item, "3, no, 4") == {"accuracy": 0.0}


def test_humaneval(data: Path) -> None:
    item = one("humaneval", data)
    assert item.turns == (HUMANEVAL["prompt"],)
    assert "\ndef" in item.stop
    found = judged(item, "    return 2 * x\n", "    return x\n", "    import sys\n    sys.exit(0)\n")
    assert found["passed"] == [True, False, False]
    assert found["verdicts"][2] == "it called exit"


def test_humaneval_as_chat(data: Path) -> None:
    item = one("humaneval", data, chat=True)
    assert str(HUMANEVAL["prompt"]) in item.turns[0]
    assert item.stop == ()
    answer = "Here it is:\n```python\ndef double(x):\n    return x + x\n```\nThat works."
    assert judged(item, answer)["passed"] == [True]
    assert judged(item, "I cannot.")["passed"] == [False]


def test_mbpp_takes_the_test_split(data: Path) -> None:
    items = load("mbpp", data, chat=False, limit=None)
    assert [item.key for item in items] == ["11", "12"]
    assert items[0].turns[0].startswith("You are an expert Python programmer, and here is your task: Write a function")
    assert items[0].turns[0].endswith("assert add(1, 2) == 3\n[BEGIN]\n")
    assert judged(items[0], "def add(a, b):\n    return a + b", "def add(a, b): ...")["passed"] == [True, False]


def test_classeval(data: Path) -> None:
    item = one("classeval", data)
    assert str(CLASSEVAL["skeleton"]) in item.turns[0]
    right = "class Box:\n    def size(self):\n        return math.floor(3.5)"
    assert judged(item, right, right.replace("3.5", "4.5"), "")["passed"] == [True, False, False]
    assert judged(one("classeval", data, chat=True), f"```python\n{right}\n```")["passed"] == [True]


def test_summaries(data: Path) -> None:
    pytest.importorskip("rouge_score")
    for name in ("xsum", "cnn-dailymail"):
        item = one(name, data)
        assert item.turns[0].startswith("Summarize: the dog")
        said = "the dog" if name == "xsum" else "dog ran"
        assert judged(item, said)["rougeL"] == pytest.approx(1.0)
        assert judged(item, "unlike anything")["rouge1"] == 0.0


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"turns": ["two", "three"]}\n')
    items = load(str(path), None, chat=False, limit=None)
    assert [(item.key, item.turns) for item in items] == [("1", ("one",)), ("3", ("two", "three"))]
    assert len(load(str(path), None, chat=False, limit=1)) == 1


def test_names() -> None:
    assert names_of("all") == [*TASKS]
    assert names_of(" gsm8k, xsum,gsm8k") == ["gsm8k", "xsum"]
    assert names_of("spec-bench/math,spec-bench/qa") == ["spec-bench/math", "spec-bench/qa"]


NAMES = {
    "gsm9k": "there is no task and no file 'gsm9k'; did you mean 'gsm8k'?",
    ",": "names no task; there are: all, quick, spec-bench",
    "spec-bench/maths": "task 'spec-bench' has no part 'maths'; there are: spec-bench/mt-bench",
    "gsm8k/x": "task 'gsm8k' has no part 'x'; there are: none, only gsm8k",
    "spec-bench,spec-bench/qa": "'spec-bench/qa' is part of 'spec-bench' already",
}


@pytest.mark.parametrize("wanted", NAMES)
def test_a_wrong_name(wanted: str) -> None:
    with pytest.raises(OptionError) as caught:
        names_of(wanted)
    assert NAMES[wanted] in str(caught.value)


BROKEN = {
    "json": ("gsm8k", "test.jsonl", "{broken\n", ":1: broken JSON"),
    "field": ("gsm8k", "test.jsonl", '\n{"question": "a"}\n', ":2: the record has no text in 'answer'"),
    "number": ("gsm8k", "test.jsonl", '{"question": "a", "answer": "b"}', ":1: the answer holds no number"),
    "object": ("gsm8k", "test.jsonl", "[1]", ":1: a record must be an object"),
    "empty": ("gsm8k", "test.jsonl", "\n", "holds no readable record"),
    "turns": ("mt-bench", "question.jsonl", '{"turns": []}', ":1: no prompt"),
    "twice": ("mt-bench", "question.jsonl", '{"question_id": 1, "turns": ["a"]}\n' * 2, "are called '1'"),
    "id": ("mbpp", "mbpp.jsonl", '{"task_id": "a"}', ":1: task_id 'a' is not a number"),
    "split": ("mbpp", "mbpp.jsonl", json.dumps({**MBPP, "task_id": 1}), "holds no readable record"),
    "gzip": ("humaneval", "HumanEval.jsonl.gz", "no gzip", "HumanEval.jsonl.gz is a broken gzip file"),
    "list": ("classeval", "ClassEval_data.json", "{}", "must hold a list of records"),
    "json list": ("classeval", "ClassEval_data.json", "[\n{]", ":2: broken JSON"),
    "entry": ("classeval", "ClassEval_data.json", "[3]", ", record 1: a record must be an object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_names_its_place(name: str, tmp_path: Path) -> None:
    task, file, text, words = BROKEN[name]
    (tmp_path / task).mkdir()
    (tmp_path / task / file).write_text(text)
    with pytest.raises(RequestError) as caught:
        load(task, tmp_path, chat=False, limit=None)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_gzip(tmp_path: Path, data: Path) -> None:
    (tmp_path / "humaneval").mkdir()
    whole = (data / "humaneval" / "HumanEval.jsonl.gz").read_bytes()
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(RequestError, match="broken gzip file"):
        load("humaneval", tmp_path, chat=False, limit=None)


def test_missing_files_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"does not hold its file: save mbpp/mbpp.jsonl or .*pip install datasets"):
        load("mbpp", tmp_path, chat=False, limit=None)
    with pytest.raises(RequestError, match=r"github.com/google-research/google-research.* as --data-dir"):
        load("mbpp", None, chat=False, limit=None)
    for name in ("spec-bench", "mbpp", "classeval", "cnn-dailymail", "xsum"):
        with pytest.raises(RequestError, match=TASKS[name].files[0]) as caught:
            load(name, None, chat=False, limit=None)
        assert TASKS[name].origin in str(caught.value)
        assert ("datasets" in str(caught.value)) == (name != "spec-bench")


def test_what_is_part_of_the_package() -> None:
    """No folder and no hub: whole benchmarks, and eight prompts in each of eight groups."""
    counts = {name: len(load(name, None, chat=True, limit=None)) for name in ("humaneval", "gsm8k", "mt-bench")}
    assert counts == {"humaneval": 164, "gsm8k": 1319, "mt-bench": 80}
    quick = load("quick", None, chat=True, limit=None)
    assert Counter(item.group for item in quick) == dict.fromkeys(tasks.QUICK, 8)
    assert len({item.turns for item in quick}) == 64
    assert [item.key for item in load("quick/code", None, chat=True, limit=2)] == ["code-1", "code-2"]
    for licence in ("humaneval", "gsm8k", "mt-bench"):
        assert (tasks.BUNDLED / f"LICENSE.{licence}").read_text().strip()


def test_a_data_folder_goes_before_the_package(data: Path, tmp_path: Path) -> None:
    assert len(load("gsm8k", data, chat=True, limit=None)) == 1
    assert len(load("gsm8k", tmp_path, chat=True, limit=None)) == 1319


def test_missing_files_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's fields have other names in two tasks."""
    shelves: dict[tuple[str, ...], dict[str, Any]] = {
        ("abisee/cnn_dailymail", "3.0.0"): {"article": "The dog ran.", "highlights": "Dog ran", "id": "x"},
        ("EdinburghNLP/xsum",): {"document": "The dog ran.", "summary": "Dog ran", "id": "1"},
        ("google-research-datasets/mbpp", "full"): MBPP,
    }

    def load_dataset(*place: str, split: str) -> Iterator[dict[str, Any]]:
        if place not in shelves:
            raise ConnectionError("no\nroute")
        return iter([shelves[place]])

    monkeypatch.setattr(tasks, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in ("cnn-dailymail", "xsum", "mbpp"):
        assert load(name, None, chat=False, limit=None)[0].turns
    with pytest.raises(RequestError, match="the hub's FudanSELab/ClassEval/test cannot be read: no route"):
        load("classeval", None, chat=False, limit=None)


@pytest.mark.skipif(not DATA.is_dir(), reason=WANTED)
def test_the_real_files() -> None:
    counts = {name: len(load(name, DATA, chat=False, limit=None)) for name in TASKS}
    assert counts == {
        "quick": 64,
        "spec-bench": 480,
        "mt-bench": 80,
        "gsm8k": 1319,
        "humaneval": 164,
        "mbpp": 500,
        "classeval": 100,
        "cnn-dailymail": 200,
        "xsum": 200,
    }
    groups = Counter(item.group for item in load("spec-bench", DATA, chat=False, limit=None))
    assert set(groups.values()) == {80}
    assert len(groups) == 6


@pytest.mark.skipif(not DATA.is_dir(), reason=WANTED)
@pytest.mark.parametrize(("name", "field"), [("humaneval", "canonical_solution"), ("mbpp", "code")])
def test_the_authors_solutions_pass(name: str, field: str) -> None:
    """The first few; docs/bench.md gives the count of all."""
    items = load(name, DATA, chat=False, limit=4)
    solutions = {str(r["task_id"]): r[field] for _, r in tasks.find_records(name, DATA)}
    for item in items:
        assert judged(item, solutions[item.key])["verdicts"] == ["passed"]
        assert judged(item, "    return None\n")["passed"] == [False]
