"""Gather the pocket model's training text: Python's standard library and permissive sets, no test split.

Every document is a plain string; chat documents are written with the pocket's own chat markers. A document
belongs to the held-out part when a hash of its text says so, so the split never depends on order or machine.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_SHARE = 0.01
TINY_PACKAGES = ("test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "encodings", "pydoc_data")


def chat(user: str, assistant: str) -> str:
    """One turn in the pocket's chat format (ChatML markers)."""
    return f"<|im_start|>user\n{user.strip()}<|im_end|>\n<|im_start|>assistant\n{assistant.strip()}<|im_end|>\n"


def is_held_out(document: str) -> bool:
    digest = hashlib.sha256(document.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def python_library() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in TINY_PACKAGES for part in relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few library files keep old encodings on purpose
        if len(text) > 200:
            yield f"# {relative}\n{text}"


def gsm8k(data: Path) -> Iterator[str]:
    for record in _jsonl(data / "gsm8k/train.jsonl"):
        answer = re.sub(r"<<[^>]*>>", "", record["answer"])
        yield chat(record["question"], answer.replace("#### ", "The answer is "))


def gpteacher(data: Path) -> Iterator[str]:
    for name in ("codegen-instruct", "roleplay-instruct", "toolformer-dedupe-only"):
        for record in json.loads((data / f"gpteacher/{name}.json").read_text()):
            question = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
            yield chat(question, record["response"])


def mbpp(data: Path) -> Iterator[str]:
    tested = {record["prompt"].strip() for record in _jsonl(data / "mbpp/mbpp_test.jsonl")}
    for record in _jsonl(data / "mbpp/mbpp.jsonl"):
        number = int(record.get("task_id", 0))
        if record["text"].strip() in tested or 11 <= number <= 510:
            continue
        code = record["code"].replace("\r\n", "\n").replace("\t", "    ")
        yield chat(record["text"], f"```python\n{code}\n```")


def self_instruct(data: Path) -> Iterator[str]:
    for name in ("seed_tasks", "user_oriented_instructions"):
        for record in _jsonl(data / f"self-instruct/{name}.jsonl"):
            for instance in record["instances"]:
                yield chat(record["instruction"] + "\n" + instance["input"], instance["output"])


def tinystories(data: Path) -> Iterator[str]:
    text = (data / "tinystories-sample/tinystories_4mb.txt").read_text()
    for story in re.split(r"(?<!\n)\n(?!\n)", text):  # a blank line parts paragraphs, a plain newline stories
        if len(story) > 100:
            yield story.strip() + "\n"


def gutenberg(data: Path) -> Iterator[str]:
    for path in sorted((data / "gutenberg").glob("*.txt")):
        text = path.read_text(encoding="utf-8-sig")
        body = re.split(r"\*\*\* ?(?:START|END) OF TH[^\n]*\n", text)[1]
        paragraphs = [re.sub(r"\s*\n\s*", " ", p).strip() for p in body.split("\n\n")]
        yield from ("\n".join(paragraphs[i : i + 40]) + "\n" for i in range(0, len(paragraphs), 40))


COPY_ORDERS = (
    "Repeat the following text exactly.",
    "Copy this text word for word.",
    "Write the text below once more.",
    "Say this again:",
    "Return the following code unchanged.",
)


def copies(documents: list[str], count: int) -> Iterator[str]:
    """Tasks whose answer repeats the prompt: they teach a small model to copy, as real chat models do."""
    draw = random.Random(7)
    for _ in range(count):
        lines = draw.choice(documents).split("\n")
        start = draw.randrange(max(1, len(lines) - 3))
        piece = "\n".join(lines[start : start + draw.randint(1, 8)])
        piece = re.sub(r"<\|im_\w+\|>(user|assistant)?", "", piece)[: draw.randint(60, 500)].strip()
        if len(piece) > 20:
            yield chat(f"{draw.choice(COPY_ORDERS)}\n{piece}", piece)


def documents(data: Path) -> list[str]:
    """All documents, shuffled with a fixed seed. Errors: FileNotFoundError names the missing set."""
    readers = (gsm8k, gpteacher, mbpp, self_instruct, tinystories, gutenberg)
    found = [*python_library(), *(document for read in readers for document in read(data))]
    found += copies(found, 9000)
    random.Random(1).shuffle(found)
    return found


def _jsonl(path: Path) -> Iterator[dict[str, str]]:
    with path.open() as file:
        yield from (json.loads(line) for line in file if line.strip())
