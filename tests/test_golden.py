"""A trained model says what it has always said, to the letter, with every drafter."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from selfdraft import LLM, drafters
from selfdraft.models.load import open_target
from selfdraft.models.target import HFTarget
from selfdraft.types import SamplingParams
from tests import golden, stories
from tests.clocks import Ticking, on_passes
from tests.models import random_adapters, run, unavailable
from tests.outside import WANTED

outside = pytest.mark.skipif(not stories.FOLDER.is_dir(), reason=WANTED)
EOS = frozenset({stories.BOS, stories.EOS})


def opened(**options: Any) -> HFTarget:
    model = stories.stories_model()
    return on_passes(open_target(model, adapters=random_adapters(model), **options))


@cache
def pocket(dtype: torch.dtype, fast: bool) -> HFTarget:
    return golden.opened(dtype, fast=fast)


@pytest.mark.parametrize("sampling", golden.SAMPLINGS)
@pytest.mark.parametrize("drafter", ["none", "auto", "layer_skip"])
@pytest.mark.parametrize("kind", ["plain float64", "plain float32", "fast float32"])
def test_the_pocket_model_says_what_was_written_down(kind: str, drafter: str, sampling: str) -> None:
    path, dtype = kind.split()
    if path == "fast" and unavailable():
        pytest.skip(unavailable())
    target = pocket(getattr(torch, dtype), path == "fast")
    written = golden.golden()
    said = golden.answers(target, drafter, sampling, [one["ids"] for one in written])
    assert said == [one["said"][sampling] for one in written]


def test_a_user_is_given_the_text_that_was_written_down() -> None:
    """From the prompt's letters to the answer's, as everything is when nothing is asked for; float32 apart."""
    llm = LLM("pocket", dtype="float32", clock=Ticking(0.001))
    for name, sampling in golden.SAMPLINGS.items():
        for one in golden.golden():
            (answer,) = llm.generate(one["prompt"], sampling)
            assert [*answer.outputs[0].token_ids] == one["said"][name]
            assert answer.outputs[0].text == one["text"][name]


@outside
def test_tokenizer_there_and_back() -> None:
    for text in ("Once upon a time", stories.GOLDEN, "naïve 🙂\nx  y"):
        assert stories.decode(stories.encode(text)) == text
    assert len(stories.encode("Once upon a time")) < 8


@outside
def test_stock_forward_says_the_golden_text() -> None:
    ids = torch.tensor([stories.encode(stories.GOLDEN)])
    with torch.inference_mode():
        answers = stories.stories_model()(ids).logits[0].argmax(-1).tolist()
    assert stories.decode(answers[:-1]) == stories.GOLDEN


@outside
@pytest.mark.parametrize("exactness", ["bitwise", "token"])
@pytest.mark.parametrize("drafter", sorted(drafters.NAMES))
def test_golden_text(drafter: str, exactness: str) -> None:
    target = opened(slots=1, exactness=exactness)
    size = len(stories.encode(stories.GOLDEN)) - 1
    (sequence,) = run(target, drafter, [[stories.BOS]], SamplingParams(max_tokens=size))
    assert stories.decode(sequence.output) == stories.GOLDEN


@outside
@pytest.mark.parametrize("drafter", sorted(drafters.NAMES))
def test_long_texts_equal_plain_decoding(drafter: str) -> None:
    target = opened(slots=3)
    prompts = [stories.encode(text) for text in ("Once upon a time", "Tom and the cat", "The big red ball")]
    sampling = SamplingParams(max_tokens=180)
    plain = run(target, "none", prompts, sampling, slots=3, eos=EOS)
    drafted = run(target, drafter, prompts, sampling, slots=3, eos=EOS)
    assert [s.output for s in drafted] == [s.output for s in plain]
