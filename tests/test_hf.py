"""`model.generate(custom_generate=selfdraft.generate)` says what transformers says, and refuses what it cannot do."""

from __future__ import annotations

import copy
import gc
import json
import threading
import weakref
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import GenerateDecoderOnlyOutput

import selfdraft
from selfdraft import drafters, hf
from selfdraft.core.sequence import Sequence
from selfdraft.engine.engine import Engine
from selfdraft.errors import OptionError, RequestError
from selfdraft.models import load
from selfdraft.models.target import HFTarget
from tests.models import VOCAB, random_adapters, tiny_llama

SINGLE = [[3, 4, 5, 6, 7, 3, 4, 5]]
BATCH = [[3, 4, 5, 6, 7, 3, 4, 5], [9, 8, 9], [*range(10, 30)]]
PAD = 0
ENDS = [7, 19, 23, 31]
ADAPTERS = random_adapters(tiny_llama())
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eos": {"eos_token_id": ENDS},
    "min_new_tokens": {"eos_token_id": ENDS, "min_new_tokens": 9},
    "min_length": {"eos_token_id": ENDS, "min_length": 24},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "bad_words": {"bad_words_ids": [[36], [11, 11], [42, 0]]},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "encoder_repetition": {"encoder_repetition_penalty": 1.3},
    "forced_eos": {"eos_token_id": [2], "forced_eos_token_id": 2},
    "suppress": {"suppress_tokens": [10, 32], "begin_suppress_tokens": [36, 42]},
    "sequence_bias": {"sequence_bias": [[[4], 2.0], [[5, 6], -3.0]]},
    "exponential": {"eos_token_id": [2], "exponential_decay_length_penalty": (4, 1.4)},
    "all": {"eos_token_id": ENDS, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 6},
}


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


def inputs(rows: list[list[int]]) -> dict[str, Tensor]:
    """Rows, padded on the left, with their mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def plain(model: LlamaForCausalLM, rows: list[list[int]], **options: Any) -> Tensor:
    wanted = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": PAD, **options}
    ids: Tensor = model.generate(**inputs(rows), **wanted)
    return ids


def ours(model: LlamaForCausalLM, rows: list[list[int]] = SINGLE, drafter: str = "lookup", **options: Any) -> Tensor:
    return plain(model, rows, custom_generate=selfdraft.generate, drafter=drafter, adapters=ADAPTERS, **options)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Every id is one letter or sign, without spaces between; one has more than one byte."""
    signs = [chr(code) for code in range(ord("A"), ord("A") + VOCAB - 1)] + ["é"]
    core = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=None, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("drafter", drafters.NAMES)
@pytest.mark.parametrize("rows", [SINGLE, BATCH], ids=["single", "padded"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_greedy_is_the_text_of_transformers(
    model: LlamaForCausalLM, drafter: str, rows: list[list[int]], options: dict[str, Any]
) -> None:
    assert torch.equal(ours(model, rows, drafter, **options), plain(model, rows, **options))


def test_the_options_change_the_text(model: LlamaForCausalLM) -> None:
    """Otherwise the test above would prove little."""
    usual = plain(model, BATCH).tolist()
    same = [name for name, options in OPTIONS.items() if plain(model, BATCH, **options).tolist() == usual]
    assert same == ["plain"]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_max_new_tokens(model: LlamaForCausalLM, most: int) -> None:
    said = ours(model, BATCH, max_new_tokens=most)
    assert said.shape[1] == max(map(len, BATCH)) + most
    assert torch.equal(said, plain(model, BATCH, max_new_tokens=most))


def test_without_a_padding_id_rows_are_filled_as_transformers_fills_them(model: LlamaForCausalLM) -> None:
    options: dict[str, Any] = {"eos_token_id": ENDS, "pad_token_id": None}
    said = plain(model, BATCH, **options)
    assert torch.equal(ours(model, BATCH, **options), said)
    assert (said[:, -1] == ENDS[0]).any(), "a row is filled"


def test_more_rows_than_slots(model: LlamaForCausalLM) -> None:
    rows = [[3 + i, 4, 5 + i] for i in range(18)]
    assert torch.equal(ours(model, rows, max_new_tokens=6), plain(model, rows, max_new_tokens=6))


def test_options_of_the_drafter(model: LlamaForCausalLM) -> None:
    config = {"method": "lookup", "num_speculative_tokens": 2}
    said = plain(model, SINGLE, custom_generate=selfdraft.generate, speculative_config=config, exactness="bitwise")
    assert torch.equal(said, plain(model, SINGLE))


def longer_than(size: int) -> Any:
    """A stopping criterion over the whole batch, as transformers' manual shows them."""

    def stop(ids: Tensor, scores: object, **_: object) -> Tensor:
        return torch.tensor([len(ids[0]) > size + 3 * row for row in range(len(ids))])

    return stop


@pytest.mark.parametrize("rows", [SINGLE, BATCH], ids=["single", "padded"])
def test_own_stopping_criteria(model: LlamaForCausalLM, rows: list[list[int]]) -> None:
    options = {"stopping_criteria": StoppingCriteriaList([longer_than(25)]), "eos_token_id": [VOCAB - 1]}
    said, wanted = ours(model, rows, **options), plain(model, rows, **options)
    assert torch.equal(said, wanted)
    assert wanted.shape[1] == 26 + 3 * (len(rows) - 1)


def test_a_criterion_may_answer_once_for_all(model: LlamaForCausalLM) -> None:
    said = ours(model, SINGLE, stopping_criteria=[lambda ids, scores, **_: ids.shape[1] >= 11])
    assert torch.equal(said, plain(model, SINGLE)[:, :11])


def test_max_time(model: LlamaForCausalLM) -> None:
    assert torch.equal(ours(model, SINGLE, max_time=0.0), plain(model, SINGLE, max_time=0.0))
    assert ours(model, SINGLE, max_time=0.0).shape[1] == len(SINGLE[0]) + 1


def test_stop_strings(model: LlamaForCausalLM) -> None:
    text = tokenizer().decode(plain(model, SINGLE)[0, len(SINGLE[0]) :])
    options: dict[str, Any] = {"stopping_criteria": [StopStringCriteria(tokenizer(), [text[4:6]])]}
    said = ours(model, SINGLE, **options)
    assert torch.equal(said, plain(model, SINGLE, **options))
    assert said.shape[1] < len(SINGLE[0]) + 24


class Ban:
    """A processor that bans other tokens in every row of the batch."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row in range(len(scores)):
            scores[row, (int(ids[row, -1]) + row) % 7 :: 7] = float("-inf")
        return scores


def test_own_processors_see_their_row_of_the_batch(model: LlamaForCausalLM) -> None:
    options = {"logits_processor": LogitsProcessorList([Ban()])}
    said = ours(model, BATCH, **options)
    assert torch.equal(said, plain(model, BATCH, **options))
    assert not torch.equal(said, plain(model, BATCH))


def test_prefix_allowed_tokens(model: LlamaForCausalLM) -> None:
    def allowed(row: int, ids: Tensor) -> list[int]:
        return [10 * row + (len(ids) + i) % 10 for i in range(5)]

    said = ours(model, BATCH, prefix_allowed_tokens_fn=allowed)
    assert torch.equal(said, plain(model, BATCH, prefix_allowed_tokens_fn=allowed))


def test_dict_in_return(model: LlamaForCausalLM) -> None:
    said = ours(model, SINGLE, return_dict_in_generate=True)
    assert isinstance(said, GenerateDecoderOnlyOutput)
    assert torch.equal(said.sequences, plain(model, SINGLE))


def test_sampling_repeats_with_the_global_seed(model: LlamaForCausalLM) -> None:
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(ours(model, BATCH, do_sample=True, temperature=1.5).tolist())
    assert texts[0] == texts[1] != texts[2]


def test_sampling_is_the_same_with_every_drafter(model: LlamaForCausalLM) -> None:
    texts = []
    for drafter in drafters.NAMES:
        torch.manual_seed(3)
        texts.append(ours(model, BATCH, drafter, do_sample=True, top_p=0.9).tolist())
    assert texts == texts[:1] * len(texts)


def test_sampling_keeps_to_top_k(model: LlamaForCausalLM) -> None:
    torch.manual_seed(0)
    said = ours(model, [SINGLE[0]] * 8, do_sample=True, top_k=3)
    logits = model(said).logits[:, len(SINGLE[0]) - 1 : -1]
    best = logits.topk(3).indices
    new = said[:, len(SINGLE[0]) :, None]
    assert bool((best == new).any(-1).all())
    assert not bool((best[..., :1] == new).all())
    torch.manual_seed(0)
    assert torch.equal(ours(model, SINGLE, do_sample=True, top_k=1), plain(model, SINGLE))


def test_several_answers(model: LlamaForCausalLM) -> None:
    torch.manual_seed(0)
    said = ours(model, [BATCH[0], BATCH[1]], do_sample=True, temperature=2.0, num_return_sequences=3)
    assert len(said) == 6
    assert torch.equal(said[:3, :8], said[:1, :8].repeat(3, 1))
    assert len({tuple(row) for row in said.tolist()}) == 6


@pytest.mark.parametrize("drafter", drafters.NAMES)
def test_text_streamer(model: LlamaForCausalLM, drafter: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = ours(model, SINGLE, drafter, token_streamer=TextStreamer(tokenizer(), skip_prompt=True))
    assert capsys.readouterr().out == tokenizer().decode(said[0, len(SINGLE[0]) :]) + "\n"


def test_iterator_streamer(model: LlamaForCausalLM) -> None:
    streamer = TextIteratorStreamer(tokenizer(), timeout=600)
    said = ours(model, SINGLE, token_streamer=streamer)
    assert "".join(streamer) == tokenizer().decode(said[0])


def test_a_streamer_ends_when_a_step_fails(model: LlamaForCausalLM) -> None:
    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        raise ZeroDivisionError

    streamer = TextIteratorStreamer(tokenizer(), timeout=600)
    with pytest.raises(ZeroDivisionError):
        ours(model, SINGLE, token_streamer=streamer, logits_processor=[fail])
    assert "".join(streamer) == tokenizer().decode(SINGLE[0])


def held(size: int) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(4):
        cache.update(torch.zeros(1, 2, size, 8).double(), torch.zeros(1, 2, size, 8).double(), layer)
    return cache


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "beams": ({"num_beams": 2}, OptionError, "num_beams=2"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, OptionError, "output_scores"),
    "logits": ({"output_logits": True, "return_dict_in_generate": True}, OptionError, "output_logits"),
    "cache": ({"past_key_values": held(3)}, OptionError, "past_key_values"),
    "guidance": ({"guidance_scale": 1.5}, OptionError, "guidance_scale"),
    "drafter": ({"drafter": "lokup"}, OptionError, "did you mean 'lookup'"),
    "option": ({"speculative_config": {"exit_layer": 1}}, OptionError, "belongs to layer_skip"),
    "range": ({"speculative_config": {"num_speculative_tokens": 0}}, OptionError, "at least 1"),
    "exactness": ({"exactness": "very"}, OptionError, "exactness='very'"),
    "embeddings": ({"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 48).double()}, RequestError, "input_ids"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(model: LlamaForCausalLM, name: str) -> None:
    options, error, words = REFUSED[name]
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "drafter": "lookup", **inputs(SINGLE)}
    if "inputs_embeds" in options:
        del given["attention_mask"]
    with pytest.raises(error, match=words):
        model.generate(**{**given, **options}, custom_generate=selfdraft.generate)


def test_streamer_of_a_batch_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(OptionError, match="a streamer carries one text, not 3"):
        ours(model, BATCH, token_streamer=TextStreamer(tokenizer()))


def test_training_mode_is_refused(model: LlamaForCausalLM) -> None:
    model.train()
    try:
        with pytest.raises(RequestError, match=r"call model\.eval\(\) first"):
            ours(model, SINGLE)
    finally:
        model.eval()


def test_a_prompt_beyond_the_context_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(RequestError, match="512 tokens leaves no room in the context of 512"):
        ours(model, [[5] * 512])


def test_the_model_is_left_alone(model: LlamaForCausalLM) -> None:
    before = (json.dumps(model.config.to_dict(), default=str), model.config._attn_implementation)
    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    text = plain(model, BATCH)
    for drafter in drafters.NAMES:
        ours(model, BATCH, drafter)
    assert (json.dumps(model.config.to_dict(), default=str), model.config._attn_implementation) == before
    assert model.generation_config == config
    assert torch.equal(plain(model, BATCH), text)


# What is kept with a model from call to call


def count_openings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    opened: list[str] = []
    real = load.open_target

    def counted(model: LlamaForCausalLM, **options: Any) -> HFTarget:
        opened.append(options["exactness"])
        return real(model, **options)

    monkeypatch.setattr(load, "open_target", counted)
    return opened


def test_a_model_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny_llama())
    opened, wanted = count_openings(monkeypatch), plain(model, SINGLE)
    for drafter in ("lookup", "none", "lookup"):
        assert torch.equal(ours(model, drafter=drafter), wanted)
    assert opened == ["token"]
    assert torch.equal(ours(model, BATCH), plain(model, BATCH)), "more rows than the kept one has slots"
    assert torch.equal(ours(model, BATCH[:2]), plain(model, BATCH[:2]))
    assert opened == ["token"] * 2
    assert torch.equal(ours(model, drafter="lookup", exactness="bitwise"), wanted)
    assert opened == ["token"] * 2 + ["bitwise"]


@pytest.mark.parametrize("change", ["dtype", "weights", "module", "attention"])
def test_a_model_that_was_changed_is_proved_again(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny_llama())
    opened = count_openings(monkeypatch)
    ours(model)
    if change == "dtype":
        model.to(torch.float32)
    elif change == "weights":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).contiguous())
    elif change == "module":
        model.model.layers[1].mlp = copy.deepcopy(model.model.layers[0].mlp)
    else:
        model.set_attn_implementation("eager" if model.config._attn_implementation != "eager" else "sdpa")
    assert torch.equal(ours(model), plain(model, SINGLE))
    assert len(opened) == 2


def test_weights_that_are_trained_in_place_count(model: LlamaForCausalLM) -> None:
    own = copy.deepcopy(model)
    before = ours(own)
    with torch.no_grad():
        own.lm_head.weight.copy_(own.lm_head.weight.flip(0))
    assert torch.equal(ours(own), plain(own, SINGLE))
    assert not torch.equal(ours(own), before)


@pytest.mark.parametrize("drafter", drafters.NAMES)
def test_what_is_kept_dies_with_the_model(drafter: str) -> None:
    own = copy.deepcopy(tiny_llama())
    ours(own, drafter=drafter)
    [(_, target)] = hf._LEFT[own]
    gone = weakref.ref(own), weakref.ref(target)
    del own, target
    gc.collect()
    assert [one() for one in gone] == [None, None]


@pytest.mark.parametrize("drafter", drafters.NAMES)
def test_no_call_leaves_anything_behind(drafter: str, model: LlamaForCausalLM) -> None:
    """Counted in living objects and tensors, after the first calls have filled what is kept."""

    def living() -> int:
        gc.collect()
        return sum(isinstance(one, Tensor | Sequence | Engine) for one in gc.get_objects())

    for _ in range(2):
        ours(model, drafter=drafter)
    before = living()
    for _ in range(5):
        ours(model, drafter=drafter)
    assert living() <= before


def test_calls_at_once_and_inside_one_another(model: LlamaForCausalLM) -> None:
    wanted, said = plain(model, SINGLE), list[Tensor]()

    def inside(ids: Tensor, scores: Tensor) -> Tensor:
        said.append(ours(model, drafter="lookup", max_new_tokens=4))
        return scores

    assert torch.equal(ours(model, drafter="lookup", logits_processor=LogitsProcessorList([inside])), wanted)
    assert all(torch.equal(one, plain(model, SINGLE, max_new_tokens=4)) for one in said)
    threads = [threading.Thread(target=lambda: said.append(ours(model, drafter="suffix"))) for _ in range(3)]
    said.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 3
    assert all(torch.equal(one, wanted) for one in said)
    assert len(hf._LEFT[model]) <= hf.KEPT
