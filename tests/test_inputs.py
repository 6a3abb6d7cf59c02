"""What people give: prompts of every shape, options of every spelling, conversations, files, and pipes.

Each is answered as the same prompt given plainly, or refused by an error that says what was given.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from selfdraft import LLM, AsyncLLM, SamplingParams, cli
from selfdraft.errors import OptionError, RequestError, SelfdraftError
from selfdraft.llm import RequestOutput
from selfdraft.sampling import bad_word_ids
from selfdraft.types import _READERS
from tests.clocks import Ticking
from tests.terminal import one_line, typed
from tests.test_llm import TEXTS, door, llm, model, tokenizer

SHORT = SamplingParams(max_tokens=6)
END = 0
"""The id of <end>, the only special token."""
A, B = TEXTS[0], TEXTS[2]


def ids(text: str) -> list[int]:
    return list(tokenizer()(text)["input_ids"])


def said(answers: list[RequestOutput]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt, answer) of each, in token ids."""
    return [(one.prompt_token_ids, one.outputs[0].token_ids) for one in answers]


# --- prompts ----------------------------------------------------------------------------------------------------


def padded(**options: Any) -> Any:
    """A batch of two as transformers makes it, the shorter one padded on the left."""
    tokens = deepcopy(tokenizer())
    tokens.pad_token, tokens.padding_side = "<end>", "left"
    return tokens([A, B], padding=True, **options)


ONE: dict[str, Any] = {
    "dict with ids": lambda: {"prompt_token_ids": ids(A)},
    "dict with an array": lambda: {"prompt_token_ids": np.array(ids(A))},
    "dict with text": lambda: {"prompt": A},
    "dict with both": lambda: {"prompt": "not this", "prompt_token_ids": ids(A)},
    "dict of vLLM": lambda: {"prompt": A, "multi_modal_data": None, "cache_salt": "x"},
    "encoding": lambda: tokenizer()(A),
    "encoding as tensors": lambda: tokenizer()(A, return_tensors="pt"),
    "encoding in a list": lambda: [tokenizer()(A, return_tensors="np")],
    "array": lambda: np.array(ids(A), dtype=np.uint16),
    "tensor": lambda: torch.tensor(ids(A)),
    "batch of one": lambda: torch.tensor([ids(A)]),
    "numbers of numpy": lambda: [np.int64(token) for token in ids(A)],
    "tensors of one number": lambda: list(torch.tensor(ids(A))),
    "tuple": lambda: tuple(ids(A)),
    "iterator": lambda: iter(ids(A)),
    "text of numpy": lambda: np.array(A),
    "list with a text": lambda: [A],
}
TWO: dict[str, Any] = {
    "dicts": lambda: [{"prompt": A}, {"prompt_token_ids": ids(B)}],
    "encodings": lambda: [tokenizer()(A), tokenizer()(B)],
    "encoding of two": lambda: tokenizer()([A, B]),
    "padded": padded,
    "padded tensors": lambda: padded(return_tensors="pt"),
    "arrays": lambda: [np.array(ids(A)), torch.tensor(ids(B))],
    "array of texts": lambda: np.array([A, B]),
    "all kinds": lambda: (A, ids(B)),
}


@pytest.mark.parametrize("name", ONE)
def test_one_prompt_of_any_shape(name: str) -> None:
    wanted = llm().generate(A, SHORT)
    assert said(llm().generate(ONE[name](), SHORT)) == said(wanted)
    if "list" not in name:
        *_, last = llm().stream(ONE[name](), SHORT)
        assert last.output.token_ids == wanted[0].outputs[0].token_ids
        assert llm().encode(ONE[name]()) == ids(A)


@pytest.mark.parametrize("name", TWO)
def test_two_prompts_of_any_shape(name: str) -> None:
    assert said(llm().generate(TWO[name](), SHORT)) == said(llm().generate([A, B], SHORT))


def test_an_array_of_two_rows_is_two_prompts() -> None:
    rows = [ids(A)[:5], ids(B)[:5]]
    for batch in (np.array(rows), torch.tensor(rows), {"input_ids": torch.tensor(rows)}):
        assert said(llm().generate(batch, SHORT)) == said(llm().generate(rows, SHORT))


def test_the_text_of_a_dict_is_kept() -> None:
    (both,) = llm().generate({"prompt": "words", "prompt_token_ids": [5]}, SHORT)
    assert (both.prompt, both.prompt_token_ids) == ("words", (5,))


WRONG: dict[str, tuple[Any, str]] = {
    "none": (None, r"prompt 0: None \(NoneType\) is no prompt: give a text, a list of token ids"),
    "none among others": (["a", None], r"prompt 1: None \(NoneType\) is no prompt"),
    "number": (5, r"prompt 0: 5 \(int\) is no prompt"),
    "half": (1.5, r"prompt 0: 1.5 \(float\) is no prompt"),
    "halves": ([1.5, 2.0], r"prompt 0: 1.5 \(float\) is no prompt"),
    "a half among ids": ([3, 2.0], r"prompt 0: token 1 is 2.0 \(float\), and token ids are whole numbers"),
    "bools": ([True, False], r"prompt 0: True \(bool\) is no prompt"),
    "a bool among ids": ([3, True], r"prompt 0: token 1 is True \(bool\)"),
    "bytes": (b"hello", r"prompt 0: b'hello' \(bytes\) is no prompt: decode it to a text first"),
    "set": ({3, 4}, r"prompt 0: \{3, 4\} \(set\) is no prompt"),
    "nested": ([[[3]]], r"prompt 0: token 0 is \[3\] \(list\)"),
    "texts in texts": (["a", ["b"]], r"prompt 1: token 0 is 'b' \(str\)"),
    "array of halves": (np.array([1.0, 2.0]), r"prompt 0: 1.0 \(float\) is no prompt"),
    "tensor of halves": (torch.tensor([[1.0]]), r"prompt 0: token 0 is 1.0 \(float\)"),
    "cube": (np.zeros((1, 1, 2), int), r"prompt 0: token 0 is \[0, 0\] \(list\)"),
    "empty array": (np.array([], int), "there is no prompt"),
    "empty dict": ({}, r"prompt 0: a dict with the keys \[\] is no prompt"),
    "other dict": ({"text": "a"}, "prompt 0: a text model cannot read 'text' in a prompt"),
    "picture": ({"prompt": "a", "multi_modal_data": {"image": 1}}, "cannot read 'multi_modal_data'"),
    "ids as prompt": ({"prompt": [3]}, "'prompt' is \\[3\\] and no text: give .* as 'prompt_token_ids'"),
    "text as ids": ({"prompt_token_ids": "a"}, "'prompt_token_ids' is 'a': give a list of token ids"),
    "half as id": ([{"prompt": "a"}, {"prompt_token_ids": [0.5]}], "prompt 1: token 0 is 0.5"),
    "no ids": ({"input_ids": []}, "'input_ids' is empty"),
    "mixed rows": ({"input_ids": [[3], 4]}, "'input_ids' mixes numbers and lists"),
    "pixels": ({"input_ids": [3], "pixel_values": 1}, "cannot read 'pixel_values' in a tokenizer's output"),
    "mask": ({"input_ids": [3, 4], "attention_mask": [1]}, "attention_mask has another shape than input_ids"),
    "all masked": ({"input_ids": [3, 4], "attention_mask": [0, 0]}, "prompt 0: the prompt is empty"),
    "half in a row": ({"input_ids": [[3], [0.5]]}, "prompt 1: token 0 is 0.5"),
    "two in one": (["a", {"input_ids": [[3], [4]]}], "prompt 1: its input_ids hold 2 prompts"),
    "half a character": ("a\ud800", r"prompt 0: a text prompt holds half a character at place 1 \('\\ud800'\)"),
    "huge": ([10**5000], "prompt 0: token id <int> is outside the vocabulary of 300"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_prompt_is_named(name: str) -> None:
    prompt, words = WRONG[name]
    with pytest.raises(RequestError, match=words):
        llm().generate(prompt, SHORT)


def test_what_is_no_prompt_takes_the_place_of_its_answer() -> None:
    answers = llm().generate([A, None, {"prompt": B}], SHORT, return_errors=True)  # type: ignore[arg-type]
    assert [one.error is None for one in answers] == [True, False, True]
    assert said([answers[0], answers[2]]) == said(llm().generate([A, B], SHORT))
    assert (answers[1].prompt, answers[1].prompt_token_ids) == (None, ())


@pytest.mark.parametrize("params", [{"temperature": 1}, "greedy", 3, [SHORT, {"n": 1}]], ids=str)
def test_what_is_no_params(params: Any) -> None:
    with pytest.raises(RequestError, match=r"sampling_params=.*: give SamplingParams\(...\)"):
        llm().generate([A, B], params if isinstance(params, list) else [params] * 2)
    if not isinstance(params, list):
        with pytest.raises(RequestError, match=r"give SamplingParams\(...\)"):
            llm().stream(A, params)


def test_one_bos() -> None:
    tokens = deepcopy(tokenizer())
    tokens.bos_token = "<end>"
    tokens.backend_tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", END)])
    own = LLM(model(), tokenizer=tokens, drafter="none", clock=Ticking(0.001))
    plain = ids("the dog")
    assert tokens("<end>the dog")["input_ids"] == [END, END, *plain], "this tokenizer doubles it"
    assert own.encode("the dog") == own.encode("<end>the dog") == [END, *plain]
    assert own.encode("the <end>dog").count(END) == 2
    assert llm().encode("<end>the dog") == [END, *plain]


# --- options ----------------------------------------------------------------------------------------------------

SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(({one.name: None}, {}) for one in fields(SamplingParams)),
    ({"bad_words": "the"}, {"bad_words": ("the",)}),
    ({"stop": ["a", np.str_("b")]}, {"stop": ("a", "b")}),
    ({"stop_token_ids": 2}, {"stop_token_ids": (2,)}),
    ({"stop_token_ids": np.array([2, 3])}, {"stop_token_ids": (2, 3)}),
    ({"stop_token_ids": torch.tensor(2)}, {"stop_token_ids": (2,)}),
    ({"allowed_token_ids": range(3)}, {"allowed_token_ids": (0, 1, 2)}),
    ({"bad_words_ids": np.array([[2, 3]])}, {"bad_words_ids": ((2, 3),)}),
    ({"logit_bias": {"5": -100, np.int64(6): np.float32(0.5)}}, {"logit_bias": {5: -100, 6: 0.5}}),
    ({"temperature": np.float32(0.5), "top_k": np.int64(4)}, {"temperature": 0.5, "top_k": 4}),
    ({"seed": torch.tensor(7), "n": np.uint8(2)}, {"seed": 7, "n": 2}),
    ({"ignore_eos": np.True_}, {"ignore_eos": True}),
    ({"prediction": [3, 4]}, {"prediction": (3, 4)}),
    ({"logits_processors": max}, {"logits_processors": (max,)}),
    ({"stopping_criteria": [any]}, {"stopping_criteria": (any,)}),
]


@pytest.mark.parametrize(("given", "meant"), SAME, ids=str)
def test_options_mean_what_a_person_means(given: dict[str, Any], meant: dict[str, Any]) -> None:
    assert SamplingParams(**given) == SamplingParams(**meant)


MISTAKES: list[tuple[str, Any, str]] = [
    *(
        (name, value, f"{name}=")
        for name in ("temperature", "top_p", "min_p")
        for value in ("0.5", True, [1], 10**5000)
    ),
    *((name, "1", f"{name}='1' is not a number") for name in ("top_k", "max_tokens", "n", "seed", "logprobs")),
    *((name, True, f"{name}=True is not a number") for name in ("top_k", "max_tokens", "n", "seed", "logprobs")),
    ("max_tokens", 10**5000, "max_tokens=<int> is out of range"),
    ("max_tokens", np.float64(4), "is not a whole number"),
    ("ignore_eos", "false", "ignore_eos='false' is neither True nor False"),
    ("skip_special_tokens", 1, "skip_special_tokens=1 is neither True nor False"),
    ("stop", 5, "stop=5: give a text or a list of texts"),
    ("stop", b"a", "stop=b'a': give a text"),
    ("stop", {"a": 1}, "stop={'a': 1}: give a text"),
    ("stop", ["a", 5], "stop holds 5, which is no text"),
    ("bad_words", [["a"]], r"bad_words holds \['a'\], which is no text"),
    ("bad_words", "", "bad_words holds an empty word"),
    ("stop_token_ids", "2", "stop_token_ids='2': give token ids"),
    ("stop_token_ids", [2.0], r"stop_token_ids\[0\]=2.0 is not a whole number"),
    ("stop_token_ids", True, r"stop_token_ids\[0\]=True is not a number"),
    ("allowed_token_ids", ["a"], r"allowed_token_ids\[0\]='a' is not a number"),
    ("bad_words_ids", [5, 6], r"bad_words_ids holds the number 5: give a list of token ids for each word"),
    ("bad_words_ids", "ab", "bad_words_ids='ab': give a list with a list of token ids"),
    ("bad_words_ids", ["ab"], r"bad_words_ids\[0\]='ab': give token ids"),
    ("logit_bias", [(5, 1.0)], "logit_bias=.* give a dict"),
    ("logit_bias", {"the": 1.0}, "logit_bias holds 'the', which is no token id"),
    ("logit_bias", {1.0: 1.0}, "logit_bias holds 1.0, which is no token id"),
    ("logit_bias", {"5": 1.0, 5: 2.0}, "logit_bias holds token id 5 twice"),
    ("logit_bias", {5: "1"}, r"logit_bias\[5\]='1' is not a number"),
    ("logit_bias", {5: float("inf")}, r"logit_bias\[5\]=inf is out of range: give a finite number, or -inf to ban it"),
    ("max_tokens", 2**40, "max_tokens=1099511627776 is out of range: it must be at least 1, at most 2147483648"),
    ("temperature", 10**400, "temperature=100.* is out of range: it must be finite, at least 0.0"),
    ("max_tokens", 0, "max_tokens=0 is out of range: it must be at least 1$"),
    ("temperature", float("inf"), "temperature=inf is out of range: it must be finite, at least 0.0"),
    ("presence_penalty", float("-inf"), "presence_penalty=-inf is out of range: it must be finite"),
    ("top_k", -2, "top_k=-2 is out of range: it must be at least 0"),
    ("logit_bias", {5: float("nan")}, r"logit_bias\[5\]=nan is not a number"),
    ("prediction", 0.5, "prediction=0.5: give token ids"),
    ("logits_processors", "upper", "logits_processors='upper': give a function"),
    ("stopping_criteria", [5], "stopping_criteria holds 5, which cannot be called"),
]


@pytest.mark.parametrize(("name", "value", "words"), MISTAKES, ids=[f"{i} {one[0]}" for i, one in enumerate(MISTAKES)])
def test_a_wrong_option_is_named(name: str, value: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        SamplingParams(**{name: value})


def test_a_top_k_of_minus_one_keeps_all() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"speculative_config": "auto"}, "speculative_config='auto': give a dict of options, such as"),
        ({"speculative_config": 5}, "speculative_config=5: give a dict"),
        ({"speculative_config": []}, r"speculative_config=\[\]: give a dict"),
        ({"speculative_config": {5: 4}}, r"speculative_config=\{5: 4\}: give a dict"),
        ({"drafter": 5}, "drafter=5 is no text: give a name, such as 'auto'"),
        ({"speculative_config": {"method": "auto", "skip_set": ""}}, "skip_set"),
        ({"speculative_config": {"method": "auto", "memory": -1}}, "memory=-1 is out of range: it must be at least 0"),
        ({"speculative_config": {"method": "auto", "bits": 5}}, "bits=5: weights are rounded to 4 or 8 bits"),
        ({"speculative_config": {"method": "auto", "task_profile": ""}}, "task_profile='' names no file"),
        ({"speculative_config": {"method": "auto", "task_profile": "a\0b"}}, "names no file"),
    ],
)
def test_a_wrong_drafter_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        llm().use(**given)


def test_options_of_a_drafter_may_be_numbers_of_numpy() -> None:
    one = llm()
    before, was = one.drafter_name, one.drafter_options
    one.use("auto", {"bits": np.int64(4), "num_speculative_tokens": np.int64(7)})
    assert one.generate(A, SHORT)[0].outputs[0].token_ids
    one.use(before, was)


@pytest.mark.parametrize("given", [(5, "x"), ("", "x"), ("z.json", 5)])
def test_a_profile_goes_to_a_path_under_a_name(given: tuple[Any, Any]) -> None:
    with pytest.raises(OptionError, match="give a path to write to, and a name as a text"):
        llm().save_task_profile(*given)


def test_no_model_is_named() -> None:
    with pytest.raises(OptionError, match="model='' names none: give a folder"):
        LLM("")


def test_a_dtype_of_torch_is_taken() -> None:
    assert LLM("pocket", dtype=torch.float32, drafter="none").target.facts.dtype == torch.float32


def test_every_option_is_read() -> None:
    assert {*_READERS} == {one.name for one in fields(SamplingParams)}


def test_a_bias_of_minus_infinity_is_a_ban() -> None:
    first = llm().generate(A, SHORT)[0].outputs[0].token_ids[0]
    others = [token for token in range(300) if token != first]
    banned = llm().generate(A, replace(SHORT, logit_bias={first: float("-inf")}))
    assert said(banned) == said(llm().generate(A, replace(SHORT, allowed_token_ids=others)))  # type: ignore[arg-type]
    assert first not in banned[0].outputs[0].token_ids


@pytest.mark.parametrize("word", ["\n", " "])
def test_whitespace_is_banned_as_it_is(word: str) -> None:
    (token,) = ids(word)
    params = replace(SHORT, logit_bias={token: 2000.0})
    assert set(llm().generate(A, params)[0].outputs[0].token_ids) == {token}, "it comes when it is not banned"
    assert token not in llm().generate(A, replace(params, bad_words=word))[0].outputs[0].token_ids  # type: ignore[arg-type]


def test_a_bad_word_is_banned_in_every_spelling_and_its_letters_are_not() -> None:
    (sequence,) = llm().requests(A, replace(SHORT, bad_words="the "))  # type: ignore[arg-type]
    assert {*sequence.sampling.bad_words_ids} == {tuple(ids(form)) for form in ("the ", "the", " the")}
    (sequence,) = llm().requests(A, replace(SHORT, bad_words=["\n"]))  # type: ignore[arg-type]
    assert sequence.sampling.bad_words_ids == (tuple(ids("\n")),)


def test_whitespace_is_banned_inside_a_text() -> None:
    """Llama's tokenizers put a mark before a text, which stands there and nowhere else."""

    def encode(text: str) -> list[int]:
        return [1, *map(ord, text)]

    assert bad_word_ids(["\n"], encode) == [(1, 10), (10,)]
    with pytest.raises(RequestError, match="has no token for 'x'; leave it out"):
        bad_word_ids(["x"], lambda _: [])


# --- stops and special tokens -----------------------------------------------------------------------------------


def ending(**options: Any) -> SamplingParams:
    """A text that would say <end> as its fourth token, and after it forever."""

    def rises(path: Any, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(0, torch.tensor([END]), 1000.0 if len(path) >= len(ids(A)) + 3 else -1000.0)

    return SamplingParams(max_tokens=8, ignore_eos=True, logits_processors=(rises,), **options)


@pytest.mark.parametrize("drafter", ["none", "lookup"])
def test_a_stop_string_that_is_a_special_token(drafter: str) -> None:
    own = door(drafter)
    whole = own.generate(A, ending())[0].outputs[0]
    assert (whole.token_ids[3:], whole.finish_reason) == ((END,) * 5, "length")
    for stop in ("<end>", ["never", "<end>"]):
        output = own.generate(A, ending(stop=stop))[0].outputs[0]
        assert (output.token_ids, output.text) == (whole.token_ids[:4], whole.text)
        assert (output.finish_reason, output.stop_reason) == ("stop", "<end>")
    kept = own.generate(A, ending(stop="<end>", include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == whole.text + "<end>"
    *_, last = own.stream(A, ending(stop="<end>", include_stop_str_in_output=True))
    assert last.output.text == kept.text


def test_a_stop_string_that_is_the_end_of_sequence_is_named_as_it_was_given() -> None:
    output = llm().generate(A, replace(ending(stop="<end>"), ignore_eos=False))[0].outputs[0]
    assert output.stop_reason == "<end>"
    assert llm().generate(A, replace(ending(), ignore_eos=False))[0].outputs[0].stop_reason == END


def test_a_stop_string_that_is_an_ordinary_token_is_found_in_the_text() -> None:
    (sequence,) = llm().requests(A, replace(SHORT, stop=("the", "<end>")))
    assert sequence.stop_tokens == {END: "<end>"}
    assert sequence.stop_ids == {END}


def test_special_tokens_in_the_text() -> None:
    silent, spoken = (llm().generate(A, ending(skip_special_tokens=skip))[0].outputs[0] for skip in (True, False))
    assert silent.token_ids == spoken.token_ids
    assert spoken.text == silent.text + "<end>" * 5
    cut = llm().generate(A, ending(skip_special_tokens=False, stop="<end>"))[0].outputs[0]
    assert (cut.text, cut.stop_reason) == (silent.text, "<end>")


# --- conversations ----------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'critic' %}{{ raise_exception('Only user and bot roles!') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{{ mood }}{% if add_generation_prompt %}[bot]{% endif %}"
)


@cache
def talker() -> LLM:
    tokens = deepcopy(tokenizer())
    tokens.chat_template = TEMPLATE
    return LLM(model(), tokenizer=tokens, drafter="lookup", clock=Ticking(0.001))


USER = {"role": "user", "content": "the dog"}
BOT = {"role": "bot", "content": "ran"}
SILENT = {"add_generation_prompt": False}
RENDERED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "plain": ([USER], {}, "[user]the dog[bot]"),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "dog"}]}],
        {},
        "[user]the\ndog[bot]",
    ),
    "a part that is a text": ([{"role": "user", "content": ["the dog"]}], {}, "[user]the dog[bot]"),
    "tool call": ([USER, {"role": "bot", "content": None, "tool_calls": [{}]}], {}, "[user]the dog[bot][bot]"),
    "tuple": ((USER, BOT), {}, "[user]the dog[bot]ran[bot]"),
    "no prompt": ([USER], SILENT, "[user]the dog"),
    "continued": (
        [USER, BOT],
        {**SILENT, "continue_final_message": True},
        "[user]the dog[bot]ran",
    ),
    "variables": ([USER], {"chat_template_kwargs": {"mood": "!"}}, "[user]the dog![bot]"),
    "template": ([USER], {"chat_template_kwargs": {"chat_template": "x"}}, "x"),
}


@pytest.mark.parametrize("name", RENDERED)
def test_conversations(name: str) -> None:
    messages, options, text = RENDERED[name]
    assert talker().decode(talker().render(messages, **options)) == text
    answer = talker().chat(messages, SHORT, **options)
    assert said([answer]) == said(talker().generate(text, SHORT))
    door_ = AsyncLLM(talker())
    assert said([asyncio.run(door_.chat(messages, SHORT, **options))]) == said([answer])
    door_.close()


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "role": ([{"role": "critic", "content": "a"}], {}, "refuses these messages: Only user and bot roles!"),
    "empty": ([], {}, r"there is no message; give a list of messages: \[\{'role'"),
    "dict": (USER, {}, "is no conversation: give a list of messages"),
    "text": ("the dog", {}, "'the dog' is no conversation"),
    "none": (None, {}, "None is no conversation"),
    "texts": (["the dog"], {}, "message 0 is 'the dog': give {'role'"),
    "two": ([[USER], [USER]], {}, "message 0 is .*: give one conversation at a time"),
    "no role": ([USER, {"content": "a"}], {}, "message 1 has no 'role'"),
    "odd role": ([{"role": 3, "content": "a"}], {}, "message 0 has no 'role' as a text"),
    "no content": ([{"role": "user"}], {}, "message 0 has no 'content'"),
    "odd content": ([{"role": "user", "content": 3}], {}, "message 0: its content is 3; give a text"),
    "picture": ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], {}, "message 0: the part"),
    "part without text": ([{"role": "user", "content": [{"type": "text"}]}], {}, "is no text; a text model takes"),
    "half a character": ([{"role": "user", "content": "\ud800"}], {}, "message 0 holds half a character"),
    "both": ([USER, BOT], {"continue_final_message": True}, "add add_generation_prompt=False"),
    "call": ([USER], {"chat_template_kwargs": {"tokenize": False}}, "holds 'tokenize', which is no variable"),
    "kwargs": ([USER], {"chat_template_kwargs": ["a"]}, r"chat_template_kwargs=\['a'\]: give a dict"),
    "broken": ([USER], {"chat_template_kwargs": {"chat_template": "{% if"}}, "the chat template refuses"),
    "failing": ([USER], {"chat_template_kwargs": {"chat_template": "{{ 1 // 0 }}"}}, "failed .*ZeroDivisionError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_conversation_that_is_refused(name: str) -> None:
    messages, options, words = REFUSED[name]
    with pytest.raises(RequestError, match=words):
        talker().chat(messages, SHORT, **options)


# --- defaults of a checkpoint -----------------------------------------------------------------------------------


def configured(**options: Any) -> Any:
    """The model with a generation config of its own."""
    own = deepcopy(model())
    for name, value in options.items():
        setattr(own.generation_config, name, value)
    return own


def test_defaults_of_the_checkpoint() -> None:
    own = configured(temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.3)
    taken = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.3)
    make = partial(LLM, own, tokenizer=tokenizer(), drafter="none", clock=Ticking(0.001))
    assert make().default_sampling_params() == SamplingParams()
    auto = make(generation_config="auto")
    assert auto.default_sampling_params() == taken
    sequence = auto.stream_request(A)
    assert replace(sequence.sampling, n=1) == taken
    job = auto.job([A, B], [None, SHORT])  # type: ignore[list-item]
    assert [one.sampling for one in job.sequences] == [taken, SHORT]
    assert auto.job(A).sequences[0].sampling == taken


def test_defaults_of_a_folder(tmp_path: Path) -> None:
    make = partial(LLM, model(), tokenizer=tokenizer(), drafter="none", clock=Ticking(0.001))
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "min_p": 0.1, "max_length": 9}))
    assert make(generation_config=tmp_path).default_sampling_params() == SamplingParams(temperature=1.0, min_p=0.1)
    for text, words in (
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ('{"top_p": 7}', "the generation config cannot be used: top_p=7 is out of range"),
    ):
        file.write_text(text)
        with pytest.raises(OptionError, match=words):
            make(generation_config=str(tmp_path))
    for wrong in (tmp_path / "nowhere", "automatic"):
        with pytest.raises(OptionError, match="cannot be read; give 'none', 'auto' or a folder"):
            make(generation_config=wrong)
    with pytest.raises(OptionError, match="generation_config=None: give 'none'"):
        make(generation_config=None)  # type: ignore[arg-type]


# --- the command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    model().save_pretrained(path)
    tokenizer = talker().tokenizer
    assert tokenizer is not None
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return partial(typed, monkeypatch, capsys)


def piped(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))


def test_a_prompt_from_standard_input_or_a_file(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--model", folder, "--max-new-tokens", 4, "--json")
    cases = {"añb 🐕": "añb 🐕", "the dog\n": "the dog", "a\n\n": "a\n", "a\r\n": "a", "\ufeffa": "a"}
    for text, wanted in cases.items():
        (tmp_path / "prompt.txt").write_bytes(text.encode())
        for arguments in (("-",), ("--prompt-file", "-"), ("--prompt-file", tmp_path / "prompt.txt")):
            piped(monkeypatch, text.encode())
            (result,) = run("generate", *arguments, *options).said["results"]
            assert result["prompt"] == wanted


def test_a_prompt_that_cannot_be_read(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, b"a\xff")
    one_line(run("generate", "-"), "standard input is not UTF-8 text: invalid start byte at byte 1")
    piped(monkeypatch, b"\n")
    one_line(run("generate", "-"), "standard input is empty")
    monkeypatch.setattr(sys, "stdin", None)
    one_line(run("generate", "-"), "standard input is empty")
    one_line(run("generate", "--prompt-file", tmp_path / "no"), "no' cannot be read: No such file or directory")
    one_line(run("generate", "hi", "--prompt-file", tmp_path / "no"), "more than one prompt is given")


def test_a_system_message(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--model", folder, "--max-new-tokens", 4, "--dtype", "float64")
    own = LLM(model(), tokenizer=talker().tokenizer, drafter="none", clock=Ticking(0.001))
    wanted = own.generate("[system]def return a, b[user]the dog[bot]", SamplingParams(max_tokens=4))[0].outputs[0].text
    assert wanted != own.generate("[user]the dog[bot]", SamplingParams(max_tokens=4))[0].outputs[0].text
    assert run("generate", "the dog", "--system", "def return a, b", *options).out == wanted + "\n"
    piped(monkeypatch, b"the dog\n\n")
    assert run("chat", "--system", "def return a, b", *options).out == f"> {wanted}\n> "


def test_output_that_is_not_utf_8(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()

    def show(*arguments: object) -> str:
        raw.seek(0)
        raw.truncate()
        stream = io.TextIOWrapper(raw, "ascii", write_through=True)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "argv", ["selfdraft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return raw.getvalue().decode("ascii")

    options = ("--model", folder, "--max-new-tokens", 40, "--temperature", 2, "--seed", 1)
    text = llm().generate("🐕", SamplingParams(max_tokens=40, temperature=2, seed=1))[0].outputs[0].text
    assert not text.isascii()
    assert show("generate", "🐕", *options, "--dtype", "float64").rstrip("\n") == "".join(
        letter if letter.isascii() else "?" for letter in text
    )
    assert json.loads(show("generate", "🐕", *options, "--json"))["results"][0]["prompt"] == "🐕", "JSON loses nothing"


# --- everything at once -----------------------------------------------------------------------------------------

LETTERS = st.characters() | st.sampled_from("\ud800\n ")
TOKENS = st.integers(0, 299)
PLAIN = st.text(LETTERS, min_size=1, max_size=8).filter(lambda text: "\ud800" not in text) | st.lists(
    TOKENS, min_size=1, max_size=5
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 310),
    st.just(10**400),
    st.floats(),
    st.text(LETTERS, max_size=4),
    st.binary(max_size=3),
    TOKENS.map(np.int32),
    st.floats(width=32).map(np.float32),
    TOKENS.map(torch.tensor),
    st.lists(TOKENS, max_size=4).map(np.array),
    st.lists(TOKENS, max_size=4).map(torch.tensor),
    st.just(len),
)
KEYS = st.sampled_from(["prompt", "prompt_token_ids", "input_ids", "attention_mask", "x", "5", 5, None])
JUNK = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=2) | st.tuples(inner, inner),
    max_leaves=5,
)
OPTIONS = st.dictionaries(st.sampled_from([one.name for one in fields(SamplingParams)]), JUNK, max_size=2)


def shapes(plain: str | list[int]) -> Iterator[Any]:
    """All ways to give this one prompt."""
    yield from (plain, [plain], (plain,))
    tokens = llm().encode(plain)
    if isinstance(plain, str):
        yield from ({"prompt": plain}, [{"prompt": plain}], tokenizer()(plain), tokenizer()([plain]))
    yield from ({"prompt_token_ids": tokens}, {"input_ids": tokens}, {"input_ids": [tokens]}, np.array(tokens))
    yield from (torch.tensor(tokens), torch.tensor([tokens]), [torch.tensor(tokens)], [np.int64(t) for t in tokens])


def params_of(options: dict[str, Any]) -> SamplingParams | None:
    try:
        params = SamplingParams(**{"max_tokens": 3, **options})
    except OptionError:
        return None
    return replace(params, max_tokens=2, min_tokens=min(params.min_tokens, 2), n=1, seed=1)


def outcome(prompt: Any, params: SamplingParams) -> Any:
    """The answers, or the kind of error."""
    try:
        return said(llm().generate(prompt, params))
    except SelfdraftError as error:
        return type(error)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(plain=PLAIN, options=OPTIONS)
def test_every_shape_of_a_prompt_is_answered_as_the_plain_one(plain: Any, options: dict[str, Any]) -> None:
    params = params_of(options) or SamplingParams(max_tokens=2)
    wanted = outcome(plain, params)
    for shape in shapes(plain):
        assert outcome(shape, params) == wanted, shape


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(prompt=JUNK, options=OPTIONS)
def test_whatever_is_given_is_answered_or_refused(prompt: Any, options: dict[str, Any]) -> None:
    params = params_of(options) or SamplingParams(max_tokens=2)
    answers = outcome(prompt, params)
    if isinstance(answers, list):
        assert outcome([list(tokens) for tokens, _ in answers], params) == answers


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(messages=JUNK | st.lists(st.dictionaries(st.sampled_from(["role", "content", "type"]), JUNK, max_size=3)))
def test_whatever_is_said_is_answered_or_refused(messages: Any) -> None:
    try:
        tokens = talker().render(messages)
    except SelfdraftError:
        return
    assert talker().decode(tokens).endswith("[bot]")
