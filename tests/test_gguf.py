"""GGUF files as models: every tensor type, split files, the tokenizer and template inside, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from selfdraft import LLM, SamplingParams
from selfdraft.errors import LoadError
from selfdraft.models.checkpoint import gguf
from selfdraft.models.checkpoint.places import find_gguf
from tests import gguf_files

SAMPLINGS = {"greedy": SamplingParams(max_tokens=24), "sampled": SamplingParams(max_tokens=24, temperature=0.8, seed=3)}


def open_file(file: Path, **options: str) -> LLM:
    """The file as a model of float weights; `test_gguf_blocks.py` has those that keep their blocks."""
    return LLM(file, drafter="none", dtype="float32", runner="plain", quantization="none", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", gguf_files.TYPES, ids=lambda kind: kind.name)
def test_every_tensor_type_is_read_right_and_decoded_exactly(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    weights = gguf_files.write(tmp_path / "tiny.gguf", kind)
    llm = open_file(tmp_path / "tiny.gguf")
    state = llm.model.state_dict()
    np.testing.assert_array_equal(state["model.embed_tokens.weight"].numpy(), weights["token_embd.weight"])
    np.testing.assert_array_equal(
        state["model.layers.1.mlp.down_proj.weight"].numpy(), weights["blk.1.ffn_down.weight"]
    )
    assert not hasattr(llm.model.config, "quantization_config")
    for sampling in SAMPLINGS.values():
        llm.use("none")
        plain = llm.generate("ababab", sampling)[0].outputs[0]
        llm.use("lookup")
        assert llm.generate("ababab", sampling)[0].outputs[0].token_ids == plain.token_ids
    assert len(plain.token_ids) == 24 or plain.finish_reason == "stop"


def test_the_dtype_is_the_one_asked_for_and_bfloat16_when_quantised(tmp_path: Path) -> None:
    def dtype_of(kind: GGMLQuantizationType, dtype: torch.dtype | None) -> torch.dtype:
        gguf_files.write(tmp_path / "tiny.gguf", kind)
        weight: torch.Tensor = next(gguf.load_model(tmp_path / "tiny.gguf", dtype).parameters())
        return weight.dtype

    assert dtype_of(GGMLQuantizationType.Q8_0, None) == torch.bfloat16
    assert dtype_of(GGMLQuantizationType.F16, None) == torch.float16
    assert dtype_of(GGMLQuantizationType.F32, None) == torch.float32
    assert dtype_of(GGMLQuantizationType.Q8_0, torch.float32) == torch.float32


def test_tokenizer_template_and_end_come_from_the_file(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "tiny.gguf")
    llm = open_file(tmp_path / "tiny.gguf")
    assert llm.decode(llm.encode("a b, cd!")) == "a b, cd!"
    assert llm.decode(llm.render([{"role": "user", "content": "hi"}])) == "[user]hi>"
    assert llm.eos == {len(gguf_files.VOCABULARY) - 1}


@pytest.mark.parametrize("parts", [2, 3])
def test_a_split_file_is_the_whole_file(parts: int, tmp_path: Path) -> None:
    whole = gguf_files.write(tmp_path / "tiny.gguf")
    folder = tmp_path / "split"
    folder.mkdir()
    gguf_files.write(folder / "tiny.gguf", parts=parts)
    names = sorted(file.name for file in folder.iterdir())
    assert names == [f"tiny-{i:05}-of-{parts:05}.gguf" for i in range(1, parts + 1)]
    for given in (folder, folder / names[0], folder / names[-1]):
        file = find_gguf(given)
        assert file is not None
        state = gguf.load_model(file, torch.float32).state_dict()
        np.testing.assert_array_equal(state["lm_head.weight"].numpy(), whole["output.weight"])
    assert gguf.load_tokenizer(folder / names[0]).chat_template == gguf_files.TEMPLATE
    (folder / names[-1]).unlink()
    with pytest.raises(LoadError, match=rf"part {names[-1]} of a split file is missing"):
        LLM(folder)


def test_a_folder_with_several_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        gguf_files.write(tmp_path / name)
    with pytest.raises(LoadError, match=r"holds 2 GGUF files; name one of them: a\.gguf, b\.gguf"):
        LLM(tmp_path)


def test_a_file_without_a_tokenizer_says_so_and_takes_one(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "with.gguf")
    gguf_files.write(tmp_path / "bare.gguf", tokenizer=False)
    with pytest.raises(LoadError, match="no tokenizer in the file"):
        LLM(tmp_path / "bare.gguf")
    tokenizer = gguf.load_tokenizer(tmp_path / "with.gguf")
    llm = LLM(tmp_path / "bare.gguf", tokenizer=tokenizer, drafter="none", dtype="float32", runner="plain")
    assert llm.decode(llm.encode("abc")) == "abc"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_refused(share: float, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    gguf_files.write(file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(LoadError, match=r"cut off or damaged|does not start with the GGUF magic|empty"):
        LLM(file)


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model at all")
    with pytest.raises(LoadError, match="not a GGUF file"):
        LLM(tmp_path / "text.gguf")
    with pytest.raises(LoadError, match="there is no such file"):
        LLM(tmp_path / "nothing.gguf")


def test_unknown_architectures_and_tensor_types_are_named(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "odd.gguf", architecture="rwkv6")
    with pytest.raises(LoadError, match="cannot read the architecture 'rwkv6'"):
        LLM(tmp_path / "odd.gguf")
    file = tmp_path / "type.gguf"
    gguf_files.write(file, GGMLQuantizationType.Q8_0)
    raw = file.read_bytes()
    name = b"output.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8  # behind the name: number of dimensions, two sizes, then the type
    assert raw[at : at + 4] == b"\x08\x00\x00\x00"
    file.write_bytes(raw[:at] + b"\xf0\x00\x00\x00" + raw[at + 4 :])
    with pytest.raises(LoadError, match="unknown type"):
        LLM(file)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    gguf_files.write(file)
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(LoadError, match=r"1 weights are missing, the first are model\.layers\.1\.mlp\.up_proj\.weight"):
        LLM(file)
