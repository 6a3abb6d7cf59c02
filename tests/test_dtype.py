"""The dtype 'auto': the checkpoint's own where its products are quick, float32 where they are emulated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from selfdraft import LLM, SamplingParams
from selfdraft.models import device
from selfdraft.models.device import dtype_on
from selfdraft.models.pocket import POCKET
from selfdraft.models.runner import kernel_build
from selfdraft.models.start import opening
from tests.test_families import FAMILIES, build

CPU = torch.device("cpu")


@pytest.fixture
def no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that does not multiply bfloat16 numbers itself."""
    monkeypatch.setattr(device, "bfloat16_units", lambda: False)
    monkeypatch.setattr(opening, "bfloat16_units", lambda: False)


@pytest.mark.usefixtures("no_units")
@pytest.mark.parametrize(
    ("runner", "kernels", "dtype"),
    [("auto", True, None), ("fast", True, None), ("auto", False, torch.float32), ("plain", True, torch.float32)],
)
def test_float32_only_where_products_are_emulated(
    monkeypatch: pytest.MonkeyPatch, runner: str, kernels: bool, dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(kernel_build, "vectors", lambda: kernels)
    assert dtype_on("auto", CPU, runner) == dtype
    assert dtype_on("bfloat16", CPU, runner) == torch.bfloat16  # what is asked for is what is loaded


def test_the_checkpoints_own_dtype_where_the_processor_has_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "bfloat16_units", lambda: True)
    assert dtype_on("auto", CPU, "plain") is None


@pytest.mark.usefixtures("no_units")
@pytest.mark.parametrize(
    ("family", "kernels", "dtype"),
    [("llama", True, torch.bfloat16), ("llama", False, torch.float32), ("mixtral", True, torch.float32)],
)
def test_a_model_that_the_fast_runner_refuses_is_loaded_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kernels: bool, dtype: torch.dtype
) -> None:
    if kernels and not kernel_build.vectors():
        pytest.skip("there are no kernels for this processor's vectors here")
    monkeypatch.setattr(kernel_build, "vectors", lambda: kernels)
    build(family.title(), FAMILIES[family].options, dtype=torch.bfloat16).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((POCKET / "tokenizer.json").read_bytes())
    made = LLM(tmp_path, device="cpu", drafter="none", max_num_seqs=1, cache=False)
    assert made.target.facts.dtype == dtype
    assert len(made.generate([[5, 6, 7]], SamplingParams(max_tokens=4))[0].outputs[0].token_ids) == 4
