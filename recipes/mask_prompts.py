"""Prompts for the masks of an instruct model: what `selfdraft train --distill` lets the model answer.

    python recipes/mask_prompts.py DATA_DIR PROMPTS.jsonl [--model smollm2] [--limit 5000]

DATA_DIR holds sets that may be trained on, in folders of these names: `gpteacher` (MIT), `self-instruct` (Apache-2.0),
`gsm8k` (train split, MIT), `mbpp` (outside its test ids, CC BY 4.0), `gutenberg` (public domain), `tinystories-sample`
(CDLA-Sharing-1.0). What is missing is left out and named. Questions about things of daily life and school are made
here. Every prompt is wrapped in the model's chat template. The same folder gives the same file.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from selfdraft import LLM

MOST = 900
"""Characters of a passage, at most: longer texts are cut when trained on."""
THINGS = """rainbows|volcanoes|vaccines|the stock market|photosynthesis|a bicycle|the French Revolution
black holes|bread|coffee|the Moon landing|chess|earthquakes|the water cycle|democracy|inflation
solar panels|the Roman Empire|bees|a piano|antibiotics|the internet|glaciers|tea|marathon training
public libraries|electric cars|the Renaissance|whales|gravity|compound interest|time zones
coral reefs|wind turbines|opera|the Silk Road|insulin|a compass|dreams|the Great Wall|recycling|jazz
a mortgage|migration of birds|the periodic table|deserts|a thermometer|yoga|the printing press
lighthouses|artificial intelligence|remote work|a vegetable garden|pottery|the immune system|tides
a microscope|football|steam engines|batteries|the Olympic Games|DNA|hurricanes|origami
a sailing boat|sleep|the human heart|supply and demand|paper|bridges"""
ASKED = (
    "Explain {} to a child.",
    "Explain in detail how {} came to be important.",
    "What are the advantages and disadvantages of {}?",
    "Write a short blog post about {}.",
    "Give me five tips about {}.",
    "Write a poem about {}.",
    "Who first studied {}, and when?",
    "What is the history of {}?",
    "Compare {} with something similar.",
    "Write an email to a friend about {}.",
    "List the main facts about {} in bullet points.",
    "Is it true that {} changed the world? Give reasons.",
)
PASSAGES = (
    "Summarize: {}",
    "{}\n\nSummarize the text above in two sentences.",
    "{}\n\nTL;DR:",
    "Rewrite this text in simple words: {}",
    "Translate to French: {}",
    "Correct the spelling of this text and give it back whole:\n{}",
    "Read the passage and answer the question.\n{}\nQuestion: What happens in it, and to whom?",
    "Answer the question from the passage.\nQuestion: Who speaks here, and about what?\nPassage: {}",
    "Continue the story: {}",
)
CODE = "Complete this function. Answer with the whole function in one code block.\n```python\n{}```"


def gpteacher(folder: Path) -> Iterator[str]:
    for name in ("codegen-instruct.json", "roleplay-instruct.json"):
        for record in json.loads((folder / name).read_text("utf-8")):
            yield f"{record['instruction']}\n{record['input']}".strip()


def self_instruct(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            record = json.loads(line)
            yield f"{record['instruction']}\n{record['instances'][0]['input']}".strip()


def gsm8k(folder: Path) -> Iterator[str]:
    for line in (folder / "train.jsonl").read_text("utf-8").splitlines():
        yield json.loads(line)["question"]


def mbpp(folder: Path) -> Iterator[str]:
    for line in (folder / "mbpp.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        if 11 <= record["task_id"] <= 510:  # the test split
            continue
        yield f"{record['text']}\nYour code should pass this test:\n{record['test_list'][0]}"
        head = re.search(r"^def .*:", record["code"], re.MULTILINE)
        if head:
            yield CODE.format(f'{head[0]}\n    """{record["text"]}\n    """\n')


def passages(folder: Path) -> Iterator[str]:
    chance = random.Random(0)
    for path in sorted(folder.glob("*.txt")):
        whole = path.read_text("utf-8", errors="replace")
        parts = [re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n|<\|endoftext\|>", whole)]
        parts = [part for part in parts[20:-60] if len(part) > 200]  # without a book's head and tail
        for part in chance.sample(parts, min(len(parts), 500)):
            yield chance.choice(PASSAGES).format(part[:MOST])


def questions() -> Iterator[str]:
    for thing in re.split(r"[|\n]", THINGS):
        yield from (asked.format(thing) for asked in ASKED)


SETS: dict[str, tuple[Callable[[Path], Iterator[str]], float]] = {
    "gpteacher": (gpteacher, 0.28),
    "self-instruct": (self_instruct, 0.07),
    "gsm8k": (gsm8k, 0.14),
    "mbpp": (mbpp, 0.12),
    "gutenberg": (passages, 0.13),
    "tinystories-sample": (passages, 0.08),
}
"""How prompts are made of each set, and its share; questions made here are the rest."""


def choose(folder: Path, limit: int) -> list[str]:
    chance, chosen = random.Random(0), list[str]()
    for name, (make, share) in SETS.items():
        if not (folder / name).is_dir():
            print(f"{folder / name} is not there: left out", file=sys.stderr)
            continue
        found = [prompt for prompt in dict.fromkeys(make(folder / name)) if len(prompt) < 2 * MOST]
        chosen += chance.sample(found, min(len(found), round(share * limit)))
    own = list(dict.fromkeys(questions()))
    chosen += chance.sample(own, min(len(own), max(limit - len(chosen), 0)))
    chance.shuffle(chosen)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--limit", type=int, default=5000)
    given = parser.parse_args()
    tokenizer = LLM(given.model).tokenizer
    with given.output.open("w", encoding="utf-8") as file:
        for prompt in choose(given.data, given.limit):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            file.write(json.dumps({"prompt": text}) + "\n")


if __name__ == "__main__":
    main()
