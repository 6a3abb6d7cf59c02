"""What drafting brings where the answer must fit a JSON schema: forced tokens as drafts, a drafter, both, neither.

python recipes/grammar.py [--model smollm2] [--tokens 160] [--runs 3]

Every way writes every answer in turn, in one process; medians, against constrained plain decoding; texts compared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from statistics import median

from selfdraft import LLM, SamplingParams
from selfdraft.drafters import build
from selfdraft.engine.engine import Engine
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


@dataclass(slots=True)
class Told:
    """What a way needed: seconds of each run over all answers, steps and tokens of one, and the answers."""

    seconds: list[float] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    texts: list[tuple[int, ...]] = field(default_factory=list)


def engine_of(llm: LLM, way: str) -> Engine:
    """A fresh engine, which knows nothing of answers before."""
    drafter, forced = WAYS[way]
    built = build(drafter, llm.target)
    return Engine(llm.target, GrammarDrafter(built) if forced else built, slots=1)


def answer(llm: LLM, grammars: Grammars, way: str, prompts: SequenceOf[list[int]], tokens: int) -> Told:
    """All answers of one way, one after the other; the time of drafting and of the grammar counts."""
    engine, told = engine_of(llm, way), Told()
    spent = 0.0
    for (schema, _), prompt in zip(ASKED, prompts, strict=True):
        processor = grammars.processor(grammars.json(schema), len(prompt))
        sequence = llm.requests(prompt, SamplingParams(max_tokens=tokens, logits_processors=(processor,)))[0]
        engine.submit(sequence)
        start = time.perf_counter()
        while not sequence.finished:
            engine.advance()
        spent += time.perf_counter() - start
        told.texts.append(tuple(sequence.output))
        told.steps += sequence.stats.num_steps
        told.tokens += len(sequence.output)
    told.seconds.append(spent)
    return told


def main(argv: SequenceOf[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=160, help="most tokens of an answer")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args(argv)
    llm = LLM(given.model, drafter="none")
    assert llm.tokenizer is not None
    grammars = Grammars(llm.tokenizer, llm.eos, llm.target.vocab)
    prompts = [llm.encode(llm.render([{"role": "user", "content": text}])) for _, text in ASKED]
    found = {way: answer(llm, grammars, way, prompts, given.tokens) for way in WAYS}  # this run warms up
    for told in found.values():
        told.seconds.clear()
    for run in range(given.runs):
        for way in [*WAYS][run % len(WAYS) :] + [*WAYS][: run % len(WAYS)]:
            found[way].seconds += answer(llm, grammars, way, prompts, given.tokens).seconds
    plain = found["plain"]
    print("| way | tokens/s | against plain | tokens per pass | texts equal |\n|---|---:|---:|---:|---|")
    for way, told in found.items():
        rate, equal = told.tokens / median(told.seconds), told.texts == plain.texts
        ratio = median(a / b for a, b in zip(plain.seconds, told.seconds, strict=True))
        print(f"| {way} | {rate:.1f} | {ratio:.2f}x | {told.tokens / told.steps:.2f} | {'yes' if equal else 'NO'} |")
    for (_, text), tokens in zip(ASKED, plain.texts, strict=True):
        print(json.dumps({"question": text, "answer": llm.decode(tokens)}))


if __name__ == "__main__":
    main()
