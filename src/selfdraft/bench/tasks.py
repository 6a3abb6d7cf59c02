"""The field's benchmarks as lists of items: what is asked, where to stop, and how an answer is judged.

A task's records are looked for in this order: the file its authors published, below the user's data folder; the copy
inside this package (`data/`, with licences), for tasks that have one; the hub's data set, if the package `datasets` is
installed. Prompts are zero-shot; what is put around a record's text is written here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from selfdraft.bench import scores
from selfdraft.bench.sandbox.outside import Verdict, run_program
from selfdraft.errors import OptionError, RequestError
from selfdraft.files.records import read_records, turns_of
from selfdraft.types import JsonObject, comma_separated

BUNDLED = Path(__file__).parent / "data"
Score = dict[str, float | list[bool] | list[str]]
"""`name: figure` of one item; for code, `passed` (by sample), `verdicts` and `protection`."""
Judge = Callable[[SequenceOf[str]], Score]
"""(texts of all samples) -> score."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a task."""

    key: str
    """Names it within its task, whatever the limit."""
    turns: tuple[str, ...]
    group: str = ""
    """Sub-task it belongs to, as in `spec-bench/math`."""
    stop: tuple[str, ...] = ()
    judge: Judge | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """Where the records lie and how one is read: `read(record, place, chat)`."""

    files: tuple[str, ...]
    """Paths below the data folder; the first that exists is read."""
    read: Callable[[JsonObject, str, bool], Item | None]
    origin: str = ""
    """Where the authors publish it."""
    bundled: str = ""
    """Its file in this package; empty when it has none."""
    hub: tuple[str, ...] = ()
    """Name, configuration and split for `datasets`; empty when the hub has none in this form."""
    groups: tuple[str, ...] = ()
    unscored: str = ""
    """Why there is no score."""
    code: bool = False
    """Scored by running what was written: more samples make sense."""
    summary: bool = False


def load(name: str, folder: Path | None, *, chat: bool, limit: int | None) -> list[Item]:
    """The items of a task, `task/group` or jsonl file; at most `limit`, of a task with groups `limit` of each.

    Errors: OptionError for an unknown name; RequestError names the file, the line and what is wrong.
    """
    task = task_of(name)
    if task is None:
        items = (_free(record, place, chat) for place, record in read_records(Path(name)))
        return _filled(list(islice(items, limit)), name)
    base, _, group = name.partition("/")
    source = find_records(base, folder)
    read = (item for place, record in source for item in (task.read(record, place, chat),) if item is not None)
    if not task.groups:
        return _filled(list(islice(read, limit)), base)
    wanted = [group] if group else list(task.groups)
    by_group: dict[str, list[Item]] = {one: [] for one in wanted}
    for item in read:
        if item.group in by_group and (limit is None or len(by_group[item.group]) < limit):
            by_group[item.group].append(item)
    return _filled([item for items in by_group.values() for item in items], name)


def names_of(wanted: str) -> list[str]:
    """The tasks of a list with commas; 'all' is every one. Errors: OptionError names what there is."""
    names: list[str] = []
    for name in comma_separated(wanted):
        if name == "all":
            names += TASKS
        else:
            _check_name(name)
            names.append(name)
    names = list(dict.fromkeys(names))
    if not names:
        raise OptionError(f"--tasks {wanted!r} names no task; there are: all, {', '.join(TASKS)}, or a jsonl file")
    whole = next((name for name in names if "/" in name and name.partition("/")[0] in names), None)
    if whole is not None:
        raise OptionError(f"--tasks: {whole!r} is part of {whole.partition('/')[0]!r} already; name one of them")
    return names


def task_of(name: str) -> Task | None:
    """The task behind `task` or `task/group`; None for a file."""
    base, slash, group = name.partition("/")
    task = TASKS.get(base)
    return task if task is not None and (not slash or group in task.groups) else None


def find_records(name: str, folder: Path | None) -> Iterator[tuple[str, JsonObject]]:
    """(place, record) of a task: from the data folder, else from this package, else from the hub.

    Errors: RequestError names the file that is wanted and where its authors publish it.
    """
    task = TASKS[name]
    paths = [folder / file for file in task.files] if folder is not None else []
    paths += [BUNDLED / task.bundled] if task.bundled else []
    found = next((path for path in paths if path.is_file()), None)
    if found is not None:
        return read_records(found)
    if task.hub and find_spec("datasets") is not None:
        return _from_hub(name, task.hub)
    where = f"{folder} does not hold its file" if folder is not None else "its file is not part of this package"
    way = f"save {' or '.join(task.files)} (from {task.origin}) in a folder and give that folder as --data-dir"
    hub = f"; or pip install datasets, and it is read from the hub ({task.hub[0]})" if task.hub else ""
    raise RequestError(f"task {name}: {where}: {way}{hub}")


def _from_hub(name: str, hub: tuple[str, ...]) -> Iterator[tuple[str, JsonObject]]:
    *place, split = hub
    try:
        records = import_module("datasets").load_dataset(*place, split=split)
    except Exception as error:  # whatever the library, the network or the hub raise
        line = " ".join(str(error).split())
        raise RequestError(f"task {name}: the hub's {'/'.join(hub)} cannot be read: {line[:200]}") from error
    return ((f"{'/'.join(hub)}, record {number}", dict(record)) for number, record in enumerate(records, 1))


def _check_name(name: str) -> None:
    if task_of(name) is not None or Path(name).is_file():
        return
    base, _, group = name.partition("/")
    if base in TASKS:
        parts = ", ".join(f"{base}/{one}" for one in TASKS[base].groups)
        raise OptionError(f"task {base!r} has no part {group!r}; there are: {parts or f'none, only {base}'}")
    near = difflib.get_close_matches(name, TASKS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise OptionError(
        f"there is no task and no file {name!r}{hint} There are: all, {', '.join(TASKS)}, or a jsonl file"
    )


def _filled(items: list[Item], name: str) -> list[Item]:
    if not items:
        raise RequestError(f"task {name}: its file holds no readable record")
    seen: dict[str, int] = {}
    for item in items:
        seen[item.key] = seen.get(item.key, 0) + 1
    twice = next((key for key, count in seen.items() if count > 1), None)
    if twice is not None:
        raise RequestError(f"task {name}: two records are called {twice!r}; results could not be told apart")
    return items


def _text(record: JsonObject, place: str, *names: str) -> str:
    """The first of these fields that holds text. Errors: RequestError."""
    for name in names:
        value = record.get(name)
        if isinstance(value, str) and value:
            return value
    raise RequestError(f"{place}: the record has no text in {' or '.join(repr(name) for name in names)}")


def _lines(record: JsonObject, place: str, *names: str) -> list[str]:
    """The first of these fields that holds a list of texts. Errors: RequestError."""
    for name in names:
        value = record.get(name)
        if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
            return value
    raise RequestError(f"{place}: the record has no list of texts in {' or '.join(repr(name) for name in names)}")


def _number(place: str) -> str:
    """The number of a line or record, out of its place."""
    return place.rpartition(":")[2].rpartition(" ")[2]


def _free(record: JsonObject, place: str, chat: bool) -> Item:
    return Item(_number(place), tuple(turns_of(record, place)))


def _mt_bench(record: JsonObject, place: str, chat: bool) -> Item:
    key = record.get("question_id", record.get("prompt_id", _number(place)))
    return Item(str(key), tuple(turns_of(record, place)))


def _quick(record: JsonObject, place: str, chat: bool) -> Item:
    return Item(_text(record, place, "id"), tuple(turns_of(record, place)), _text(record, place, "group"))


QUICK = ("chat", "translation", "summary", "qa", "math", "retrieval", "code", "editing")
"""Groups of the bundled prompts, eight prompts each."""

GROUPS = {
    "translation": "translation",
    "summarization": "summarization",
    "qa": "qa",
    "math_reasoning": "math",
    "rag": "rag",
}
"""Sub-tasks of Spec-Bench by its `category`; the eight categories of MT-Bench together are 'mt-bench'."""


def _spec_bench(record: JsonObject, place: str, chat: bool) -> Item:
    group = GROUPS.get(_text(record, place, "category"), "mt-bench")
    return Item(str(record.get("question_id", _number(place))), tuple(turns_of(record, place)), group)


def _gsm8k(record: JsonObject, place: str, chat: bool) -> Item:
    question, answer = _text(record, place, "question"), _text(record, place, "answer")
    if scores.last_number(answer) is None:
        raise RequestError(f"{place}: the answer holds no number")
    prompt = question if chat else f"Question: {question}\nAnswer:"
    judge = partial(_judge_number, answer=answer)
    return Item(_number(place), (prompt,), stop=() if chat else ("Question:",), judge=judge)


def _judge_number(texts: SequenceOf[str], answer: str) -> Score:
    return {"accuracy": float(scores.same_number(texts[0], answer))}


def _summary(record: JsonObject, place: str, chat: bool, *, ask: str) -> Item:
    if "turns" in record:
        prompt, references = turns_of(record, place)[0], _lines(record, place, "reference")
    elif "prompt" in record:
        prompt, references = _text(record, place, "prompt"), [_text(record, place, "completion")]
    else:
        prompt = f"{ask}{_text(record, place, 'article', 'document')}\n"
        references = [_text(record, place, "highlights", "summary")]
    clean = [reference.replace("<|endoftext|>", "").strip() for reference in references]
    return Item(_number(place), (prompt,), judge=partial(_judge_summary, references=clean))


def _judge_summary(texts: SequenceOf[str], references: SequenceOf[str]) -> Score:
    return {**scores.rouge(texts[0], references)}


HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completed function ends: Chen et al. (arXiv 2107.03374), section 3.2."""


def _humaneval(record: JsonObject, place: str, chat: bool) -> Item:
    prompt, tests = _text(record, place, "prompt"), _text(record, place, "test")
    entry = _text(record, place, "entry_point")
    after = f"\n{tests}\ncheck({entry})\n"
    asked = f"Complete this function. Answer with the whole function in one code block.\n```python\n{prompt}```"
    judge = partial(_judge_code, before=prompt, after=after, fenced=chat)
    key = _text(record, place, "task_id")
    return Item(key, (asked if chat else prompt,), stop=() if chat else HUMANEVAL_STOPS, judge=judge)


def _mbpp(record: JsonObject, place: str, chat: bool) -> Item | None:
    """Austin et al. (arXiv 2108.07732): its test split is task_id 11 to 510; the prompt is theirs, without examples."""
    number = record.get("task_id")
    if not isinstance(number, int):
        raise RequestError(f"{place}: task_id {number!r} is not a number")
    if not 11 <= number <= 510:
        return None
    tests = _lines(record, place, "test", "test_list")
    asked = _text(record, place, "prompt", "text")
    prompt = f"You are an expert Python programmer, and here is your task: {asked} "
    prompt += "Your code should pass these tests:\n\n" + "\n".join(tests)
    after = "\n" + "\n".join([str(record.get("test_setup_code") or ""), *tests]) + "\n"
    judge = partial(_judge_code, before="", after=after, fenced=True)
    return Item(
        str(number), (prompt if chat else prompt + "\n[BEGIN]\n",), stop=() if chat else ("[DONE]",), judge=judge
    )


def _classeval(record: JsonObject, place: str, chat: bool) -> Item:
    """Du et al. (arXiv 2308.01861), their holistic strategy: the whole class at once."""
    skeleton, tests = _text(record, place, "skeleton"), _text(record, place, "test")
    prompt = f"Complete the class {_text(record, place, 'class_name')} in the following code.\n"
    prompt += f"```python\n{skeleton}\n```\n" + ("" if chat else "The complete class:\n```python\n")
    classes = ", ".join(_lines(record, place, "test_classes"))
    before = "\n".join(_lines({"i": record.get("import_statement") or [""]}, place, "i")) + "\n"
    after = f"\n{tests}\n{UNITTEST.format(classes=classes)}"
    judge = partial(_judge_code, before=before, after=after, fenced=chat)
    return Item(_text(record, place, "task_id"), (prompt,), stop=() if chat else ("\n```",), judge=judge)


UNITTEST = """
import io, unittest
suite = unittest.TestSuite(map(unittest.defaultTestLoader.loadTestsFromTestCase, [{classes}]))
result = unittest.TextTestRunner(stream=io.StringIO()).run(suite)
assert result.testsRun and result.wasSuccessful(), "a test failed"
"""
"""Runs test cases that stand in the same module. Every one must pass, as in ClassEval's class-level score."""


def _judge_code(texts: SequenceOf[str], before: str, after: str, fenced: bool) -> Score:
    """Run each sample with its tests. With `fenced`, the first fenced block in it is the code; else all of it."""
    verdicts = [judged(text, before, after, fenced) for text in texts]
    return {
        "passed": [verdict.passed for verdict in verdicts],
        "verdicts": [verdict.why for verdict in verdicts],
        "protection": sorted({verdict.protection for verdict in verdicts}),
    }


def judged(text: str, before: str, after: str, fenced: bool) -> Verdict:
    """The verdict on one written program."""
    code = scores.code_of(text) if fenced else None
    # a whole function in a block stands on its own: behind the prompt it replaces the unfinished one
    return run_program(before + (text if code is None else f"\n{code}") + after)


TASKS = {
    "quick": Task((), _quick, bundled="quick.jsonl", groups=QUICK, unscored="quick measures speed only"),
    "spec-bench": Task(
        ("spec-bench/question.jsonl",),
        _spec_bench,
        "github.com/hemingkx/Spec-Bench, data/spec_bench/question.jsonl",
        groups=("mt-bench", *GROUPS.values()),
        unscored="Spec-Bench measures speed only",
    ),
    "mt-bench": Task(
        ("mt-bench/question.jsonl",),
        _mt_bench,
        "github.com/lm-sys/FastChat, fastchat/llm_judge/data/mt_bench/question.jsonl",
        bundled="mt-bench.jsonl",
        unscored="a judge model would be needed",
    ),
    "gsm8k": Task(
        ("gsm8k/test.jsonl",),
        _gsm8k,
        "github.com/openai/grade-school-math, grade_school_math/data/test.jsonl",
        bundled="gsm8k-test.jsonl.gz",
    ),
    "humaneval": Task(
        ("humaneval/HumanEval.jsonl.gz", "humaneval/HumanEval.jsonl"),
        _humaneval,
        "github.com/openai/human-eval, data/HumanEval.jsonl.gz",
        bundled="humaneval.jsonl.gz",
        code=True,
    ),
    "mbpp": Task(
        ("mbpp/mbpp.jsonl", "mbpp/mbpp_test.jsonl"),
        _mbpp,
        "github.com/google-research/google-research, mbpp/mbpp.jsonl",
        hub=("google-research-datasets/mbpp", "full", "test"),
        code=True,
    ),
    "classeval": Task(
        ("classeval/ClassEval_data.json",),
        _classeval,
        "github.com/FudanSELab/ClassEval, data/ClassEval_data.json",
        hub=("FudanSELab/ClassEval", "test"),
        code=True,
    ),
    "cnn-dailymail": Task(
        ("cnn-dailymail/cnn_dailymail_3_0_0_2_or_3_sentences.jsonl", "cnn-dailymail/eagle_sum_question.jsonl"),
        partial(_summary, ask="In 2 or 3 sentences, what are the main points of this news article?\n\nArticle: "),
        "the data set abisee/cnn_dailymail 3.0.0, test: a line per record with 'article' and 'highlights'",
        hub=("abisee/cnn_dailymail", "3.0.0", "test"),
        summary=True,
    ),
    "xsum": Task(
        ("xsum/xsum_summarize_DOC.jsonl",),
        partial(_summary, ask="Summarize: "),
        "the data set EdinburghNLP/xsum, test: a line per record with 'document' and 'summary'",
        hub=("EdinburghNLP/xsum", "test"),
        summary=True,
    ),
}
"""Every task by name."""
