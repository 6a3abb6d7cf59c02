"""Quantised checkpoints load as they are, and every drafter keeps their greedy text."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from selfdraft import drafters
from selfdraft.models.load import load_model, open_target
from selfdraft.models.target import HFTarget
from selfdraft.types import SamplingParams
from tests.clocks import on_passes
from tests.models import random_adapters, run
from tests.test_masks import bare, crowded, plain_rows

VOCAB = 61
PROMPTS = [[3, 4, 5, 6, 7, 3, 4, 5], [9, 8, 9, 8, 9], [*range(30)]]


def int8() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install selfdraft[quantised]")
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install selfdraft[quantised]")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)  # its default mixes rows: see the last test


def nf4() -> Any:
    int8()
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def torchao_int8() -> Any:
    pytest.importorskip("torchao", reason="torchao is not installed: pip install selfdraft[quantised]")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "bnb_int8": (int8, "Linear8bitLt"),
    "bnb_nf4": (nf4, "Linear4bit"),
    "torchao_int8": (torchao_int8, "Linear"),
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes logs every single int8 product on a CPU."""
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "disabled", True)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("bitsandbytes"):
            monkeypatch.setattr(logging.getLogger(name), "disabled", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


@cache
def quantised(folder: Path, kind: str) -> PreTrainedModel:
    """A random LLaMA, saved, quantised by its library, saved again with its quantization_config, and loaded by us."""
    make, _ = KINDS[kind]
    config = make()
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "plain")
    made = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config, device_map="cpu")
    made.save_pretrained(folder / kind)
    return load_model(folder / kind, dtype=torch.float64)  # the dtype is that of the checkpoint all the same


@cache
def target_of(folder: Path, kind: str) -> HFTarget:
    model = quantised(folder, kind)
    return on_passes(open_target(model, slots=3, adapters=random_adapters(model)))


@pytest.mark.parametrize("kind", KINDS)
def test_loads_as_it_is(folder: Path, kind: str) -> None:
    model = quantised(folder, kind)
    up = model.get_submodule("model.layers.0.mlp.up_proj")
    assert type(up).__name__ == KINDS[kind][1]
    assert type(up.weight) is not torch.nn.Parameter, "the weight is the library's own kind of tensor"
    assert model.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_that_of_plain_decoding(folder: Path, kind: str) -> None:
    target = target_of(folder, kind)
    sampling = SamplingParams(max_tokens=40)
    alone = [run(target, "none", [prompt], sampling)[0].output for prompt in PROMPTS]
    for drafter in drafters.NAMES:
        texts = run(target, drafter, PROMPTS, sampling, slots=3)
        assert [sequence.output for sequence in texts] == alone, drafter
    assert len({token for text in alone for token in text}) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_masks_leave_the_other_rows_alone(folder: Path, kind: str) -> None:
    """To the bit: the adapter of the masks works beside the quantised layers, on rows of its own."""
    model = quantised(folder, kind)
    strong, said = random_adapters(model), []
    for adapters in (strong, [*map(bare, strong)]):
        target = HFTarget(model, slots=2, shapes=target_of(folder, kind).shapes, adapters=adapters)
        rows = crowded(target)
        said.append(target.forward(rows).clone())
    plain = plain_rows(rows)
    masks = [row for row in range(len(rows)) if row not in plain]
    assert torch.equal(said[0][plain], said[1][plain])
    assert ((said[0][masks] - said[1][masks]).abs().amax(-1) > 0.01).all()


def test_int8_with_outliers_does_not_claim_bitwise(folder: Path) -> None:
    """Columns with an outlier in any row of a pass are multiplied apart: no shape undoes that."""
    model = quantised(folder, "bnb_int8")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert target_of(folder, "bnb_int8").exactness.level == "bitwise"
    layer.state.threshold = 6.0
    try:
        target = open_target(model, slots=1)
    finally:
        layer.state.threshold = 0.0
    assert target.exactness.level == "token"
    assert "llm_int8_threshold=0" in target.exactness.why
