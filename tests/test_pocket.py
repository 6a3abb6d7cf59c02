"""The model inside the package: small, whole, described, and the text of every drafter is its plain text."""

from __future__ import annotations

import re

import pytest

from selfdraft import LLM, SamplingParams
from selfdraft.drafters import NAMES
from selfdraft.llm import Prompt
from selfdraft.models.pocket import POCKET


@pytest.fixture(scope="module")
def pocket() -> LLM:
    return LLM("pocket", drafter="none", max_num_seqs=4)


def test_its_card_says_what_it_is(pocket: LLM) -> None:
    """Blocks, width, parameters, vocabulary and masks are those of the files; the package stays small."""
    card = (POCKET / "README.md").read_text()
    config, parameters = pocket.model.config, sum(p.numel() for p in pocket.model.parameters())
    assert f"{config.num_hidden_layers} blocks, width {config.hidden_size}, {parameters:,} parameters" in card
    assert f"BPE vocabulary of {config.vocab_size:,}, bfloat16" in card
    masks = {adapter.method: len(adapter.embeddings) for adapter in pocket.target.adapters}
    assert masks == {"s3d": 4, "space": 5}
    for method, count in masks.items():
        assert re.search(rf"`selfdraft_{method}`\s+\({count} masks", card)
    assert sum(file.stat().st_size for file in POCKET.rglob("*") if file.suffix != ".pyc") < 24 * 2**20


def test_it_is_deep_enough_to_skip_layers(pocket: LLM) -> None:
    assert pocket.target.layers >= 12


@pytest.mark.parametrize("name", NAMES)
def test_every_drafter_keeps_its_text(pocket: LLM, name: str) -> None:
    prompts: list[Prompt] = [
        "def fibonacci(n):\n",
        pocket.render(
            [{"role": "user", "content": "Repeat the following text exactly.\nA red bird sat on the old barn."}]
        ),
        "Once upon a time",
    ]
    for sampling in (SamplingParams(max_tokens=40), SamplingParams(max_tokens=40, temperature=0.8, top_p=0.95, seed=1)):
        pocket.use("none")
        plain = [answer.outputs[0].text for answer in pocket.generate(prompts, sampling)]
        pocket.use(name)
        drafted = [answer.outputs[0].text for answer in pocket.generate(prompts, sampling)]
        assert drafted == plain
        assert all(text.strip() for text in plain)
