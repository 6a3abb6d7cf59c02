"""Families that work: the text of `generate`, skip views, mask rows, the proof at load. The others are refused."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfdraft import drafters
from selfdraft.core.rows import Rows, pack
from selfdraft.core.sequence import Sequence
from selfdraft.core.tree import Draft
from selfdraft.errors import LoadError, OptionError, UnsupportedModel
from selfdraft.models import views
from selfdraft.models.attention import Group
from selfdraft.models.checkpoint.end_ids import declared_ends, ends_of
from selfdraft.models.exactness import NATURAL, Shapes
from selfdraft.models.facts import context_of
from selfdraft.models.load import check_supported, load_model, load_tokenizer, open_target
from selfdraft.models.proof.whole_model import prove
from selfdraft.models.target import HFTarget
from selfdraft.types import SamplingParams, Skip
from tests.clocks import on_passes
from tests.models import random_adapters, run

VOCAB = 61
WINDOW = 8
NEW = 24
MASKS = 7
SHAPES = {"canonical": Shapes(4, 64), "natural": NATURAL}
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GPT = {"n_positions": 256, "n_embd": 32, "n_layer": 3, "n_head": 4}
LOOSE = {"head_dim": 8, "tie_word_embeddings": False}
"""Tied random embeddings would make Gemma repeat one token."""
GEMMA = {**LOOSE, "query_pre_attn_scalar": 8}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}


@dataclass(frozen=True)
class Family:
    """A tiny member of a family: class names `<config>Config` and `<model>`, and what differs from BASE."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    experts: bool = False


FAMILIES = {
    "llama": Family("Llama"),
    "llama_yarn": Family("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": Family("Mistral", {"sliding_window": WINDOW}),
    "qwen2": Family("Qwen2"),
    "qwen2_window": Family("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": Family("Qwen3", {"head_dim": 8}),
    "gemma": Family("Gemma", LOOSE),
    "gemma2": Family("Gemma2", {**GEMMA, "sliding_window": WINDOW}),
    "gemma3": Family("Gemma3Text", {**GEMMA, **MIXED}, "Gemma3ForCausalLM"),
    "phi": Family("Phi"),
    "phi3": Family("Phi3", {"sliding_window": WINDOW}),
    "olmo2": Family("Olmo2"),
    "olmo3": Family("Olmo3", MIXED),
    "granite": Family("Granite", {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "starcoder2": Family("Starcoder2", {"sliding_window": WINDOW}),
    "gpt_neox": Family("GPTNeoX"),
    "gpt2": Family("GPT2", GPT, "GPT2LMHeadModel"),
    "opt": Family("OPT", {"tie_word_embeddings": False, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "smollm3": Family("SmolLM3"),
    "cohere": Family("Cohere"),
    "cohere2": Family("Cohere2", MIXED),
    "glm4": Family("Glm4", {"head_dim": 8}),
    "exaone4": Family("Exaone4", MIXED),
    "ministral": Family("Ministral", {"head_dim": 8, "sliding_window": WINDOW}),
    "seed_oss": Family("SeedOss", {"head_dim": 8}),
    "mixtral": Family("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, experts=True),
    "qwen3_moe": Family(
        "Qwen3Moe",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        experts=True,
    ),
    "gpt_oss": Family(
        "GptOss",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
        experts=True,
    ),
    "deepseek_v3": Family(
        "DeepseekV3", {**LATENT, **ROUTED, "qk_nope_head_dim": 4, "first_k_dense_replace": 1}, experts=True
    ),
}
PLAIN_DRAFTERS = sorted(drafters.NAMES)


@cache
def model_of(name: str) -> PreTrainedModel:
    family = FAMILIES[name]
    return build(family.config, family.options, family.model, torch.float32 if family.experts else torch.float64)


def build(config: str, options: dict[str, Any], model: str = "", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model, wider spread than the usual initialisation so that its text is not one token for ever."""
    settings = getattr(transformers, f"{config}Config")(**{**BASE, **options})
    torch.manual_seed(0)
    made: PreTrainedModel = getattr(transformers, model or f"{config}ForCausalLM")(settings)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.25)
            else:
                weight += torch.randn_like(weight) * 0.1
    return made.to(dtype).eval()


def prompts() -> list[list[int]]:
    """One shorter and one longer than the window."""
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (size,), generator=draw).tolist() for size in (5, 20)]


@cache
def generated(name: str) -> list[list[int]]:
    """Greedy output of transformers' own loop."""
    texts = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model_of(name).generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0
            )
        texts.append(out[0, len(prompt) :].tolist())
    return texts


@cache
def target_of(name: str, shapes: str) -> HFTarget:
    """With random mask tokens, so that drafters which need some can be tried too."""
    model = model_of(name)
    return on_passes(HFTarget(model, slots=2, shapes=SHAPES[shapes], adapters=random_adapters(model)))


@pytest.mark.parametrize("drafter", PLAIN_DRAFTERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_that_of_generate(name: str, drafter: str) -> None:
    for shapes in SHAPES:
        texts = run(target_of(name, shapes), drafter, prompts(), SamplingParams(max_tokens=NEW), slots=2)
        assert [sequence.output for sequence in texts] == generated(name), shapes


@pytest.mark.parametrize("name", FAMILIES)
def test_proof_at_load(name: str) -> None:
    wanted = "token" if FAMILIES[name].experts else "bitwise"
    target = open_target(model_of(name), slots=1)
    assert target.exactness.level == wanted or "rounds differently" in target.exactness.why
    assert target.shapes.canonical == (target.exactness.level == "bitwise")
    assert open_target(model_of(name), slots=1, exactness="token").shapes == NATURAL


@pytest.mark.parametrize("name", FAMILIES)
def test_skip_view_is_the_model_without_those_sublayers(name: str) -> None:
    skip = Skip(attention=frozenset({1}), mlp=frozenset({1, 2}))
    target, tokens, draft = target_of(name, "natural"), prompts()[1], Draft((7, 8, 9), (-1, -1, 1), ("",) * 3, 3)
    said = target.forward(rows_of(tokens, draft), skip)
    with silenced(model_of(name), skip), torch.inference_mode():
        left = stock(model_of(name), [*tokens, 7])
        right = stock(model_of(name), [*tokens, 8, 9])
    torch.testing.assert_close(
        said, torch.stack([left[-2], left[-1], right[-2], right[-1]]), rtol=loose(name), atol=loose(name)
    )


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_mask_rows_leave_the_others_alone(name: str, shapes: str) -> None:
    target, tokens = target_of(name, shapes), prompts()[1]
    draft = Draft((7, 8, 9), (-1, -1, 1), ("",) * 3, 3)
    probed = draft.with_probes([VOCAB, VOCAB + 1, VOCAB + MASKS - 1], [-1, 0, -3], "")
    without = target.forward(rows_of(tokens, draft)).clone()
    logits = target.forward(rows_of(tokens, probed))
    torch.testing.assert_close(logits[: len(without)], without, rtol=loose(name), atol=loose(name))
    assert logits[len(without) :].isfinite().all()
    assert not torch.allclose(logits[4], logits[5])


def rows_of(tokens: list[int], draft: Draft) -> Rows:
    """All of `tokens` pending, `draft` under the last one."""
    sequence = Sequence(list(tokens), len(tokens), SamplingParams(), slot=0)
    return pack([(sequence, len(tokens), draft)])


def stock(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def loose(name: str) -> float:
    """float64 is not taken at its word: some stock attention takes its softmax in float32."""
    return 1e-3 if FAMILIES[name].experts else 1e-5


@contextmanager
def silenced(model: PreTrainedModel, skip: Skip) -> Iterator[None]:
    """Sublayers of a stock model add nothing, by forward hooks."""

    def hook(_module: nn.Module, _inputs: object, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    handles = []
    for index, block in enumerate(views.blocks(model, 3)):
        for chosen, name in ((skip.attention, views.attention_of(block)), (skip.mlp, views.mlp_of(block))):
            if index in chosen:
                handles.append(block.get_submodule(name or "?").register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


REFUSED: dict[str, tuple[Family, str]] = {
    "falcon": (Family("Falcon"), "attention interface"),
    "gptj": (Family("GPTJ", {**GPT, "rotary_dim": 4}), "attention interface"),
    "gpt_neo": (
        Family("GPTNeo", {"num_layers": 3, "num_heads": 4, "attention_types": [[["global"], 3]]}),
        "attention interface",
    ),
    "bloom": (Family("Bloom", {"n_head": 4, "n_layer": 3}), "attention interface"),
    "mpt": (Family("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256}), "attention interface"),
    "stablelm": (Family("StableLm"), "attention interface|keyword arguments"),
    "nemotron": (Family("Nemotron"), "keyword arguments"),
    "mamba": (Family("Mamba"), "recurrent state|rewound"),
    "jamba": (Family("Jamba", {"num_experts": 2, "use_mamba_kernels": False}), "recurrent state|rewound"),
    "qwen3_next": (
        Family("Qwen3Next", {"head_dim": 8, "num_experts": 2, "layer_types": ["linear_attention"] * 3}),
        "'linear_attention'.*rewound",
    ),
    "lfm2": (Family("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}), "'conv'.*rewound"),
    "llama4": (
        Family("Llama4Text", {"attention_chunk_size": 8, "intermediate_size_mlp": 48}, "Llama4ForCausalLM"),
        "chunks of 8",
    ),
    "t5": (
        Family(
            "T5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "T5ForConditionalGeneration"
        ),
        "encoder-decoder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_the_cause(name: str) -> None:
    family, cause = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=cause):
        open_target(build(family.config, family.options, family.model, torch.float32), slots=1)


def test_experts_refuse_float64() -> None:
    with pytest.raises(UnsupportedModel, match="float64; use float32"):
        check_supported(build("Mixtral", FAMILIES["mixtral"].options))


def test_growing_rope_is_capped() -> None:
    scaled = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "factor": 4,
    }
    longrope = build("Phi3", {"original_max_position_embeddings": 64, "rope_parameters": scaled})
    dynamic = build("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}})
    for model, most in ((longrope, 64), (dynamic, 256)):
        assert context_of(model) == open_target(model, slots=1).max_length == most
        with pytest.raises(UnsupportedModel, match="rotary frequencies change"):
            open_target(model, slots=1, context=most + 1)


def test_context_beyond_the_model() -> None:
    with pytest.raises(OptionError, match="1 to 256 positions"):
        open_target(model_of("llama"), slots=1, context=257)
    assert open_target(model_of("llama"), slots=1, context=100).max_length == 100


def test_proof_sees_other_weights_and_other_windows() -> None:
    other = build("Llama", {"rms_norm_eps": 1e-2})
    with pytest.raises(UnsupportedModel, match="logits differ"):
        prove(HFTarget(other), model_of("llama"))
    target = HFTarget(model_of("mistral"))
    target.config = type(target.config)(**{**target.config.to_dict(), "sliding_window": 5})
    with pytest.raises(UnsupportedModel, match="layer 0 attends with window 8"):
        prove(target, model_of("mistral"))


def test_proof_sees_a_layer_that_goes_elsewhere() -> None:
    class Elsewhere(nn.Module):
        def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
            return hidden_states, None

    model = build("Llama", {})
    views.blocks(model, 3)[1].self_attn = Elsewhere()
    with pytest.raises(UnsupportedModel, match="layer 1 did not use"):
        open_target(model, slots=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_oss"])
def test_proof_allows_rounding(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    open_target(build(family.config, family.options, family.model, dtype), slots=1)


def test_proof_sees_a_broken_memory_and_a_broken_window(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Group.mask
    with monkeypatch.context() as patch:
        patch.setattr(HFTarget, "keep", lambda *_: None)
        with pytest.raises(UnsupportedModel, match="logits differ"):
            open_target(model_of("llama"), slots=1)
    for wrong in (None, WINDOW + 1):
        with monkeypatch.context() as patch:
            patch.setattr(Group, "mask", lambda group, _window, *rest, wrong=wrong: right(group, wrong, *rest))
            with pytest.raises(UnsupportedModel, match="logits differ"):
                open_target(model_of("mistral"), slots=1)


def test_blocks_are_those_of_the_language_model() -> None:
    """The tower of this vision model has as many blocks as its decoder."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    options = {
        "text_config": {**BASE, **GEMMA, **MIXED},
        "vision_config": {**tower, "image_size": 16, "patch_size": 8},
        "mm_tokens_per_image": 4,
    }
    config = transformers.Gemma3Config(**options)
    model = transformers.Gemma3ForConditionalGeneration(config).double().eval()
    assert type(views.blocks(model, 3)[0]).__name__ == "Gemma3DecoderLayer"
    target = open_target(model, slots=1)
    plain, skipped = (run(target, name, prompts()[1:], SamplingParams(max_tokens=8)) for name in ("none", "layer_skip"))
    assert plain[0].output == skipped[0].output


def test_a_model_in_training_mode_stays_in_it() -> None:
    model = build("GPT2", GPT, "GPT2LMHeadModel").train()
    open_target(model, slots=1)
    assert all(module.training for module in model.modules())


def test_eos_ids() -> None:
    model = build("Llama", {})
    assert ends_of(declared_ends(model), VOCAB, None) == frozenset()
    model.config.eos_token_id = 3
    assert ends_of(declared_ends(model), VOCAB, None) == {3}
    model.generation_config.eos_token_id = [4, 5]
    assert ends_of(declared_ends(model), VOCAB, None) == {3, 4, 5}


def saved(folder: Path, name: str = "llama") -> Path:
    model_of(name).save_pretrained(folder)
    return folder


def config_only(folder: Path, **config: Any) -> Path:
    """A folder whose config.json is that of a small LLaMA with some entries changed, and no weights."""
    folder.mkdir(exist_ok=True)
    kept = {**model_of("llama").config.to_dict(), **config}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_loads_what_was_saved(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path), dtype=None)
    assert model.dtype == torch.float64
    assert not model.training
    torch.testing.assert_close(stock(model, [1, 2, 3]), stock(model_of("llama"), [1, 2, 3]), rtol=0, atol=0)
    assert load_model(str(tmp_path), dtype=torch.float32).dtype == torch.float32
    open_target(model, slots=1)


@pytest.mark.parametrize("place", ["/no/such/folder", "./missing", "~/missing", "tests/missing", "a/b/c", "missing/"])
def test_missing_folder_is_never_asked_of_the_hub(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(LoadError, match=re.escape(Path(place).name)) as caught:
        load_model(place, dtype=None)
    with pytest.raises(LoadError, match="there is no such folder; check the path"):
        load_tokenizer(Path(place))
    assert "there is no such folder; check the path" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreachable_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub\nand more lines")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", cut_off)
    with pytest.raises(
        LoadError, match=r"^no-such-org/no-such-model: cannot load the model: We couldn't connect to the hub$"
    ):
        load_model("no-such-org/no-such-model", dtype=None)


def test_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no config\.json and no \.gguf file; give the folder"):
        load_model(tmp_path, dtype=None)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match=r"is a file; give a \.gguf file, or the folder"):
        load_model(tmp_path / "model.safetensors", dtype=None)


@pytest.mark.parametrize(("text", "cause"), [('{"model_type":', "not valid JSON"), ("[]", "names no model_type")])
def test_broken_config(tmp_path: Path, text: str, cause: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LoadError, match=cause):
        load_model(tmp_path, dtype=None)


def test_unknown_model_type(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="does not know model type 'zzz'"):
        load_model(config_only(tmp_path, model_type="zzz"), dtype=None)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    folder, mark = config_only(tmp_path / "trapped"), tmp_path / "sprung"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(LoadError, match=r"pytorch_model\.bin is a pickle.*convert it to safetensors"):
        load_model(folder, dtype=None)
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert mark.exists(), "the trap works"
    mark.unlink()
    load_model(saved(folder), dtype=None)  # both kinds lie there: the safe one is taken
    assert not mark.exists()


def test_no_weights_and_broken_weights(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="weights are missing"):
        load_model(config_only(tmp_path), dtype=None)
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(LoadError, match="cannot load the model"):
        load_model(tmp_path, dtype=None)


@pytest.mark.parametrize("kind", ["zzz", "llama"])
def test_code_of_the_checkpoint_is_never_run(tmp_path: Path, kind: str) -> None:
    """An unknown type needs it and is refused; a known type has its own class here."""
    folder, mark = tmp_path / "trapped", tmp_path / "sprung"
    saved(folder)
    auto = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model", "AutoTokenizer": ["trap.T", "trap.T"]}
    config_only(folder, model_type=kind, auto_map=auto)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto}))
    (folder / "trap.py").write_text(f"open({str(mark)!r}, 'w')")
    if kind == "zzz":
        with pytest.raises(LoadError, match="trust_remote_code=True"):
            load_model(folder, dtype=None)
    else:
        assert type(load_model(folder, dtype=None)).__name__ == "LlamaForCausalLM"
    with pytest.raises(LoadError):
        load_tokenizer(folder)
    assert not mark.exists()


def test_encoder_decoder_checkpoint(tmp_path: Path) -> None:
    folder = config_only(tmp_path, model_type="t5", is_encoder_decoder=True, d_model=32)
    (folder / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        load_model(folder, dtype=None)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no tokenizer \(tokenizer\.json is missing\)"):
        load_tokenizer(saved(tmp_path))
