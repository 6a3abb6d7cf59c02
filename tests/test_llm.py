"""The front door: what `LLM` takes, says and refuses, with a tiny random model and a tokenizer made here."""

from __future__ import annotations

import copy
import json
from functools import cache
from itertools import pairwise, zip_longest
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfdraft import LLM, SamplingParams, drafters
from selfdraft.errors import OptionError, PromptTooLong, RequestError, SelfdraftError
from selfdraft.llm import RequestOutput
from selfdraft.sampling import bad_word_ids
from tests.clocks import Ticking
from tests.models import VOCAB, random_adapters, tiny_llama

TEXTS = ["the dog ran over the hill and the dog sat", "añb 🐕 ran 你好 the", "def add(a, b): return a"]
WORDS = 300
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[bot]"
GREEDY = SamplingParams(max_tokens=24)
WILD = SamplingParams(max_tokens=24, temperature=1.5)


@cache
def tokenizer(template: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE: most random tokens are halves of characters."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", clean_up_tokenization_spaces=False)
    made.chat_template = TEMPLATE if template else None
    return made


@cache
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).double().eval()


def door(drafter: str = "lookup", **options: Any) -> LLM:
    adapters = random_adapters(model())
    return LLM(model(), tokenizer=tokenizer(), drafter=drafter, adapters=adapters, clock=Ticking(0.001), **options)


@cache
def llm() -> LLM:
    """One for all tests that leave no trace in it."""
    return door()


def ids_of(answers: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.token_ids for answer in answers for output in answer.outputs]


def test_text_and_ids_are_one() -> None:
    (by_text,) = llm().generate(TEXTS[0], GREEDY)
    (by_ids,) = llm().generate(llm().encode(TEXTS[0]), GREEDY)
    assert by_text.prompt == TEXTS[0]
    assert by_ids.prompt is None
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids == tuple(tokenizer()(TEXTS[0])["input_ids"])
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids
    assert by_text.outputs[0].text == llm().decode(by_text.outputs[0].token_ids)
    assert by_text.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("drafter", drafters.NAMES)
def test_every_drafter_says_what_transformers_says(drafter: str) -> None:
    said = ids_of(door(drafter, max_num_seqs=2).generate(TEXTS, GREEDY))
    for text, tokens in zip(TEXTS, said, strict=True):
        ids = torch.tensor([llm().encode(text)])
        wanted = model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert list(tokens) == wanted[0, ids.shape[1] :].tolist()


def test_batch_with_params_of_their_own() -> None:
    params = [SamplingParams(max_tokens=5), SamplingParams(max_tokens=9, temperature=1.0, seed=3), GREEDY]
    together = ids_of(llm().generate(TEXTS, params))
    alone = [ids_of(llm().generate(text, one))[0] for text, one in zip(TEXTS, params, strict=True)]
    assert together == alone
    assert [len(tokens) for tokens in together] == [5, 9, 24]


def test_several_answers() -> None:
    (answer,) = llm().generate(TEXTS[0], SamplingParams(max_tokens=12, temperature=1.5, n=3, seed=5))
    assert [output.index for output in answer.outputs] == [0, 1, 2]
    alone = [
        ids_of(llm().generate(TEXTS[0], SamplingParams(max_tokens=12, temperature=1.5, seed=5 + i))) for i in range(3)
    ]
    assert [output.token_ids for output in answer.outputs] == [said for (said,) in alone]
    assert len(set(ids_of([answer]))) == 3


def test_logprobs_sources_and_stats_belong_to_the_tokens() -> None:
    (answer,) = llm().generate(TEXTS[0], SamplingParams(max_tokens=60, logprobs=3))
    output = answer.outputs[0]
    whole = torch.tensor([[*answer.prompt_token_ids, *output.token_ids]])
    wanted = model()(whole).logits[0, len(answer.prompt_token_ids) - 1 : -1].log_softmax(-1)
    assert len(output.logprobs) == len(output.sources) == len(output.token_ids) == 60
    for i, (token, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        assert entry.token == token == entry.top[0][0]
        assert entry.logprob == pytest.approx(wanted[i, token].item(), abs=1e-6)
        assert [t for t, _ in entry.top] == wanted[i].topk(3).indices.tolist()
    stats = output.stats
    assert {*output.sources} == {"target", "lookup"}
    assert stats.num_accepted_draft_tokens == sum(source != "target" for source in output.sources) > 0
    assert stats.num_output_tokens == 60
    assert stats.num_steps + stats.num_accepted_draft_tokens == 60


def test_counts_of_all_requests_add_up() -> None:
    own = door()
    answers = own.generate(TEXTS, GREEDY)
    list(own.stream(TEXTS[0], GREEDY))
    assert own.stats.num_output_tokens == 24 * 4
    assert own.stats.num_steps > sum(answer.outputs[0].stats.num_steps for answer in answers)


@pytest.mark.parametrize("sampling", [GREEDY, WILD], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafter", drafters.NAMES)
def test_a_stream_adds_up(drafter: str, sampling: SamplingParams) -> None:
    own = door(drafter)
    for seed, text in enumerate(TEXTS):
        params = SamplingParams(max_tokens=48, temperature=sampling.temperature, seed=seed)
        pieces = list(own.stream(text, params))
        (whole,) = own.generate(text, params)
        output = whole.outputs[0]
        last = pieces[-1].output
        assert (last.text, last.token_ids, last.finish_reason) == (output.text, output.token_ids, output.finish_reason)
        assert "".join(piece.text for piece in pieces) == last.text == own.decode(last.token_ids)
        assert tuple(token for piece in pieces for token in piece.token_ids) == last.token_ids
        assert tuple(source for piece in pieces for source in piece.sources) == last.sources
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert all(a.output.stats.num_steps < b.output.stats.num_steps for a, b in pairwise(pieces))


def test_a_stream_never_breaks_a_character() -> None:
    """The text so far is at every step a beginning of the final text, though tokens are single bytes."""
    spelled = [token for sign in "a🐕你é👩‍🚀b" * 2 for token in tokenizer()(sign)["input_ids"]]

    def spell(path: Any, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -1.0).index_fill(0, torch.tensor(spelled[len(path) - 1]), 1.0)

    params = SamplingParams(max_tokens=len(spelled), logits_processors=(spell,))
    for drafter in drafters.NAMES:
        pieces = list(door(drafter).stream([5], params))
        assert "".join(piece.text for piece in pieces) == "a🐕你é👩‍🚀b" * 2
        assert not any("\ufffd" in piece.text for piece in pieces)


def test_chat() -> None:
    talker = LLM(model(), tokenizer=tokenizer(template=True), drafter="lookup")
    said = talker.chat([{"role": "user", "content": "the dog"}], GREEDY)
    assert talker.decode(said.prompt_token_ids) == "[user]the dog[bot]"
    assert said.outputs[0] == talker.generate("[user]the dog[bot]", GREEDY)[0].outputs[0]


def test_chat_without_a_template() -> None:
    with pytest.raises(RequestError, match="no chat template; give a plain prompt"):
        llm().chat([{"role": "user", "content": "the dog"}])


@pytest.mark.parametrize("drafter", drafters.NAMES)
def test_stop_strings(drafter: str) -> None:
    own = door(drafter)
    whole = own.generate(TEXTS[0], GREEDY)[0].outputs[0].text
    stop = next(whole[i : i + 2] for i in range(4, len(whole)) if "\ufffd" not in whole[i : i + 2])
    output = own.generate(TEXTS[0], SamplingParams(max_tokens=24, stop=(stop,)))[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == (whole[: whole.index(stop)], "stop", stop)
    pieces = list(own.stream(TEXTS[0], SamplingParams(max_tokens=24, stop=(stop,))))
    assert "".join(piece.text for piece in pieces) == output.text


def test_eos_of_the_tokenizer_ends_unless_ignored() -> None:
    end = tokenizer().eos_token_id
    params: dict[str, Any] = {"max_tokens": 8, "logit_bias": {end: 1000.0}}
    first, second = llm().generate(
        [TEXTS[0]] * 2, [SamplingParams(**params), SamplingParams(**params, ignore_eos=True)]
    )
    assert (first.outputs[0].token_ids, first.outputs[0].stop_reason) == ((end,), end)
    assert first.outputs[0].text == ""
    assert second.outputs[0].token_ids == (end,) * 8


def test_bad_words_stay_out() -> None:
    tokens = ids_of(llm().generate(TEXTS[0], GREEDY))[0]
    word, token = next(
        (llm().decode([t]).strip(), t) for t in tokens if tokenizer()(llm().decode([t]).strip())["input_ids"] == [t]
    )
    banned = llm().generate(TEXTS[0], SamplingParams(max_tokens=24, bad_words=(word,)))[0].outputs[0]
    at = tokens.index(token)
    assert banned.token_ids[:at] == tokens[:at]
    assert token not in banned.token_ids


def test_a_bad_word_is_banned_as_it_is_given_at_the_start_and_behind_a_space() -> None:
    def letters(text: str) -> list[int]:
        return [*text.encode()]

    assert bad_word_ids(["no"], letters) == [(*b" no",), (*b"no",)]
    assert bad_word_ids(["no "], letters) == [(*b" no",), (*b"no",), (*b"no ",)]


PROMPTS: dict[str, tuple[Any, type[SelfdraftError], str]] = {
    "no prompt": ([], RequestError, "there is no prompt"),
    "empty text": (["a", ""], RequestError, "prompt 1: the prompt is empty"),
    "empty ids": ([[3], [4], []], RequestError, "prompt 2: the prompt is empty"),
    "too long": (["a", [5] * 256], PromptTooLong, "prompt 1: the prompt has 256 tokens; the context of 256"),
    "too high": ([[3], [WORDS]], RequestError, f"prompt 1: token id {WORDS} is outside the vocabulary of {WORDS}"),
    "negative": ([3, -1], RequestError, "prompt 0: token id -1 is outside"),
    "mixed": (["a", 3], RequestError, "mixes token ids and prompts"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_wrong_prompt_is_named_and_nothing_is_run(name: str) -> None:
    prompts, error, words = PROMPTS[name]
    own = door()
    with pytest.raises(error, match=words):
        own.generate(prompts, GREEDY)
    assert own.stats.num_steps == 0
    assert not own.engine.waiting
    assert not own.engine.running


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {WORDS: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"allowed_token_ids": (1, WORDS)},
        {"bad_words_ids": ((1, WORDS),)},
        {"stop_token_ids": (WORDS,)},
    ],
    ids=str,
)
def test_ids_outside_the_vocabulary(params: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="in the sampling options is outside 300 tokens"):
        llm().generate("a", SamplingParams(**params))


def test_requests_that_do_not_fit_together() -> None:
    with pytest.raises(RequestError, match="2 sampling params for 3 prompts"):
        llm().generate(TEXTS, [GREEDY, GREEDY])
    with pytest.raises(RequestError, match="a stream carries one answer"):
        llm().stream("a", SamplingParams(n=2, temperature=1.0))
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm().stream("")


@pytest.mark.parametrize("params", [SamplingParams(stop=("x",)), SamplingParams(bad_words=("x",))], ids=["stop", "bad"])
def test_without_a_tokenizer(params: SamplingParams) -> None:
    bare = LLM(model(), clock=Ticking(0.001))
    output = bare.generate([3, 4, 5], GREEDY)[0].outputs[0]
    assert (output.text, output.token_ids) == ("", ids_of(llm().generate([3, 4, 5], GREEDY))[0])
    with pytest.raises(RequestError, match=r"need.* a tokenizer"):
        bare.generate([3, 4, 5], params)
    with pytest.raises(RequestError, match="a text prompt needs a tokenizer"):
        bare.generate("a", GREEDY)


def test_unseeded_sampling_differs_and_seeded_repeats() -> None:
    fresh = ids_of(llm().generate([TEXTS[0]] * 4, WILD))
    assert len(set(fresh)) == 4
    params = SamplingParams(max_tokens=24, temperature=1.5, seed=11)
    alone = ids_of(llm().generate(TEXTS[0], params))
    assert set(ids_of(llm().generate([TEXTS[0]] * 3, params))) == set(alone)
    assert ids_of(door("suffix").generate(TEXTS[0], params)) == alone


def test_use_and_engine_for() -> None:
    own = door("none")
    plain = ids_of(own.generate(TEXTS, GREEDY))
    other = own.engine_for("suffix")
    assert (own.drafter_name, own.engine.drafter is not other.drafter) == ("none", True)
    for name in drafters.NAMES:
        own.use(name)
        assert own.drafter_name == name
        assert ids_of(own.generate(TEXTS, GREEDY)) == plain
    own.use(speculative_config={"method": "ngram", "num_speculative_tokens": 2})
    assert ids_of(own.generate(TEXTS, GREEDY)) == plain
    kept = own.engine
    with pytest.raises(OptionError, match="did you mean"):
        own.use("lokup")
    assert (own.engine, own.drafter_name) == (kept, "ngram")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drafter": "lookup", "speculative_config": {"method": "suffix"}}, "disagree"),
        ({"speculative_config": {"num_speculative_tokens": 3}}, 'num_speculative_tokens but no "method"'),
        ({"speculative_config": {"method": 3}}, "is not a name"),
        ({"drafter": "lookup", "speculative_config": {"exit_layer": 1}}, "belongs to layer_skip"),
        ({"max_model_len": 257}, "1 to 256 positions"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 is out of range"),
        ({"prefill_chunk": 0}, "prefill_chunk=0 is out of range"),
        ({"max_model_len": 0}, "1 to 256 positions"),
        ({"exactness": "very"}, "exactness='very'"),
        ({"dtype": "int3"}, "dtype 'int3' is unknown"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        LLM(model(), tokenizer=tokenizer(), **options)


def test_two_in_one_process() -> None:
    other = LLM(tiny_llama(), drafter="lookahead", clock=Ticking(0.001))
    mine = door("layer_skip")
    wanted = [ids_of(mine.generate(TEXTS[0], GREEDY)), ids_of(other.generate([3, 4, 5], GREEDY))]
    streams = (mine.stream(TEXTS[0], GREEDY), other.stream([3, 4, 5], GREEDY))
    said: list[list[int]] = [[], []]
    for pieces in zip_longest(*streams):
        for tokens, piece in zip(said, pieces, strict=True):
            tokens += piece.token_ids if piece else ()
    assert [[tuple(tokens)] for tokens in said] == wanted
    assert max(said[1]) < VOCAB


@pytest.mark.parametrize("drafter", drafters.NAMES)
def test_closing_a_stream_frees_the_slot(drafter: str) -> None:
    own = door(drafter, max_num_seqs=1)
    wanted = ids_of(own.generate(TEXTS[1], GREEDY))
    for _ in range(3):
        stream = own.stream(TEXTS[0], GREEDY)
        piece = next(stream)
        assert len(own.engine.running) == 1
        stream.close()  # type: ignore[attr-defined]
        assert not own.engine.running
        assert piece.output.finish_reason is None
    assert ids_of(own.generate(TEXTS[1], GREEDY)) == wanted


@pytest.mark.parametrize("drafter", drafters.NAMES)
def test_the_model_is_left_alone(drafter: str) -> None:
    own = copy.deepcopy(model()).train()
    own.lm_head.eval()
    ids = torch.tensor([llm().encode(TEXTS[0])])

    def facts() -> list[object]:
        flags = [module.training for module in own.modules()]
        return [json.dumps(own.config.to_dict(), default=str), own.config._attn_implementation, flags]

    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    weights = {name: (value.data_ptr(), value.clone()) for name, value in own.state_dict().items()}
    before, said = facts(), own.generate(ids, **options)
    adapters = random_adapters(model())
    mine = LLM(own, tokenizer=tokenizer(), drafter=drafter, adapters=adapters, clock=Ticking(0.001))
    mine.generate(TEXTS, GREEDY)
    assert facts() == before
    assert torch.equal(own.generate(ids, **options), said)
    assert own.state_dict().keys() == weights.keys()
    for name, value in own.state_dict().items():
        assert value.data_ptr() == weights[name][0]
        assert torch.equal(value, weights[name][1])


def test_max_model_len() -> None:
    short = door(max_model_len=40)
    output = short.generate([5] * 30, SamplingParams(max_tokens=100))[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (10, "length")
    assert output.token_ids == ids_of(llm().generate([5] * 30, SamplingParams(max_tokens=10)))[0]
    assert len(short.generate([5] * 39, GREEDY)[0].outputs[0].token_ids) == 1
    with pytest.raises(PromptTooLong, match="40 tokens; the context of 40 leaves room for 39"):
        short.generate([5] * 40, GREEDY)
