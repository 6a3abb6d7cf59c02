"""The model inside the package: small, whole, described, and the text of every drafter is its plain text."""

from __future__ import annotations

import pytest

from selfdraft import LLM, SamplingParams
from selfdraft.drafters import NAMES
from selfdraft.llm import Prompt
from selfdraft.models.pocket import POCKET


@pytest.fixture(scope="module")
def pocket() -> LLM:
    return LLM("pocket", drafter="none", max_num_seqs=4)


def test_it_is_small_and_described() -> None:
    files = [file for file in POCKET.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40 * 2**20
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= {
        file.name for file in files
    }
    card = (POCKET / "README.md").read_text()
    for word in ("tokens seen", "held-out bits per byte", "Data", "cannot do"):
        assert word in card


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
