"""The prompts of tasks for recipes that decode them: what is said of them on the command line, and their tokens."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from selfdraft import LLM
from selfdraft.bench.tasks import load, names_of


def options(about: str | None) -> argparse.ArgumentParser:
    """The options of a recipe that answers tasks; `about` is its docstring."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", default="quick", help="names as 'selfdraft bench' has them")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--limit", type=int, help="prompts of each task or group")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    return parser


def prompts_of(llm: LLM, given: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Token ids of the first turns in the chat template, by task or group of one."""
    found = defaultdict(list)
    for name in names_of(given.tasks):
        for item in load(name, given.data_dir, chat=True, limit=given.limit):
            found[item.group or name].append(llm.render([{"role": "user", "content": item.turns[0]}]))
    return dict(found)
