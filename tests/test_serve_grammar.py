"""JSON schemas: what is written validates, and equals constrained plain decoding; what is forced is drafted."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import jsonschema
import pytest
import torch

from selfdraft import LLM, SamplingParams
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.drafters import NAMES, build
from selfdraft.engine.engine import Engine
from selfdraft.errors import MissingMasks, RequestError
from selfdraft.models.reference import Tokenizer
from selfdraft.serve.grammar import Grammar, GrammarDrafter, Grammars, part_of
from tests.serving import pocket

SCHEMAS = 1000
ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string", "maxLength": 8}, "city": {"enum": ["Rome", "Oslo", "São Paulo"]}},
    "required": ["street", "city"],
    "additionalProperties": False,
}


@cache
def parts() -> tuple[LLM, Grammars]:
    llm = pocket("none", max_num_seqs=4)
    assert llm.tokenizer is not None
    return llm, Grammars(llm.tokenizer, llm.eos, llm.target.vocab)


def tokenizer() -> Tokenizer:
    found = parts()[0].tokenizer
    assert found is not None
    return found


def sequence_of(schema: dict[str, Any] | bool, seed: int = 0, **options: Any) -> Sequence:
    llm, grammars = parts()
    prompt = llm.encode("Once upon a time")
    processor = grammars.processor(grammars.json(schema), len(prompt))
    sampling = SamplingParams(**{"max_tokens": 200, "seed": seed, "logits_processors": (processor,), **options})
    return llm.requests(prompt, sampling)[0]


def run(engine: Engine, sequence: Sequence) -> str:
    engine.submit(sequence)
    while not sequence.finished:
        engine.advance()
    assert sequence.stream is not None
    return sequence.stream.text


def drafting(name: str) -> Engine:
    llm, _ = parts()
    return Engine(llm.target, GrammarDrafter(build(name, llm.target)), slots=4)


def plain() -> Engine:
    llm, _ = parts()
    return Engine(llm.target, build("none", llm.target), slots=4)


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema that a short text can fulfil."""
    kinds = ["string", "integer", "boolean", "enum", "const", "null"] + ["object", "array"] * (depth < 2)
    kind = draw.choice(kinds)
    if kind == "string":
        return {"type": "string", "maxLength": draw.randrange(1, 9)}
    if kind == "integer":
        low = draw.randrange(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randrange(1000)}
    if kind == "enum":
        return {"enum": draw.sample(["a", "bee", 3, None, True, "à la carte", "犬", {"x": 1}], draw.randrange(1, 4))}
    if kind == "const":
        return {"const": draw.choice(["fixed", 7, [1, 2], {"k": "v"}])}
    if kind == "object":
        names = draw.sample(["name", "age", "city", "is_dog", "größe", "list of things"], draw.randrange(1, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(draw, depth + 1) for name in names},
            "required": names[: draw.randrange(len(names) + 1)],
            "additionalProperties": False,
        }
    if kind == "array":
        return {"type": "array", "items": random_schema(draw, depth + 1), "maxItems": draw.randrange(1, 4)}
    return {"type": kind}


@pytest.mark.parametrize("part", range(10))
def test_a_thousand_random_schemas(part: int) -> None:
    """Drafted equals constrained plain decoding token by token, and what is whole validates."""
    draw = random.Random(part)
    engines = [plain(), drafting("merged")]
    whole = forced = 0
    for number in range(SCHEMAS // 10):
        schema = random_schema(draw)
        options = {"temperature": draw.choice([0.0, 0.8, 1.2]), "max_tokens": 80}
        requests = [sequence_of(schema, number, **options) for _ in engines]
        texts = [run(engine, request) for engine, request in zip(engines, requests, strict=True)]
        assert requests[0].output == requests[1].output, schema
        forced += sum("grammar" in source for source in requests[1].sources)
        if requests[0].finish_reason == "stop":
            whole += 1
            jsonschema.validate(json.loads(texts[0]), schema)
    assert whole > SCHEMAS // 20
    assert forced > SCHEMAS // 10


@pytest.mark.parametrize("name", [*NAMES])
def test_every_drafter_under_a_grammar(name: str) -> None:
    try:
        engine = drafting(name)
    except MissingMasks:
        pytest.skip("no masks in this checkpoint")
    for seed, temperature in ((0, 0.0), (1, 0.9)):
        alone, drafted = (sequence_of(ADDRESS, seed, temperature=temperature) for _ in range(2))
        assert run(plain(), alone) == run(engine, drafted)
        assert alone.output == drafted.output


def test_requests_with_and_without_a_grammar_in_one_batch() -> None:
    llm, _ = parts()
    engine = drafting("merged")
    free = llm.requests(llm.encode("Once upon a time"), SamplingParams(max_tokens=30))[0]
    bound = [sequence_of(ADDRESS, seed, temperature=0.7) for seed in range(3)]
    for sequence in (free, *bound):
        engine.submit(sequence)
    while engine.running or engine.waiting:
        engine.advance()
    assert free.output == [*llm.generate("Once upon a time", SamplingParams(max_tokens=30))[0].outputs[0].token_ids]
    for seed, sequence in enumerate(bound):
        again = sequence_of(ADDRESS, seed, temperature=0.7)
        run(plain(), again)
        assert again.output == sequence.output


def test_what_is_forced_is_drafted_and_costs_fewer_steps() -> None:
    alone, drafted = sequence_of(ADDRESS), sequence_of(ADDRESS)
    run(plain(), alone)
    run(drafting("none"), drafted)
    assert drafted.stats.num_steps < alone.stats.num_steps
    assert drafted.stats.draft_acceptance_rate > 0.9


def test_a_draft_that_breaks_the_grammar_is_cut_there() -> None:
    llm, grammars = parts()
    grammar = grammars.processor(grammars.json({"const": "ab"}), 0)
    right = llm.encode('"ab"')
    wrong = llm.encode("dog")
    draft = Draft.branches([right, [*right[:1], *wrong], wrong], "x")
    kept = grammar.valid([], draft)
    assert [draft.tokens[node] for node in kept] == right
    assert part_of(draft, kept).tokens == tuple(right)
    assert part_of(draft, []) == Draft()


def test_the_matcher_goes_back_as_well_as_on() -> None:
    """A row's path may be longer or shorter than the last one, or another one."""
    llm, grammars = parts()
    text = llm.encode('{"street": "x", "city": "Rome"}')
    grammar = grammars.processor(grammars.json(ADDRESS), 0)
    fresh = [allowed(grammars.processor(grammars.json(ADDRESS), 0), text[:i]) for i in range(len(text) + 1)]
    draw = random.Random(0)
    for _ in range(100):
        size = draw.randrange(len(text) + 1)
        assert torch.equal(allowed(grammar, text[:size]), fresh[size])
    assert {int(token) for token in fresh[-1].nonzero()} == {*llm.eos}


def allowed(grammar: Grammar, path: list[int]) -> torch.Tensor:
    return grammar(path, torch.zeros(parts()[0].target.vocab)).isfinite()


def test_schemas_that_cannot_be_used_are_said() -> None:
    _, grammars = parts()
    wrong: list[dict[str, Any]] = [{"type": "nonsense"}, {"enum": []}, {"pattern": "("}]
    for schema in wrong:
        with pytest.raises(RequestError, match=r"^the JSON schema cannot be used: (?!the JSON schema)"):
            grammars.json(schema)
    assert tokenizer()
