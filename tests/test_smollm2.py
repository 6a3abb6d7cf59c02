"""The promise on a real model, SmolLM2-135M-Instruct: every drafter says what plain decoding says, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from selfdraft import LLM, SamplingParams
from selfdraft.core.sequence import Sequence
from selfdraft.drafters import NAMES
from selfdraft.prove.record import Record, decode
from tests.clocks import on_passes
from tests.smollm2 import smollm2_or_skip

PROMPTS = (
    "Repeat this list: apples, pears, plums, apples, pears, cherries, plums, apples, pears.",
    "Write a Python function that adds two numbers.",
)
SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=16),
    "sampled": SamplingParams(max_tokens=16, temperature=0.8, top_p=0.95, seed=7),
}
DRAFTERS = [*(name for name in NAMES if name != "none"), "merged with masks", "auto with masks"]
DRAFTERS += ["auto with bits", "auto with s3d"]
OPTIONS: dict[str, dict[str, object]] = {"": {}, "masks": {"masks": True}, "bits": {"bits": 4}, "s3d": {"s3d": True}}
GOLDEN = "The capital of France is Paris."


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def llm(request: pytest.FixtureRequest) -> LLM:
    made = LLM(smollm2_or_skip(), dtype=request.param, drafter="none", max_num_seqs=2)
    on_passes(made.target)
    return made


def requests(llm: LLM, sampling: SamplingParams) -> list[Sequence]:
    return [llm.requests(llm.render([{"role": "user", "content": prompt}]), sampling)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def plain(llm: LLM) -> Callable[[str], list[Record]]:
    """Plain decoding of the prompts, by the name of the sampling: once for all drafters."""
    engine = llm.engine_for("none")
    return cache(lambda name: [decode(engine, one, bits=True) for one in requests(llm, SAMPLINGS[name])])


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_every_token_and_every_bit_is_that_of_plain_decoding(
    llm: LLM, plain: Callable[[str], list[Record]], drafter: str, sampling: str
) -> None:
    method, _, option = drafter.partition(" with ")
    drafted = llm.engine_for(method, OPTIONS[option])
    for expected, one in zip(plain(sampling), requests(llm, SAMPLINGS[sampling]), strict=True):
        got = decode(drafted, one, bits=True)
        assert got.tokens == expected.tokens
        if llm.exactness.level == "bitwise":
            assert got.digests == expected.digests


@pytest.mark.parametrize("drafter", ["auto", "lookahead"])
def test_a_batch_says_what_each_says_alone(llm: LLM, plain: Callable[[str], list[Record]], drafter: str) -> None:
    alone = [one.tokens for one in plain("sampled")]
    together = requests(llm, SAMPLINGS["sampled"])
    for _ in llm.engine_for(drafter).generate(together):
        pass
    assert [tuple(one.output) for one in together] == alone


def test_it_is_accepted_and_exact_to_the_bit_where_the_fast_runner_works(llm: LLM) -> None:
    if llm.target.runner is not None:
        assert llm.exactness.level == "bitwise"


def test_golden_text_and_template(llm: LLM) -> None:
    ids = llm.render([{"role": "user", "content": "What is the capital of France?"}])
    text = llm.decode(ids)
    assert "You are a helpful AI assistant named SmolLM, trained by Hugging Face" in text
    assert text.endswith("What is the capital of France?\nassistant\n")
    answer = llm.generate([ids], SamplingParams(max_tokens=24))[0].outputs[0]
    assert (answer.text, answer.finish_reason) == (GOLDEN, "stop")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_it_is_never_refused(dtype: str) -> None:
    made = LLM(smollm2_or_skip(), dtype=dtype, drafter="none", runner="plain")
    assert next(made.model.parameters()).dtype == getattr(torch, dtype)
