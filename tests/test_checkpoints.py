"""Checkpoints as they are found: weights missing or left over, stale end ids, pointers, shards, LoRA, wrappers."""

from __future__ import annotations

import builtins
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from selfdraft import LLM, SamplingParams
from selfdraft.bench.peers.local import Transformers
from selfdraft.bench.run import Contender
from selfdraft.cli.peers import FoundPeer, check_merged
from selfdraft.errors import LoadError, OptionError
from selfdraft.models import reference
from selfdraft.models.checkpoint.end_ids import declared_ends, ends_of, turn_end
from selfdraft.models.checkpoint.lora import unwrapped
from selfdraft.models.checkpoint.weights import LoadingInfo, check_weights
from selfdraft.models.load import load_model, load_tokenizer
from tests import gguf_files
from tests.models import VOCAB, tiny_llama
from tests.terminal import typed
from tests.test_llm import tokenizer

Weights = dict[str, Tensor]
PROMPT = [3, 4, 5, 6, 7, 3, 4, 5]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SHARDED = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def saved(folder: Path, change: Callable[[Weights], Weights] = dict, **config: Any) -> Path:
    """A tiny LLaMA's folder with its weights changed, and some entries of config.json."""
    tiny_llama(torch.float32).save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = change(load_file(file))
    save_file({name: weight.clone() for name, weight in weights.items()}, file, metadata={"format": "pt"})
    edit(folder / "config.json", **config)
    return folder


def edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if name not in names}


def with_more(**extra: Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name.replace("__", "."): weight for name, weight in extra.items()}


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def bare(weights: Weights) -> Weights:
    """As the base model without its head would have been saved."""
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([PROMPT])).logits
    return found


INCOMPLETE: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any], str]] = {
    "no head": (
        without("lm_head.weight"),
        {},
        r"1 weights are missing, the first are lm_head\.weight; it is not a whole",
    ),
    "a wrapper's prefix": (
        prefixed("module."),
        {},
        r"39 weights are missing, the first are lm_head\.weight, model\.embed_tokens\.weight, "
        r"model\.layers\.0\.input_layernorm\.weight; in the file they begin with 'module\.'",
    ),
    "a compiled model's prefix": (prefixed("_orig_mod."), {}, r"in the file they begin with '_orig_mod\.'"),
    "fewer layers": (
        dict,
        {"num_hidden_layers": 12},
        r"72 weights are missing, the first are model\.layers\.4\.input_layernorm\.weight, .*"
        r"the configuration says 12 layers and the file has 4",
    ),
    "more layers": (
        dict,
        {"num_hidden_layers": 3},
        r"more layers than the 3 of model\.layers.*9 weights have no place, the first are model\.layers\.3\.input",
    ),
    "more layers of the bare model": (bare, {"num_hidden_layers": 3}, r"more layers than the 3 .* layers\.3\.input"),
    "a bias": (
        with_more(model__layers__0__self_attn__q_proj__bias=torch.ones(48)),
        {},
        r"1 weights have no place in the model, the first are model\.layers\.0\.self_attn\.q_proj\.bias; it is another",
    ),
    "a norm of another family": (
        with_more(model__layers__1__self_attn__q_norm__weight=torch.ones(8)),
        {},
        r"1 weights have no place in the model, the first are model\.layers\.1\.self_attn\.q_norm\.weight",
    ),
    "a bias of the head": (
        with_more(lm_head__bias=torch.ones(VOCAB)),
        {},
        r"the first are lm_head\.bias; it is another",
    ),
    "other sizes": (
        dict,
        {"intermediate_size": 64},
        r"12 weights have other sizes .*model\.layers\.0\.mlp\.down_proj\.weight: 48x96 in the file, 48x64 by the conf",
    ),
    "another vocabulary": (
        dict,
        {"vocab_size": 64},
        r"2 weights have other sizes .* lm_head\.weight: 61x48 in the file",
    ),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_weights_that_do_not_fit_the_configuration(name: str, tmp_path: Path) -> None:
    change, config, words = INCOMPLETE[name]
    with pytest.raises(LoadError, match=words) as caught:
        load_model(saved(tmp_path, change, **config), dtype=None)
    assert "\n" not in str(caught.value)


def test_layers_are_counted_as_numbers(tmp_path: Path) -> None:
    lost = [f"model.layers.{i}.mlp.up_proj.weight" for i in (2, 10)]
    model = LlamaForCausalLM(type(tiny_llama().config)(**{**tiny_llama().config.to_dict(), "num_hidden_layers": 12}))
    model.save_pretrained(tmp_path)
    weights = without(*lost)(load_file(tmp_path / "model.safetensors"))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        LoadError, match=rf"2 weights are missing, the first are {lost[0]}, {lost[1]}; it is not a whole"
    ):
        load_model(tmp_path, dtype=None)


def tied(weights: Weights) -> Weights:
    return without("lm_head.weight")(weights)


HARMLESS: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any], str | None]] = {
    "tied": (tied, {"tie_word_embeddings": True}, None),
    "bare model": (bare, {}, None),
    "rotary table": (with_more(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)), {}, None),
    "rotary cosines": (with_more(model__layers__0__self_attn__rotary_emb__cos_cached=torch.ones(4)), {}, None),
    "scales of a cache": (with_more(model__layers__0__self_attn__k_scale=torch.ones(1)), {}, None),
    "a value head": (
        with_more(v_head__weight=torch.ones(1, 48)),
        {},
        "1 weights are not used, the first are v_head.weight",
    ),
    "a prediction layer": (
        with_more(model__layers__4__eh_proj__weight=torch.ones(4)),
        {"num_nextn_predict_layers": 1},
        "1 weights are not used, the first are model.layers.4.eh_proj.weight",
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_no_error(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change, config, note = HARMLESS[name]
    with caplog.at_level(logging.WARNING, "selfdraft"):
        model = load_model(saved(tmp_path, change, **config), dtype=None)
    notes = [record.getMessage() for record in caplog.records if record.name == "selfdraft"]
    assert notes == ([f"{tmp_path}: {note}"] if note else [])
    if name == "tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    else:
        assert torch.equal(logits(model), logits(tiny_llama(torch.float32)))


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    load_model(tmp_path, dtype=None)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(next(name for name in weights if "experts.1.w1" in name))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match="mostly those of experts, are missing in part"):
        load_model(tmp_path, dtype=None)


def test_a_gguf_file_with_more_layers_than_it_says(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "tiny.gguf")
    raw = (tmp_path / "tiny.gguf").read_bytes()
    at = raw.index(b"llama.block_count") + len(b"llama.block_count") + 4  # behind the name: the type, then the number
    assert raw[at] == 2
    (tmp_path / "tiny.gguf").write_bytes(raw[:at] + b"\x01" + raw[at + 1 :])
    with pytest.raises(
        LoadError, match=r"more layers than the 1 of its block_count: the first is blk\.1, the last blk\.1;"
    ):
        load_model(tmp_path / "tiny.gguf", dtype=None)


# transformers as a reference


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"num_beams": 3}, {"suppress_tokens": [36]}],
    ids=str,
)
def test_the_reference_is_plain_greedy_whatever_the_checkpoint_asks_for(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    wanted = reference.greedy(tiny_llama(torch.float32), PROMPT, 24, frozenset())
    ends = frozenset(wanted[5:6])
    folder = saved(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, **settings}))
    model = load_model(folder, dtype=None)
    own = model.generation_config
    stopped = wanted[: wanted.index(wanted[5]) + 1]
    usual = model.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)
    assert usual[0, len(PROMPT) :].tolist() != wanted, "these settings change the text"
    assert reference.greedy(model, PROMPT, 24, frozenset()) == wanted
    assert reference.greedy(model, PROMPT, 24, ends) == stopped
    peer = Transformers("transformers", model, {}, lambda: None)
    assert list(peer.answer(PROMPT, 24, 0).tokens) == wanted
    lookup = Transformers("transformers", model, {"prompt_lookup_num_tokens": 3}, lambda: None)
    assert list(lookup.answer(PROMPT, 24, 0).tokens) == wanted
    assert model.generation_config is own
    assert {name: getattr(own, name) for name in settings} == settings


# ends of a text


def with_ends(folder: Path, config: object = None, generation: object = None) -> Path:
    saved(folder, eos_token_id=config)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return folder


ENDS: dict[str, tuple[object, object, set[int], str]] = {
    "of one file": (2, None, {2}, ""),
    "of both": (2, [3, 5], {2, 3, 5}, ""),
    "beyond the vocabulary": ([2, 99999], None, {2}, "eos_token_id of the config: 99999 is left out"),
    "beyond, of generation": (2, [4, VOCAB], {2, 4}, f"of the generation config: {VOCAB} is left out"),
    "null": ([2, None], None, {2}, "eos_token_id of the config: None is left out"),
    "null, of generation": (2, [None, 4], {2, 4}, "of the generation config: None is left out"),
    "below zero": (-1, None, set(), "eos_token_id of the config: -1 is left out"),
    "no number": ("2", ["</s>", 4.0, True, 5], {5}, "generation config: '</s>', 4.0, True is left out"),
}


@pytest.mark.parametrize("name", ENDS)
def test_ends_are_those_of_all_files_and_in_the_vocabulary(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, generation, wanted, note = ENDS[name]
    with caplog.at_level(logging.WARNING, "selfdraft"):
        llm = LLM(
            with_ends(tmp_path, config, generation), tokenizer=spoken(None), drafter="none", runner="plain", cache=False
        )
    assert llm.eos == wanted | {VOCAB - 1}
    assert note in caplog.text
    assert bool(note) == bool(caplog.text)
    output = llm.generate([PROMPT], SamplingParams(max_tokens=6, min_tokens=4))[0].outputs[0]
    assert not {*output.token_ids[:4]} & llm.eos
    assert len(output.token_ids) >= 4


def spoken(template: str | None) -> Any:
    """A tokenizer for the tiny model: letters, and special tokens for turns; its end is the last token."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<|turn|>", "<|turn|>>", "</s>"]
    words = [chr(code) for code in range(ord("A"), ord("A") + VOCAB - len(special))] + special
    core = Tokenizer(models.BPE({sign: i for i, sign in enumerate(words)}, []))
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    made.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|turn|>>"]})
    made.chat_template = template
    return made


EACH = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
TEMPLATES: dict[str, tuple[str | None, int | None]] = {
    "none": (None, None),
    "a turn": (EACH + "<|turn|>\n{% endfor %}", VOCAB - 3),
    "behind a line": (EACH + "\n<|turn|>{% endfor %}</s>", VOCAB - 3),
    "the longest": (EACH + "<|turn|>>{% endfor %}", VOCAB - 2),
    "the end itself": (EACH + "</s>{% endfor %}", VOCAB - 1),
    "plain words": (EACH + "[bot]{% endfor %}", None),
    "nothing": (EACH + "{% endfor %}", None),
    "words first": (EACH + "end<|turn|>{% endfor %}", None),
    "a beginning": (EACH + "<s>{% endfor %}", None),
    "no assistant": ("{{ raise_exception('no assistant here') }}", None),
    "answers left out": ("{{ messages[0]['content'] }}<|turn|>", None),
    "broken": ("{% for", None),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_a_turn_is_read_from_the_template(name: str) -> None:
    template, wanted = TEMPLATES[name]
    speaker = spoken(template)
    assert turn_end(speaker) == wanted
    turn = {wanted} if wanted is not None else set()
    assert ends_of(declared_ends(tiny_llama()), VOCAB, speaker) == {VOCAB - 1} | turn


def test_an_end_of_a_turn_that_the_model_does_not_know() -> None:
    speaker = spoken(EACH + "<|more|>{% endfor %}")
    speaker.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    assert turn_end(speaker) == VOCAB
    assert ends_of(declared_ends(tiny_llama()), VOCAB, speaker) == {VOCAB - 1}


# files


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_pointers_in_the_place_of_a_models_files(name: str, tmp_path: Path) -> None:
    (saved(tmp_path) / name).write_text(POINTER)
    with pytest.raises(LoadError, match=rf"{name} is a pointer of Git LFS, not the file itself; run `git lfs pull`"):
        load_model(tmp_path, dtype=None)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_pointers_in_the_place_of_a_tokenizers_files(name: str, tmp_path: Path) -> None:
    tokenizer(template=True).save_pretrained(saved(tmp_path))
    assert load_tokenizer(tmp_path)("the dog")["input_ids"]
    assert (tmp_path / name).is_file()
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(LoadError, match=rf"{name} is a pointer of Git LFS"):
        load_tokenizer(tmp_path)


def test_other_pointers(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_text(POINTER)
    with pytest.raises(LoadError, match=r"tiny\.gguf is a pointer of Git LFS"):
        load_model(tmp_path / "tiny.gguf", dtype=None)
    folder = saved(tmp_path / "folder")
    (folder / "model.safetensors").rename(folder / "kept")
    (folder / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(LoadError, match=r"pytorch_model\.bin is a pointer of Git LFS"):
        load_model(folder, dtype=None)
    (folder / "kept").rename(folder / "model.safetensors")
    load_model(folder, dtype=None)  # what is not read does not count


def sharded(folder: Path) -> Path:
    saved(folder)
    (folder / "model.safetensors").unlink()
    tiny_llama(torch.float32).save_pretrained(folder, max_shard_size="200KB")
    assert {file.name for file in folder.glob("*.safetensors")} == {*SHARDED}
    return folder


def test_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "whole")
    assert torch.equal(logits(load_model(folder, dtype=None)), logits(tiny_llama(torch.float32)))
    index = folder / "model.safetensors.index.json"
    kept = index.read_text()
    for text, words in (
        (POINTER, r"index\.json is a pointer of Git LFS"),
        ("{", r"index\.json is not valid JSON"),
        ("[]", r"index\.json holds no JSON object"),
        ("{}", r"index\.json has no weight_map"),
    ):
        index.write_text(text)
        with pytest.raises(LoadError, match=words):
            load_model(folder, dtype=None)
    index.unlink()
    with pytest.raises(
        LoadError, match=r"2 shards such as model-00001-of-00002\.safetensors, but no model\.safe.*index"
    ):
        load_model(folder, dtype=None)
    index.write_text(kept)
    (folder / SHARDED[1]).write_text(POINTER)
    with pytest.raises(LoadError, match=rf"{SHARDED[1]} is a pointer of Git LFS"):
        load_model(folder, dtype=None)
    (folder / SHARDED[1]).unlink()
    with pytest.raises(LoadError, match=rf"1 of 2 shards are missing, the first is {SHARDED[1]}; download them all"):
        load_model(folder, dtype=None)


def test_weights_of_another_name_and_weights_cut_off(tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadError, match="the file is cut off or damaged: download it again"):
        load_model(tmp_path, dtype=None)
    file.rename(tmp_path / "weights.safetensors")
    with pytest.raises(LoadError, match=r"weights\.safetensors is not the name of a model's weights; .* rename it"):
        load_model(tmp_path, dtype=None)


TOKENIZERS: dict[str, tuple[dict[str, str | None], str]] = {
    "no words": ({"tokenizer.json": None}, r"tokenizer\.json is missing; copy it there, or pass tokenizer="),
    "cut off": (
        {"tokenizer.json": '{"version": "1.0", "tru'},
        r"tokenizer\.json is not valid JSON \(.*\); download it",
    ),
    "empty": ({"tokenizer.json": ""}, r"tokenizer\.json is not valid JSON"),
    "no model": ({"tokenizer.json": "{}"}, r"tokenizer\.json has no entry 'model'"),
    "no object": ({"tokenizer_config.json": "[]"}, r"tokenizer_config\.json holds no JSON object"),
    "sentencepiece": (
        {"tokenizer.json": None, "tokenizer.model": "rubbish"},
        r"tokenizer\.json is missing, and tokenizer\.model cannot be read in its place .*pip install sentencepiece",
    ),
    "specials alone": (
        {"tokenizer.json": None, "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'},
        r"the tokenizer has no words, only 3 special tokens: tokenizer\.json is missing",
    ),
    "nothing at all": (
        {"tokenizer.json": None, "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'},
        r"the tokenizer has no words",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_made(name: str, tmp_path: Path) -> None:
    files, words = TOKENIZERS[name]
    tokenizer().save_pretrained(saved(tmp_path))
    for file, text in files.items():
        if text is None:
            (tmp_path / file).unlink()
        else:
            (tmp_path / file).write_text(text)
    with pytest.raises(LoadError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


# LoRA and wrappers


def tuned(base: Path, seed: int = 0, **options: Any) -> Any:
    """The model of a folder with a LoRA adapter beside its weights that changes what it says."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "down_proj"], **options}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(init_lora_weights=False, **settings))
    return model.eval()


def adapter(folder: Path, base: Path, **options: Any) -> Tensor:
    """Write an adapter for the model in `base`; returns what the model says with it."""
    model = tuned(base, **options)
    model.save_pretrained(folder)
    return logits(model)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-4)


def test_a_lora_folder_is_its_base_model_with_the_adapter_merged(tmp_path: Path) -> None:
    base, lora = saved(tmp_path / "base"), tmp_path / "lora"
    spoken(None).save_pretrained(base)
    wanted = adapter(lora, base)
    plain = load_model(base, dtype=None)
    assert not close(wanted, logits(plain)), "the adapter changes the text"
    for model in (load_model(lora, dtype=None), load_model(base, dtype=None, lora=lora)):
        assert type(model) is LlamaForCausalLM
        assert not model.training
        assert close(logits(model), wanted)
        assert {*model.state_dict()} == {*plain.state_dict()}
    llm = LLM(lora, drafter="lookup", cache=False)
    assert llm.eos == {VOCAB - 1}, "the base model's tokenizer"
    said = llm.generate([PROMPT], SamplingParams(max_tokens=12))[0].outputs[0].token_ids
    assert list(said) == reference.greedy(load_model(lora, dtype=None), PROMPT, 12, llm.eos)
    by_option = LLM(base, lora=lora, drafter="lookup", cache=False)
    assert by_option.generate([PROMPT], SamplingParams(max_tokens=12))[0].outputs[0].token_ids == said


def test_both_a_lora_folder_and_another_one(tmp_path: Path) -> None:
    base, first, second = saved(tmp_path / "base"), tmp_path / "first", tmp_path / "second"
    adapter(first, base)
    load_model(first, dtype=None).save_pretrained(tmp_path / "merged")
    wanted = adapter(second, tmp_path / "merged", seed=1)
    assert close(logits(load_model(first, dtype=None, lora=second)), wanted)


def test_a_lora_folder_may_have_a_tokenizer_and_a_config_of_its_own(tmp_path: Path) -> None:
    base, lora = saved(tmp_path / "base"), tmp_path / "lora"
    spoken(None).save_pretrained(base)
    wanted = adapter(lora, base)
    own = spoken(EACH + "<|turn|>{% endfor %}")
    own.save_pretrained(lora)
    (lora / "config.json").write_text((base / "config.json").read_text())
    edit(lora / "adapter_config.json", base_model_name_or_path="../base")
    assert load_tokenizer(lora).chat_template == own.chat_template
    assert close(logits(load_model(lora, dtype=None)), wanted)


def test_an_adapter_beside_a_models_weights_is_never_guessed_at(tmp_path: Path) -> None:
    base = saved(tmp_path)
    adapter(base, base)
    with pytest.raises(LoadError, match=r"holds a model and a LoRA adapter; move adapter_config\.json"):
        load_model(base, dtype=None)
    (base / "selfdraft.json").write_text("{}")  # masks, which are loaded elsewhere
    assert torch.equal(logits(load_model(base, dtype=None)), logits(tiny_llama(torch.float32)))


def test_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(tmp_path / "lora", saved(tmp_path / "base"))
    right = builtins.__import__

    def imported(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "peft":
            raise ImportError("no peft here")
        return right(name, *rest)

    monkeypatch.setattr(builtins, "__import__", imported)
    with pytest.raises(LoadError, match=r"is a LoRA adapter; to merge it into its model: pip install peft"):
        load_model(tmp_path / "lora", dtype=None)


Break = Callable[[Path, Path], object]


def pickled(lora: Path, _: Path) -> None:
    (lora / "adapter_model.safetensors").unlink()
    (lora / "adapter_model.bin").write_bytes(pickle.dumps({}))


def fewer(lora: Path, _: Path) -> None:
    weights = load_file(lora / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "layers.1.mlp.down_proj.lora_B" in name))
    save_file(weights, lora / "adapter_model.safetensors")


def other_size(lora: Path, base: Path) -> None:
    config = type(tiny_llama().config)(**{**tiny_llama().config.to_dict(), "intermediate_size": 64})
    LlamaForCausalLM(config).save_pretrained(base)


BROKEN_LORA: dict[str, tuple[Break, str]] = {
    "no base": (
        lambda lora, _: edit(lora / "adapter_config.json", base_model_name_or_path=None),
        r"is a LoRA adapter and adapter_config\.json names no base model; give the base model, and .*--lora DIR",
    ),
    "a base that is gone": (
        lambda lora, _: edit(lora / "adapter_config.json", base_model_name_or_path="/no/such/base"),
        r"lora is a LoRA adapter, and its base model: /no/such/base: there is no such folder.*--lora DIR",
    ),
    "itself": (
        lambda lora, _: edit(lora / "adapter_config.json", base_model_name_or_path=str(lora)),
        r"whose base model .* is an adapter, too",
    ),
    "a broken base": (
        lambda _, base: (base / "model.safetensors").unlink(),
        r"lora is a LoRA adapter, and its base model: .*base: no \*\.safetensors file; the weights are missing",
    ),
    "a pointer": (
        lambda lora, _: (lora / "adapter_model.safetensors").write_text(POINTER),
        r"adapter_model\.safetensors is a pointer of Git LFS",
    ),
    "a pointer of the config": (
        lambda lora, _: (lora / "adapter_config.json").write_text(POINTER),
        r"adapter_config\.json is a pointer of Git LFS",
    ),
    "no weights": (
        lambda lora, _: (lora / "adapter_model.safetensors").unlink(),
        r"no adapter_model\.safetensors \(weights are missing\)",
    ),
    "a pickle": (pickled, r"adapter_model\.bin is a pickle, which can run code and is never opened"),
    "weights cut off": (
        lambda lora, _: (lora / "adapter_model.safetensors").write_bytes(b"rubbish"),
        "cannot load the LoRA adapter: .*cut off or damaged",
    ),
    "a weight missing": (
        fewer,
        r"does not fit the model: 1 of its weights are missing, the first is base_model\.model\.mod",
    ),
    "fewer modules": (
        lambda lora, _: edit(lora / "adapter_config.json", target_modules=["q_proj"]),
        r"does not fit the model: 8 of its weights have no place, the first is base_model\.model\.model\.layers\.0\.",
    ),
    "another model": (other_size, "cannot load the LoRA adapter: .*size mismatch"),
    "no such modules": (
        lambda lora, _: edit(lora / "adapter_config.json", target_modules=["c_attn"]),
        "cannot load the LoRA adapter: .*c_attn",
    ),
    "masks of ours": (
        lambda lora, _: (lora / "selfdraft.json").write_text("{}"),
        r"holds mask tokens of `selfdraft train`",
    ),
}


@pytest.mark.parametrize("name", BROKEN_LORA)
def test_broken_lora_folders(name: str, tmp_path: Path) -> None:
    base, lora = saved(tmp_path / "base"), tmp_path / "lora"
    adapter(lora, base)
    change, words = BROKEN_LORA[name]
    change(lora, base)
    with pytest.raises(LoadError, match=words) as caught:
        load_model(lora, dtype=None)
    assert "\n" not in str(caught.value)


def test_what_is_given_as_lora_and_is_none(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    with pytest.raises(LoadError, match=r"base is no LoRA adapter: no adapter_config\.json"):
        load_model(base, dtype=None, lora=base)
    with pytest.raises(LoadError, match="nothing: there is no such folder"):
        load_model(base, dtype=None, lora=tmp_path / "nothing")
    adapter(tmp_path / "masks", base)
    (tmp_path / "masks" / "selfdraft.json").write_text("{}")
    with pytest.raises(LoadError, match="which are never merged; give it as an adapter"):
        load_model(base, dtype=None, lora=tmp_path / "masks")


def test_other_adapters_of_peft(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    scaled = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    with torch.no_grad():
        for name, weight in scaled.named_parameters():
            if "ia3" in name:
                weight.mul_(1.5)
    scaled.save_pretrained(tmp_path / "ia3")
    assert close(logits(load_model(tmp_path / "ia3", dtype=None)), logits(scaled.eval()))
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), prompts).save_pretrained(tmp_path / "prompts")
    with pytest.raises(LoadError, match="an adapter of type 'PROMPT_TUNING' cannot be merged into weights"):
        load_model(tmp_path / "prompts", dtype=None)


def test_lora_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, lora = saved(tmp_path / "base"), tmp_path / "lora"
    spoken(None).save_pretrained(base)
    adapter(lora, base)
    command = ("generate", "ABCABC", "--model", base, "--drafter", "none", "--max-new-tokens", "8", "--json")
    llm = LLM(lora, drafter="none", cache=False)
    wanted = llm.generate("ABCABC", SamplingParams(max_tokens=8))[0].outputs[0].token_ids
    found = json.loads(typed(monkeypatch, capsys, *command, "--lora", lora).out)
    assert found["lora"] == str(lora)
    assert found["results"][0]["token_ids"] == list(wanted)
    plain = json.loads(typed(monkeypatch, capsys, *command).out)
    assert "lora" not in plain
    assert plain["results"][0]["token_ids"] != list(wanted)
    done = typed(monkeypatch, capsys, *command, "--lora", tmp_path / "nothing")
    assert done.code == 2
    assert "nothing: there is no such folder" in done.err


def test_peers_that_would_read_the_base_model_are_refused(tmp_path: Path) -> None:
    base, lora = saved(tmp_path / "base"), tmp_path / "lora"
    adapter(lora, base)

    def guest(engine: str) -> FoundPeer:
        return FoundPeer(Contender(engine, "none"), {}, engine, "python")

    for model, merged in ((base, lora), (lora, None)):
        check_merged([guest("transformers"), guest("llama.cpp")], str(model), merged)
        with pytest.raises(
            OptionError, match="--peers vllm: it reads the checkpoint's folder, without the LoRA adapter"
        ):
            check_merged([guest("transformers"), guest("vllm")], str(model), merged)
    check_merged([guest("vllm")], str(base), None)


def test_a_model_of_peft_is_refused_and_left_alone(tmp_path: Path) -> None:
    model = tuned(saved(tmp_path))
    before = logits(model)
    with pytest.raises(LoadError, match=r"PeftModel is a model of peft .*LLM\(model\.merge_and_unload\(\)\)"):
        LLM(model)
    assert torch.equal(logits(model), before)
    assert LLM(model.merge_and_unload(), drafter="none").generate([PROMPT], SamplingParams(max_tokens=2))


def test_wrapped_models_are_unwrapped() -> None:
    model = tiny_llama(torch.float32)
    assert unwrapped(model) is model
    compiled: Any = torch.compile(model)
    assert unwrapped(compiled) is model
    assert unwrapped(nn.DataParallel(model)) is model
    assert unwrapped(nn.DataParallel(compiled)) is model
    said = LLM(compiled, drafter="lookup").generate([PROMPT], SamplingParams(max_tokens=8))[0].outputs[0].token_ids
    assert list(said) == reference.greedy(model, PROMPT, 8, frozenset())


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    for odd, name in (
        (None, "builtins.NoneType"),
        (nn.Linear(2, 2), r"linear\.Linear"),
        (GenerationConfig(), "GenerationC"),
    ):
        with pytest.raises(LoadError, match=rf"{name}.* is no model of transformers; give a PreTrainedModel, a folder"):
            LLM(odd)
    with pytest.raises(OptionError, match=r"with a loaded model: merging would change that model; give its folder"):
        LLM(tiny_llama(), lora=tmp_path)


def test_the_first_of_several_wrong_sizes_is_the_first_layer_by_number() -> None:
    odd = [(f"model.layers.{layer}.mlp.up_proj.weight", torch.Size([2, 3]), torch.Size([2, 4])) for layer in (10, 2)]
    info = LoadingInfo(missing_keys=[], unexpected_keys=[], mismatched_keys=odd)
    with pytest.raises(LoadError, match=r"2 weights .* the first is model\.layers\.2\.mlp.*: 2x3 in the file, 2x4 by"):
        check_weights("here", tiny_llama(), info)
