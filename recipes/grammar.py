"""What drafting brings where the answer must fit a JSON schema: forced tokens as drafts, a drafter, both, neither.

python recipes/grammar.py [--model smollm2] [--tokens 160] [--runs 3]

Every way writes every answer in turn, in one process; medians, against constrained plain decoding; texts compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence as SequenceOf
from statistics import median

from selfdraft import LLM, SamplingParams
from selfdraft.drafters import build
from selfdraft.engine.engine import Engine
from selfdraft.prove.record import Record, decode
from selfdraft.serve.grammar import GrammarDrafter, Grammars

PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 20},
        "last_name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "occupation": {"type": "string", "maxLength": 40},
        "is_retired": {"type": "boolean"},
    },
    "required": ["first_name", "last_name", "age", "occupation", "is_retired"],
    "additionalProperties": False,
}
CALL = {
    "type": "object",
    "properties": {
        "name": {"const": "search_products"},
        "arguments": {
            "type": "object",
            "properties": {
                "query": {"type": "string", "maxLength": 60},
                "category": {"enum": ["books", "electronics", "garden", "clothing"]},
                "maximum_price": {"type": "integer"},
                "in_stock_only": {"type": "boolean"},
            },
            "required": ["query", "category", "maximum_price", "in_stock_only"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "arguments"],
    "additionalProperties": False,
}
STEPS = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 60},
        "steps": {"type": "array", "items": {"type": "string", "maxLength": 80}, "minItems": 3, "maxItems": 3},
    },
    "required": ["title", "steps"],
    "additionalProperties": False,
}
REVIEW = {
    "type": "object",
    "properties": {
        "sentiment": {"enum": ["positive", "negative", "neutral"]},
        "confidence": {"type": "integer", "minimum": 0, "maximum": 100},
        "summary": {"type": "string", "maxLength": 120},
    },
    "required": ["sentiment", "confidence", "summary"],
    "additionalProperties": False,
}
ASKED: tuple[tuple[dict[str, object], str], ...] = (
    (PERSON, "Give me as JSON the person in this sentence: Maria Lopez, 67, worked as a nurse and is retired now."),
    (PERSON, "Give me as JSON the person in this sentence: John Smith is a 34 year old carpenter from Leeds."),
    (CALL, "Find a book about growing tomatoes for less than 25 dollars that can be sent today."),
    (CALL, "I want a waterproof winter jacket under 150 dollars, whether or not it is in stock."),
    (STEPS, "How do I boil an egg? Answer as JSON with a title and three steps."),
    (STEPS, "How do I change the tyre of a bicycle? Answer as JSON with a title and three steps."),
    (REVIEW, "Judge this review as JSON: The room was clean and quiet, but breakfast was cold and the staff was rude."),
    (REVIEW, "Judge this review as JSON: Best headphones I have ever had, the battery lasts for days."),
)
WAYS = {
    "plain": ("none", False),
    "forced tokens": ("none", True),
    "auto": ("auto", False),
    "auto, forced tokens": ("auto", True),
}
"""Each way's drafter, and whether what the grammar forces is drafted."""


def answers(llm: LLM, grammars: Grammars, way: str, prompts: SequenceOf[list[int]], tokens: int) -> list[Record]:
    """All answers of one way by a fresh engine, one after the other; drafting and the grammar are in their times."""
    drafter, forced = WAYS[way]
    built = build(drafter, llm.target)
    engine = Engine(llm.target, GrammarDrafter(built) if forced else built, slots=1)
    found = []
    for (schema, _), prompt in zip(ASKED, prompts, strict=True):
        processor = grammars.processor(grammars.json(schema), len(prompt))
        (sequence,) = llm.requests(prompt, SamplingParams(max_tokens=tokens, logits_processors=(processor,)))
        found.append(decode(engine, sequence))
    return found


def row(way: str, plain: SequenceOf[list[Record]], runs: SequenceOf[list[Record]]) -> str:
    """A line of the table: medians over the runs, each against the plain run of its turn; all texts are compared."""
    seconds, base = ([sum(one.seconds for one in run) for run in taken] for taken in (runs, plain))
    written = sum(len(one.tokens) for one in runs[0])
    steps = sum(one.stats.num_steps for one in runs[0])
    equal = all(one.tokens == other.tokens for run in runs for one, other in zip(run, plain[0], strict=True))
    ratio = median(a / b for a, b in zip(base, seconds, strict=True))
    rate = written / median(seconds)
    return f"| {way} | {rate:.1f} | {ratio:.2f}x | {written / steps:.2f} | {'yes' if equal else 'NO'} |"


def main(argv: SequenceOf[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=160, help="most tokens of an answer")
    parser.add_argument("--runs", type=int, default=3, help="turns of all ways that count")
    given = parser.parse_args(argv)
    llm = LLM(given.model, drafter="none")
    assert llm.tokenizer is not None
    grammars = Grammars(llm.tokenizer, llm.eos, llm.target.vocab)
    prompts = [llm.encode(llm.render([{"role": "user", "content": text}])) for _, text in ASKED]
    runs: dict[str, list[list[Record]]] = {way: [] for way in WAYS}
    for turn in range(1 + given.runs):
        first = turn % len(WAYS)
        for way in [*WAYS][first:] + [*WAYS][:first]:
            runs[way].append(answers(llm, grammars, way, prompts, given.tokens))
    measured = {way: taken[1:] for way, taken in runs.items()}  # the first turn warms up
    print("| way | tokens/s | against plain | tokens per pass | texts equal |\n|---|---:|---:|---:|---|")
    for way, taken in measured.items():
        print(row(way, measured["plain"], taken))
    for (_, text), one in zip(ASKED, measured["plain"][0], strict=True):
        print(json.dumps({"question": text, "answer": llm.decode(one.tokens)}))


if __name__ == "__main__":
    main()
